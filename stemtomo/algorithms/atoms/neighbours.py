"""Pairs of neighbouring atoms, by freud's bounding-volume trees; connected sets of atoms."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from stemtomo.algorithms.atoms.blocks import atom_blocks, require_positions
from stemtomo.errors import ConfigurationError


def bonds(
    positions: np.ndarray, cutoff_angstrom: float, atoms_per_block: int = 50_000
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of ``positions`` (atom, 3) closer than the cutoff, each once, found block by block."""
    firsts, seconds = [], []
    for block in atom_blocks(positions, atoms_per_block, cutoff_angstrom):
        found = neighbour_list(*open_box(positions[block.around], cutoff_angstrom), cutoff_angstrom)
        first, second = np.asarray(found.query_point_indices), np.asarray(found.point_indices)
        own = first < len(block.own)
        first, second = block.around[first[own]].astype(np.int32), block.around[second[own]].astype(np.int32)
        once = first < second
        firsts.append(first[once])
        seconds.append(second[once])
    return np.concatenate(firsts), np.concatenate(seconds)


def open_box(positions: np.ndarray, cutoff_angstrom: float) -> tuple[Any, np.ndarray]:
    """Return freud's box, so large that no periodic image comes within the cutoff, and the positions in it (float32).

    Raises
    ------
    ConfigurationError
        If the positions are not (atom, 3) and finite, or the cutoff is not positive.
    """
    import freud

    require_positions(positions)
    if not cutoff_angstrom > 0:
        raise ConfigurationError(f"the cutoff is {cutoff_angstrom} Å; a positive distance is needed")
    if len(positions) == 0:
        return freud.box.Box.cube(1.0), np.zeros((0, 3), dtype=np.float32)
    low, high = positions.min(axis=0), positions.max(axis=0)
    sides = high - low + 2.5 * cutoff_angstrom + 1
    return freud.box.Box(*sides), (positions - (low + high) / 2).astype(np.float32)


def neighbour_list(box: Any, points: np.ndarray, cutoff_angstrom: float) -> Any:
    """Return freud's list of the neighbours of ``points`` (atom, 3) within ``cutoff_angstrom``."""
    import freud

    query = freud.locality.AABBQuery(box, points).query(points, {"r_max": cutoff_angstrom, "exclude_ii": True})
    return query.toNeighborList()


def connected_sets(count: int, first: np.ndarray, second: np.ndarray, member: np.ndarray, fewest: int) -> np.ndarray:
    """Return the number of the connected set of each of ``count`` atoms, (atom,); -1 for atoms in none.

    ``first`` and ``second`` are bonds; atoms that are not a ``member`` (atom,) boolean are in no set, sets of less than
    ``fewest`` atoms are none. The largest set is 0.
    """
    bond = member[first] & member[second]
    graph = coo_matrix((np.ones(int(bond.sum()), dtype=np.int8), (first[bond], second[bond])), shape=(count, count))
    label = connected_components(graph, directed=False)[1]
    label = np.where(member, label, -1)
    names, inverse, sizes = np.unique(label, return_inverse=True, return_counts=True)
    sizes = np.where(names < 0, 0, sizes)
    rank = np.argsort(np.argsort(-sizes, kind="stable"), kind="stable")
    kept = np.where(sizes >= max(fewest, 1), rank, -1)
    return kept[inverse]
