"""Gradients of one part with all that lies between probe and detector as parameters: tilt, thickness, focus.

Everything that these do to a wave is a phase on its spectrum, so the three moments of
:func:`stemtomo.physics.gaps.gap_moments`, before the first slice and between slices, give all their gradients
without any further transform. Slices may be *tied*, all the same: then the tilt is determined, while with free slices
it is an exact gauge (drifting slices under an upright propagator give the same patterns).

The frame of the object is that of the middle of the stack: a column that leans is straight in it, and lies where it
passes the middle. Sources: Sha et al., Sci. Adv. 8, eabn2275 (2022), eq. 3, for the propagator.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from stemtomo.algorithms.ptychography.model import ObjectKind, tied_gradient, weighted
from stemtomo.algorithms.ptychography.windows import ObjectGrid
from stemtomo.backend import Array, array_namespace, real_dtype, to_device_of, together_bytes
from stemtomo.kernels import patches
from stemtomo.kernels.fourier import fft2, ifft2
from stemtomo.physics import gaps as between
from stemtomo.physics.gaps import drift_ramps, gap_moments, geometry_gradient
from stemtomo.physics.propagation import fresnel_propagator


@dataclass(frozen=True)
class Stack:
    """What is held fixed while the geometry is fitted.

    Parameters
    ----------
    grid
        Object grid and windows.
    wavelength
        In Å.
    slices
        Number of slices.
    entry
        Distance from the plane of the probe to the first slice, in mean slice thicknesses: ``entrance`` for a probe on
        the entrance surface, ``-middle`` for one in the middle of the stack.
    tied
        All slices are the same; those that differ in thickness have a phase that goes with it.
    weights
        Thickness of every slice over their mean, where they differ. A slice acts in its middle.
    """

    grid: ObjectGrid
    wavelength: float
    slices: int
    entry: float = 0.5
    tied: bool = True
    loss: patches.Loss = "anscombe"
    kind: ObjectKind = "complex"
    weights: tuple[float, ...] | None = None

    @property
    def entrance(self) -> float:
        """Distance from the entrance surface to the first slice, in mean slice thicknesses."""
        return 0.5 if self.weights is None else self.weights[0] / 2

    @property
    def middle(self) -> float:
        """Distance from the first slice to the middle of the stack, in mean slice thicknesses."""
        return self.slices / 2 - self.entrance

    @property
    def distances(self) -> list[float]:
        """Distances of neighbouring slices, in mean slice thicknesses."""
        if self.weights is None:
            return [1.0] * (self.slices - 1)
        return [(a + b) / 2 for a, b in itertools.pairwise(self.weights)]

    @property
    def entry_drift(self) -> float:
        """How far columns drift from the middle of the stack to the first slice, in drifts per mean thickness."""
        return -self.middle


@dataclass(frozen=True)
class Geometry:
    """The geometry that is fitted."""

    tilt_rad_xy: np.ndarray
    """Mistilt (2,) as x, y in rad, positive where columns drift to +x, +y with depth; or (position, 2), a map of it."""
    slice_thickness_angstrom: float
    """Their mean, where slices differ."""
    c1_angstrom: float = 0.0
    """Defocus C1 of the probe beside what its modes have already."""


class Sums(NamedTuple):
    """Sums over a batch; every field adds up over batches and parts."""

    phase: Array
    """G_u of the object, (1, Y, X) tied, else (slice, Y, X); real for a phase object."""
    probe: Array
    """Wirtinger gradient of the modes (mode, y, x) in their plane."""
    illumination: Array
    entry: Array
    """Moments (3,) before the first slice, float64: see :func:`stemtomo.physics.gaps.gap_moments`."""
    gaps: Array
    """Moments (3,) of all gaps between slices, times their distances in mean slice thicknesses."""
    loss: float
    positions: int


class Moments(NamedTuple):
    """The moments of every position of a batch, (position, 3), float64."""

    entry: Array
    gaps: Array


def gradients(
    phase: Array,
    probe: Array,
    geometry: Geometry,
    stack: Stack,
    counts: Array,
    where: np.ndarray,
    mask: Array | None = None,
) -> tuple[Sums, Moments]:
    """Return the sums over the positions ``where``, and what each of them says about its own geometry.

    Parameters
    ----------
    phase
        u with t = exp(i u): (1, Y, X) for tied slices, else (slice, Y, X); real or complex.
    probe
        Modes (mode, y, x) in their plane.
    counts
        Patterns of all positions of the part, (position, qy, qx), zero frequency first, any real dtype. A detector
        smaller than the probe's window sees the low frequencies; what lies beyond is unknown.
    mask
        (qy, qx) bool, False where the detector tells nothing.
    """
    xp = array_namespace(phase)
    modes, pixel = len(probe), stack.grid.pixel_angstrom_yx
    transmission = _transmission(phase, stack, probe)
    slope = xp.zeros_like(transmission)
    slices, slopes = ([a[0]] * stack.slices if len(a) == 1 else a for a in (transmission, slope))
    lit = xp.zeros(stack.grid.shape_yx, dtype=real_dtype(probe))
    travelled = _entry_propagator(geometry, stack, probe)
    before = fft2(probe) * travelled
    probe_slope = xp.zeros_like(before)
    entry, gaps = xp.zeros((len(where) * modes, 3)), xp.zeros((stack.slices - 1, len(where) * modes, 3))
    loss: Any = 0.0
    chunk = max(1, together_bytes(probe) // probe.nbytes)
    for start in range(0, len(where), chunk):
        batch, part = where[start : start + chunk], slice(start * modes, (start + chunk) * modes)
        corners = to_device_of(np.repeat(stack.grid.corners[batch], modes, axis=0), probe)
        ramps, propagators = _ramps(geometry, stack, batch, probe), propagators_of(geometry, stack, batch, probe)
        entering = (before * ramps[:, None]).reshape(-1, *probe.shape[1:])
        waves = ifft2(entering)
        patches.illuminate(waves, corners, lit)
        spectra, incident, behind = between.forward(waves, slices, corners, propagators)
        seen = to_device_of(np.ascontiguousarray(batch, dtype=np.int64), probe)
        loss = loss + patches.residual(spectra, counts, stack.loss, where=seen, modes=modes, mask=mask).sum()
        path = (incident, behind, slices, corners, propagators, slopes)
        back = fft2(between.adjoint(spectra, *path, pixel, gaps[:, part]), overwrite=True)
        gap_moments(back, entering, pixel, entry[part])
        probe_slope += (back.reshape(-1, *probe.shape) * ramps[:, None].conj()).sum(axis=0)
    phase_slope = -1j * transmission.conj() * slope
    if len(phase_slope) > len(phase):
        phase_slope = tied_gradient(phase_slope, stack.weights)
    if stack.kind == "phase":
        phase_slope = xp.ascontiguousarray(phase_slope.real)
    moments = Moments(
        entry.reshape(-1, modes, 3).sum(axis=1), _over_gaps(gaps.reshape(-1, len(where), modes, 3).sum(axis=2), stack)
    )
    totals = (moments.entry.sum(axis=0), moments.gaps.sum(axis=0))
    return Sums(phase_slope, ifft2(probe_slope * travelled.conj()), lit, *totals, float(loss), len(where)), moments


def geometry_slopes(entry: Array, gaps: Array, geometry: Geometry, stack: Stack, tilt_rad_xy: Array) -> Array:
    """Return dL/d(theta_x, theta_y, dz), (..., 3), from moments (..., 3) summed as ``tilt_rad_xy`` (..., 2) is."""
    thickness = geometry.slice_thickness_angstrom
    inside = geometry_gradient(gaps, stack.wavelength, thickness, tilt_rad_xy)
    ahead = geometry_gradient(entry, stack.wavelength, thickness, tilt_rad_xy, stack.entry, stack.entry_drift)
    return inside + ahead


def focus_slope(entry: Array, wavelength: float) -> Array:
    """Return dL/dC1 per Å: a probe of defocus C1 carries the phase -pi lambda C1 |k|²."""
    return -np.pi * wavelength * entry[..., 2]


def patterns(phase: Array, probe: Array, geometry: Geometry, stack: Stack, where: np.ndarray) -> Array:
    """Return the model's patterns (position, ky, kx), zero frequency first, of the positions ``where``."""
    xp = array_namespace(phase)
    modes = len(probe)
    transmission = _transmission(phase, stack, probe)
    slices = [transmission[0]] * stack.slices if len(transmission) == 1 else transmission
    corners = to_device_of(np.repeat(stack.grid.corners[where], modes, axis=0), probe)
    waves = _entering(probe, geometry, stack, where)
    spectra, _, _ = between.forward(waves, slices, corners, propagators_of(geometry, stack, where, probe))
    return (xp.abs(spectra) ** 2).reshape(len(where), modes, *spectra.shape[1:]).sum(axis=1)


def illumination(probe: Array, geometry: Geometry, stack: Stack, where: np.ndarray) -> Array:
    """Return the sum over the positions ``where`` of the intensity on the first slice, (Y, X)."""
    total = array_namespace(probe).zeros(stack.grid.shape_yx, dtype=real_dtype(probe))
    chunk = max(1, together_bytes(probe) // probe.nbytes)
    for start in range(0, len(where), chunk):
        batch = where[start : start + chunk]
        corners = to_device_of(np.repeat(stack.grid.corners[batch], len(probe), axis=0), probe)
        patches.illuminate(_entering(probe, geometry, stack, batch), corners, total)
    return total


def entering_probe(probe: Array, geometry: Geometry, stack: Stack) -> Array:
    """Return the modes (mode, y, x) on the first slice in the object's frame, for one tilt of the whole specimen."""
    drift = stack.entry_drift * _drift(geometry, np.zeros(1, dtype=int), probe)
    ramp = drift_ramps(drift, probe.shape[-2:], stack.grid.pixel_angstrom_yx, probe)[0]
    return ifft2(fft2(probe) * _entry_propagator(geometry, stack, probe) * ramp)


def _entering(probe: Array, geometry: Geometry, stack: Stack, where: np.ndarray) -> Array:
    before = fft2(probe) * _entry_propagator(geometry, stack, probe)
    ramps = _ramps(geometry, stack, where, probe)
    return ifft2((before * ramps[:, None]).reshape(-1, *probe.shape[1:]))


def _entry_propagator(geometry: Geometry, stack: Stack, like: Array) -> Array:
    # A defocus is the phase of so much free space.
    distance = stack.entry * geometry.slice_thickness_angstrom + geometry.c1_angstrom
    shape, pixel = like.shape[-2:], stack.grid.pixel_angstrom_yx
    return to_device_of(fresnel_propagator(shape, pixel, stack.wavelength, distance, dtype=like.dtype), like)


def _drift(geometry: Geometry, where: np.ndarray, like: Array) -> Array:
    """Drift of the columns over one slice thickness, (position, 2), x and y in Å; or (1, 2) for one tilt of all."""
    tilt = np.atleast_2d(geometry.tilt_rad_xy)
    tilt = tilt if len(tilt) == 1 else tilt[where]
    return to_device_of(geometry.slice_thickness_angstrom * np.tan(tilt), like)


def _ramps(geometry: Geometry, stack: Stack, where: np.ndarray, like: Array) -> Array:
    pixel = stack.grid.pixel_angstrom_yx
    there = stack.grid.shifts_px[where] * np.asarray(pixel)[::-1]
    drift = stack.entry_drift * _drift(geometry, where, like) - to_device_of(there, like)
    return drift_ramps(drift, like.shape[-2:], pixel, like)


def propagators_of(geometry: Geometry, stack: Stack, where: np.ndarray, like: Array) -> list[Array]:
    """H of every gap in its order: (ky, kx) for one tilt of all, else (position x mode, ky, kx)."""
    found = {distance: _propagator(geometry, stack, where, like, distance) for distance in set(stack.distances)}
    return [found[distance] for distance in stack.distances]


def _transmission(phase: Array, stack: Stack, probe: Array) -> Array:
    """T (1, Y, X) of tied slices that are alike, else (slice, Y, X)."""
    if stack.tied and stack.weights is not None:
        phase = weighted(phase, stack.weights)
    return array_namespace(phase).exp(1j * phase).astype(probe.dtype)


def _over_gaps(moments: Array, stack: Stack) -> Array:
    """Sum moments (gap, position, 3) over gaps, as far as each is from being a whole one: (position, 3)."""
    if stack.weights is None:
        return moments.sum(axis=0)
    xp = array_namespace(moments)
    return xp.tensordot(xp.asarray(stack.distances), moments, axes=1)


def _propagator(geometry: Geometry, stack: Stack, where: np.ndarray, like: Array, distance: float) -> Array:
    shape, pixel = like.shape[-2:], stack.grid.pixel_angstrom_yx
    thickness = distance * geometry.slice_thickness_angstrom
    straight = to_device_of(fresnel_propagator(shape, pixel, stack.wavelength, thickness, dtype=like.dtype), like)
    ramps = drift_ramps(distance * _drift(geometry, where, like), shape, pixel, like)
    if len(np.atleast_2d(geometry.tilt_rad_xy)) == 1:
        return straight * ramps[0]
    return array_namespace(like).repeat(straight * ramps, len(like), axis=0)
