"""The probe of a tilt in joint tomography: at its first slice, its light, its steps and the slope of its focus."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from stemtomo import backend
from stemtomo.algorithms.joint import solver
from stemtomo.algorithms.joint.pose import focus_slope
from stemtomo.algorithms.joint.view import View
from stemtomo.algorithms.ptychography.noise import mean_curvature
from stemtomo.algorithms.ptychography.solver import illumination
from stemtomo.backend import Array
from stemtomo.kernels.patches import Loss
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.physics.probe import reciprocal_grid
from stemtomo.physics.propagation import fresnel_propagator, propagate
from stemtomo.pipeline.joint_parts import Tilt


def on_device(array: np.ndarray) -> Array:
    """Return ``array`` in the memory of the GPU, where this worker has one."""
    return backend.to_device(array) if backend.gpu_available() else array


def seen_curvature(probe: Array, loss: Loss, most_electrons: float) -> float:
    """Return the curvature of the loss in the modulus of waves, where patterns look like those of ``probe``.

    More than ``most_electrons`` are compared as if they were so many.
    """
    intensity = np.square(np.abs(np.fft.fft2(backend.to_host(probe), norm="ortho"))).sum(axis=0)
    return mean_curvature(intensity * min(1.0, most_electrons / float(intensity.sum())), loss)


def peak_light(probe: Array, view: View, tilt: Tilt) -> float:
    """Return the peak of the illumination of all positions on the first slice."""
    return float(illumination(at_first_slice(probe, view, tilt), tilt.grid).max())


def focus_slope_task(sums: dict[str, Any], view: View, probe: Array, tilt: Tilt) -> float:
    """Return the slope of the loss per Å of focus from the ``sums`` of a visit."""
    pixel = (tilt.view.box.voxel_angstrom, tilt.view.box.voxel_angstrom)
    ky, kx = reciprocal_grid(probe.shape[-2:], pixel)
    # The derivative of a propagator per Å, over the propagator.
    factor = -1j * math.pi * wavelength_angstrom(tilt.optics.energy_ev) * (ky**2 + kx**2)
    per_angstrom = to_first_slice(probe, view, tilt) * on_device(factor.astype(probe.dtype))
    return focus_slope(propagate(on_device(probe).copy(), per_angstrom), sums["probe"])


def at_first_slice(probe: Array, view: View, tilt: Tilt) -> Array:
    """Return ``probe`` (mode, y, x), told in the plane of the rotation centre, at the first slice of ``view``."""
    return propagate(on_device(probe).copy(), to_first_slice(probe, view, tilt))


def to_first_slice(probe: Array, view: View, tilt: Tilt) -> Array:
    """Return H(k) from the plane of the rotation centre to the first slice of ``view``."""
    pixel = (view.box.voxel_angstrom, view.box.voxel_angstrom)
    wavelength = wavelength_angstrom(tilt.optics.energy_ev)
    distance = view.first_slice_z_angstrom + view.focus_angstrom
    return on_device(fresnel_propagator(probe.shape[-2:], pixel, wavelength, distance, dtype=probe.dtype))


def new_probe(probe: Array, visit: dict[str, Any], view: View, tilt: Tilt, step: float, curvature: float) -> Array:
    """Return ``probe`` after one step along the gradient that a ``visit`` summed."""
    gradient = propagate(visit["probe"].copy(), to_first_slice(probe, view, tilt).conj())
    return solver.probe_step(probe, gradient, visit["positions"], step, curvature)
