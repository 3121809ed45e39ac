"""The power spectrum of the noise of an image: from vacuum, from two half sets, or white from the finest detail.

Noise of ptychographic phases is coloured: the probe and the patterns decide at which frequencies it is strong. A
spectrum here is (ky, kx), zero frequency at [0, 0], the expected |FFT|² of the noise with the orthonormal FFT, so that
its mean is the variance of a pixel.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stemtomo.backend import Array, array_namespace, fft2, ifft2

_MAD_OF_NORMAL = 0.6745
#: Sizes of the blocks that a periodogram is averaged over, the first that fits often enough.
_BLOCKS = (64, 32, 16)
_FEWEST_BLOCKS = 6


class NoiseSpectrum(NamedTuple):
    """Expected power (ky, kx) of the noise, and how it was found."""

    power: Array
    source: str

    @property
    def sigma(self) -> float:
        """Standard deviation of a pixel."""
        return float(self.power.mean()) ** 0.5


def white_noise(image: Array, valid: Array | None = None) -> NoiseSpectrum:
    """Return white noise of the standard deviation of the finest diagonal detail (Haar), by its median.

    Detail of the specimen at that frequency counts as noise, coloured noise is under- or overestimated: use it where
    there is neither vacuum nor a half set.
    """
    xp = array_namespace(image)
    detail = (image[:-1, :-1] - image[1:, :-1] - image[:-1, 1:] + image[1:, 1:]) / 2
    if valid is not None:
        detail = detail[valid[:-1, :-1] & valid[1:, 1:]]
    sigma = float(xp.median(xp.abs(detail))) / _MAD_OF_NORMAL if detail.size else 0.0
    return NoiseSpectrum(xp.full(image.shape, sigma**2, np.float64), "white, from the finest detail")


def noise_of_region(image: Array, region: Array) -> NoiseSpectrum | None:
    """Return the spectrum of ``image`` in ``region`` (y, x) bool, where only noise is; ``None`` if it is too small.

    Windowed periodograms of blocks that lie in the region are averaged (Welch) and interpolated to the image's grid.
    """
    xp = array_namespace(image)
    level = float(image[region].mean()) if bool(region.any()) else 0.0
    for size in _BLOCKS:
        corners = _blocks_inside(region, size)
        if len(corners) >= _FEWEST_BLOCKS:
            window = xp.hanning(size + 2)[1:-1]
            window = window[:, None] * window
            window /= xp.sqrt((window**2).mean())
            power = xp.zeros((size, size))
            for y, x in corners:
                power += xp.abs(fft2((image[y : y + size, x : x + size] - level) * window)) ** 2
            power = _resampled(power / len(corners), image.shape)
            return NoiseSpectrum(power, f"vacuum, {len(corners)} blocks of {size} px")
    return None


def noise_of_halves(first: Array, second: Array, valid: Array | None = None, smooth_px: int = 7) -> NoiseSpectrum:
    """Return the spectrum of the noise of an image whose half sets gave ``first`` and ``second``, (y, x).

    Their difference has no specimen in it; an image of all data has half the noise amplitude of the difference. Gauges
    (level, ramp) must have been taken off both.

    Parameters
    ----------
    valid
        (y, x) bool, where both were observed.
    smooth_px
        The power is averaged over this many frequencies along each axis.
    """
    xp = array_namespace(first)
    difference = (first - second).astype(np.float64) / 2
    if valid is None:
        share = 1.0
    else:
        difference = xp.where(valid, difference - difference[valid].mean(), 0)
        share = max(float(valid.mean()), 1e-6)
    power = xp.abs(fft2(difference)) ** 2 / share
    kernel = xp.zeros(power.shape)
    reach = [min(smooth_px, length) for length in power.shape]
    kernel[: reach[0], : reach[1]] = 1 / (reach[0] * reach[1])
    kernel = xp.roll(kernel, (-(reach[0] // 2), -(reach[1] // 2)), axis=(0, 1))
    smoothed = ifft2(fft2(power) * xp.fft.fft2(kernel)).real
    return NoiseSpectrum(xp.maximum(smoothed, 0), "half sets")


def _blocks_inside(region: Array, size: int) -> list[tuple[int, int]]:
    """Return the corners of half-overlapping blocks that lie wholly in ``region``."""
    step = size // 2
    return [
        (y, x)
        for y in range(0, region.shape[0] - size + 1, step)
        for x in range(0, region.shape[1] - size + 1, step)
        if bool(region[y : y + size, x : x + size].all())
    ]


def _resampled(power: Array, shape: tuple[int, ...]) -> Array:
    """Interpolate a periodic spectrum linearly to the frequencies of an image of ``shape``."""
    xp = array_namespace(power)
    for axis, length in enumerate(shape):
        count = power.shape[axis]
        place = xp.arange(length) * (count / length)
        below = place.astype(np.int64)
        share = (place - below)[:, None] if axis == 0 else place - below
        low, high = xp.take(power, below % count, axis=axis), xp.take(power, (below + 1) % count, axis=axis)
        power = (1 - share) * low + share * high
    return power
