"""Atoms that are missing: where the residual asks for some, in the gaps between those there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from scipy.spatial import cKDTree

from stemtomo.algorithms.local_orbital.model import Orbitals
from stemtomo.algorithms.local_orbital.solver import Geometry, inverse_curvature, typical_intensities

#: The loss's derivative in the intensity that atoms of none at sites (site, 3) have, (site,).
Wanted = Callable[[Orbitals, np.ndarray], np.ndarray]

#: An inserted atom stands out by so many standard deviations; at most this share of the atoms come at once, or so many.
_SIGNIFICANT, _MOST_INSERTED, _FEWEST = 3.0, 0.2, 20
#: Sites are looked at from this share of the closest distance on, as neighbours of those that atoms may come to.
_BESIDE = 0.75
#: Sites are no further from an atom than so many distances of neighbours: there the specimen ends.
_OUTSIDE = 1.6
#: Sites that are held at once; those of a larger specimen take a pass over the images for every so many.
SITES_TOGETHER = 12 << 20
#: Sites whose curvature is worked out at once.
_TOGETHER = 1 << 18


def extended(
    model: Orbitals,
    wanted: Wanted,
    geometry: Geometry,
    *,
    insertion: float,
    minimum_distance_angstrom: float,
    gone: np.ndarray | None = None,
    spacing_angstrom: float = 0.7,
) -> tuple[Orbitals, int]:
    """Return the model with atoms where the residual asks for some, and how many.

    Atoms of no intensity are put on a grid in the gaps between the others; the derivative of the loss in the intensity
    of each, over its curvature, is the intensity that the residual holds there. An atom comes to the vertex of
    parabolas through the strongest and its neighbours.

    Parameters
    ----------
    insertion
        Smallest intensity at which an atom is inserted, in those of the median atom of the faintest kind. It must stand
        out of what the residual holds elsewhere in the gaps, too, and no more come at once than a share of those there
        are: what is left of atoms that are not in their places yet looks like many small ones.
    gone
        Places (place, 3) of atoms that were taken out just now: what they explained is left there, as their neighbours
        have made room for them, and is no atom before these were searched for without them.
    """
    tree, closest = cKDTree(model.positions), minimum_distance_angstrom
    every = typical_intensities(model)
    typical = float(every.min())
    beside, candidates = [np.zeros(0, np.float32)], [_Candidates(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0))]
    for sites, index in _gaps(tree, _BESIDE * closest, spacing_angstrom):
        strength = -wanted(model, sites) * _inverse_curvature_at(sites, model, geometry, typical) / typical
        free = tree.query(sites, distance_upper_bound=2 * closest)[0] > closest
        if gone is not None and len(gone):
            free &= cKDTree(gone).query(sites, distance_upper_bound=2 * closest)[0] > closest
        strong = np.flatnonzero(free & (strength > insertion))
        moved = sites[strong] + spacing_angstrom * _vertices(index, strength, strong)
        candidates.append(_Candidates(sites[strong], moved, strength[strong]))
        beside.append(strength[free].astype(np.float32))
    whole = np.concatenate(beside)
    if len(whole) == 0:
        return model, 0
    found = _Candidates(*(np.concatenate(arrays) for arrays in zip(*candidates, strict=True)))
    middle = float(np.median(whole))
    noise = 1.4826 * float(np.median(np.abs(whole - middle)))
    found = found.part(found.strength > middle + _SIGNIFICANT * noise)
    most = max(_FEWEST, round(_MOST_INSERTED * len(model)))
    found = found.part(_summits(found.sites, found.strength, closest, most))
    if len(found.sites) == 0:
        return model, 0
    places = np.where((tree.query(found.moved)[0] > closest)[:, None], found.moved, found.sites)
    start = typical * np.clip(found.strength, 0.5, every.max() / typical)
    return model.with_atoms(places, start, np.full(len(places), np.median(model.width_angstrom))), len(places)


class _Candidates(NamedTuple):
    """Sites where an atom may be missing, (site, 3), the vertices near them, and what the residual holds there."""

    sites: np.ndarray
    moved: np.ndarray
    strength: np.ndarray

    def part(self, where: np.ndarray) -> _Candidates:
        return _Candidates(*(values[where] for values in self))


def _inverse_curvature_at(sites: np.ndarray, model: Orbitals, geometry: Geometry, intensity: float) -> np.ndarray:
    """Return the inverse curvature of the loss in the intensity of an atom at each of ``sites``, (site,)."""
    alone = replace(model.kept(np.zeros(0, dtype=np.int64)), species=None)
    width = float(np.median(model.width_angstrom))
    found = [
        inverse_curvature(alone.with_atoms(some, np.full(len(some), intensity), np.full(len(some), width)), geometry)[
            "intensity"
        ]
        for some in (sites[start : start + _TOGETHER] for start in range(0, len(sites), _TOGETHER))
    ]
    return np.concatenate(found)


def _summits(sites: np.ndarray, strength: np.ndarray, distance: float, most: int) -> np.ndarray:
    """Return up to ``most`` of the sites, the strongest first, further than ``distance`` apart."""
    chosen: list[int] = []
    taken = np.zeros(len(sites), dtype=bool)
    near = cKDTree(sites)
    for site in np.argsort(-strength, kind="stable"):
        if len(chosen) == most:
            break
        if not taken[site]:
            chosen.append(int(site))
            taken[near.query_ball_point(sites[site], distance)] = True
    return np.array(chosen, dtype=np.int64)


def _vertices(index: np.ndarray, strength: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return how far from ``chosen`` sites parabolas through them and their neighbours along x, y, z are highest.

    In steps of the grid, (chosen, 3), at most half of one, and none along an axis on which a neighbour is no site.

    Parameters
    ----------
    index
        Where every site is on the grid, (site, 3), in ascending order.
    """
    shape = index.max(axis=0).astype(np.int64) + 3
    of_axis = np.array([shape[1] * shape[2], shape[2], 1])
    numbers = (index + 1) @ of_axis
    found = np.zeros((len(chosen), 3))
    for axis in range(3):
        before, after = (_looked_up(numbers, strength, numbers[chosen] + side * of_axis[axis]) for side in (-1, 1))
        bend = before - 2 * strength[chosen] + after
        offset = 0.5 * (before - after) / np.where(bend < 0, bend, np.nan)
        found[:, axis] = np.clip(np.nan_to_num(offset), -0.5, 0.5)
    return found


def _looked_up(numbers: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Return the values of ascending ``numbers`` that are ``asked`` for, NaN where there is none."""
    at = np.minimum(np.searchsorted(numbers, asked), len(numbers) - 1)
    return np.where(numbers[at] == asked, values[at], np.nan)


def _gaps(
    tree: cKDTree, distance: float, spacing: float, together: int = SITES_TOGETHER
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield points of a grid that are further than ``distance`` from every atom, but not outside the specimen.

    With where they are on the grid, in ascending order. Of one plane of the grid after the other, as a box of a large
    specimen is mostly atoms and vacuum; some planes are yielded ``together``, when they have so many points.
    """
    positions = tree.data
    low, high = positions.min(axis=0) - spacing, positions.max(axis=0) + spacing
    counts = np.ceil((high - low) / spacing).astype(int) + 1
    neighbour = float(np.median(tree.query(positions, k=2)[0][:, 1])) if len(positions) > 1 else distance
    furthest = _OUTSIDE * neighbour
    rows = np.stack(np.meshgrid(np.arange(counts[1]), np.arange(counts[2]), indexing="ij"), axis=-1).reshape(-1, 2)
    planes: list[np.ndarray] = []
    for x in range(counts[0]):
        plane = np.column_stack([np.full(len(rows), x), rows]).astype(np.int32)
        nearest = tree.query(low + spacing * plane, distance_upper_bound=furthest)[0]
        planes.append(plane[(nearest > distance) & (nearest < furthest)])
        held = sum(map(len, planes))
        if held >= together or (x == counts[0] - 1 and held):
            index = np.concatenate(planes)
            planes = []
            yield low + spacing * index, index
