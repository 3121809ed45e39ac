"""Test specimens and images of local-orbital tomography: amorphous particles, and their focal tilt series."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.spatial import cKDTree

from stemtomo.algorithms.local_orbital.model import FocalSeries, Orbitals, images_of, slices_for
from stemtomo.algorithms.local_orbital.probes import start_probes
from stemtomo.errors import ConfigurationError
from stemtomo.geometry import Optics

_PUSH, _PULL, _ROUNDS = 0.55, 0.3, 4000
#: Atoms per Å3 of amorphous silicon.
SILICON_DENSITY = 0.05
_FINE_ANGSTROM = 0.5


def amorphous_particle(
    count: int,
    *,
    nearest_angstrom: tuple[float, float] = (2.32, 2.36),
    density: float = SILICON_DENSITY,
    seed: int = 0,
) -> np.ndarray:
    """Return positions (atom, 3) in Å of a spherical amorphous particle around the origin.

    Every atom's nearest neighbour lies within ``nearest_angstrom`` (2.32 to 2.36 Å for silicon, Mao et al. 2024).

    Raises
    ------
    ConfigurationError
        If no such particle is found: the density is too high for these distances.
    """
    rng = np.random.default_rng(seed)
    radius = (3 * count / (4 * np.pi * density)) ** (1 / 3)
    direction = rng.normal(size=(count, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    positions = direction * radius * rng.uniform(size=(count, 1)) ** (1 / 3)
    low, high = nearest_angstrom
    middle = (low + high) / 2
    for _ in range(_ROUNDS):
        tree = cKDTree(positions)
        pairs = tree.query_pairs(middle, output_type="ndarray")
        distance, index = tree.query(positions, k=2)
        nearest = distance[:, 1]
        if nearest.min() >= low and nearest.max() <= high:
            return positions - positions.mean(axis=0)
        step = np.zeros_like(positions)
        apart = positions[pairs[:, 0]] - positions[pairs[:, 1]]
        length = np.maximum(np.linalg.norm(apart, axis=1), 1e-6)
        push = apart / length[:, None] * (_PUSH * (middle - length))[:, None]
        for axis in range(3):
            step[:, axis] += np.bincount(pairs[:, 0], push[:, axis], count)
            step[:, axis] -= np.bincount(pairs[:, 1], push[:, axis], count)
        lonely = np.flatnonzero(nearest > middle)
        towards = positions[index[lonely, 1]] - positions[lonely]
        step[lonely] += _PULL * towards * (1 - middle / nearest[lonely])[:, None]
        positions = positions + step
        outside = np.linalg.norm(positions, axis=1)
        positions *= np.minimum(1, (radius + 0.5) / np.maximum(outside, 1e-9))[:, None]
    raise ConfigurationError(
        f"{count} atoms at {density:g} per Å3 do not settle with nearest neighbours at {low:g} to {high:g} Å; "
        "lower the density"
    )


def focal_tilt_series(
    positions: np.ndarray,
    optics: Optics,
    rotations: np.ndarray,
    defocus_angstrom: np.ndarray,
    *,
    shape_yx: tuple[int, int],
    pixel_angstrom: float,
    width_angstrom: float | np.ndarray = 0.35,
    intensity: float | np.ndarray = 1.0,
    electrons_per_atom: float | None = None,
    window_px: int = 48,
    seed: int = 0,
    dtype: type = np.float32,
) -> FocalSeries:
    """Return incoherent images of ``positions`` at every tilt (tilt, 3, 3) and focus, all foci of a tilt together.

    The probe is that of ``optics``, followed in steps of 0.5 Å through the specimen.

    Parameters
    ----------
    defocus_angstrom
        (section,): what is added to C10.
    width_angstrom
        Standard deviation of an atom: thermal motion and the size of its scattering; one for all, or (atom,).
    intensity
        Signal of an atom in the images' unit, one for all, or (atom,).
    electrons_per_atom
        Electrons that one atom scatters to the detector in an image, for Poisson noise; none if not given. Images are
        in units of one atom's signal.
    """
    extent = 2 * float(np.linalg.norm(positions, axis=1).max())
    slices = slices_for(extent, _FINE_ANGSTROM)
    foci = len(defocus_angstrom)
    series = FocalSeries(
        np.zeros((len(rotations) * foci, *shape_yx), dtype),
        np.repeat(rotations, foci, axis=0),
        np.tile(np.arange(foci), len(rotations)),
        pixel_angstrom,
    )
    count = len(positions)
    model = Orbitals(
        positions,
        np.broadcast_to(np.asarray(intensity, dtype=np.float64), count),
        np.broadcast_to(np.asarray(width_angstrom, dtype=np.float64), count),
        start_probes(optics, defocus_angstrom, slices, _FINE_ANGSTROM, window_px, pixel_angstrom),
        _FINE_ANGSTROM,
        np.zeros((len(series), 2)),
        np.zeros((len(series), 3)),
    )
    return replace(series, images=counted(images_of(model, series), electrons_per_atom, seed))


def counted(images: np.ndarray, electrons_per_atom: float | None, seed: int = 0) -> np.ndarray:
    """Return ``images``, in units of one atom's signal, with the noise of counting so many electrons for it."""
    if electrons_per_atom is None:
        return images
    drawn = np.random.default_rng(seed).poisson(np.maximum(images, 0) * electrons_per_atom)
    return (drawn / electrons_per_atom).astype(images.dtype)
