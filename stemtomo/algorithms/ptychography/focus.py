"""Defocus of a specimen of any thickness: C1, thickness and mistilt out of one multislice fit with tied slices.

Parallax gives the focus of one plane, which in a crystal is not the middle: columns guide the beam, and what is told
is where they let go of it. Here the thickness is part of the model. C1 is told in the middle of the stack, where a
change of thickness moves focus the least.

How well it is known is seen by fitting two halves of the field from vacuum, out of focus to either side by half a depth
of focus and with a thickness too large and too small: what noise, the specimen and a search that has not ended leave
of that. Where the loss is flat, the halves stay where they began, and the result says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from stemtomo.algorithms.ptychography import adaptive, mistilt
from stemtomo.algorithms.ptychography.adaptive import Geometry, Stack
from stemtomo.algorithms.ptychography.mistilt import Data, Fit, Free
from stemtomo.algorithms.ptychography.model import seen_by_detector
from stemtomo.algorithms.ptychography.noise import expected_loss
from stemtomo.backend import to_host

#: Factor by which the halves begin too thick and too thin.
_THICKNESS_APART = 1.4
#: Share of their first distance that the halves may keep.
_KEPT = 0.25
#: What tied slices of one phase leave in C1 whatever the noise, in depths of focus; see docs/calibration.md.
_MODEL_ERROR = 0.04
#: Loss above the noise floor, in floors, beyond which no geometry is believed.
_LARGEST_EXCESS = 1.0
#: Share of the larger loss by which one sign of C1 must be better than the other.
_SIGN_MARGIN = 0.02
#: Skewness of the phase, of either sign, that tells peaks from holes; and the share of the peak illumination there.
_SKEWNESS, _LIT = 0.5, 0.3
#: Patterns at which the noise floor is looked up.
_FLOOR_PATTERNS = 32


class Refined(NamedTuple):
    """What a fit says of C1, and how sure it is."""

    c1_angstrom: float
    """In the middle of the specimen."""
    c1_sigma_angstrom: float
    thickness_angstrom: float
    thickness_sigma_angstrom: float
    """Infinite where the patterns do not tell the thickness."""
    mistilt_rad_xy: np.ndarray
    mistilt_sigma_rad: float
    loss: float
    """Per detector pixel and pattern."""
    noise_floor: float
    reason: str
    """Why C1 is not determined; empty where it is."""


def refine(
    start: Geometry,
    stack: Stack,
    data: Data,
    halves: tuple[np.ndarray, np.ndarray],
    semiangle_rad: float,
    iterations: int,
    on_iteration: Callable[[], None] | None = None,
) -> Refined:
    """Fit object, mistilt, thickness and C1 from ``start``, and say how far two halves of the field agree.

    Parameters
    ----------
    start
        Where the search begins; C1 beside that of ``data.probe``, which lies in the middle of the stack.
    halves
        Positions of two parts of the field that share as little as they can.
    """
    depth = stack.wavelength / semiangle_rad**2
    where = np.sort(np.concatenate(halves))

    def follow(*_: object) -> None:
        if on_iteration is not None:
            on_iteration()

    def fitted(begin: Geometry, positions: np.ndarray) -> Fit:
        return mistilt.fit(begin, stack, data, positions, iterations, free=Free(focus=True), on_iteration=follow)

    whole = fitted(start, where)
    parts = []
    for positions, side in zip(halves, (1, -1), strict=True):
        displaced = replace(
            whole.geometry,
            slice_thickness_angstrom=whole.geometry.slice_thickness_angstrom * _THICKNESS_APART**side,
            c1_angstrom=whole.geometry.c1_angstrom + side * depth / 2,
        )
        parts.append(fitted(displaced, positions).geometry)
    return _judged(whole, (parts[0], parts[1]), stack, data, where, depth)


class Trial(NamedTuple):
    """What a short fit with one sign of C1 leaves."""

    loss: float
    skewness: float
    """Of the phase: positive where it has peaks, as atoms are, negative where it has holes."""


def better_sign(first: Trial, second: Trial) -> int | None:
    """Return which of two fits with opposite C1, and scans turned by half a turn, is right; ``None`` if not clear.

    A weak object fits both alike, with its phase inverted: then atoms, which advance the wave, tell. A strong one fits
    only one. What the loss and the phase say must not contradict each other.
    """
    trials = (first, second)
    best = int(second.loss < first.loss)
    by_loss = best if trials[1 - best].loss - trials[best].loss > _SIGN_MARGIN * trials[1 - best].loss else None
    peaked = int(second.skewness > first.skewness)
    clear = trials[peaked].skewness > _SKEWNESS and trials[1 - peaked].skewness < -_SKEWNESS
    by_phase = peaked if clear else None
    if by_loss is not None and by_phase is not None and by_loss != by_phase:
        return None
    return by_phase if by_loss is None else by_loss


def skewness(fit: Fit, stack: Stack, data: Data, where: np.ndarray) -> float:
    """Return the skewness of the fitted phase where the field is well lit."""
    lit = to_host(adaptive.illumination(data.probe, fit.geometry, stack, where))
    phase = to_host(fit.phase[0].real)[lit > _LIT * lit.max()].astype(np.float64)
    off = phase - phase.mean()
    return float((off**3).mean() / max((off**2).mean(), 1e-30) ** 1.5)


def _judged(
    whole: Fit, parts: tuple[Geometry, Geometry], stack: Stack, data: Data, where: np.ndarray, depth: float
) -> Refined:
    found, (first, second) = whole.geometry, parts
    # Each half is worth as much as the other: their mean is off by half of what they differ.
    spread = abs(first.c1_angstrom - second.c1_angstrom) / 2
    thick = found.slice_thickness_angstrom * stack.slices
    thick_spread = abs(first.slice_thickness_angstrom - second.slice_thickness_angstrom) * stack.slices / 2
    apart = thick * (_THICKNESS_APART - 1 / _THICKNESS_APART) / 2
    floor = _noise_floor(whole, stack, data, where)
    loss = whole.loss / math.prod(data.counts.shape[1:])
    reason = ""
    if spread > _KEPT * depth / 2:
        reason = (
            f"two halves of the field, begun {depth:.3g} Å apart in C1, end {2 * spread:.3g} Å apart: the patterns"
            " do not tell it, or the search was too short"
        )
    elif loss > (1 + _LARGEST_EXCESS) * floor:
        reason = (
            f"the loss ({loss:.3g}) stays far above what counting noise leaves ({floor:.3g}): rotation, transposition,"
            " semiangle or the sign of C1 is wrong, or the specimen is unlike a slab of equal slices"
        )
    return Refined(
        found.c1_angstrom,
        math.hypot(spread, _MODEL_ERROR * depth),
        thick,
        math.hypot(thick_spread, 2 * _MODEL_ERROR * depth) if thick_spread < _KEPT * apart else math.inf,
        found.tilt_rad_xy,
        float(np.abs(first.tilt_rad_xy - second.tilt_rad_xy).max()) / 2,
        loss,
        floor,
        reason,
    )


def _noise_floor(fit: Fit, stack: Stack, data: Data, where: np.ndarray) -> float:
    some = where[np.unique(np.linspace(0, len(where) - 1, _FLOOR_PATTERNS).astype(int))]
    seen = adaptive.patterns(fit.phase, data.probe, fit.geometry, stack, some)
    return expected_loss(to_host(seen_by_detector(seen, data.counts.shape[1:])), stack.loss)
