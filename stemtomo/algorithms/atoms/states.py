"""Several states of one specimen: a rigid registration by what did not change, and which atom became which."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from stemtomo.errors import ConfigurationError

_ROUNDS = 40
_QUICK_ROUNDS = 6
_FINALISTS = 4
#: Atoms, from the middle outwards, for the first look at all starts and for the choice among the best.
_FEW, _MANY = 800, 5000
_SHIFT_STARTS = 12


class RigidMotion(NamedTuple):
    """Rigid motion r -> ``rotation`` r + ``translation`` (Å) of a state onto the reference.

    ``core`` are the pairs (state, reference) of atoms, (pair, 2), that define it; ``rmsd_angstrom`` is their deviation.
    """

    rotation: np.ndarray
    translation: np.ndarray
    core: np.ndarray
    rmsd_angstrom: float

    def apply(self, positions: np.ndarray) -> np.ndarray:
        """Return ``positions`` (n, 3) of the state where they lie in the reference."""
        return positions @ self.rotation.T + self.translation


def register_states(
    state: np.ndarray,
    reference: np.ndarray,
    state_species: np.ndarray,
    reference_species: np.ndarray,
    *,
    nearest_angstrom: float,
    largest_rotation_deg: float = 10.0,
) -> RigidMotion:
    """Return the rigid motion of ``state`` (n, 3) that makes most of its atoms meet those of ``reference`` (m, 3).

    Rotations up to ``largest_rotation_deg`` and a few shifts are tried as starts. From each, nearest atoms of one
    species are paired both ways within a radius that shrinks from 0.6 to 0.25 nearest distances, and the motion fitted
    to the pairs; atoms that moved are no pairs, so what counts is the common core. The start with most pairs wins.

    Raises
    ------
    ConfigurationError
        If fewer than a tenth of the atoms (or 20) meet.
    """
    radii = np.array([0.6, 0.4, 0.25]) * nearest_angstrom
    middle = state.mean(axis=0)
    inner = np.argsort(np.linalg.norm(state - middle, axis=1), kind="stable")
    tree = cKDTree(reference)

    def tried(some: np.ndarray, start: tuple[np.ndarray, np.ndarray], rounds: int) -> RigidMotion:
        return _settled((state[some], state_species[some]), (reference, reference_species, tree), start, radii, rounds)

    few, many = inner[:_FEW], inner[:_MANY]
    starts = _starts(state, reference, middle, largest_rotation_deg, nearest_angstrom)
    ends = [tried(few, start, _QUICK_ROUNDS) for start in starts]
    ends = sorted(ends, key=lambda end: (-len(end.core), end.rmsd_angstrom))[:_FINALISTS]
    best = max((tried(many, end[:2], _ROUNDS) for end in ends), key=lambda end: (len(end.core), -end.rmsd_angstrom))
    everything = np.arange(len(state))
    final = tried(everything, best[:2], _ROUNDS)
    if len(final.core) < max(20, 0.1 * min(len(state), len(reference))):
        raise ConfigurationError(
            f"only {len(final.core)} of {len(state)} atoms of the state meet one of the reference: the states have no "
            f"common core within {largest_rotation_deg:g} deg; turn one of them first, or allow more (rotation_deg)"
        )
    return final


def _starts(
    state: np.ndarray, reference: np.ndarray, middle: np.ndarray, largest_deg: float, nearest: float
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return rotations and translations to start from, the likeliest first."""
    radius = float(np.sqrt(((state - middle) ** 2).sum(axis=1).mean()))
    step = 0.5 * nearest / min(radius, 12 * nearest)
    count = int(np.ceil(np.radians(largest_deg) / step)) if largest_deg > 0 else 0
    grid = np.arange(-count, count + 1) * step
    vectors = np.stack(np.meshgrid(grid, grid, grid, indexing="ij"), axis=-1).reshape(-1, 3)
    length = np.linalg.norm(vectors, axis=1)
    vectors = vectors[np.argsort(length, kind="stable")][: int((length <= np.radians(largest_deg) + step).sum())]
    centroids = reference.mean(axis=0) - middle
    shifts = [np.zeros(3), centroids]
    rng = np.random.default_rng(0)
    shifts += [centroids + nearest * rng.normal(size=3) for _ in range(_SHIFT_STARTS)]
    starts = [(np.eye(3), shift) for shift in shifts[:2]]
    starts += [(Rotation.from_rotvec(v).as_matrix(), centroids) for v in vectors]
    starts += [(np.eye(3), shift) for shift in shifts[2:]]
    return [(rotation, middle + shift - rotation @ middle) for rotation, shift in starts]


def _settled(
    moving: tuple[np.ndarray, np.ndarray],
    fixed: tuple[np.ndarray, np.ndarray, cKDTree],
    start: tuple[np.ndarray, np.ndarray],
    radii: np.ndarray,
    rounds: int,
) -> RigidMotion:
    """Pair and fit in turn, within each of ``radii``, until the pairs stay; positions and species of both sides."""
    (state, state_species), (reference, reference_species, tree), (rotation, shift) = moving, fixed, start
    pairs = np.empty((0, 2), dtype=np.int64)
    for radius in radii:
        previous = None
        for _ in range(rounds):
            pairs = mutual_pairs(state @ rotation.T + shift, reference, radius, tree)
            pairs = pairs[state_species[pairs[:, 0]] == reference_species[pairs[:, 1]]]
            if len(pairs) < 6 or pairs.tobytes() == previous:
                break
            previous = pairs.tobytes()
            rotation, shift = rigid_fit(state[pairs[:, 0]], reference[pairs[:, 1]])
    off = state[pairs[:, 0]] @ rotation.T + shift - reference[pairs[:, 1]]
    rmsd = float(np.sqrt((off**2).sum(axis=1).mean())) if len(pairs) else np.inf
    return RigidMotion(rotation, shift, pairs, rmsd)


def mutual_pairs(a: np.ndarray, b: np.ndarray, radius: float, tree_b: cKDTree | None = None) -> np.ndarray:
    """Return pairs (index of a, index of b) within ``radius``, one to one, (pair, 2).

    Every a goes to its nearest b; of those that go to one b the nearest stays.
    """
    distance, index = (tree_b or cKDTree(b)).query(a, distance_upper_bound=radius)
    rows = np.flatnonzero(np.isfinite(distance))
    if len(rows) == 0:
        return np.empty((0, 2), dtype=np.int64)
    # The nearest a of each b that is somebody's nearest: the first in order of distance.
    order = rows[np.argsort(distance[rows], kind="stable")]
    _, first = np.unique(index[order], return_index=True)
    kept = np.sort(order[first])
    return np.stack([kept, index[kept]], axis=1)


def rigid_fit(moving: np.ndarray, fixed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rotation and translation that bring ``moving`` (n, 3) closest to ``fixed`` (n, 3) (Kabsch)."""
    a, b = moving.mean(axis=0), fixed.mean(axis=0)
    u, _, vt = np.linalg.svd((fixed - b).T @ (moving - a))
    sign = np.array([1, 1, np.sign(np.linalg.det(u @ vt))])
    rotation = (u * sign) @ vt
    return rotation, b - rotation @ a
