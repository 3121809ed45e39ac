"""From a reconstructed object to a projected phase: what is observed, and which gauges are taken off.

A constant phase, and a ramp (against a shift of the patterns), leave the data unchanged; vacuum, where there is some,
fixes both: its phase is zero.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import scipy.ndimage

from stemtomo.backend import array_namespace
from stemtomo.errors import CalibrationError

Background = Literal["plane", "level", "none"]

_MAX_ROUNDS = 100
_REJECT_ABOVE = 2.0
#: Vacuum is where means over boxes of this many pixels stay within this part of the scatter.
_VACUUM_BOX_PX = 9
_VACUUM_LEVEL = 0.6


def vacuum_background(phase: np.ndarray, valid: np.ndarray, kind: Background) -> np.ndarray:
    """Return the level or plane under the specimen, (y, x) in rad: what vacuum would show everywhere.

    Matter only ever adds phase, so the fit is one-sided: points above twice the scatter of those below the fit are
    taken for matter and left out, until the set no longer changes. Without any vacuum the result is the lower envelope
    of the phase.

    Parameters
    ----------
    phase
        Phase sum in rad, (y, x).
    valid
        (y, x) bool, where the phase was observed.
    kind
        ``"plane"`` for level and ramp, ``"level"`` for a constant, ``"none"`` for zero.

    Raises
    ------
    CalibrationError
        If fewer than 10 pixels are valid.
    """
    background = np.zeros(phase.shape)
    if kind == "none":
        return background
    if np.count_nonzero(valid) < 10:
        raise CalibrationError(
            f"the vacuum level cannot be fitted to {np.count_nonzero(valid)} observed pixels; at least 10 are needed:"
            " check the scan's step and the illumination"
        )
    y, x = np.indices(phase.shape, dtype=np.float64)
    columns = [np.ones(phase.shape)]
    if kind == "plane":
        columns += [y / phase.shape[0] - 0.5, x / phase.shape[1] - 0.5]
    basis = np.stack([column[valid] for column in columns], axis=1)
    values = phase[valid].astype(np.float64)
    kept = np.ones(values.size, dtype=bool)
    coefficients = np.zeros(basis.shape[1])
    for _ in range(_MAX_ROUNDS):
        coefficients = np.linalg.lstsq(basis[kept], values[kept], rcond=None)[0]
        excess = values - basis @ coefficients
        below = excess[excess < 0]
        scatter = np.sqrt(np.mean(below**2)) if below.size else 0.0
        matter = excess > _REJECT_ABOVE * scatter
        if np.array_equal(~matter, kept):
            break
        kept = ~matter
    return np.einsum("c,cyx->yx", coefficients, np.stack(columns))


def vacuum(flat: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Return (y, x) bool: where ``flat`` (y, x), a phase whose background was taken off, is vacuum.

    The scatter is that of the pixels below zero; vacuum is where means over a box are small against it, without a rim
    of half the box, so that atoms beside it do not count.
    """
    below = flat[valid & (flat < 0)]
    scatter = float(np.sqrt(np.mean(below**2))) if below.size else 0.0
    inside = scipy.ndimage.uniform_filter(valid.astype(float), _VACUUM_BOX_PX, mode="constant") > 0.999
    mean = scipy.ndimage.uniform_filter(np.where(valid, flat, 0).astype(float), _VACUUM_BOX_PX)
    empty = inside & (np.abs(mean) <= _VACUUM_LEVEL * scatter)
    # Single boxes over matter may come out near zero by chance: what is vacuum is so over more than a box.
    empty = scipy.ndimage.binary_opening(empty, np.ones((_VACUUM_BOX_PX, _VACUUM_BOX_PX)))
    return scipy.ndimage.binary_closing(empty, np.ones((3, 3))) & inside


def depth_profile(phases: np.ndarray, valid: np.ndarray, empty: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how much of the phase every slice holds: mean over the specimen above vacuum, and deviation, in rad.

    Parameters
    ----------
    phases
        (slice, y, x) in rad.
    valid
        (y, x) bool, where the phase was observed.
    empty
        (y, x) bool, vacuum; without any, the faintest tenth of the phase sum stands for it.
    """
    total = phases.sum(axis=0)
    empty = empty & valid
    if np.count_nonzero(empty) < 10:
        empty = valid & (total <= np.quantile(total[valid], 0.1))
    specimen = valid & ~empty if np.any(valid & ~empty) else valid
    level = np.array([np.mean(phase[empty]) for phase in phases])
    return (
        np.array([np.mean(phase[specimen]) for phase in phases]) - level,
        np.array([np.std(phase[specimen]) for phase in phases]),
    )


def observed(illumination: np.ndarray, fraction: float) -> np.ndarray:
    """Return (y, x) bool: where the summed probe intensity is at least ``fraction`` of its median over the scan.

    The median is taken over the pixels above a tenth of the maximum, that is over the scanned field.
    """
    typical = np.median(illumination[illumination > 0.1 * illumination.max()])
    return illumination >= fraction * typical


def centred(image: np.ndarray, shape_yx: tuple[int, int], fill: float | bool = 0) -> np.ndarray:
    """Return ``image`` (..., y, x) cropped or padded to ``shape_yx`` with its centre n // 2 kept at the centre."""
    out = array_namespace(image).full((*image.shape[:-2], *shape_yx), fill, dtype=image.dtype)
    source, target = [], []
    for have, want in zip(image.shape[-2:], shape_yx, strict=True):
        start = want // 2 - have // 2
        target.append(slice(max(start, 0), min(start + have, want)))
        source.append(slice(max(-start, 0), max(-start, 0) + target[-1].stop - target[-1].start))
    out[..., target[0], target[1]] = image[..., source[0], source[1]]
    return out
