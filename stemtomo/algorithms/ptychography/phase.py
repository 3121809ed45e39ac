"""From a reconstructed object to a projected phase: what is observed, and which gauges are taken off.

A constant phase, and a ramp (against a shift of the patterns), leave the data unchanged; vacuum, where there is some,
fixes both: its phase is zero.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from stemtomo.backend import array_namespace
from stemtomo.errors import CalibrationError

Background = Literal["plane", "level", "none"]

_MAX_ROUNDS = 100
_REJECT_ABOVE = 2.0


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
