"""Annular dark-field images by frozen-phonon multislice: test data that owe nothing to the model of local orbitals.

Atoms scatter a coherent wave here, one after the other along the beam; electrons that end between two angles count.
Channelling, scattering by several atoms and interference between neighbours are in these images and not in the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stemtomo.errors import ConfigurationError
from stemtomo.geometry import Optics
from stemtomo.physics import multislice
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.physics.potential import BAND_LIMIT, slice_potentials, transmission_functions
from stemtomo.physics.probe import probe_wave, reciprocal_grid
from stemtomo.physics.propagation import fresnel_propagator, prepared

_BATCH = 4  # probes that go through the specimen together: their waves stay in the processor's cache
_BESIDE_ANGSTROM = 4.0  # probes further than this from every atom's column scatter nothing


@dataclass(frozen=True)
class DarkField:
    """The microscope of :func:`dark_field_image`, and how finely it is computed.

    Parameters
    ----------
    optics
        The probe; its C1 refers to its plane in the laboratory.
    inner_mrad, outer_mrad
        The detector. Mao et al. (2024): 30 and 195 mrad. Beyond two thirds of the grid's Nyquist nothing is scattered.
    finer
        Pixels of the waves per pixel of the image.
    window_px
        Edge of the window that holds a probe, in these finer pixels.
    slice_thickness_angstrom
        Of the generator; 2 Å in Mao et al.
    phonon_rms_angstrom
        Thermal displacement along one axis; 0.078 Å is silicon at room temperature.
    configurations
        Frozen-phonon configurations that an image averages.
    """

    optics: Optics
    inner_mrad: float = 30.0
    outer_mrad: float = 195.0
    finer: int = 3
    window_px: int = 96
    slice_thickness_angstrom: float = 2.0
    phonon_rms_angstrom: float = 0.078
    configurations: int = 1


def dark_field_image(
    positions: np.ndarray,
    atomic_numbers: np.ndarray,
    rotation: np.ndarray,
    setup: DarkField,
    *,
    shape_yx: tuple[int, int],
    pixel_angstrom: float,
    seed: int = 0,
) -> np.ndarray:
    """Return the image (y, x) of atoms seen at ``rotation``: the share of a probe's electrons on the detector.

    Parameters
    ----------
    positions
        (atom, 3), x, y, z in Å around the rotation centre, which is at index n // 2 of the image.
    rotation
        R: a feature at r is seen at R^T r.
    seed
        Of the vibrations.

    Raises
    ------
    ConfigurationError
        If the detector lies beyond what the grid scatters to.
    """
    fine = pixel_angstrom / setup.finer
    wavelength = wavelength_angstrom(setup.optics.energy_ev)
    limit_mrad = 1e3 * BAND_LIMIT / (2 * fine) * wavelength
    if setup.inner_mrad >= limit_mrad:
        raise ConfigurationError(
            f"a detector from {setup.inner_mrad:g} mrad sees nothing: waves on pixels of {fine:.3g} Å scatter to "
            f"{limit_mrad:.3g} mrad; raise finer"
        )
    window = (setup.window_px, setup.window_px)
    ky, kx = reciprocal_grid(window, (fine, fine))
    angle_mrad = 1e3 * wavelength * np.sqrt(ky**2 + kx**2)
    seen = ((angle_mrad >= setup.inner_mrad) & (angle_mrad < setup.outer_mrad)).astype(np.float32).ravel()
    lab = positions @ rotation
    rng = np.random.default_rng(seed)
    total = np.zeros(shape_yx)
    for _ in range(setup.configurations):
        moved = lab + rng.normal(0, setup.phonon_rms_angstrom, lab.shape)
        total += _one_configuration(moved, np.asarray(atomic_numbers), setup, fine, seen, shape_yx)
    return total / setup.configurations


def _one_configuration(
    lab: np.ndarray, numbers: np.ndarray, setup: DarkField, fine: float, seen: np.ndarray, shape_yx: tuple[int, int]
) -> np.ndarray:
    step = setup.slice_thickness_angstrom
    top = float(lab[:, 2].min()) - step / 2
    edges = top + step * np.arange(math.ceil((float(lab[:, 2].max()) - top) / step) + 1)
    edges[-1] += 1e-6
    margin = setup.window_px // 2 + 1
    field = (setup.finer * shape_yx[0] + 2 * margin, setup.finer * shape_yx[1] + 2 * margin)
    # The field's centre is where the image's centre pixel is.
    centre = [setup.finer * (n // 2) + margin for n in shape_yx]
    offset = np.array([centre[1] - field[1] // 2, centre[0] - field[0] // 2]) * fine
    placed = lab.copy()
    placed[:, :2] += offset
    potentials = slice_potentials(placed, numbers, field, (fine, fine), edges)
    transmission = transmission_functions(potentials, setup.optics.energy_ev)
    window = (setup.window_px, setup.window_px)
    wavelength = wavelength_angstrom(setup.optics.energy_ev)
    gap = fresnel_propagator(window, (fine, fine), wavelength, step)
    propagators = prepared([gap] * (len(transmission) - 1))
    probe = probe_wave(setup.optics, window, (fine, fine), plane_z_angstrom=float(edges[0]) + step / 2)
    pixel = fine * setup.finer
    where = _near(lab, shape_yx, pixel)
    out = np.zeros(shape_yx)
    for start in range(0, len(where), _BATCH):
        chosen = where[start : start + _BATCH]
        corners = (chosen * setup.finer + margin - setup.window_px // 2).astype(np.int64)
        waves = np.ascontiguousarray(np.broadcast_to(probe, (len(chosen), *window)))
        patterns = multislice.intensities(waves, transmission, corners, propagators)
        out[chosen[:, 0], chosen[:, 1]] = patterns.reshape(len(chosen), -1) @ seen
    return out


def _near(lab: np.ndarray, shape_yx: tuple[int, int], pixel: float) -> np.ndarray:
    """Return rows and columns (probe, 2) of the image's pixels in the disc that the specimen fills."""
    rows, columns = np.indices(shape_yx).reshape(2, -1)
    x, y = (columns - shape_yx[1] // 2) * pixel, (rows - shape_yx[0] // 2) * pixel
    reach = float(np.linalg.norm(lab[:, :2], axis=1).max()) + _BESIDE_ANGSTROM
    inside = x**2 + y**2 <= reach**2
    return np.stack([rows[inside], columns[inside]], axis=1)
