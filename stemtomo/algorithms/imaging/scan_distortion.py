"""Drift during a scan and linear distortion of it, from repeated frames or from a known lattice.

A scan that is distorted shows I(s) = f(M s) of a specimen f, s from the centre of the image. A specimen that moves by d
from one frame to the next is, row by row, elsewhere: M = 1 - d (0, 1/rows), a shear along the fast axis and a stretch
along the slow one (the time between frames taken as none). A lattice with the frequency g is seen at M^T g.
Practice of atomic electron tomography: drift from repeated frames, the rest from a lattice.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from stemtomo.errors import CalibrationError

_LEAST_PEAK = 5.0
"""A lattice spot stands at least so many medians of all frequencies high."""


class Drift(NamedTuple):
    """Movement (x, y) in px from one frame to the next, and its scatter between pairs of frames."""

    per_frame_px: np.ndarray
    scatter_px: float


def drift_of(frames: np.ndarray) -> Drift:
    """Return the drift of repeated frames (frame, y, x) of one place, two at least.

    Raises
    ------
    CalibrationError
        If there is one frame alone.
    """
    if len(frames) < 2:
        raise CalibrationError(f"drift needs two frames of one place or more, found {len(frames)}")
    moves = np.array([_shift(before, after) for before, after in itertools.pairwise(frames)])
    typical = np.median(moves, axis=0)
    return Drift(typical, float(np.sqrt(np.mean((moves - typical) ** 2))))


def matrix_of_drift(drift_px: np.ndarray, rows: int) -> np.ndarray:
    """Return M (2, 2), columns x and y, of a frame of ``rows`` rows that drifts by ``drift_px`` (x, y) meanwhile."""
    return np.array([[1.0, -drift_px[0] / rows], [0.0, 1.0 - drift_px[1] / rows]])


def matrix_of_lattice(image: np.ndarray, known: np.ndarray, reach: float = 0.15) -> np.ndarray:
    """Return M (2, 2) from where the spots of a known lattice lie in the transform of ``image`` (y, x).

    Parameters
    ----------
    known
        (n, 2), frequencies x, y in cycles per px that the lattice should have; two directions at least.
    reach
        How far from there a spot is looked for, relative to its frequency.

    Raises
    ------
    CalibrationError
        If a spot is not there, or the spots lie in one direction.
    """
    known = np.asarray(known, dtype=float)
    if known.ndim != 2 or known.shape[1] != 2 or np.linalg.matrix_rank(known, tol=1e-6) < 2:
        raise CalibrationError("a lattice needs two frequencies (x, y) that do not lie in one direction")
    window = np.outer(*(np.hanning(n) for n in image.shape))
    values = (image - image.mean()) * window
    seen = np.array([_spot(values, frequency, reach) for frequency in known])
    # g' = M^T g for every spot; these are rows.
    return np.asarray(np.linalg.lstsq(known, seen, rcond=None)[0])


def corrected(
    image: np.ndarray, valid: np.ndarray, matrix: np.ndarray, offset_px: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the undistorted image (y, x), by cubic splines, and where it is known.

    Parameters
    ----------
    matrix
        M (2, 2), columns x and y.
    offset_px
        (x, y), how far the specimen had moved when the scan was at its centre; none if not given.
    """
    height, width = image.shape
    y, x = np.meshgrid(np.arange(height) - height // 2, np.arange(width) - width // 2, indexing="ij")
    moved = np.stack([x.ravel(), y.ravel()]) + (np.zeros(2) if offset_px is None else np.asarray(offset_px))[:, None]
    sx, sy = np.linalg.solve(matrix, moved)
    at = np.stack([sy + height // 2, sx + width // 2]).reshape(2, height, width)
    filled = np.where(valid, image, image[valid].mean() if valid.any() else 0.0)
    found = ndimage.map_coordinates(filled, at, order=3, mode="nearest")
    outside = ndimage.map_coordinates((~valid).astype(np.float32), at, order=1, mode="constant", cval=1.0)
    known = outside < 0.01
    return np.where(known, found, 0).astype(image.dtype), known


class Average(NamedTuple):
    """Mean (y, x) of repeated frames, where it is known, and the drift that was taken out."""

    image: np.ndarray
    known: np.ndarray
    drift: Drift


def averaged(frames: np.ndarray, valid: np.ndarray) -> Average:
    """Return the mean (y, x) of repeated frames (frame, y, x), each freed of drift, where it is known, and the drift.

    The image is the specimen where it was at the middle of the first frame.
    """
    drift = drift_of(np.where(valid, frames, 0))
    matrix = matrix_of_drift(drift.per_frame_px, frames.shape[1])
    pairs = [
        corrected(frame, mask, matrix, number * drift.per_frame_px)
        for number, (frame, mask) in enumerate(zip(frames, valid, strict=True))
    ]
    weights = np.sum([known for _, known in pairs], axis=0)
    total = np.sum([image for image, _ in pairs], axis=0)
    return Average((total / np.maximum(weights, 1)).astype(frames.dtype), weights > 0, drift)


def _shift(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return by how much (x, y) ``after`` lies beyond ``before``, sub-pixel."""
    window = np.outer(*(np.hanning(n) for n in before.shape))
    a, b = (np.fft.fft2((image - image.mean()) * window) for image in (before, after))
    cross = b * np.conj(a)
    correlation = np.fft.ifft2(cross).real
    peak = np.unravel_index(np.argmax(correlation), correlation.shape)
    start = [_signed(int(index), n) for index, n in zip(peak, before.shape, strict=True)]
    centre = np.array(start, dtype=np.float64)
    for step in (0.1, 0.01):
        offsets = np.arange(-10, 11) * step
        ky, kx = (np.fft.fftfreq(n) for n in before.shape)
        down = np.exp(2j * np.pi * np.outer(centre[0] + offsets, ky))
        across = np.exp(2j * np.pi * np.outer(kx, centre[1] + offsets))
        fine = (down @ cross @ across).real
        row, column = np.unravel_index(np.argmax(fine), fine.shape)
        centre = centre + np.array([offsets[row], offsets[column]])
    return centre[::-1].copy()


def _spot(values: np.ndarray, frequency: np.ndarray, reach: float) -> np.ndarray:
    """Return the frequency (x, y) of the strongest spot near ``frequency``."""
    length = float(np.linalg.norm(frequency))
    y, x = (np.arange(n) for n in values.shape)
    span, centre = max(reach * length, 1.5 / min(values.shape)), frequency.copy()
    for number in range(4):
        offsets = np.linspace(-span, span, 31)
        down = np.exp(-2j * np.pi * np.outer(centre[1] + offsets, y))
        across = np.exp(-2j * np.pi * np.outer(x, centre[0] + offsets))
        amplitude = np.abs(down @ values @ across)
        row, column = np.unravel_index(np.argmax(amplitude), amplitude.shape)
        if number == 0 and amplitude[row, column] < _LEAST_PEAK * np.median(np.abs(np.fft.fft2(values))):
            raise CalibrationError(
                f"no lattice spot stands out near the frequency ({frequency[0]:.4f}, {frequency[1]:.4f}) per px"
            )
        centre += np.array([offsets[column], offsets[row]])
        span /= 8
    return centre


def _signed(index: int, length: int) -> int:
    return index - length if index > length // 2 else index
