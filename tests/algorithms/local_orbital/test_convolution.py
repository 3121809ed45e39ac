"""A stack of slices behind kernels: the sum written out with direct convolutions, and its adjoints by dot tests."""

import numpy as np
import pytest
from scipy.signal import convolve2d

from stemtomo.algorithms.local_orbital.convolution import SliceConvolution, padded_shape

SHAPE, WINDOW = (30, 34), (8, 7)
PADDED = padded_shape(SHAPE, WINDOW)

stacks = pytest.mark.parametrize("slices", [1, 4, 5])
precisions = pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-13)])


def _filled(slices, dtype):
    rng = np.random.default_rng(slices)
    work = SliceConvolution(slices, PADDED, np.zeros(1, dtype))
    work.stack[:, : SHAPE[0], : SHAPE[1]] = rng.normal(size=(slices, *SHAPE))
    return work, rng.normal(size=(slices, *WINDOW)).astype(dtype), rng.normal(size=PADDED).astype(dtype)


@stacks
@precisions
def test_an_image_is_the_sum_of_the_slices_behind_their_kernels(slices, dtype, tolerance):
    work, kernels, _ = _filled(slices, dtype)
    image, _ = work.image(work.transfers(kernels))
    rows, columns = (slice(w // 2, w // 2 + n) for w, n in zip(WINDOW, SHAPE, strict=True))
    wanted = sum(
        convolve2d(layer[: SHAPE[0], : SHAPE[1]].astype(float), kernel)[rows, columns]
        for layer, kernel in zip(work.stack, kernels, strict=True)
    )
    np.testing.assert_allclose(image[: SHAPE[0], : SHAPE[1]], wanted, atol=tolerance * np.abs(wanted).max())


@stacks
@precisions
def test_correlation_and_the_kernels_sums_are_adjoints(slices, dtype, tolerance):
    work, kernels, other = _filled(slices, dtype)
    stack = work.stack.copy()
    transfers = work.transfers(kernels)
    image, spectra = work.image(transfers)
    wanted = np.vdot(image.astype(float), other)
    turned = work.turned_spectrum(other)
    by_kernel = work.kernels_adjoint(np.stack([spectrum * turned for spectrum in spectra]), slices, WINDOW)
    scale = float(np.linalg.norm(image) * np.linalg.norm(other))
    assert np.vdot(by_kernel.astype(float), kernels) == pytest.approx(wanted, abs=tolerance * scale)
    work.correlate(transfers, turned)
    assert np.vdot(work.stack.astype(float), stack) == pytest.approx(wanted, abs=tolerance * scale)
