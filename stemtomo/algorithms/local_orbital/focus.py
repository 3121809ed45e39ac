"""The foci of sections before the atoms are known: whose rough places tell a focus well, since all share it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from stemtomo.algorithms.local_orbital.model import FocalSeries, Orbitals, images_of

#: Misfit of every section, (section,), where the C1 of each is moved by so much, (section,) in Å.
MisfitAt = Callable[[np.ndarray], np.ndarray]

#: A focus that is told stays if another explains the images better only by this share of the misfit.
_WORTH = 2e-3
#: The search goes on at its ends up to so many times the reach; then these shares of its step follow.
_FURTHEST, _FINER = 3.0, (0.5, 0.25, 0.25)


class Overlap(NamedTuple):
    """Sums over the pixels of every section's images, (section,): model times image, model squared, image squared."""

    cross: np.ndarray
    model: np.ndarray
    image: np.ndarray

    @property
    def misfit(self) -> np.ndarray:
        """Share of the images' power that the model does not explain at its best brightness, (section,)."""
        power = np.maximum(self.model * self.image, np.finfo(np.float64).tiny)
        return np.asarray(1 - self.cross**2 / power)


def overlap(model: Orbitals, series: FocalSeries, numbers: np.ndarray) -> Overlap:
    """Return the sums over ``series``, whose images are the ``numbers`` of all, for sections of ``model``."""
    sums = np.zeros((3, len(model.probes)))
    if len(series):
        drawn = images_of(model, series, numbers)
        axes = (-2, -1)
        pairs = ((drawn, series.images), (drawn, drawn), (series.images, series.images))
        for row, (first, second) in zip(sums, pairs, strict=True):
            each = np.array([float(value) for value in (first * second).sum(axis=axes, dtype=np.float64)])
            np.add.at(row, series.sections, each)
    return Overlap(*sums)


def spread_over(sections: np.ndarray, numbers: np.ndarray, each: int) -> np.ndarray:
    """Return up to ``each`` of the images ``numbers`` of every section, evenly over the series, in order."""
    chosen = []
    for section in np.unique(sections[numbers]):
        mine = numbers[sections[numbers] == section]
        chosen.append(mine[np.unique(np.linspace(0, len(mine) - 1, min(each, len(mine))).round().astype(int))])
    return np.sort(np.concatenate(chosen))


def look_for_foci(
    misfit_at: MisfitAt, sections: int, reach_angstrom: float, step_angstrom: float, before: np.ndarray | None = None
) -> np.ndarray:
    """Return by how much the C1 of every section is to be moved for the smallest misfit, (section,) in Å.

    Steps over ``reach_angstrom`` to both sides, and further where a section is best at an end; then shorter
    steps around the best of every section, and the vertex of a parabola. It is 0 where that is not worth a move.

    Parameters
    ----------
    before
        Where the foci were found to be before, (section,): the search begins with a step to both sides of that.
    """
    start = np.zeros(sections) if before is None else before
    count = max(1, int(np.ceil(reach_angstrom / step_angstrom))) if before is None else 1
    offsets = step_angstrom * np.arange(-count, count + 1)
    misfits = np.stack([misfit_at(start + offset) for offset in offsets])
    while offsets[-1] < _FURTHEST * reach_angstrom and np.isin(misfits.argmin(axis=0), (0, len(offsets) - 1)).any():
        offsets = np.concatenate([[offsets[0] - step_angstrom], offsets, [offsets[-1] + step_angstrom]])
        below, above = (misfit_at(start + offset) for offset in (offsets[0], offsets[-1]))
        misfits = np.concatenate([below[None], misfits, above[None]])
    told = misfits[len(offsets) // 2]
    best = start + offsets[misfits.argmin(axis=0)]
    lowest = misfits.min(axis=0)
    for share in _FINER:
        step = share * step_angstrom
        around = np.stack([misfit_at(best - step), lowest, misfit_at(best + step)])
        chosen = around.argmin(axis=0)
        centre, best, lowest = best, best + (chosen - 1) * step, around.min(axis=0)
    curvature = around[0] - 2 * around[1] + around[2]
    inside = (chosen == 1) & (curvature > 0)
    vertex = centre + 0.5 * step * (around[0] - around[2]) / np.where(inside, curvature, 1.0)
    found = np.where(inside, vertex, best)
    return np.where((start != 0) | (told - lowest > _WORTH * told), found, 0.0)
