"""Pair distribution function of a finite body, and the first valley that separates neighbours from the rest.

In a finite body the number of pairs at a distance falls with the distance for want of room. Here it is compared with
what a uniform density in the same body would have: its set covariance, from the body on a grid.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import fft, ndimage
from scipy.spatial import cKDTree

from stemtomo.algorithms.atoms.blocks import require_positions
from stemtomo.errors import ConfigurationError

_MOST_VOXELS = 8e6
#: The body reaches this part of the distance between neighbours beyond its outermost atoms: in balls of fcc crystals
#: its volume is then that of their atoms within 2 %.
_SKIN = 0.4


class Body(NamedTuple):
    """The space of atoms: ``inside`` (z, y, x) on a grid of ``spacing`` Å from the corner ``origin`` x, y, z."""

    inside: np.ndarray
    spacing: float
    origin: np.ndarray

    @property
    def volume_angstrom3(self) -> float:
        """Volume in Å³."""
        return float(self.inside.sum()) * self.spacing**3

    def depth(self, positions: np.ndarray) -> np.ndarray:
        """Return how far ``positions`` (n, 3) lie below the body's surface in Å, (n,); 0 outside."""
        distance = ndimage.distance_transform_edt(self.inside) * self.spacing
        index = np.rint((positions - self.origin) / self.spacing).astype(int)[:, ::-1]
        index = np.clip(index, 0, np.array(self.inside.shape) - 1)
        return distance[tuple(index.T)]


class PairDistribution(NamedTuple):
    """``g`` (bin,) at distances ``r_angstrom`` (bin,); partial ones by pair of species; ``density`` in atoms per Å³."""

    r_angstrom: np.ndarray
    g: np.ndarray
    partial: dict[tuple[str, str], np.ndarray]
    density: float


def nearest_distance(positions: np.ndarray) -> float:
    """Return the median distance in Å of an atom of ``positions`` (atom, 3) to its nearest neighbour.

    Raises
    ------
    ConfigurationError
        If there are fewer than two atoms.
    """
    require_positions(positions)
    if len(positions) < 2:
        raise ConfigurationError(f"{len(positions)} atom(s): at least two are needed to speak of neighbours")
    some = positions[:: max(1, len(positions) // 20_000)]
    return float(np.median(cKDTree(positions).query(some, k=2)[0][:, 1]))


def body_of(positions: np.ndarray, neighbour_angstrom: float, margin_angstrom: float = 0.0) -> Body:
    """Return the body of atoms at ``positions`` (atom, 3): holes narrower than two neighbours are filled.

    ``margin_angstrom`` is empty space kept around it.
    """
    reach = 1.25 * neighbour_angstrom
    low = positions.min(axis=0) - reach - margin_angstrom
    sides = np.ptp(positions, axis=0) + 2 * (reach + margin_angstrom)
    spacing = max(neighbour_angstrom / 6, float((np.prod(sides) / _MOST_VOXELS) ** (1 / 3)))
    shape = (np.ceil(sides / spacing).astype(int) + 1)[::-1]
    empty = np.ones(shape, dtype=bool)
    empty[tuple(np.rint((positions - low) / spacing).astype(int)[:, ::-1].T)] = False
    grown = ndimage.distance_transform_edt(empty) * spacing < reach
    inside = ndimage.distance_transform_edt(grown) * spacing > reach - _SKIN * neighbour_angstrom
    return Body(inside, spacing, low)


def expected_pairs(body: Body, edges: np.ndarray) -> np.ndarray:
    """Return the pairs that a density of one per Å³ in ``body`` has between the distances ``edges``, (bin,).

    Each pair counts once. The set covariance (volume of the body's overlap with itself, shifted) is averaged over
    directions; ``edges`` (bin + 1,) in Å begin anywhere.
    """
    pad = int(np.ceil(edges[-1] / body.spacing)) + 2
    shape = [fft.next_fast_len(n + pad, real=True) for n in body.inside.shape]
    transform = fft.rfftn(body.inside.astype(np.float32), shape)
    overlap = fft.irfftn(np.abs(transform) ** 2, shape) * body.spacing**3
    axes = [fft.fftfreq(n, 1 / n) * body.spacing for n in shape]
    reach = [np.flatnonzero(np.abs(axis) <= edges[-1] + 2 * body.spacing) for axis in axes]
    overlap = overlap[np.ix_(*reach)]
    z, y, x = np.meshgrid(*(axis[index] for axis, index in zip(axes, reach, strict=True)), indexing="ij", sparse=True)
    distance = np.sqrt(z * z + y * y + x * x)
    # Averaged over directions on shells of one voxel, then interpolated: the covariance is smooth in the distance.
    shell = np.rint(distance / body.spacing).astype(int)
    count = np.bincount(shell.ravel())
    mean = np.bincount(shell.ravel(), overlap.ravel()) / np.maximum(count, 1)
    radius = np.bincount(shell.ravel(), distance.ravel()) / np.maximum(count, 1)
    fine = np.linspace(edges[:-1], edges[1:], 9, axis=-1)
    covariance = np.interp(fine, radius, mean)
    return 0.5 * np.trapezoid(4 * np.pi * fine**2 * covariance, fine, axis=-1)


def pair_distribution(
    counts: dict[tuple[str, str], np.ndarray],
    numbers: dict[str, int],
    body: Body,
    edges: np.ndarray,
) -> PairDistribution:
    """Return g(r) from the ``counts`` of pairs per bin by two species (see :func:`count_pairs`).

    Parameters
    ----------
    numbers
        Atoms of each species.
    edges
        Distances in Å, (bin + 1,).
    """
    uniform = expected_pairs(body, edges) / body.volume_angstrom3**2
    total = sum(numbers.values())

    def ratio(found: np.ndarray, pairs: float) -> np.ndarray:
        return np.divide(found, pairs * uniform, out=np.zeros(len(uniform)), where=pairs * uniform > 0)

    partial = {
        (a, b): ratio(found, (numbers[a] * numbers[b]) * (1.0 if a == b else 2.0)) for (a, b), found in counts.items()
    }
    everything = ratio(np.sum(list(counts.values()), axis=0), float(total) ** 2)
    centres = (edges[:-1] + edges[1:]) / 2
    return PairDistribution(centres, everything, partial, total / body.volume_angstrom3)


def count_pairs(
    positions: np.ndarray, species: np.ndarray, own: int, edges: np.ndarray, names: list[str]
) -> dict[tuple[str, str], np.ndarray]:
    """Return how many pairs per bin of ``edges`` (Å) the first ``own`` atoms make, half of each with atom ``own`` on.

    Summed over the blocks of all atoms, each pair counts once. ``species`` (atom,) are among ``names``; keys are pairs
    in the order of ``names``.
    """
    trees = {name: cKDTree(positions[species == name]) for name in names}
    owned = {name: cKDTree(positions[:own][species[:own] == name]) for name in names}
    result: dict[tuple[str, str], np.ndarray] = {}
    for i, first in enumerate(names):
        for j, second in enumerate(names):
            key = (first, second) if i <= j else (second, first)
            found = np.zeros(len(edges) - 1)
            if owned[first].n and trees[second].n:
                # Atoms at exactly an edge belong to the bin below it; an atom is no pair with itself.
                cumulative = owned[first].count_neighbors(trees[second], edges).astype(np.float64)
                found = np.diff(cumulative) / 2
            result[key] = result.get(key, 0.0) + found
    return result


def first_valley(r_angstrom: np.ndarray, g: np.ndarray) -> float:
    """Return the distance in Å of the first minimum of ``g`` after its first peak: where nearest neighbours end.

    The curve is smoothed by 0.1 Å first. A peak is the highest point before g falls to below 0.9 again; the valley is
    the lowest point before it rises above one, sought up to 1.9 times the distance of the peak.

    Raises
    ------
    ConfigurationError
        If there is no peak.
    """
    step = r_angstrom[1] - r_angstrom[0]
    smooth = ndimage.gaussian_filter1d(g, 0.1 / step)
    above = np.flatnonzero(smooth > 1)
    if len(above) == 0:
        raise ConfigurationError("the pair distribution has no peak above one: give the cutoff of neighbours in Å")
    start = int(above[0])
    fallen = np.flatnonzero(smooth[start:] < 0.9)
    stop = start + int(fallen[0]) if len(fallen) else len(smooth)
    peak = start + int(np.argmax(smooth[start:stop]))
    beyond = np.searchsorted(r_angstrom, 1.9 * r_angstrom[peak])
    again = np.flatnonzero(smooth[stop:beyond] > 1)
    end = stop + int(again[0]) if len(again) else int(beyond)
    low = smooth[peak:end]
    # In a crystal the valley is a flat zero: its middle.
    lowest = np.flatnonzero(low <= low.min() + 1e-9)
    return float(r_angstrom[peak + int(round(lowest.mean()))])
