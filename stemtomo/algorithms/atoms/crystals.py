"""Crystals that atoms are registered with: a cell, its atoms, and its reflections."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stemtomo.errors import ConfigurationError


class Reflections(NamedTuple):
    """Reflections: Miller indices (n, 3), vectors in 1/Å (n, 3) x, y, z, complex structure factors (n,)."""

    indices: np.ndarray
    vectors: np.ndarray
    factors: np.ndarray


@dataclass(frozen=True)
class Crystal:
    """A crystal.

    Parameters
    ----------
    name
        What to call it.
    cell
        Rows are the edges a, b, c in Å, (3, 3).
    fractional
        Atoms of the cell in units of the edges, (atom, 3), in [0, 1).
    symbols
        Their elements.
    weights
        How strongly they scatter, (atom,); atomic numbers, or one for all.
    """

    name: str
    cell: np.ndarray
    fractional: np.ndarray
    symbols: tuple[str, ...]
    weights: np.ndarray

    @property
    def reciprocal(self) -> np.ndarray:
        """Rows are the reciprocal edges in 1/Å (without 2 pi), (3, 3)."""
        return np.linalg.inv(self.cell).T

    @property
    def nearest_angstrom(self) -> float:
        """Distance of nearest neighbours in Å."""
        shifts = np.array(list(itertools.product((-1, 0, 1), repeat=3)))
        delta = (self.fractional[:, None, None] - self.fractional[None, :, None] - shifts) @ self.cell
        distance = np.sqrt((delta**2).sum(axis=-1))
        return float(distance[distance > 1e-6].min())

    def only(self, species: tuple[str, ...] | None) -> Crystal:
        """Return the crystal with these ``species`` alone; all if ``None``.

        Raises
        ------
        ConfigurationError
            If it has none of them.
        """
        if species is None:
            return self
        chosen = np.isin(self.symbols, species)
        if not chosen.any():
            raise ConfigurationError(f"{self.name} has the species {sorted(set(self.symbols))}, not {list(species)}")
        symbols = tuple(np.array(self.symbols)[chosen].tolist())
        return Crystal(self.name, self.cell, self.fractional[chosen], symbols, self.weights[chosen])

    def reflections(self, highest_inv_angstrom: float) -> Reflections:
        """Return the reflections up to ``highest_inv_angstrom`` that are not extinct, weakest 1 % left out."""
        reach = np.ceil(highest_inv_angstrom * np.linalg.norm(self.cell, axis=1)).astype(int)
        axes = [np.arange(-n, n + 1) for n in reach]
        indices = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
        vectors = indices @ self.reciprocal
        length = np.linalg.norm(vectors, axis=1)
        near = (length > 1e-9) & (length <= highest_inv_angstrom)
        indices, vectors = indices[near], vectors[near]
        factors = np.exp(-2j * np.pi * (indices @ self.fractional.T)) @ self.weights
        strong = np.abs(factors) > 0.01 * self.weights.sum()
        return Reflections(indices[strong], vectors[strong], factors[strong])


_HALVES = ((0, 0, 0), (0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0))
_QUARTER = (0.25, 0.25, 0.25)


def _fcc(*points: tuple[float, float, float]) -> list[tuple[float, float, float]]:
    return [tuple((np.array(p) + h) % 1.0) for p in points for h in _HALVES]


def _spinel_oxygen(u: float) -> list[tuple[float, float, float]]:
    """32e of Fd-3m with a tetrahedral site at the origin: four anions about each of the two such sites of a cell."""
    tetrahedron = np.array([(1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)]) * (u - 0.125)
    points = [tuple(-t) for t in tetrahedron] + [tuple(np.array(_QUARTER) + t) for t in tetrahedron]
    return _fcc(*points)


#: Structures by name: groups of sites, and how many species they take.
_STRUCTURES: dict[str, list[list[tuple[float, float, float]]]] = {
    "sc": [[(0, 0, 0)]],
    "bcc": [[(0, 0, 0), (0.5, 0.5, 0.5)]],
    "fcc": [_fcc((0, 0, 0))],
    "diamond": [_fcc((0, 0, 0), _QUARTER)],
    "zincblende": [_fcc((0, 0, 0)), _fcc(_QUARTER)],
    "rocksalt": [_fcc((0, 0, 0)), _fcc((0.5, 0.5, 0.5))],
    "cscl": [[(0, 0, 0)], [(0.5, 0.5, 0.5)]],
    "L1_0": [[(0, 0, 0), (0.5, 0.5, 0)], [(0.5, 0, 0.5), (0, 0.5, 0.5)]],
    "L1_2": [[(0, 0, 0)], [(0.5, 0.5, 0), (0.5, 0, 0.5), (0, 0.5, 0.5)]],
    "perovskite": [[(0, 0, 0)], [(0.5, 0.5, 0.5)], [(0.5, 0.5, 0), (0.5, 0, 0.5), (0, 0.5, 0.5)]],
    "spinel": [
        _fcc((0, 0, 0), _QUARTER),
        _fcc((0.625, 0.625, 0.625), (0.625, 0.875, 0.875), (0.875, 0.625, 0.875), (0.875, 0.875, 0.625)),
        _spinel_oxygen(0.2631),
    ],
}
STRUCTURES = tuple(_STRUCTURES)


def named_crystal(
    structure: str,
    a_angstrom: float,
    species: tuple[str, ...],
    weights: tuple[float, ...],
    c_angstrom: float | None = None,
    oxygen_u: float = 0.2631,
) -> Crystal:
    """Return a crystal of the cubic (or, with ``c_angstrom``, tetragonal) ``structure``.

    Parameters
    ----------
    structure
        One of :data:`STRUCTURES`.
    a_angstrom
        Edge of the conventional cell.
    species, weights
        One element per kind of site, in the order of the usual formula (spinel: tetrahedral, octahedral, anion), and
        how strongly it scatters; one species stands for all kinds.
    oxygen_u
        Anion parameter of spinel, origin at -3m (0.2631 in Co3O4).

    Raises
    ------
    ConfigurationError
        If the structure is not known or has another number of species.
    """
    kinds = _STRUCTURES.get(structure)
    if kinds is None:
        raise ConfigurationError(f"{structure!r} is not a known structure: {', '.join(STRUCTURES)}; or give a CIF file")
    if structure == "spinel":
        kinds = [*kinds[:2], _spinel_oxygen(oxygen_u)]
        if len(species) == 2:  # Co3O4: the same metal on both kinds of sites
            species, weights = (species[0], *species), (weights[0], *weights)
    if len(species) == 1:
        species, weights = species * len(kinds), weights * len(kinds)
    if len(species) != len(kinds) or not a_angstrom > 0:
        raise ConfigurationError(
            f"{structure} has {len(kinds)} kinds of sites; {len(species)} species and a = {a_angstrom} Å were given"
        )
    fractional = np.array([site for kind in kinds for site in kind])
    symbols = tuple(name for name, kind in zip(species, kinds, strict=True) for _ in kind)
    each = np.array([w for w, kind in zip(weights, kinds, strict=True) for _ in kind], dtype=float)
    c = a_angstrom if c_angstrom is None else c_angstrom
    return Crystal(structure, np.diag([a_angstrom, a_angstrom, c]), fractional, symbols, each)
