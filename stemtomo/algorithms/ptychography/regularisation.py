"""What is known of an object beforehand, applied after an update."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from stemtomo.backend import Array, array_namespace


def blurred_along_beam(phase: Array, width_slices: float, weights: Sequence[float] | None = None) -> Array:
    """Return ``phase`` (slice, Y, X) behind a Gaussian along the beam of ``width_slices``, its ends repeated.

    Slices closer than the depth of field cannot be told apart by the data; left free they take up noise, and artefacts
    that cancel in the pattern but not in the phase. The blur keeps a phase that all slices share as it is, and its
    rows add to one at the ends too. With ``weights``, the thickness of every slice over their mean, it is the phase per
    thickness that is blurred.
    """
    count = len(phase)
    if count == 1 or width_slices <= 0:
        return phase
    return (blur_matrix(count, width_slices, phase, weights) @ phase.reshape(count, -1)).reshape(phase.shape)


def blur_matrix(count: int, width_slices: float, like: Array, weights: Sequence[float] | None = None) -> Array:
    """Return that blur as a matrix (slice, slice) in the real precision of ``like``; its transpose is the adjoint."""
    xp = array_namespace(like)
    if width_slices <= 0:
        return xp.eye(count, dtype=like.real.dtype)
    if weights is not None:
        return xp.asarray(_unequal(np.asarray(weights, dtype=np.float64), width_slices), dtype=like.real.dtype)
    reach = max(1, math.ceil(4 * width_slices))
    taps = [math.exp(-0.5 * (offset / width_slices) ** 2) for offset in range(-reach, reach + 1)]
    rows = [[0.0] * count for _ in range(count)]
    for slice_index in range(count):
        for offset, tap in zip(range(-reach, reach + 1), taps, strict=True):
            rows[slice_index][min(max(slice_index + offset, 0), count - 1)] += tap / sum(taps)
    return xp.asarray(rows, dtype=like.real.dtype)


def _unequal(weights: np.ndarray, width: float) -> np.ndarray:
    """The same for slices of ``weights`` thickness: neighbours count by distance and thickness, ends go on for ever."""
    count, reach = len(weights), max(1, math.ceil(4 * width))
    beyond = [math.ceil(reach / end) for end in (weights[0], weights[-1])]
    number = np.clip(np.arange(-beyond[0], count + beyond[1]), 0, count - 1)
    thick = weights[number]
    middle = np.cumsum(thick) - thick / 2
    away = middle[beyond[0] : beyond[0] + count, None] - middle
    taps = np.where(np.abs(away) < reach + 1e-6, thick * np.exp(-0.5 * (away / width) ** 2), 0)
    rows = np.zeros((count, count))
    np.add.at(rows.T, number, taps.T / taps.sum(axis=1))
    return weights[:, None] * rows / weights


def depth_blur_angstrom(wavelength: float, semiangle_rad: float) -> float:
    """Return the blur along the beam, in Å, that costs no resolution: half of lambda / alpha², the depth of focus."""
    return 0.5 * wavelength / semiangle_rad**2
