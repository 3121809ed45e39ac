"""The FFTs of this package against scipy's, and waves through slices fused with them against the separate kernels."""

import numpy as np
import pytest
import scipy.fft

from stemtomo.backend import aligned_empty
from stemtomo.kernels import fourier, patches, slices

SHAPES = [(16, 16), (20, 20), (48, 100), (30, 27), (64, 64), (108, 108), (120, 80), (96, 128)]


def waves(shape, count=3, seed=0, dtype=np.complex64):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, *shape)) + 1j * rng.normal(size=(count, *shape))).astype(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_transforms_agree_with_scipy(shape):
    wave = waves(shape)
    assert fourier.is_ours(wave)
    transfer = np.exp(1j * waves(shape, 1)[0].real).astype(np.complex64)
    spectrum = scipy.fft.fft2(wave, norm="ortho")
    np.testing.assert_allclose(fourier.fft2(wave), spectrum, atol=3e-6)
    np.testing.assert_allclose(fourier.ifft2(spectrum), wave, atol=3e-6)
    expected = scipy.fft.ifft2(spectrum * transfer, norm="ortho")
    np.testing.assert_allclose(fourier.convolve(wave.copy(), transfer), expected, atol=3e-6)
    np.testing.assert_allclose(fourier.convolve(expected.copy(), transfer, adjoint=True), wave, atol=3e-6)


def test_a_transform_leaves_its_input_alone_unless_told():
    wave = waves((32, 32))
    kept = wave.copy()
    fourier.fft2(wave)
    np.testing.assert_array_equal(wave, kept)
    assert fourier.fft2(wave, overwrite=True) is wave


@pytest.mark.parametrize(
    ("shape", "dtype"), [((32, 32), np.complex128), ((14, 32), np.complex64), ((32, 34), np.complex64)]
)
def test_what_is_not_transformed_here_goes_to_the_fallback(shape, dtype):
    wave = waves(shape, dtype=dtype)
    assert not fourier.is_ours(wave)
    np.testing.assert_allclose(fourier.fft2(wave), scipy.fft.fft2(wave, norm="ortho"), atol=3e-6)


@pytest.mark.parametrize("shape", [(32, 32), (36, 20), (27, 40)])
@pytest.mark.parametrize("wraps", [False, True])
def test_a_wave_through_a_slice_is_what_the_separate_kernels_give(shape, wraps):
    rng = np.random.default_rng(1)
    wave, gradient = waves(shape), waves(shape, seed=2)
    layer = waves((50, 61), 1)[0]
    transfer = np.exp(1j * rng.normal(size=shape)).astype(np.complex64)
    corners = np.array([[0, 0], [3, 7], [5, 60 if wraps else 11]])
    behind = patches.transmit(wave, layer, corners)
    np.testing.assert_allclose(
        slices.transmit_fft2(wave, layer, corners), scipy.fft.fft2(behind, norm="ortho"), atol=2e-5
    )
    expected = fourier.convolve(behind.copy(), transfer)
    np.testing.assert_allclose(slices.transmit_convolve(wave, layer, corners, transfer), expected, atol=2e-5)

    pull, expected_pull = np.zeros_like(layer), np.zeros_like(layer)
    back = gradient.copy()
    patches.transmit_adjoint(back, wave, layer, corners, expected_pull)
    back = fourier.convolve(back, transfer, adjoint=True)
    found = slices.transmit_adjoint_convolve(gradient.copy(), wave, layer, corners, pull, transfer)
    np.testing.assert_allclose(found, back, atol=2e-5)
    np.testing.assert_allclose(pull, expected_pull, atol=2e-5)


def test_aligned_arrays_begin_on_a_cache_line():
    for shape in [(3, 5), (7,), (2, 16, 16)]:
        array = aligned_empty(shape, np.complex64)
        assert array.shape == shape
        assert array.ctypes.data % 64 == 0
