"""The orientation of the fcc lattice around each atom, from its twelve neighbours; grains of one orientation."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from scipy.spatial import cKDTree

from stemtomo.algorithms.atoms.neighbours import connected_sets

#: Directions of the twelve neighbours of an fcc atom, and the cubic axis that each is perpendicular to (1, 2, 3).
SLOTS = np.array(
    [d for d in itertools.product((-1, 0, 1), repeat=3) if sum(map(abs, d)) == 2], dtype=np.float64
) / np.sqrt(2)
SLOT_AXIS = np.argmin(np.abs(SLOTS), axis=1) + 1
_FEWEST = 6
_CHUNK = 20_000


def cubic_rotations() -> np.ndarray:
    """Return the 24 rotations of a cube onto itself, (24, 3, 3)."""
    found = []
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1.0, -1.0), repeat=3):
            matrix = np.zeros((3, 3))
            matrix[range(3), order] = signs
            if np.linalg.det(matrix) > 0:
                found.append(matrix)
    return np.array(found)


_CUBE = cubic_rotations()


class Frames(NamedTuple):
    """Local fcc lattices of atoms.

    Parameters
    ----------
    rotation
        (atom, 3, 3); columns are the cubic axes in the sample's frame.
    misfit
        Root mean square deviation of the neighbours from the lattice's directions in rad, (atom,); inf for atoms with
        fewer than six neighbours.
    neighbour
        Index of the neighbour in each of :data:`SLOTS`, -1 where there is none, (atom, 12).
    """

    rotation: np.ndarray
    misfit: np.ndarray
    neighbour: np.ndarray


def fcc_frames(positions: np.ndarray, own: int, cutoff_angstrom: float) -> Frames:
    """Return the fcc lattice around each of the first ``own`` atoms of ``positions`` (atom, 3).

    Pairs of neighbours at about 60 degrees propose rotations; the one that brings the nearest twelve within the cutoff
    closest to an fcc shell is refined by a least-squares rotation. Which of the 24 equivalent rotations it is, is
    left open (:func:`grains_of`).
    """
    tree = cKDTree(positions)
    parts = [
        _frames(positions, tree, np.arange(start, min(start + _CHUNK, own)), cutoff_angstrom)
        for start in range(0, own, _CHUNK)
    ]
    return Frames(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _frames(positions: np.ndarray, tree: cKDTree, atoms: np.ndarray, cutoff: float) -> Frames:
    distance, index = tree.query(positions[atoms], k=13, distance_upper_bound=cutoff)
    distance, index = distance[:, 1:], index[:, 1:]
    there = np.isfinite(distance)
    index = np.where(there, index, 0)
    unit = (positions[index] - positions[atoms][:, None]) * (there / np.where(there, distance, 1.0))[..., None]
    best = np.full(len(atoms), -np.inf)
    rotation = np.broadcast_to(np.eye(3), (len(atoms), 3, 3)).copy()
    for proposed in _proposals(unit, there):
        score = np.einsum("nki,nij,sj->nks", unit, proposed, SLOTS, optimize=True).max(axis=2).sum(axis=1)
        better = score > best
        best[better] = score[better]
        rotation[better] = proposed[better]
    for _ in range(2):
        slot = np.einsum("nki,nij,sj->nks", unit, rotation, SLOTS, optimize=True).argmax(axis=2)
        rotation = _closest_rotation(np.einsum("nki,nkj->nij", unit, SLOTS[slot]))
    return _assigned(unit, there, index, rotation)


def _proposals(unit: np.ndarray, there: np.ndarray) -> list[np.ndarray]:
    """Return rotations (atom, 3, 3) that put the nearest neighbour, and one at about 60 degrees, on a pair of slots."""
    cosine = np.einsum("ni,nki->nk", unit[:, 0], unit)
    fitness = np.where(there, -np.abs(cosine - 0.5), -np.inf)
    partners = np.argsort(-fitness, axis=1)[:, :4]
    first, second = np.array([0.0, 1, 1]) / np.sqrt(2), np.array([1.0, 0, 1]) / np.sqrt(2)
    proposals = []
    for column in partners.T:
        other = np.take_along_axis(unit, column[:, None, None], axis=1)[:, 0]
        for a, b in ((first, second), (second, first)):
            product = np.einsum("ni,j->nij", unit[:, 0], a) + np.einsum("ni,j->nij", other, b)
            cross = np.einsum("ni,j->nij", np.cross(unit[:, 0], other), np.cross(a, b))
            proposals.append(_closest_rotation(product + cross))
    return proposals


def _closest_rotation(matrix: np.ndarray) -> np.ndarray:
    """Return the rotations closest to ``matrix`` (n, 3, 3)."""
    u, _, vt = np.linalg.svd(matrix)
    u[:, :, 2] *= np.sign(np.linalg.det(u @ vt))[:, None]
    return u @ vt


def _assigned(unit: np.ndarray, there: np.ndarray, index: np.ndarray, rotation: np.ndarray) -> Frames:
    cosines = np.einsum("nki,nij,sj->nks", unit, rotation, SLOTS, optimize=True)
    slot, closeness = cosines.argmax(axis=2), cosines.max(axis=2)
    angle = np.arccos(np.clip(closeness, -1, 1))
    count = there.sum(axis=1)
    misfit = np.sqrt((np.where(there, angle, 0) ** 2).sum(axis=1) / np.maximum(count, 1))
    neighbour = np.full((len(unit), len(SLOTS)), -1, dtype=np.int64)
    # The closest to a slot is written last, and stays.
    order = np.argsort(closeness, axis=1)
    for column in order.T:
        rows = np.flatnonzero(np.take_along_axis(there, column[:, None], 1)[:, 0])
        picked = column[rows]
        neighbour[rows, slot[rows, picked]] = index[rows, picked]
    return Frames(rotation, np.where(count >= _FEWEST, misfit, np.inf), neighbour)


def misorientation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the least angle in rad between cubic lattices of rotations ``first`` and ``second``, (n, 3, 3) each."""
    return np.arccos(np.clip((_nearest_equivalent(first, second)[1] - 1) / 2, -1, 1))


def _nearest_equivalent(rotation: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ``rotation`` (n, 3, 3) in the equivalent setting closest to ``reference``, and the trace between them."""
    between = np.einsum("nji,njk->nik", rotation, np.broadcast_to(reference, rotation.shape))
    # The rotation from R S to the reference has the trace of S^T R^T Q.
    trace = np.einsum("sij,nij->ns", _CUBE, between)
    best = trace.argmax(axis=1)
    return rotation @ _CUBE[best], trace[np.arange(len(rotation)), best]


def grains_of(
    frames: Frames, largest_misfit_rad: float = 0.2, tolerance_rad: float = 0.14, fewest: int = 13
) -> tuple[np.ndarray, Frames]:
    """Return the orientation grain of each atom, (atom,), -1 for none, and the frames in one setting per grain.

    A grain is a connected set of neighbours whose lattices differ by less than ``tolerance_rad`` (8 degrees) from one
    to the next. In the returned frames every atom of a grain has that of the 24 equivalent settings which is closest to
    the grain's best atom, so that "perpendicular to x" means the same for all.
    """
    count = len(frames.misfit)
    first = np.repeat(np.arange(count), len(SLOTS))
    second = frames.neighbour.ravel()
    # Half of the bonds suffice to connect.
    bond = second > first
    first, second = first[bond], second[bond]
    member = frames.misfit < largest_misfit_rad
    bond = member[first] & member[second]
    first, second = first[bond], second[bond]
    alike = np.empty(len(first), dtype=bool)
    for start in range(0, len(first), 10 * _CHUNK):
        part = slice(start, start + 10 * _CHUNK)
        alike[part] = misorientation(frames.rotation[first[part]], frames.rotation[second[part]]) < tolerance_rad
    grain = connected_sets(count, first[alike], second[alike], member, fewest)
    return grain, _one_setting(frames, grain)


def _one_setting(frames: Frames, grain: np.ndarray) -> Frames:
    rotation, neighbour = frames.rotation.copy(), frames.neighbour.copy()
    for number in range(int(grain.max(initial=-1)) + 1):
        atoms = np.flatnonzero(grain == number)
        reference = frames.rotation[atoms[np.argmin(frames.misfit[atoms])]]
        if number == 0:
            reference = _nearest_equivalent(reference[None], np.eye(3))[0][0]
        turned = _nearest_equivalent(frames.rotation[atoms], reference)[0]
        # A slot s of the old frame is the slot S^T s of the new one.
        setting = np.rint(np.einsum("nji,njk->nik", frames.rotation[atoms], turned))
        moved = np.einsum("nji,sj->nsi", setting, SLOTS)
        slot = np.einsum("nsi,ti->nst", moved, SLOTS).argmax(axis=2)
        rotation[atoms] = turned
        np.put_along_axis(taken := np.full((len(atoms), len(SLOTS)), -1), slot, frames.neighbour[atoms], axis=1)
        neighbour[atoms] = taken
    return Frames(rotation, frames.misfit, neighbour)
