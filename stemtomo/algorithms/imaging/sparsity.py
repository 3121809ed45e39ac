"""The Fourier-sparsity constraint: a crystal lives on few frequencies, noise on all; what is local stays as it is.

A projection onto images with a given sparse spectrum would replace every defect by perfect crystal. So the model here
is a sum: a part with the sparse spectrum, and a part that may be anything, but only where the image visibly deviates
from the first (or was not observed). Both are linear subspaces, and the orthogonal projection onto their sum is exact:
it can be repeated without change, keeps the mean, and leaves every pixel of the second part as it was.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stemtomo.algorithms.imaging.noise_spectrum import NoiseSpectrum
from stemtomo.backend import Array, array_namespace, fft2, fftfreq, ifft2

_TOLERANCE = 1e-12
_MOST_ITERATIONS = 200
#: Rounds of finding what deviates: the first is of a lattice that the defects have pulled at.
_ROUNDS = 3


class Sparse(NamedTuple):
    """Filtered image; the frequencies kept (ky, kx) bool; the pixels protected (y, x) bool."""

    image: Array
    kept: Array
    protected: Array


def crystal_frequencies(
    image: Array, noise: NoiseSpectrum, threshold: float, keep_below: float, radius: float
) -> Array:
    """Return (ky, kx) bool: where ``image`` (y, x) rises above its noise and its ring of frequencies, and around.

    Parameters
    ----------
    noise
        Of the image. Where less than half of a ring rises above it, the median of the ring counts too: it holds what
        is not crystalline. A second call on the filtered image then finds the same peaks.
    threshold
        In medians of |FFT|; pure noise exceeds 4 once in 65 000 frequencies.
    keep_below
        Frequencies up to here, in cycles per pixel, are all kept: shape, background, thickness.
    radius
        Around every peak, in cycles per pixel: its width is one over the size of the crystal.
    """
    xp = array_namespace(image)
    magnitude = xp.abs(fft2(image.astype(np.float64)))
    ky, kx = fftfreq(image.shape[0], 1.0, image)[:, None], fftfreq(image.shape[1], 1.0, image)
    frequency = xp.sqrt(ky**2 + kx**2)
    ring = (frequency * min(image.shape)).astype(np.int64)
    median = xp.sqrt(np.log(2) * noise.power)
    above = magnitude > threshold * median
    counts = xp.bincount(ring.ravel())
    crowded = xp.bincount(ring.ravel(), above.ravel().astype(np.float64)) > 0.5 * counts
    around = xp.where(crowded, 0, _ring_medians(magnitude, ring, counts))[ring]
    # Rounding is not a peak, where there is no noise at all.
    peaks = magnitude > xp.maximum(threshold * xp.maximum(median, around), 1e-12 * magnitude.max())
    return _grown(peaks, radius) | (frequency <= keep_below)


def project_sparse(image: Array, kept: Array, protected: Array | None = None) -> Array:
    """Return the closest image that is a sum of the frequencies ``kept`` and of anything where ``protected``.

    The sparse part is fitted to the pixels that are not protected (conjugate gradients).

    Parameters
    ----------
    image
        (y, x), real.
    kept
        (ky, kx) bool, zero frequency at [0, 0], the same at ±k; with the zero frequency in it, the mean is preserved.
    protected
        (y, x) bool.
    """
    xp = array_namespace(image)
    if protected is None:
        protected = xp.zeros(image.shape, bool)
    return xp.where(protected, image, _fitted(image, kept, protected))


def deviations(residual: Array, noise: NoiseSpectrum, width_px: float, threshold: float) -> Array:
    """Return (y, x) bool: where ``residual`` is more than ``noise``, looked at through a Gaussian of a column's width.

    Parameters
    ----------
    width_px
        Standard deviation of a column of atoms.
    threshold
        In standard deviations of what noise alone gives.
    """
    xp = array_namespace(residual)
    ky, kx = fftfreq(residual.shape[0], 1.0, residual)[:, None], fftfreq(residual.shape[1], 1.0, residual)
    matched = xp.exp(-2 * (np.pi * width_px) ** 2 * (ky**2 + kx**2))
    sigma = float((noise.power * matched**2).mean()) ** 0.5
    seen = xp.abs(ifft2(fft2(residual.astype(np.float64)) * matched).real) > threshold * sigma
    reach = int(np.ceil(2.5 * width_px))
    y, x = xp.arange(-reach, reach + 1)[:, None], xp.arange(-reach, reach + 1)
    return _dilated(seen, (y**2 + x**2) <= reach**2)


def fourier_sparse(
    image: Array,
    noise: NoiseSpectrum,
    *,
    threshold: float,
    keep_below: float,
    radius: float,
    column_width_px: float,
    protect_above: float,
    valid: Array | None = None,
    cleaned: Array | None = None,
) -> Sparse:
    """Return ``image`` with the noise between its crystal frequencies taken off, its local deviations untouched.

    Parameters
    ----------
    image
        (y, x), with its ``noise``; it decides which frequencies are kept and what deviates.
    threshold, keep_below, radius
        See :func:`crystal_frequencies`.
    column_width_px, protect_above
        See :func:`deviations`.
    valid
        (y, x) bool: pixels that were not observed are left as they are.
    cleaned
        The image to filter instead, such as ``image`` after another filter.
    """
    xp = array_namespace(image)
    unseen = xp.zeros(image.shape, bool) if valid is None else ~valid
    kept, protected = crystal_frequencies(image, noise, threshold, keep_below, radius), unseen
    for _ in range(_ROUNDS):
        sparse = _fitted(image, kept, protected)
        found = unseen | deviations(xp.where(unseen, 0, image - sparse), noise, column_width_px, protect_above)
        if bool((found == protected).all()):
            break
        protected = found
    return Sparse(project_sparse(image if cleaned is None else cleaned, kept, protected), kept, protected)


def _fitted(image: Array, kept: Array, protected: Array) -> Array:
    """Return the image of the frequencies ``kept`` alone that fits ``image`` best where it is not ``protected``."""
    image = image.astype(np.float64)
    sparse = ifft2(fft2(image) * kept).real
    free = ~protected
    residual = ifft2(fft2((image - sparse) * free) * kept).real
    direction, energy = residual, float((residual**2).sum())
    enough = _TOLERANCE**2 * float((image**2).sum())
    for _ in range(_MOST_ITERATIONS):
        if energy <= enough:
            break
        response = ifft2(fft2(direction * free) * kept).real
        step = energy / float((direction * response).sum())
        sparse = sparse + step * direction
        residual = residual - step * response
        before, energy = energy, float((residual**2).sum())
        direction = residual + (energy / before) * direction
    return sparse


def _ring_medians(magnitude: Array, ring: Array, counts: Array) -> Array:
    """Return the median of ``magnitude`` for every number in ``ring``, each of which occurs ``counts`` times."""
    xp = array_namespace(magnitude)
    rings, values = ring.ravel(), magnitude.ravel()
    values = values[xp.lexsort(xp.stack([values, rings]))]
    starts = xp.cumsum(counts) - counts
    return values[xp.minimum(starts + counts // 2, values.size - 1)]


def _grown(peaks: Array, radius: float) -> Array:
    """Return ``peaks`` on the periodic grid of frequencies with all within ``radius`` cycles per pixel of one."""
    xp = array_namespace(peaks)
    reach = [int(radius * length) for length in peaks.shape]
    y = xp.arange(-reach[0], reach[0] + 1)[:, None] / peaks.shape[0]
    x = xp.arange(-reach[1], reach[1] + 1) / peaks.shape[1]
    return _dilated(peaks, y**2 + x**2 <= radius**2 * (1 + 1e-9))


def _dilated(mask: Array, element: Array) -> Array:
    """Return ``mask`` dilated by ``element``, odd and centred, on a periodic grid."""
    xp = array_namespace(mask)
    kernel = xp.zeros(mask.shape)
    height, width = (min(have, want) for have, want in zip(element.shape, mask.shape, strict=True))
    kernel[:height, :width] = element[:height, :width]
    kernel = xp.roll(kernel, (-(element.shape[0] // 2), -(element.shape[1] // 2)), axis=(0, 1))
    return xp.fft.ifft2(xp.fft.fft2(mask.astype(np.float64)) * xp.fft.fft2(kernel)).real > 0.5
