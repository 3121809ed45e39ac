"""Registration of atoms with a known crystal: orientation, strain, origin; which site each is on; which are empty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.spatial import cKDTree

from stemtomo.algorithms.atoms.bragg import atom_density, orientation, refine_matrix, spectrum, translation
from stemtomo.algorithms.atoms.crystals import Crystal
from stemtomo.errors import ConfigurationError

_SEED_ATOMS = 20_000
_CHUNK = 50_000
#: Parts of the distance of nearest neighbours: what counts as on a site while the lattice is being fitted, and after.
_FIT_TOLERANCE, _TOLERANCE = 0.3, 0.4
_SWEEPS = 30
_CLOSINGS = 3
_PAD = 5
_AROUND = (2.05, 3.05)
_PERCEPTRON_STEPS = 100


@dataclass(frozen=True)
class Registration:
    """Where a crystal lies in the sample: r = ``matrix`` c + ``translation``, both in Å, columns x, y, z."""

    crystal: Crystal
    matrix: np.ndarray
    translation: np.ndarray
    reflections: int = 0

    @property
    def rotation(self) -> np.ndarray:
        """Orthogonal part R of matrix = V R, (3, 3): columns are the crystal's axes in the sample."""
        u, _, vt = np.linalg.svd(self.matrix)
        return u @ vt

    @property
    def strain(self) -> np.ndarray:
        """Homogeneous strain V - 1 against the crystal's own cell, in the sample's frame, (3, 3)."""
        return self.matrix @ self.rotation.T - np.eye(3)

    def positions(self, cells: np.ndarray, basis: np.ndarray) -> np.ndarray:
        """Return the sample positions (n, 3) of atoms ``basis`` (n,) of ``cells`` (n, 3)."""
        points = (cells + self.crystal.fractional[basis]) @ self.crystal.cell
        return points @ self.matrix.T + self.translation


class Sites(NamedTuple):
    """Sites that atoms are on: ``cell`` (atom, 3) whole numbers, ``basis`` (atom,), -1 for atoms on none, and
    ``displacement`` (atom, 3) in Å from the registered site.
    """

    cell: np.ndarray
    basis: np.ndarray
    displacement: np.ndarray


class Lattice(NamedTuple):
    """All sites of a specimen.

    ``cell`` (site, 3), ``basis`` (site,), ``atom`` (site,) index of the atom on it or -1, and ``surrounded`` (site,):
    the share of neighbouring sites that are occupied.
    """

    cell: np.ndarray
    basis: np.ndarray
    atom: np.ndarray
    surrounded: np.ndarray


def register_atoms(positions: np.ndarray, crystal: Crystal, rotation: np.ndarray | None = None) -> Registration:
    """Register ``crystal`` with atoms at ``positions`` (atom, 3) in Å.

    Bragg peaks of the middle of the specimen give orientation, strain and origin; a least-squares fit to the atoms near
    sites, from there outwards, refines all. Atoms of the crystal that are not in ``positions`` should be left out of it
    (:meth:`Crystal.only`).

    Parameters
    ----------
    rotation
        Orientation to start from, where it is known.

    Raises
    ------
    ConfigurationError
        If the atoms do not form this crystal.
    """
    centre = np.median(positions, axis=0)
    off = np.abs(positions - centre).max(axis=1)
    side = 2 * float(np.partition(off, min(_SEED_ATOMS, len(off)) - 1)[min(_SEED_ATOMS, len(off)) - 1])
    nearest = crystal.nearest_angstrom
    spacing = nearest / 5
    # Thermal motion and noise leave little beyond this; it holds the first ten or so shells.
    highest = 2.6 / nearest
    found = spectrum(atom_density(positions, centre, side, spacing), spacing)
    unit = Crystal(crystal.name, crystal.cell, crystal.fractional, crystal.symbols, np.ones(len(crystal.symbols)))
    turned = orientation(found, unit, highest) if rotation is None else rotation
    matrix, used = refine_matrix(found, unit, turned, highest)
    origin = centre + translation(found, unit, matrix, highest)
    start = Registration(crystal, matrix, origin, used)
    return _grown(positions, start, centre, side / 4)


def _grown(positions: np.ndarray, start: Registration, centre: np.ndarray, radius: float) -> Registration:
    """Refine ``start`` by the atoms on sites, within a growing radius (Å) about ``centre``."""
    distance = np.linalg.norm(positions - centre, axis=1)
    nearest = start.crystal.nearest_angstrom
    fitted = start
    while True:
        inside = distance <= radius
        for _ in range(2):
            sites = nearest_sites(positions[inside], fitted)
            off = np.linalg.norm(sites.displacement, axis=1)
            near = off < _FIT_TOLERANCE * nearest
            if near.sum() < 12 or near.mean() < 0.3:
                raise ConfigurationError(
                    f"only {near.mean():.0%} of the atoms lie on sites of {start.crystal.name}: check the lattice "
                    "constant and the species, and that the specimen is one crystal"
                )
            near &= off <= 3 * np.median(off[near])
            fitted = fit_affine(positions[inside][near], sites.cell[near], sites.basis[near], fitted)
        if inside.all():
            return fitted
        radius *= 1.5


def fit_affine(positions: np.ndarray, cells: np.ndarray, basis: np.ndarray, start: Registration) -> Registration:
    """Return the registration with the least squared distance of ``positions`` (n, 3) from their sites."""
    crystal = start.crystal
    points = (cells + crystal.fractional[basis]) @ crystal.cell
    middle = points.mean(axis=0)
    design = np.column_stack([points - middle, np.ones(len(points))])
    solved = np.linalg.lstsq(design, positions, rcond=None)[0]
    matrix = solved[:3].T
    return Registration(crystal, matrix, solved[3] - matrix @ middle, start.reflections)


def nearest_sites(positions: np.ndarray, registration: Registration, offset: np.ndarray | None = None) -> Sites:
    """Return the site nearest to each of ``positions`` (n, 3), less ``offset`` (n, 3) where given."""
    crystal = registration.crystal
    to_cell = np.linalg.inv(registration.matrix @ crystal.cell.T).T
    from_cell = (registration.matrix @ crystal.cell.T).T
    cell, basis, displacement = (np.empty((len(positions), 3), int), np.empty(len(positions), int), positions * 0.0)
    for start in range(0, len(positions), _CHUNK):
        part = slice(start, start + _CHUNK)
        at = positions[part] - registration.translation - (0 if offset is None else offset[part])
        best = np.full(len(at), np.inf)
        for number, point in enumerate(crystal.fractional):
            relative = at @ to_cell - point
            whole = np.rint(relative)
            off = (relative - whole) @ from_cell
            distance = (off**2).sum(axis=1)
            better = np.flatnonzero(distance < best)
            best[better] = distance[better]
            cell[start + better], basis[start + better] = whole[better], number
            displacement[start + better] = off[better]
    if offset is not None:
        displacement = displacement + offset
    return Sites(cell, basis, displacement)


def assign_sites(positions: np.ndarray, registration: Registration) -> Sites:
    """Return which site each atom of ``positions`` (atom, 3) is on, one atom a site, -1 for atoms on none.

    Atoms close to a site are assigned first. Others follow from them: a displacement that has grown across the specimen
    is predicted by the mean of the assigned neighbours', so that far from the centre no atom is taken for its
    neighbour's.
    """
    nearest = registration.crystal.nearest_angstrom
    sites = nearest_sites(positions, registration)
    cell, basis, displacement = (column.copy() for column in sites)
    assigned = np.linalg.norm(displacement, axis=1) < 0.2 * nearest
    left = np.flatnonzero(~assigned)
    if len(left):
        distance, index = cKDTree(positions).query(positions[left], k=15, distance_upper_bound=1.6 * nearest)
        index = np.where(np.isfinite(distance), index, 0)[:, 1:]
        there = np.isfinite(distance)[:, 1:]
    for _ in range(_SWEEPS if len(left) else 0):
        known = there & assigned[index]
        count = known.sum(axis=1)
        mean = (displacement[index] * known[..., None]).sum(axis=1) / np.maximum(count, 1)[:, None]
        found = nearest_sites(positions[left], registration, mean)
        off = np.linalg.norm(found.displacement - mean, axis=1)
        new = ~assigned[left] & (count >= 3) & (off < _TOLERANCE * nearest)
        if not new.any():
            break
        atoms = left[new]
        cell[atoms], basis[atoms], displacement[atoms] = (column[new] for column in found)
        assigned[atoms] = True
    basis[~assigned] = -1
    return _one_each(Sites(cell, basis, displacement), len(registration.crystal.fractional))


def _one_each(sites: Sites, kinds: int) -> Sites:
    """Leave of two atoms on one site the one with the smaller displacement."""
    atoms = np.flatnonzero(sites.basis >= 0)
    if len(atoms) == 0:
        return sites
    key = site_keys(
        sites.cell[atoms], sites.basis[atoms], kinds, sites.cell[atoms].min(axis=0), sites.cell[atoms].max(axis=0)
    )
    order = np.lexsort((np.linalg.norm(sites.displacement[atoms], axis=1), key))
    double = np.append(False, np.diff(key[order]) == 0)
    basis = sites.basis.copy()
    basis[atoms[order[double]]] = -1
    return Sites(sites.cell, basis, sites.displacement)


def site_keys(cell: np.ndarray, basis: np.ndarray, kinds: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return one whole number for each site of cells between ``low`` and ``high`` (3,), (n,)."""
    span = high - low + 1
    x, y, z = (cell - low).T
    return np.asarray(((x * span[1] + y) * span[2] + z) * kinds + basis)


def complete_lattice(sites: Sites, crystal: Crystal, least_share: float = 0.3) -> Lattice:
    """Return the occupied sites, and the empty ones that belong to the specimen.

    An empty site belongs to it if the occupied sites around it, out to twice the distance of nearest neighbours,
    enclose it: no plane through it has all of them strictly on one side. So a vacancy is found within a facet and an
    edge, but not at a corner; the space outside a convex specimen, also next to a step, is never enclosed. Besides,
    more than ``least_share`` of the sites around it must be occupied. Vacancies side by side are found in turn.
    """
    atoms = np.flatnonzero(sites.basis >= 0)
    low = sites.cell[atoms].min(axis=0) - _PAD
    shape = (*(sites.cell[atoms].max(axis=0) - low + 1 + _PAD), len(crystal.fractional))
    atom = np.full(shape, -1)
    atom[(*(sites.cell[atoms] - low).T, sites.basis[atoms])] = atoms
    around, wider = (neighbour_offsets(crystal, r * crystal.nearest_angstrom) for r in _AROUND)
    belongs = atom >= 0
    for _ in range(_CLOSINGS):
        share = _share_around(belongs, around)
        candidate = np.argwhere(~belongs & (share > least_share))
        found = share[tuple(candidate.T)] > 0.5
        found |= _enclosed(belongs, candidate, wider, crystal)
        if not found.any():
            break
        belongs[tuple(candidate[found].T)] = True
    share = _share_around(belongs, around)
    chosen = np.argwhere(belongs)
    at = tuple(chosen.T)
    return Lattice(chosen[:, :3] + low, chosen[:, 3], atom[at], share[at])


def _enclosed(
    belongs: np.ndarray, candidate: np.ndarray, around: list[list[tuple[np.ndarray, int]]], crystal: Crystal
) -> np.ndarray:
    """Return which sites ``candidate`` (n, 4) no plane separates strictly from the marked sites around them, (n,).

    A separating direction is sought by the perceptron rule: away from the site that is least on its right side.
    """
    result = np.zeros(len(candidate), dtype=bool)
    for basis, neighbours in enumerate(around):
        rows = np.flatnonzero(candidate[:, 3] == basis)
        if len(rows) == 0 or not neighbours:
            continue
        step = np.array([cell for cell, _ in neighbours])
        other = np.array([number for _, number in neighbours])
        vectors = (step + crystal.fractional[other] - crystal.fractional[basis]) @ crystal.cell
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            at = candidate[part, None, :3] + step
            there = belongs[at[..., 0], at[..., 1], at[..., 2], other]
            direction = -(there @ vectors)
            open_ = np.ones(len(part), dtype=bool)
            for _ in range(_PERCEPTRON_STEPS):
                along = np.where(there[open_], direction[open_] @ vectors.T, -np.inf)
                worst = along.argmax(axis=1)
                enclosed = along[np.arange(len(worst)), worst] >= -1e-9
                open_[open_] = enclosed
                if not enclosed.any():
                    break
                direction[open_] -= vectors[worst[enclosed]]
            result[part] = open_
    return result


def neighbour_offsets(crystal: Crystal, radius_angstrom: float) -> list[list[tuple[np.ndarray, int]]]:
    """Return for each atom of the cell its neighbours within ``radius_angstrom``: (cell (3,), basis)."""
    reach = np.ceil(radius_angstrom * np.linalg.norm(crystal.reciprocal, axis=1)).astype(int) + 1
    cells = np.stack(np.meshgrid(*[np.arange(-n, n + 1) for n in reach], indexing="ij"), axis=-1).reshape(-1, 3)
    result = []
    for here in crystal.fractional:
        found: list[tuple[np.ndarray, int]] = []
        for number, there in enumerate(crystal.fractional):
            distance = np.linalg.norm((cells + there - here) @ crystal.cell, axis=1)
            found += [(cell, number) for cell in cells[(distance <= radius_angstrom) & (distance > 1e-6)]]
        result.append(found)
    return result


def _share_around(belongs: np.ndarray, around: list[list[tuple[np.ndarray, int]]]) -> np.ndarray:
    """Return the share of the sites ``around`` each that ``belongs`` (x, y, z, basis) marks."""
    share = np.zeros(belongs.shape, dtype=np.float32)
    for basis, neighbours in enumerate(around):
        for cell, other in neighbours:
            # Empty cells lie around the specimen, so nothing comes round the edge.
            share[..., basis] += np.roll(belongs[..., other], tuple(-cell), axis=(0, 1, 2))
        share[..., basis] /= max(len(neighbours), 1)
    return share
