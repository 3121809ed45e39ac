"""Free-space propagation between slices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from stemtomo.backend import Array
from stemtomo.kernels.fourier import Transfer, convolve
from stemtomo.physics.probe import reciprocal_grid


def fresnel_propagator(
    shape_yx: tuple[int, int],
    pixel_angstrom_yx: tuple[float, float],
    wavelength: float,
    thickness_angstrom: float,
    tilt_rad_xy: tuple[float, float] = (0.0, 0.0),
    dtype: np.dtype | type = np.complex64,
) -> np.ndarray:
    """Return H(k) = exp(-i pi dz (lambda |k|² - 2 k . tan(theta))), (ky, kx), zero frequency first.

    A tilt theta of the specimen off the beam is, to about 1 degree, a shift of each slice by dz tan(theta): columns
    drift to +x, +y with depth for positive tilts (Sha et al., Sci. Adv. 8, eabn2275 (2022), eq. 2). H is unitary: its
    adjoint is its conjugate.
    """
    ky, kx = reciprocal_grid(shape_yx, pixel_angstrom_yx)
    drift = 2 * (kx * math.tan(tilt_rad_xy[0]) + ky * math.tan(tilt_rad_xy[1]))
    phase = -math.pi * thickness_angstrom * (wavelength * (kx**2 + ky**2) - drift)
    return np.exp(1j * phase).astype(dtype)


def propagate(waves: Array, propagator: Array | Transfer) -> Array:
    """Return ``waves`` (..., y, x) after the distance of ``propagator`` (ky, kx); consumes ``waves``."""
    return convolve(waves, propagator)


def propagate_adjoint(waves: Array, propagator: Array | Transfer) -> Array:
    """Adjoint (and inverse) of :func:`propagate`; consumes ``waves``."""
    return convolve(waves, propagator, adjoint=True)


def prepared(propagators: Sequence[Array]) -> list[Transfer]:
    """Return ``propagators`` laid out for many calls; gaps that share an array share the layout."""
    found = {id(propagator): Transfer(propagator) for propagator in propagators}
    return [found[id(propagator)] for propagator in propagators]
