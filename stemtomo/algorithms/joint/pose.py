"""How the slices of a view change with its pose and focus, and the Gauss-Newton steps that follow.

A small turn w (rotation vector in the laboratory) moves a feature at r by w x r, so the volume changes by
-(w x r) . grad V; a shift by s changes it by -s . grad V. Half of a small change of phase under a pixel turns up in the
moduli on the detector, so the curvature of the loss is the illumination times the square of the projected change.
"""

from __future__ import annotations

import math

import numpy as np

from stemtomo.algorithms.joint.view import View, planes_of, slices_from
from stemtomo.backend import Array, array_namespace, fft1, fftfreq, ifft1, to_host
from stemtomo.physics import rotation

#: Columns of a pose: shift along x and y in px, turn about the laboratory's x, y, z in rad.
SHIFTS, TURNS = slice(0, 2), slice(2, 5)
#: Distance of the two slopes that give the curvature of the loss in the focus.
FOCUS_AHEAD_ANGSTROM = 4.0
#: A step of the focus that is longer has left the range of its parabola.
_LONGEST_FOCUS_STEP_ANGSTROM = 20.0


def shift_changes(slices: Array) -> Array:
    """Return the change of ``slices`` (slice, Y, X) per pixel of shift along x and y, (2, slice, Y, X)."""
    xp = array_namespace(slices)
    return xp.stack([-derivative(slices, axis) for axis in (2, 1)])


def turn_changes(volume: Array, view: View) -> Array:
    """Return the change of the slices of ``volume`` (z, y, x) per rad of turn about x, y, z, (3, slice, Y, X)."""
    xp = array_namespace(volume)
    laboratory = rotation.to_laboratory(volume, view.pose)
    z, y, x = (xp.arange(count, dtype=volume.dtype) - count // 2 for count in volume.shape)
    z, y = z[:, None, None], y[:, None]
    along_z, along_y, along_x = (derivative(laboratory, axis) for axis in (0, 1, 2))
    changes = (z * along_y - y * along_z, x * along_z - z * along_x, y * along_x - x * along_y)
    return xp.stack([slices_from(planes_of(change, view), view) for change in changes])


def pose_step(changes: Array, phase_gradient: Array, illumination: Array, curvature: float) -> np.ndarray:
    """Return the Gauss-Newton step, (n,), of parameters whose unit changes the slices by ``changes``.

    Parameters
    ----------
    changes
        (n, slice, Y, X), rad per unit.
    phase_gradient
        (slice, Y, X), gradient of the loss in the slices.
    illumination
        (Y, X), sum of the probes' intensities.
    """
    xp = array_namespace(changes)
    slope = xp.stack([xp.sum(change * phase_gradient, dtype=np.float64) for change in changes])
    projected = [change.sum(axis=0, dtype=np.float64) for change in changes]
    normal = xp.stack([xp.stack([xp.sum(illumination * a * b) for b in projected]) for a in projected]) * curvature
    normal, slope = to_host(normal), to_host(slope)
    # Units differ, so each parameter is damped on its own scale.
    damped = normal + np.diag(1e-3 * np.diag(normal) + 1e-12)
    return -np.linalg.solve(damped, slope)


def focus_slope(change: Array, probe_gradient: Array) -> float:
    """Return the slope of the loss per Å of focus.

    Parameters
    ----------
    change
        (mode, y, x), change of the probe per Å of focus.
    probe_gradient
        (mode, y, x), gradient of the loss in the probe, in the same plane.
    """
    return float(array_namespace(change).sum((probe_gradient.conj() * change).real, dtype=np.float64))


def focus_step(slope: float, slope_ahead: float) -> float:
    """Return the Newton step in Å from the slopes of the loss at a focus and :data:`FOCUS_AHEAD_ANGSTROM` beyond it.

    Most of what a change of focus does to the probe is invisible (through a uniform phase, the aperture stays as bright
    as it was), so that its size says little of the curvature of the loss; two slopes do.
    """
    rise = slope_ahead - slope
    if rise <= 0:
        return -math.copysign(FOCUS_AHEAD_ANGSTROM, slope)
    step = -slope * FOCUS_AHEAD_ANGSTROM / rise
    return max(-_LONGEST_FOCUS_STEP_ANGSTROM, min(_LONGEST_FOCUS_STEP_ANGSTROM, step))


def derivative(values: Array, axis: int) -> Array:
    """Return the derivative per pixel of ``values`` along ``axis``, exact where they are band-limited."""
    frequency = fftfreq(values.shape[axis], 1.0, values)
    if values.shape[axis] % 2 == 0:
        frequency[values.shape[axis] // 2] = 0
    shape = [1, 1, 1]
    shape[axis] = -1
    spectrum = fft1(values.astype(np.result_type(values.dtype, np.complex64)), axis)
    return ifft1(spectrum * (2j * math.pi * frequency).reshape(shape), axis).real
