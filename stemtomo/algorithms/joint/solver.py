"""Joint reconstruction: steps on one view at a time, or on all views together, with constraints on the volume.

A sweep visits the views one after another (ordered subsets): the volume is turned, its slices descend along batches of
patterns, and what they gained is turned back. With batches of one pattern and the illumination of the whole scan as
preconditioner this is the published update (Lee et al. 2023, section II); batches that spread over the scan, each with
its own illumination, take several times fewer sweeps. Once sweeps only carry noise around, accelerated steps on the sum
of all views (FISTA; Beck & Teboulle, SIAM J. Imaging Sci. 2, 183 (2009)) converge.

The unknowns are coefficients of Gaussian elements (``element_width_px``; zero is a voxel each), in rad per voxel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import ndimage

from stemtomo.algorithms.joint.transfer import amplified
from stemtomo.algorithms.joint.view import View, slices_adjoint, slices_of
from stemtomo.algorithms.ptychography import solver
from stemtomo.algorithms.ptychography.phase import observed, vacuum_background
from stemtomo.backend import Array, array_namespace, real_dtype, to_device_of, to_host

#: Part of the typical illumination where a phase counts as observed, and the blur before its vacuum is looked for.
_LIT, _LEVEL_BLUR_PX = 0.5, 2.0
#: The outline of a specimen is between these parts of its bright inside, and in the histogram of so many bins there is
#: this often the least count before counts have risen by the last factor.
_BRIGHT_PERCENTILE, _OUTLINE, _BINS, _FACES, _RISE = 99.5, (0.2, 0.6), 20, 2.5, 1.3
#: A view with less vacuum than this, as a share of what is lit, has none that tells a phase.
LEAST_VACUUM = 0.05


@dataclass(frozen=True)
class Constraint:
    """What every volume must obey.

    Parameters
    ----------
    positivity
        No negative potential.
    soft_threshold_rad
        Taken off every voxel after each visit of a view.
    element_width_px
        Width (sigma) of the Gaussians that the volume is a sum of.
    """

    positivity: bool = True
    soft_threshold_rad: float = 0.0
    element_width_px: float = 0.0


@dataclass(frozen=True)
class SweepRule:
    """Steps of a sweep.

    Parameters
    ----------
    step
        1 removes the residual of a phase where the whole illumination falls.
    damping
        Share of the peak illumination in the preconditioner.
    batches
        Batches of patterns per visit; 0 for one pattern at a time.
    """

    step: float = 1.0
    damping: float = 0.1
    batches: int = 4


@dataclass(frozen=True)
class Patterns:
    """Patterns of some positions of one view.

    Parameters
    ----------
    model
        Object grid with the windows of these positions, propagators and loss.
    counts
        (position, ky, kx), zero frequency first, electrons; or what yields those of some positions, as runs of these
        with their patterns.
    numbers
        Index of each position in its scan, (position,).
    """

    model: solver.Model
    counts: Array | Callable[[np.ndarray], Iterable[tuple[np.ndarray, Array]]]
    numbers: np.ndarray


def elements(coefficients: Array, width_px: float) -> Array:
    """Return the volume, (z, y, x), that is the sum of Gaussians of ``width_px``; it is its own adjoint."""
    if width_px == 0:
        return coefficients
    xp = array_namespace(coefficients)
    transfer = 1.0
    for axis, count in enumerate(coefficients.shape):
        k = xp.fft.rfftfreq(count) if axis == 2 else xp.fft.fftfreq(count)
        shape = [1, 1, 1]
        shape[axis] = -1
        transfer = transfer * xp.exp(-2 * (math.pi * width_px * k) ** 2).reshape(shape)
    spectrum = xp.fft.rfftn(coefficients, axes=(0, 1, 2)) * transfer
    return xp.fft.irfftn(spectrum, s=coefficients.shape, axes=(0, 1, 2)).astype(coefficients.dtype)


def constrained(coefficients: Array, constraint: Constraint, support: Array | None, share: float = 1.0) -> Array:
    """Return the nearest coefficients that obey ``constraint`` and vanish outside ``support`` (z, y, x), bool."""
    xp = array_namespace(coefficients)
    threshold = coefficients.dtype.type(share * constraint.soft_threshold_rad)
    if constraint.positivity:
        found = xp.maximum(coefficients - threshold, 0)
    else:
        found = xp.sign(coefficients) * xp.maximum(xp.abs(coefficients) - threshold, 0)
    return found if support is None else xp.where(support, found, 0)


def gradients(
    patterns: Patterns, slices: Array, probe: Array, wanted: np.ndarray | None = None
) -> dict[str, Any] | None:
    """Return the sums over those of ``patterns`` whose numbers are ``wanted`` (all if not given), or ``None``.

    Parameters
    ----------
    slices
        (slice, Y, X), phase in rad of the part of the object that the model's grid covers.
    probe
        (mode, y, x), the modes of the wave at the first slice.

    Returns
    -------
    dict
        ``phase`` (slice, Y, X): gradient in the slices; ``probe`` (mode, y, x); ``illumination`` (Y, X); ``loss``;
        ``positions``. Sums of parts add up.
    """
    batch = np.arange(len(patterns.numbers)) if wanted is None else np.flatnonzero(np.isin(patterns.numbers, wanted))
    if not batch.size:
        return None
    state = solver.State(slices, probe)
    if not callable(patterns.counts):
        return solver.gradients(state, patterns.model, patterns.counts, batch)._asdict()
    groups = ((where, counts, np.arange(len(where))) for where, counts in patterns.counts(batch))
    return solver.gradients_of(state, patterns.model, groups)._asdict()


def descended(
    slices: Array,
    sums: dict[str, Any],
    rule: SweepRule,
    curvature: float,
    peak: float | None,
    gain: np.ndarray | None = None,
) -> Array:
    """Return ``slices`` (slice, Y, X) after one preconditioned step along ``sums``.

    All slices of a pixel move together at worst, so that the step is shared between them. ``peak`` is the peak
    illumination of the whole scan, which then preconditions all pixels alike; ``None`` for that of the batch.
    ``gain`` (ky, kx // 2 + 1) is that of :func:`~stemtomo.algorithms.joint.transfer.frequency_gain`.
    """
    weight: Any
    if peak is not None:
        weight = 2 * curvature * peak
    else:
        illumination = sums["illumination"]
        highest = float(illumination.max())
        weight = 2 * curvature * ((1 - rule.damping) * illumination + rule.damping * highest)
    length = slices.dtype.type(rule.step / len(slices))
    if gain is None:
        return slices - (length * sums["phase"] / weight).astype(slices.dtype)
    # Half of the weight on either side: the preconditioner is symmetric and positive, so that this descends.
    root = array_namespace(slices).sqrt(weight)
    return slices - (length * amplified(sums["phase"] / root, gain) / root).astype(slices.dtype)


def without_level(slices: Array, illumination: Array, empty: Array | None = None) -> tuple[Array, float]:
    """Return ``slices`` (slice, Y, X) without the phase of their vacuum, where ``illumination`` (Y, X) reaches.

    No pattern knows the mean phase of a view, and positivity lets it only grow: a haze would fill the box. Vacuum is
    what ``empty`` (Y, X; bool) says, rays that miss the outline of the specimen. Without an outline yet, it is what
    most of the dark part of the projection agrees on, or else its lower envelope.

    Returns
    -------
    Array
        The slices.
    float
        Share of what is lit that is vacuum; 1 without an outline.
    """
    lit = observed(to_host(illumination), _LIT)
    total = to_host(slices.sum(axis=0))
    if empty is None:
        seen, weight = (ndimage.gaussian_filter(part, _LEVEL_BLUR_PX) for part in (total * lit, 1.0 * lit))
        level, share = float(vacuum_background(seen / np.maximum(weight, 1e-3), lit, "level")[0, 0]), 1.0
    else:
        vacuum = lit & to_host(empty)
        share = np.count_nonzero(vacuum) / np.count_nonzero(lit)
        level = float(total[vacuum].mean()) if share >= LEAST_VACUUM else 0.0
    xp = array_namespace(slices)
    return slices - xp.where(to_device_of(lit, slices), slices.dtype.type(level / len(slices)), 0), share


def turned_back(
    coefficients: Array, change: Array, view: View, constraint: Constraint, support: Array | None, share: float
) -> Array:
    """Return ``coefficients`` after the ``change`` (slice, Y, X) that the slices of a visit made.

    A slice is a sum of planes, so each plane takes its share of the change.
    """
    per_plane = change / change.dtype.type(view.voxels_per_slice)
    gained = elements(slices_adjoint(per_plane, view), constraint.element_width_px)
    return constrained(coefficients + gained, constraint, support, share)


@dataclass(frozen=True)
class Momentum:
    """Where the accelerated gradient stands: iterate, look-ahead point, momentum and step.

    Parameters
    ----------
    coefficients, ahead
        (z, y, x), the last iterate and the point at which the next gradient is taken.
    t
        FISTA's sequence; 1 starts it anew.
    loss
        Loss at the last look-ahead point.
    step
        Step times the bound of the curvature.
    """

    coefficients: Array
    ahead: Array
    t: float = 1.0
    loss: float = math.inf
    step: float = 4.0


#: A step that made the loss rise is shortened by this factor, and momentum is lost.
_SHORTEN = 0.5
_LEAST_STEP = 0.5


def accelerated(
    state: Momentum, gradient: Array, loss: float, bound: float, constraint: Constraint, support: Array | None
) -> Momentum:
    """Return the next iterate from the ``gradient`` (z, y, x) and ``loss`` at the look-ahead point.

    ``bound`` is the sum over views of the largest curvature of each. Views share little but the lowest frequencies, so
    the first step is several times 1 / bound; if the loss rises, it starts anew from the last iterate, more carefully.
    """
    if loss > state.loss:
        step = max(_LEAST_STEP, _SHORTEN * state.step)
        return Momentum(state.coefficients, state.coefficients, 1.0, math.inf, step)
    gradient = elements(gradient, constraint.element_width_px)
    length = gradient.dtype.type(state.step / bound)
    new = constrained(state.ahead - length * gradient, constraint, support)
    t = (1 + math.sqrt(1 + 4 * state.t**2)) / 2
    ahead = new + new.dtype.type((state.t - 1) / t) * (new - state.coefficients)
    return replace(state, coefficients=new, ahead=ahead, t=t, loss=loss)


def auto_support(volume: Array, voxel_angstrom: float, reach_angstrom: float = 2.0) -> Array:
    """Return where the specimen can be, (z, y, x) bool: its blurred outline and ``reach_angstrom`` around it.

    Outside of it a constant would grow, since no pattern knows the mean phase of a view.
    """
    blurred = ndimage.gaussian_filter(to_host(volume), reach_angstrom / voxel_angstrom)
    inside = blurred > outline_level(blurred)
    reach = max(1, round(reach_angstrom / voxel_angstrom))
    distance = ndimage.distance_transform_edt(~inside)
    return to_device_of(distance <= reach, volume)


def outline_level(blurred: np.ndarray) -> float:
    """Return the value of a ``blurred`` volume (z, y, x) that its specimen exceeds and noise does not.

    The faces of a specimen take all values between nothing and its inside about equally often. Noise of few electrons,
    which positivity makes a haze, has many small values and ever fewer large ones: it ends where few more are left than
    those of the faces. A part of the specimen that is faint as a whole makes the histogram rise again, and stays.
    """
    bright = float(np.percentile(blurred, _BRIGHT_PERCENTILE))
    if bright <= 0:
        return 0.0
    counts, edges = np.histogram(blurred / bright, np.linspace(*_OUTLINE, _BINS + 1))
    counts = ndimage.uniform_filter1d(counts.astype(float), 3)
    lowest = np.minimum.accumulate(counts)
    rise = int(np.argmax(np.append(counts > _RISE * lowest, True)))
    return bright * float(edges[np.argmax(counts <= _FACES * lowest[rise - 1])])


def start_slices(coefficients: Array, view: View, constraint: Constraint) -> Array:
    """Return the slices (slice, Y, X) of ``coefficients``, in their precision."""
    volume = elements(coefficients, constraint.element_width_px)
    xp = array_namespace(volume)
    return xp.ascontiguousarray(slices_of(volume, view)).astype(real_dtype(volume))


def probe_step(probe: Array, gradient: Array, positions: int, step: float, curvature: float) -> Array:
    """Return ``probe`` (mode, y, x) after one step along the sum of its ``gradient`` over ``positions``.

    |t| is 1, so the curvature is the number of positions everywhere. The electrons of the probe are kept: a scale of
    the probe cannot be told from missing electrons.
    """
    xp = array_namespace(probe)
    moved = probe - probe.dtype.type(step / (2 * curvature * positions)) * gradient
    scale = xp.sqrt(xp.sum(xp.abs(probe) ** 2) / xp.sum(xp.abs(moved) ** 2))
    return (moved * scale).astype(probe.dtype)
