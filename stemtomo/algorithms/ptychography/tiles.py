"""Tiles of a scan: rectangles of scan positions that own their patterns, and the windows of the object they see.

Every recorded position belongs to one tile, so that a pattern is stored and read once. Windows overlap by what the
patterns of neighbours reach; gradients and illumination are summed there, and every tile that holds a pixel then takes
the same step at it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from stemtomo.algorithms.ptychography.windows import ObjectGrid

Rectangle = tuple[tuple[int, int], tuple[int, int]]
"""((y0, y1), (x0, x1)): rows y0 <= y < y1 and columns x0 <= x < x1."""


@dataclass(frozen=True)
class Tile:
    """A part of a scan.

    Parameters
    ----------
    scan
        The rectangle of scan positions.
    where
        (position,) int64, which of the recorded positions of the scan are in it, ascending.
    window
        The part of the object that their patterns reach, with its margin.
    grid
        Windows of these positions in that part of the object.
    """

    scan: Rectangle
    where: np.ndarray
    window: Rectangle
    grid: ObjectGrid


def edges(length: int, count: int, unit: int = 1) -> list[int]:
    """Return where ``count`` runs of ``length`` positions begin, and ``length``: even, at multiples of ``unit``.

    Fewer runs come out where there are fewer units than runs. The last unit may be cut by the end of the scan.
    """
    units = math.ceil(length / unit)
    count = max(1, min(count, units))
    return [min(length, unit * (units * index // count)) for index in range(count)] + [length]


def fair_unit(length: int, count: int, units: Sequence[int], most: float = 1.05) -> int:
    """Return the first of ``units``, else the last, with which no run of :func:`edges` is ``most`` times the mean."""
    for unit in units:
        bounds = edges(length, count, unit)
        if len(bounds) == count + 1 and max(np.diff(bounds)) <= most * length / count:
            return unit
    return units[-1]


def rectangles(
    shape_yx: tuple[int, int], tiles_yx: tuple[int, int], unit_yx: tuple[int, int] = (1, 1)
) -> list[Rectangle]:
    """Cut a scan into ``tiles_yx`` rectangles, whose edges lie at multiples of ``unit_yx``, row by row.

    With the shard of the frames as the unit, every shard is read by one tile.
    """
    rows, columns = (edges(*each) for each in zip(shape_yx, tiles_yx, unit_yx, strict=True))
    return [(y, x) for y in itertools.pairwise(rows) for x in itertools.pairwise(columns)]


def cut_scan(
    grid: ObjectGrid, shape_yx: tuple[int, int], recorded: np.ndarray, cuts: Sequence[Rectangle], margin_px: int = 0
) -> list[Tile]:
    """Return the tiles of a scan; rectangles without a recorded position are left out.

    Parameters
    ----------
    grid
        Windows of the recorded positions in the whole object.
    shape_yx
        Positions of the scan.
    recorded
        (position,) flat indices into the scan, ascending.
    cuts
        Disjoint rectangles that cover the scan.
    margin_px
        Pixels by which windows are larger than what their positions reach, within the object.

    Raises
    ------
    ValueError
        If a recorded position lies in none of the rectangles or in several.
    """
    owner = np.full(shape_yx, -1)
    for number, (y, x) in enumerate(cuts):
        if (owner[y[0] : y[1], x[0] : x[1]] >= 0).any():
            raise ValueError(f"the rectangle {(y, x)} overlaps another one; a position belongs to one tile")
        owner[y[0] : y[1], x[0] : x[1]] = number
    owners = owner.ravel()[recorded]
    if (owners < 0).any():
        raise ValueError(f"{int((owners < 0).sum())} recorded positions lie in no tile; rectangles must cover the scan")
    # A stable sort keeps the order of the scan within each tile.
    order = np.argsort(owners, kind="stable")
    bounds = np.searchsorted(owners[order], np.arange(len(cuts) + 1))
    runs = zip(cuts, itertools.pairwise(bounds.tolist()), strict=True)
    return [_tile(grid, cut, order[first:last], margin_px) for cut, (first, last) in runs if first < last]


def with_halo(
    tiles: Sequence[Tile], grid: ObjectGrid, shape_yx: tuple[int, int], recorded: np.ndarray, halo: int, margin_px: int
) -> list[Tile]:
    """Return ``tiles`` that also see the patterns of neighbours, up to ``halo`` scan positions beyond their own.

    The other arguments are those of :func:`cut_scan` that made them.
    """
    rows, columns = np.divmod(recorded, shape_yx[1])
    found = []
    for tile in tiles:
        (y0, y1), (x0, x1) = (
            (max(0, start - halo), min(length, stop + halo))
            for (start, stop), length in zip(tile.scan, shape_yx, strict=True)
        )
        where = np.flatnonzero((rows >= y0) & (rows < y1) & (columns >= x0) & (columns < x1))
        found.append(_tile(grid, ((y0, y1), (x0, x1)), where, margin_px))
    return found


def out_to_edges(tiles: Sequence[Tile], grid: ObjectGrid) -> list[Tile]:
    """Return ``tiles`` with outermost windows that reach the edges of the object, which no pattern may reach.

    Together they then hold what filters of the whole object spread out there.
    """
    outer = [(min(low for low, _ in spans), max(high for _, high in spans)) for spans in
             zip(*(tile.scan for tile in tiles), strict=True)]  # fmt: skip
    found = []
    for tile in tiles:
        y, x = (
            (0 if scan[0] == first else window[0], length if scan[1] == last else window[1])
            for scan, window, (first, last), length in zip(tile.scan, tile.window, outer, grid.shape_yx, strict=True)
        )
        found.append(_on(grid, tile.scan, tile.where, (y, x)))
    return found


@functools.lru_cache(maxsize=4)
def batch_of(members: int, batches: int, seed: int) -> np.ndarray:
    """Return the batch, (member,) int32, of each of ``members``: the batches of ``spread_batches``, read-only.

    Members are positions, or blocks of neighbours that stay together so that a block of frames is read once an epoch.
    """
    found = np.empty(members, np.int32)
    order = np.random.default_rng(seed).permutation(members)
    found[order] = np.arange(members) % max(1, min(batches, members))
    found.flags.writeable = False  # the cache hands out one array
    return found


def _tile(grid: ObjectGrid, scan: Rectangle, where: np.ndarray, margin_px: int) -> Tile:
    if grid.periodic:  # windows wrap around: every tile sees the whole object
        window: Rectangle = ((0, grid.shape_yx[0]), (0, grid.shape_yx[1]))
    else:
        first = np.maximum(grid.corners[where].min(axis=0) - margin_px, 0)
        reach = grid.corners[where].max(axis=0) + np.asarray(grid.window_yx) + margin_px
        last = np.minimum(reach, np.asarray(grid.shape_yx))
        window = ((int(first[0]), int(last[0])), (int(first[1]), int(last[1])))
    return _on(grid, scan, where, window)


def _on(grid: ObjectGrid, scan: Rectangle, where: np.ndarray, window: Rectangle) -> Tile:
    local = replace(
        grid,
        shape_yx=(window[0][1] - window[0][0], window[1][1] - window[1][0]),
        corners=grid.corners[where] - [window[0][0], window[1][0]],
        shifts_px=grid.shifts_px[where],
    )
    return Tile(scan, where, window, local)
