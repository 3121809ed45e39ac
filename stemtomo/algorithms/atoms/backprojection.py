"""A quick density from images of any tilts: back-projection behind a filter that undoes its own blur.

The filter of image k at frequency q in its plane is 1 / sum_j exp(-pi (D q.n_j)²), n_j the beams of all tilts and D the
extent of the object: how many images measured that frequency (exact weighting after Harauz and van Heel, Optik 73, 146
(1986), with a Gaussian in place of the sinc). It needs no tilt axis, so that it serves any geometry.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import scipy.fft

from stemtomo.backend import Array, to_host
from stemtomo.physics.projection import TiltGeometry, backproject


def weights(rotations: np.ndarray, shape_yx: tuple[int, int], pixel_angstrom: float, extent_angstrom: float) -> Array:
    """Return the filter of every tilt, (tilt, ky, kx) with kx half as in a real FFT; at most 1."""
    ky = scipy.fft.fftfreq(shape_yx[0], pixel_angstrom)
    kx = scipy.fft.rfftfreq(shape_yx[1], pixel_angstrom)
    beams = rotations[:, :, 2]
    # q.n_j of image k is (kx, ky) times these.
    across = np.einsum("kia,ji->kja", rotations[:, :, :2], beams) * extent_angstrom
    filters = np.empty((len(rotations), len(ky), len(kx)), np.float32)
    for own, filter_ in zip(across, filters, strict=True):
        seen = np.zeros(filter_.shape, np.float32)
        for along_x, along_y in own.astype(np.float32):
            seen += np.exp(-np.float32(np.pi) * np.square(along_x * kx + along_y * ky[:, None], dtype=np.float32))
        filter_[:] = 1 / np.maximum(seen, 1)
    return filters


def sampled(image: Array, every: int) -> tuple[np.ndarray, tuple[float, float]]:
    """Return every ``every``-th pixel of ``image`` (y, x), its centre among them, and its lag in x and y.

    The lag is what the centre index n // 2 of the samples is short of the centre, in samples.
    """
    rows, columns = image.shape
    small = to_host(image)[(rows // 2) % every :: every, (columns // 2) % every :: every]
    return small, (columns // 2 // every - small.shape[1] // 2, rows // 2 // every - small.shape[0] // 2)


def density(
    images: Iterable[np.ndarray],
    geometry: TiltGeometry,
    pixel_angstrom: float,
    blur_angstrom: float,
    extent_angstrom: float,
    support: Array | None = None,
) -> Array:
    """Return the density (z, y, x) per Å³ that images (y, x) per Å² are projections of, blurred.

    Parameters
    ----------
    images
        One for each tilt of ``geometry``, whose voxels and pixels are ``pixel_angstrom`` wide.
    blur_angstrom
        Standard deviation of the Gaussian that the density is blurred by, which keeps noise down.
    extent_angstrom
        Largest diameter of the object.
    """
    shape = geometry.image_shape
    # Room for the filter's tails, which would otherwise enter at the other side.
    padded = tuple(scipy.fft.next_fast_len(int(1.5 * count), real=True) for count in shape)
    ky = scipy.fft.fftfreq(padded[0], pixel_angstrom)[:, None]
    kx = scipy.fft.rfftfreq(padded[1], pixel_angstrom)
    transfer = np.exp(-2 * np.pi**2 * blur_angstrom**2 * (kx**2 + ky**2)).astype(np.float32)
    filters = weights(geometry.rotations, (padded[0], padded[1]), pixel_angstrom, extent_angstrom)
    stack = np.empty((len(geometry), *shape), np.float32)
    for image, filter_, filtered in zip(images, filters, stack, strict=True):
        spectrum = scipy.fft.rfft2(image.astype(np.float32), s=padded) * (filter_ * transfer)
        filtered[:] = scipy.fft.irfft2(spectrum, s=padded)[: shape[0], : shape[1]]
    values = backproject(geometry, stack, geometry.whole_image, geometry.whole_volume, support)
    return values / np.float32(extent_angstrom)
