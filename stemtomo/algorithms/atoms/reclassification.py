"""Species by what atoms around look like: profiles compared with the mean profiles of the classes nearby.

Intensities drift through a specimen, by thickness, the missing wedge or channelling, so that one level for all of it
takes some atoms for others. After Yang et al., Nature 592, 60 (2021).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix
from scipy.spatial import cKDTree

from stemtomo.errors import ConfigurationError

_CHUNK = 2_000
_ROUNDS = 30
#: As many flips this often in a row: atoms flip back and forth.
_PATIENCE = 5
#: A class needs this many members around an atom for a mean of its own there.
_FEWEST = 3


class Reclassified(NamedTuple):
    """Classes by profile.

    Parameters
    ----------
    labels
        Class of each atom, (atom,).
    confidence
        Probability of that class, if profiles deviate from the means at random, (atom,).
    flips
        Atoms that changed class in each round.
    """

    labels: np.ndarray
    confidence: np.ndarray
    flips: tuple[int, ...]


def reclassify_locally(
    positions: np.ndarray, profiles: np.ndarray, labels: np.ndarray, radius_angstrom: float = 10.0
) -> Reclassified:
    """Give each atom the class whose mean profile within ``radius_angstrom`` is nearest to its own, until none changes.

    Parameters
    ----------
    positions
        (atom, 3), in Å.
    profiles
        Values of the volume about each atom, (atom, sample).
    labels
        Classes to begin with, (atom,), from 0. Where fewer than three members of a class are around an atom, beside
        itself, the mean of that class everywhere counts.

    Raises
    ------
    ConfigurationError
        If the arrays do not belong together.
    """
    labels = np.asarray(labels).copy()
    if not len(positions) == len(profiles) == len(labels):
        counts = f"{len(positions)} positions, {len(profiles)} profiles and {len(labels)} labels"
        raise ConfigurationError(f"{counts} do not belong together; give one of each for every atom")
    classes = int(labels.max()) + 1 if len(labels) else 0
    flips: list[int] = []
    distance = np.zeros((len(labels), classes))
    for _ in range(_ROUNDS):
        distance = _distances(positions, profiles, labels, radius_angstrom, classes)
        nearest = np.argmin(distance, axis=1)
        flips.append(int((nearest != labels).sum()))
        labels = nearest
        if flips[-1] == 0 or (len(flips) >= _PATIENCE and len(set(flips[-_PATIENCE:])) == 1):
            break
    return Reclassified(labels, _confidence(distance, labels, profiles.shape[1]), tuple(flips))


def _distances(
    positions: np.ndarray, profiles: np.ndarray, labels: np.ndarray, radius: float, classes: int
) -> np.ndarray:
    """Return squared distances of each profile to the mean of each class around it, (atom, class)."""
    member = np.eye(classes)[labels]
    total = member.T @ profiles
    everywhere = total / np.maximum(member.sum(axis=0), 1)[:, None]
    everywhere[member.sum(axis=0) == 0] = np.inf
    tree = cKDTree(positions)
    result = np.empty((len(labels), classes))
    for start in range(0, len(labels), _CHUNK):
        part = slice(start, start + _CHUNK)
        near = cKDTree(positions[part]).sparse_distance_matrix(tree, radius, output_type="coo_matrix")
        others = near.col != near.row + start
        row, column = near.row[others], near.col[others]
        around = csr_matrix((np.ones(len(row)), (row, column)), shape=near.shape)
        for label in range(classes):
            weight = around[:, np.flatnonzero(labels == label)]
            count = np.asarray(weight.sum(axis=1)).ravel()
            sums = weight @ profiles[labels == label]
            mean = np.where((count >= _FEWEST)[:, None], sums / np.maximum(count, 1)[:, None], everywhere[label])
            result[part, label] = ((profiles[part] - mean) ** 2).sum(axis=1)
    return result


def _confidence(distance: np.ndarray, labels: np.ndarray, samples: int) -> np.ndarray:
    """Return the posterior of each atom's own class, profiles deviating like those of atoms of one class do."""
    if len(labels) == 0:
        return np.empty(0)
    own = distance[np.arange(len(labels)), labels]
    variance = max(float(np.median(own)) / samples, np.finfo(np.float64).tiny)
    logs = -(distance - own[:, None]) / (2 * variance)
    result: np.ndarray = 1 / np.exp(np.clip(logs, -700, 700)).sum(axis=1)
    return result
