"""Propagation between slices as something to be fitted: spectra kept in every gap, and what their gradient says.

A gap's propagator is a phase on the spectrum, H = exp(i phi(k)) with phi = -pi dz (lambda |k|² - 2 k . tan(theta)).
With the spectrum U behind the gap and the gradient B of it, dL/dphi(k) is -Im(conj(B) U); its moments against kx, ky
and |k|² are all that tilt and thickness need. Source: Sha et al., Sci. Adv. 8, eabn2275 (2022), eq. 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from stemtomo.backend import Array, array_namespace, real_dtype, to_device_of
from stemtomo.kernels import patches
from stemtomo.kernels.fourier import fft2, ifft2
from stemtomo.physics.probe import reciprocal_grid


def forward(
    probes: Array, transmission: Sequence[Array], corners: Array, propagators: Sequence[Array]
) -> tuple[Array, list[Array], list[Array]]:
    """Propagate as :func:`stemtomo.physics.multislice.forward`, keeping the spectra in the gaps.

    Parameters
    ----------
    propagators
        H(k) of each gap, (ky, kx), or (position, ky, kx) where it differs from position to position.

    Returns
    -------
    spectra, incident
        As there.
    behind
        Spectrum behind each gap, (position, ky, kx).
    """
    incident, behind = [probes], []
    for layer, propagator in zip(transmission[:-1], propagators, strict=True):
        spectrum = fft2(patches.transmit(incident[-1], layer, corners), overwrite=True)
        spectrum *= propagator
        behind.append(spectrum)
        incident.append(ifft2(spectrum))
    return fft2(patches.transmit(incident[-1], transmission[-1], corners), overwrite=True), incident, behind


def adjoint(
    spectra_gradient: Array,
    incident: Sequence[Array],
    behind: Sequence[Array],
    transmission: Sequence[Array],
    corners: Array,
    propagators: Sequence[Array],
    transmission_gradient: Sequence[Array],
    pixel_angstrom_yx: tuple[float, float],
    moments: Array,
) -> Array:
    """Carry a gradient on the detector back, as :func:`stemtomo.physics.multislice.adjoint`, at no further transform.

    Adds each gap's moments to ``moments`` (gap, position, 3), float64: see :func:`gap_moments`.
    """
    gradient = ifft2(spectra_gradient, overwrite=True)
    for index in range(len(transmission) - 1, -1, -1):
        patches.transmit_adjoint(gradient, incident[index], transmission[index], corners, transmission_gradient[index])
        if index:
            spectrum = fft2(gradient, overwrite=True)
            gap_moments(spectrum, behind[index - 1], pixel_angstrom_yx, moments[index - 1])
            spectrum *= propagators[index - 1].conj()
            gradient = ifft2(spectrum, overwrite=True)
    return gradient


def gap_moments(
    gradient_spectrum: Array, spectrum: Array, pixel_angstrom_yx: tuple[float, float], moments: Array
) -> None:
    """Add each position's gradient in the phase of a propagator, summed against kx, ky and |k|², to ``moments``.

    ``spectrum`` is U behind the gap, (position, ky, kx); ``moments`` is (position, 3), float64.
    """
    ky, kx = (to_device_of(k.ravel(), moments) for k in reciprocal_grid(spectrum.shape[-2:], pixel_angstrom_yx))
    slope = gradient_spectrum.imag * spectrum.real
    slope -= gradient_spectrum.real * spectrum.imag
    over_y, over_x = slope.sum(axis=-2), slope.sum(axis=-1)
    moments[:, 0] += over_y @ kx
    moments[:, 1] += over_x @ ky
    moments[:, 2] += over_y @ (kx * kx) + over_x @ (ky * ky)


def geometry_gradient(
    moments: Array,
    wavelength: float,
    thickness_angstrom: float,
    tilt_rad_xy: Array,
    travel: float = 1.0,
    drift: float = 1.0,
) -> Array:
    """Return dL/d(theta_x, theta_y, dz), (..., 3), per rad and per Å, from :func:`gap_moments` (..., 3) of a gap.

    Both are sums: over positions for one tilt of the whole specimen, per position for a map of tilts (..., 2); over
    gaps where these are alike. In the gap the wave goes ``travel`` times the thickness, and columns drift by ``drift``
    times what they do over one thickness.
    """
    xp = array_namespace(moments)
    slope = xp.tan(to_device_of(np.asarray(tilt_rad_xy, dtype=np.float64), moments))
    gradient = xp.empty_like(moments)
    gradient[..., :2] = 2 * math.pi * drift * thickness_angstrom * (1 + slope**2) * moments[..., :2]
    drifted = (slope * moments[..., :2]).sum(axis=-1)
    gradient[..., 2] = math.pi * (2 * drift * drifted - travel * wavelength * moments[..., 2])
    return gradient


def drift_ramps(
    drift_angstrom_xy: Array, shape_yx: tuple[int, int], pixel_angstrom_yx: tuple[float, float], like: Array
) -> Array:
    """Return exp(2 pi i k.d), (position, ky, kx): what a drift d (position, 2; x, y) of columns does to spectra.

    It is the tilt's part of H with d = dz tan(theta), and carries a wave by -d.
    """
    xp = array_namespace(like)
    ky, kx = (to_device_of(k.ravel(), like) for k in reciprocal_grid(shape_yx, pixel_angstrom_yx))
    dtype = np.result_type(real_dtype(like), np.complex64)
    ramp_y = xp.exp(2j * math.pi * drift_angstrom_xy[:, 1, None] * ky).astype(dtype)
    ramp_x = xp.exp(2j * math.pi * drift_angstrom_xy[:, 0, None] * kx).astype(dtype)
    return ramp_y[:, :, None] * ramp_x[:, None, :]
