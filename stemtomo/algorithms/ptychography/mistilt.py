"""Mistilt and thickness of a specimen from its patterns: the adaptive propagator, with slices tied together.

With free slices the tilt is an exact gauge: drifting slices under an upright propagator give the same patterns. Tied
slices determine it, and object, tilt and thickness then come out of one quasi-Newton search from vacuum and any tilt.
Two things make that search fast where a descent crawls: curvatures learnt across units, and the object's frame in the
middle of the stack, where a change of tilt does not move the columns as a whole.

Source: Sha et al., Sci. Adv. 8, eabn2275 (2022).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from stemtomo.algorithms.ptychography import adaptive
from stemtomo.algorithms.ptychography.adaptive import Geometry, Stack
from stemtomo.algorithms.quasi_newton import Iterate, Point, minimise
from stemtomo.backend import Array, array_namespace, fft2, real_dtype, to_device_of, to_host

#: Share of the peak illumination in the object's inverse curvature.
_DAMPING = 0.1
#: Shares of the bound on the curvature in tilt and thickness that are seen: most of what they change is phase on the
#: detector. They only shape the first step; the search learns the rest.
_TILT_SEEN, _THICKNESS_SEEN = 0.05, 0.3
_LARGEST_TILT_STEP_RAD, _LARGEST_THICKNESS_STEP, _LARGEST_FOCUS_STEP_ANGSTROM = 2e-3, 0.05, 20.0
#: The geometry stands still: what it may change over the last iterations.
_STILL_ITERATIONS, _STILL_TILT_RAD, _STILL_THICKNESS, _STILL_FOCUS_ANGSTROM = 10, 3e-5, 2e-3, 0.3


@dataclass(frozen=True)
class Data:
    """Patterns and probe of one part."""

    probe: Array
    """Modes (mode, y, x) in their plane (see :class:`~stemtomo.algorithms.ptychography.adaptive.Stack`)."""
    counts: Array
    """(position, qy, qx), zero frequency first."""
    mask: Array | None = None
    """(qy, qx) bool, False where the detector tells nothing."""


@dataclass(frozen=True)
class Fit:
    """A fitted specimen."""

    geometry: Geometry
    phase: Array
    """u: (1, Y, X) of tied slices, each of which is this; else (slice, Y, X)."""
    loss: float
    """Per pattern."""
    path: list[tuple[float, ...]] = field(default_factory=list)
    """Tilt x and y in rad, slice thickness and C1 in Å after every iteration."""


class Free(NamedTuple):
    """What of the geometry is looked for."""

    tilt: bool = True
    thickness: bool = True
    focus: bool = False


def fit(
    start: Geometry,
    stack: Stack,
    data: Data,
    where: np.ndarray,
    iterations: int,
    phase: Array | None = None,
    free: Free = Free(),
    on_iteration: Callable[[int, float, Geometry], None] | None = None,
) -> Fit:
    """Fit the object and what is ``free`` together, until the geometry stands still or ``iterations`` are over."""
    path: list[tuple[float, ...]] = []

    def evaluate(point: Point) -> tuple[float, Point]:
        trial = _geometry(point[1:])
        sums, _ = adaptive.gradients(point[0], data.probe, trial, stack, data.counts, where, data.mask)
        slopes = _geometry_slopes(sums, trial, stack)
        return sums.loss, (sums.phase, *(slope * wanted for slope, wanted in zip(slopes, free, strict=True)))

    def follow(iterate: Iterate) -> bool:
        reached = _geometry(iterate.point[1:])
        path.append((*reached.tilt_rad_xy.tolist(), reached.slice_thickness_angstrom, reached.c1_angstrom))
        if on_iteration is not None:
            on_iteration(len(path), iterate.loss / len(where), reached)
        return stands_still(path)

    begin = vacuum(stack, data.probe) if phase is None else phase
    found = minimise(
        evaluate,
        (begin, *_point(start)),
        (object_scale(start, stack, data, where), *inverse_curvatures(start, stack, data, len(where))),
        iterations,
        largest_step=(
            None,
            _LARGEST_TILT_STEP_RAD,
            _LARGEST_THICKNESS_STEP * start.slice_thickness_angstrom,
            _LARGEST_FOCUS_STEP_ANGSTROM,
        ),
        on_iteration=follow,
    )
    return Fit(_geometry(found.point[1:]), found.point[0], found.loss / len(where), path)


def vacuum(stack: Stack, probe: Array) -> Array:
    """Return u of an empty object, (1, Y, X) tied, else (slice, Y, X)."""
    dtype = probe.dtype if stack.kind == "complex" else real_dtype(probe)
    return array_namespace(probe).zeros((1 if stack.tied else stack.slices, *stack.grid.shape_yx), dtype=dtype)


def stands_still(path: Sequence[tuple[float, ...]]) -> bool:
    """Whether tilt (x, y, rad), slice thickness and C1 (Å) changed by next to nothing over the last iterations."""
    if len(path) <= _STILL_ITERATIONS:
        return False
    recent = np.array(path[-_STILL_ITERATIONS - 1 :])
    spread = np.ptp(recent, axis=0)
    still = spread[:2].max() < _STILL_TILT_RAD and spread[2] < _STILL_THICKNESS * recent[-1, 2]
    return bool(still and (spread[3:] < _STILL_FOCUS_ANGSTROM).all())


def _point(geometry: Geometry) -> Point:
    lengths = (geometry.slice_thickness_angstrom, geometry.c1_angstrom)
    return np.array(geometry.tilt_rad_xy, dtype=np.float64), *(np.array([length]) for length in lengths)


def _geometry(point: Point) -> Geometry:
    return Geometry(point[0], float(point[1][0]), c1_angstrom=float(point[2][0]))


def _geometry_slopes(sums: adaptive.Sums, geometry: Geometry, stack: Stack) -> Point:
    slopes = to_host(adaptive.geometry_slopes(sums.entry, sums.gaps, geometry, stack, geometry.tilt_rad_xy))
    focus = to_host(adaptive.focus_slope(sums.entry, stack.wavelength))
    return slopes[:2], slopes[2:], np.array([focus])


def object_scale(
    geometry: Geometry,
    stack: Stack,
    data: Data,
    where: np.ndarray,
    lit: Array | None = None,
    peak: float | None = None,
) -> Array:
    """Inverse curvature of the object: as many slices move together as there are, so it goes with their square.

    Of a part, ``lit`` is the illumination of its window and ``peak`` the largest of all.
    """
    lit = adaptive.illumination(data.probe, geometry, stack, where) if lit is None else lit
    peak = lit.max() if peak is None else lit.dtype.type(peak)
    together = stack.slices if stack.tied else 1
    weight = 2 * stack.slices * together * ((1 - _DAMPING) * lit + _DAMPING * peak)
    return (1 / weight)[None]


def inverse_curvatures(geometry: Geometry, stack: Stack, data: Data, positions: int) -> Point:
    """Inverse curvatures of tilt, thickness and C1, from how wide the probe's spectrum is."""
    shape, pixel = data.probe.shape[-2:], stack.grid.pixel_angstrom_yx
    ky, kx = (np.fft.fftfreq(n, p) for n, p in zip(shape, pixel, strict=True))
    square = to_device_of(ky[:, None] ** 2 + kx**2, data.probe)
    power = (array_namespace(data.probe).abs(fft2(data.probe)) ** 2).sum(axis=0)
    incident = float(power.sum()) * positions
    electrons = incident * (stack.slices - 1) ** 2
    mean_square = float((power * square).sum() / power.sum())
    mean_fourth = float((power * square**2).sum() / power.sum())
    tilt = 2 * electrons * (2 * np.pi * geometry.slice_thickness_angstrom) ** 2 * mean_square / 2
    thickness = 2 * electrons * (np.pi * stack.wavelength) ** 2 * mean_fourth
    focus = 2 * incident * (np.pi * stack.wavelength) ** 2 * mean_fourth
    return tuple(np.array(1 / c) for c in (_TILT_SEEN * tilt, _THICKNESS_SEEN * thickness, _THICKNESS_SEEN * focus))
