"""Finer samples and narrower atoms: band-limited up-sampling, and deconvolution by an atom's width.

Both are convolutions with short kernels, so that a piece of a volume with a margin gives what the whole gives there.
"""

from __future__ import annotations

import numpy as np
import scipy.fft
from scipy import ndimage
from scipy.signal import oaconvolve

#: Half of the interpolating kernel in voxels, and the shape of its Kaiser window.
_SINC_REACH, _KAISER = 8, 6.0
#: Half of the deconvolving kernel, in widths of an atom and voxels more.
_WIENER_WIDTHS, _WIENER_VOXELS = 6.0, 3


def upsampling_reach(factor: int) -> int:
    """Return how far, in voxels, :func:`upsampled` looks."""
    return _SINC_REACH if factor > 1 else 0


def deconvolution_reach(width_voxels: float) -> int:
    """Return how far, in voxels, :func:`deconvolved` looks."""
    return int(np.ceil(_WIENER_WIDTHS * width_voxels)) + _WIENER_VOXELS if width_voxels > 0 else 0


def upsampled(volume: np.ndarray, factor: int) -> np.ndarray:
    """Return ``volume`` (z, y, x), zero outside, with ``factor`` samples per voxel along each axis.

    Voxel i is sample ``factor`` i; in between, a sinc in a Kaiser window, which keeps frequencies up to about 0.8 of
    the voxels' limit as they are.
    """
    if factor == 1:
        return volume
    taps = np.arange(-_SINC_REACH, _SINC_REACH + 1)
    for axis in range(3):
        shape = list(volume.shape)
        shape[axis] *= factor
        finer = np.empty(shape, np.float32)
        for phase in range(factor):
            offset = taps - phase / factor
            window = np.i0(_KAISER * np.sqrt(np.clip(1 - (offset / (_SINC_REACH + 1)) ** 2, 0, None))) / np.i0(_KAISER)
            kernel = np.sinc(offset) * window
            chosen = [slice(None)] * 3
            chosen[axis] = slice(phase, None, factor)
            finer[tuple(chosen)] = ndimage.correlate1d(volume, kernel / kernel.sum(), axis=axis, mode="constant")
        volume = finer
    return volume


def deconvolved(volume: np.ndarray, width_voxels: float, noise: float) -> np.ndarray:
    """Return ``volume`` (z, y, x), zero outside, with Gaussians of ``width_voxels`` (sigma) made narrow.

    Wiener's filter, G / (G² + ``noise``) with G the Fourier transform of the Gaussian, scaled to leave sums as they
    are, and cut off where its kernel has died away.

    Parameters
    ----------
    noise
        Power of the noise over that of sharp atoms; the smaller, the sharper and the noisier.
    """
    if width_voxels <= 0:
        return volume
    reach = deconvolution_reach(width_voxels)
    count = 2 * reach + 1
    along = np.exp(-2 * (np.pi * width_voxels * scipy.fft.fftfreq(count)) ** 2)
    bell = along[:, None, None] * along[:, None] * along
    kernel = scipy.fft.fftshift(scipy.fft.ifftn(bell / (bell**2 + noise)).real)
    distance = np.sqrt(((np.indices(kernel.shape, dtype=np.float32) - reach) ** 2).sum(axis=0)) / reach
    kernel *= np.where(distance < 1, np.cos(np.pi / 2 * np.clip(2 * distance - 1, 0, 1)) ** 2, 0)
    sharp: np.ndarray = oaconvolve(volume, (kernel / kernel.sum()).astype(np.float32), mode="same")
    return sharp.astype(np.float32, copy=False)
