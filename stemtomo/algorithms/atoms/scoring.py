"""Found atoms against known ones: one rigid shift, a one-to-one match, and what it says.

A root mean square deviation means nothing without its recall: the two are always reported together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from stemtomo.errors import ConfigurationError

_ROUNDS = 20


@dataclass(frozen=True)
class Match:
    """A one-to-one match of found atoms with known ones after a rigid shift.

    Parameters
    ----------
    found, truth
        Indices of the matched pairs, (pair,) each.
    shift_angstrom
        What was added to the found positions, (3,), x, y, z.
    deviation_angstrom
        Shifted found minus true position of each pair, (pair, 3).
    recall, precision
        Matched share of the known, and of the found atoms.
    """

    found: np.ndarray
    truth: np.ndarray
    shift_angstrom: np.ndarray
    deviation_angstrom: np.ndarray
    recall: float
    precision: float

    @property
    def rmsd_angstrom(self) -> float:
        """Root mean square three-dimensional deviation of the pairs in Å; nan without pairs."""
        return float(np.sqrt((self.deviation_angstrom**2).sum(axis=1).mean())) if len(self.found) else float("nan")

    @property
    def rmsd_xyz_angstrom(self) -> np.ndarray:
        """The same along x, y and z, (3,)."""
        return np.sqrt((self.deviation_angstrom**2).mean(axis=0)) if len(self.found) else np.full(3, np.nan)


def match_atoms(found: np.ndarray, truth: np.ndarray, radius_angstrom: float) -> Match:
    """Match ``found`` (n, 3) to ``truth`` (m, 3) positions, one to one within ``radius_angstrom``.

    The rigid shift that minimises the deviation of the matched pairs is removed. It is found from two starts, no shift
    and equal centroids (which mislead when many atoms are false or missing); the better end is kept.

    Raises
    ------
    ConfigurationError
        If there is no known atom, a position is not finite, or the radius is not positive.
    """
    for name, positions in (("found", found), ("known", truth)):
        if positions.ndim != 2 or positions.shape[1] != 3 or not np.isfinite(positions).all():
            raise ConfigurationError(f"{name} atoms must be finite positions (n, 3); got shape {positions.shape}")
    if len(truth) == 0 or not radius_angstrom > 0:
        raise ConfigurationError(
            f"{len(truth)} known atoms and a match radius of {radius_angstrom} Å: at least one atom and a positive "
            "radius are needed to score"
        )
    starts = [np.zeros(3)]
    if len(found):
        starts.append(truth.mean(axis=0) - found.mean(axis=0))
    ends = [_settle(found, truth, radius_angstrom, start) for start in starts]
    return max(ends, key=lambda match: (len(match.found), -match.rmsd_angstrom if len(match.found) else 0.0))


def deviation_over_depth(match: Match, truth: np.ndarray, step_angstrom: float = 4.0) -> dict[str, list[float]]:
    """Return the RMSD of the pairs of ``match`` in layers of depth, about the origin along z.

    Parameters
    ----------
    truth
        Known positions (atom, 3) in Å.

    Returns
    -------
    dict
        ``z_angstrom``: middle of each layer that holds a pair; ``rmsd_pm``; ``atoms``: pairs in it.
    """
    layer = np.rint(truth[match.truth, 2] / step_angstrom).astype(int)
    squared = (match.deviation_angstrom**2).sum(axis=1)
    found: dict[str, list[float]] = {"z_angstrom": [], "rmsd_pm": [], "atoms": []}
    for number in np.unique(layer):
        inside = layer == number
        found["z_angstrom"].append(float(number * step_angstrom))
        found["rmsd_pm"].append(float(100 * np.sqrt(squared[inside].mean())))
        found["atoms"].append(int(inside.sum()))
    return found


def mirrored(positions: np.ndarray) -> np.ndarray:
    """Return ``positions`` (n, 3) with z reversed: what a tilt series of the opposite sign would have given."""
    return positions * np.array([1.0, 1.0, -1.0])


def confusion_matrix(found_species: np.ndarray, true_species: np.ndarray, names: list[str]) -> np.ndarray:
    """Return the counts (true, found) over matched pairs, both axes in the order of ``names``."""
    table = np.zeros((len(names), len(names)), dtype=np.int64)
    position = {name: index for index, name in enumerate(names)}
    for true, given in zip(true_species, found_species, strict=True):
        table[position[str(true)], position[str(given)]] += 1
    return table


def _settle(found: np.ndarray, truth: np.ndarray, radius: float, shift: np.ndarray) -> Match:
    """Alternate matching and shifting from ``shift`` until the pairs no longer change."""
    previous: tuple[bytes, bytes] | None = None
    for _ in range(_ROUNDS):
        ours, theirs = _assign(found + shift, truth, radius)
        pairs = (ours.tobytes(), theirs.tobytes())
        if pairs == previous or len(ours) == 0:
            break
        previous = pairs
        shift = (truth[theirs] - found[ours]).mean(axis=0)
    ours, theirs = _assign(found + shift, truth, radius)
    deviation = found[ours] + shift - truth[theirs]
    precision = len(ours) / len(found) if len(found) else 0.0
    return Match(ours, theirs, shift, deviation, len(ours) / len(truth), precision)


def _assign(found: np.ndarray, truth: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of the assignment with the most matches, then the least sum of squared distances.

    Pairs further apart than ``radius`` do not exist, which cuts the problem into clusters of a few atoms, each solved
    by the Hungarian method; so a million atoms are no dense matrix.
    """
    empty = np.empty(0, dtype=np.int64)
    if len(found) == 0:
        return empty, empty
    pairs = cKDTree(found).sparse_distance_matrix(cKDTree(truth), radius, output_type="coo_matrix")
    if pairs.nnz == 0:
        return empty, empty
    count = len(found)
    nodes = count + len(truth)
    graph = coo_matrix((np.ones(pairs.nnz), (pairs.row, pairs.col + count)), shape=(nodes, nodes))
    label = connected_components(graph, directed=False)[1][pairs.row]
    order = np.argsort(label, kind="stable")
    chosen = []
    for edges in np.split(order, np.flatnonzero(np.diff(label[order])) + 1):
        rows, row_index = np.unique(pairs.row[edges], return_inverse=True)
        columns, column_index = np.unique(pairs.col[edges], return_inverse=True)
        # Leaving a pair out costs more than any set of distances of the cluster could save.
        cost = np.full((len(rows), len(columns)), radius**2 * (len(edges) + 1) * 2)
        cost[row_index, column_index] = pairs.data[edges] ** 2
        for i, j in zip(*linear_sum_assignment(cost), strict=True):
            if cost[i, j] <= radius**2:
                chosen.append((rows[i], columns[j]))
    ours, theirs = np.array(sorted(chosen), dtype=np.int64).T
    return ours, theirs
