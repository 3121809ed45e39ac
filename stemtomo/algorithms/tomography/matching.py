"""Shifts of projections under strong noise, by where they agree with the projections of a volume.

Where the noise is stronger than the specimen, the best place of a single projection on the reprojection of the others
is often a wrong one, a column beside the right one. So every place keeps its probability, and the next volume is made
of projections averaged over their places (expectation maximisation, as Sigworth, J. Struct. Biol. 122, 328 (1998)):
what is not known yet is blurred, and sharpens as the volume does. The probabilities begin
flat (a temperature above one).
"""

from __future__ import annotations

import math

import numpy as np

from stemtomo.backend import Array, array_namespace, to_host

_PER_PX = 4


def offsets_px(reach_px: float) -> np.ndarray:
    """Return the places that are tried along an axis: quarters of a pixel up to ``reach_px`` to both sides."""
    steps = math.floor(reach_px * _PER_PX)
    return np.arange(-steps, steps + 1) / _PER_PX


def noise_level(images: np.ndarray, valid: np.ndarray) -> float:
    """Return the standard deviation of white noise in ``images`` (tilt, y, x), most of them vacuum or smooth."""
    rough = np.diff(images, axis=-1)[valid[..., 1:] & valid[..., :-1]]
    return float(np.median(np.abs(rough))) / (0.6745 * math.sqrt(2)) if rough.size else 0.0


def overlaps(images: Array, references: Array, offsets: np.ndarray) -> Array:
    """Return sum_u image(u) reference(u - s) for offsets s, as (tilt, y offset, x offset).

    Parameters
    ----------
    images, references
        (tilt, y, x), zero where nothing was measured.
    offsets
        In px, along either axis.
    """
    xp = array_namespace(images)
    shape = [2 * n for n in images.shape[1:]]
    spectrum = xp.fft.fft2(images, shape) * xp.conj(xp.fft.fft2(references, shape))
    waves = [xp.exp(2j * math.pi * xp.asarray(np.outer(np.fft.fftfreq(n), offsets))) for n in shape]
    return (waves[0].T[None] @ spectrum @ waves[1][None]).real / math.prod(shape)


def probabilities(overlap: Array, variance: float, temperature: float, offsets: np.ndarray, width_yx: Array) -> Array:
    """Return the probability of every offset, (tilt, y offset, x offset), which add up to one.

    Parameters
    ----------
    overlap
        What :func:`overlaps` says, times the factor between images and references.
    variance
        Of the noise of a pixel.
    temperature
        Divides the logarithm of the probability: above one all is less certain.
    width_yx
        Standard deviations of the offsets before they are measured, px.
    """
    xp = array_namespace(overlap)
    y, x = (xp.asarray(offsets) / width for width in width_yx)
    logarithm = (overlap / variance - (y[:, None] ** 2 + x[None, :] ** 2) / 2) / temperature
    weight = xp.exp(logarithm - logarithm.max(axis=(1, 2), keepdims=True))
    return weight / weight.sum(axis=(1, 2), keepdims=True)


def expected(probability: Array, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of the offsets (tilt, 2), columns x and y."""
    xp = array_namespace(probability)
    along = xp.stack([probability.sum(axis=1), probability.sum(axis=2)], axis=1)
    mean = along @ xp.asarray(offsets)
    square = along @ xp.asarray(offsets**2)
    return to_host(mean), np.sqrt(np.maximum(to_host(square - mean**2), 0))


def averaged(images: Array, probability: Array, offsets: np.ndarray) -> Array:
    """Return ``images`` (tilt, y, x) taken back by their offsets, averaged with the probabilities of these."""
    xp = array_namespace(images)
    height, width = images.shape[1:]
    shape = (2 * height, 2 * width)
    waves = [xp.exp(2j * math.pi * xp.asarray(np.outer(np.fft.fftfreq(n), offsets))) for n in shape]
    transfer = waves[0][None] @ probability @ waves[1].T[None]
    found = xp.fft.ifft2(xp.fft.fft2(images, shape) * transfer).real[:, :height, :width]
    return found.astype(images.dtype)
