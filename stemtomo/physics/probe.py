"""Coherent probes on the grid of the object."""

from __future__ import annotations

import math

import numpy as np

from stemtomo.backend import Array, array_namespace, real_dtype
from stemtomo.geometry import Optics
from stemtomo.kernels import patches
from stemtomo.kernels.fourier import fft2, ifft2
from stemtomo.physics.aberrations import aberration_phase
from stemtomo.physics.electron import wavelength_angstrom


def reciprocal_grid(shape_yx: tuple[int, int], pixel_angstrom_yx: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Return (ky, kx) in 1/Å as a column and a row, zero frequency first, float64."""
    ky = np.fft.fftfreq(shape_yx[0], pixel_angstrom_yx[0])[:, None]
    kx = np.fft.fftfreq(shape_yx[1], pixel_angstrom_yx[1])[None, :]
    return ky, kx


def aperture(
    optics: Optics, shape_yx: tuple[int, int], pixel_angstrom_yx: tuple[float, float], soft: bool = True
) -> np.ndarray:
    """Return the aperture amplitude A(k), (ky, kx), zero frequency first, between 0 and 1.

    A soft edge falls linearly over one reciprocal pixel, as the area of a pixel that is cut by the edge does; a hard
    one jumps from 1 to 0 on the edge.
    """
    ky, kx = reciprocal_grid(shape_yx, pixel_angstrom_yx)
    k = np.sqrt(ky**2 + kx**2)
    edge = optics.semiangle_rad / wavelength_angstrom(optics.energy_ev)
    if not soft:
        return (k < edge).astype(np.float64)
    pixel = math.sqrt(1 / (shape_yx[0] * pixel_angstrom_yx[0]) / (shape_yx[1] * pixel_angstrom_yx[1]))
    return np.clip((edge - k) / pixel + 0.5, 0.0, 1.0)


def probe_wave(
    optics: Optics,
    shape_yx: tuple[int, int],
    pixel_angstrom_yx: tuple[float, float],
    *,
    plane_z_angstrom: float | None = None,
    intensity: float = 1.0,
    soft_edge: bool = True,
    dtype: np.dtype | type = np.complex64,
) -> np.ndarray:
    """Return the probe's wave (y, x) at laboratory plane z, its centre at index n // 2.

    Parameters
    ----------
    plane_z_angstrom
        Plane in which the wave is wanted; ``None`` is the plane that C10 refers to. Down the beam the probe goes
        further over focus: C10 grows by z - defocus_plane_z.
    intensity
        Sum of |probe|², in electrons.
    """
    wavelength = wavelength_angstrom(optics.energy_ev)
    ky, kx = reciprocal_grid(shape_yx, pixel_angstrom_yx)
    drift = 0.0 if plane_z_angstrom is None else plane_z_angstrom - optics.defocus_plane_z_angstrom
    aberrations = {**optics.aberrations, "C10": optics.c1_angstrom + drift}
    magnitude = aperture(optics, shape_yx, pixel_angstrom_yx, soft_edge)
    spectrum = magnitude * np.exp(-1j * aberration_phase(kx, ky, wavelength, aberrations))
    spectrum *= math.sqrt(intensity / np.sum(np.abs(spectrum) ** 2))
    return np.ascontiguousarray(np.fft.fftshift(ifft2(spectrum)).astype(dtype))


def shift_ramps(shifts_px: Array, shape_yx: tuple[int, int], like: Array) -> tuple[Array, Array]:
    """Return the factors exp(-2 pi i k.s) that shift a wave, along y (position, ky) and along x (position, kx).

    ``shifts_px`` is (position, 2), columns x, y, in pixels. The Nyquist lines carry no phase, so that a shift is
    unitary and its adjoint is the opposite shift.
    """
    xp = array_namespace(like)
    complex_dtype = np.result_type(real_dtype(like), np.complex64)
    ramps = []
    for column, count in ((1, shape_yx[0]), (0, shape_yx[1])):
        frequency = xp.fft.fftfreq(count)
        if count % 2 == 0:
            frequency[count // 2] = 0.0
        ramps.append(xp.exp(-2j * math.pi * shifts_px[:, column, None] * frequency[None, :]).astype(complex_dtype))
    return ramps[0], ramps[1]


def shift_ramp(shifts_px: Array, shape_yx: tuple[int, int], like: Array) -> Array:
    """Return the spectra exp(-2 pi i k.s) of :func:`shift_ramps`, (position, ky, kx)."""
    along_y, along_x = shift_ramps(shifts_px, shape_yx, like)
    return along_y[:, :, None] * along_x[:, None, :]


def shifted_probes(probes: Array, shifts_px: Array) -> Array:
    """Return copies of ``probes`` (mode, y, x) shifted by ``shifts_px`` (position, 2; x, y): (position, mode, y, x).

    A single ``probe`` (y, x) gives (position, y, x).
    """
    if probes.ndim == 2:
        return shifted_probes(probes[None], shifts_px)[:, 0]
    ramps = shift_ramps(shifts_px, probes.shape[-2:], probes)
    return ifft2(patches.shift(fft2(probes), *ramps), overwrite=True)


def shifted_probes_adjoint(gradients: Array, shifts_px: Array) -> Array:
    """Adjoint of :func:`shifted_probes`: sum of ``gradients`` (position, mode, y, x) shifted back; consumes them."""
    if gradients.ndim == 3:
        return shifted_probes_adjoint(gradients[:, None], shifts_px)[0]
    ramps = shift_ramps(shifts_px, gradients.shape[-2:], gradients)
    return ifft2(patches.shift_adjoint(fft2(gradients, overwrite=True), *ramps), overwrite=True)
