"""What tiles of a tilt take: memory of a worker, strips of a step, and what is exchanged where stitched ones meet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stemtomo import backend
from stemtomo.algorithms.ptychography.mistilt_map import RasterGaussian
from stemtomo.algorithms.ptychography.tiles import Rectangle, fair_unit, rectangles
from stemtomo.algorithms.ptychography.windows import ObjectGrid
from stemtomo.geometry import Detector, Scan
from stemtomo.io.schema import CHUNK_POSITIONS
from stemtomo.pipeline.config import PtychographySettings
from stemtomo.pipeline.tile_fields import GROUP_BYTES

#: Pixels that a window is larger than what its positions reach, on every side: what refined positions may move by.
MARGIN_PX = 4
#: Scan positions of a chunk, the least that is read.
CHUNK = (CHUNK_POSITIONS, CHUNK_POSITIONS)
#: Buffers of a running task beside the object: waves of the positions that are worked on together, codecs.
BUFFERS = 64 * backend.CACHE_BYTES


@dataclass(frozen=True)
class Alone:
    """What tiles on their own take where they meet."""

    positions: int
    """Of the largest tile, with those of its neighbours that it sees."""
    pairs: int
    """Of tiles that overlap."""
    bytes_moved: int
    """What all tiles together send each other at one meeting."""


@dataclass(frozen=True)
class Need:
    """What tiles of one tilt take: bytes of one worker, of all patterns, of one strip exchange."""

    held_patterns: int
    """Of the patterns that the busiest worker holds."""
    held_objects: int
    """Of object, momentum and sums of the tiles of the busiest worker."""
    running: int
    """Of one running task beside that."""
    positions: int
    """Of the largest tile."""
    strips: int
    """That all tiles together exchange in one step."""
    alone: Alone | None = None
    """Of tiles that are stitched."""

    def per_worker(self, threads: int) -> int:
        """Return the peak memory of the busiest worker."""
        return self.held_patterns + self.held_objects + threads * self.running


@dataclass(frozen=True)
class Choice:
    """A cut into rows and columns of tiles, whether their patterns are held, and what that takes."""

    tiles_yx: tuple[int, int]
    resident: bool
    need: Need


def need_of(
    scan: Scan,
    detector: Detector,
    grid: ObjectGrid,
    itemsize: int,
    shard_yx: tuple[int, int],
    settings: PtychographySettings,
    tiles_yx: tuple[int, int],
    resident: bool,
    workers: int,
) -> Need:
    """Return what a cut takes on so many ``workers``, from the geometry alone."""
    halo = (settings.stitch_halo or 0) if settings.tile_mode == "stitch" else 0
    cuts = cuts_of(scan, tiles_yx, shard_yx)
    tiles = _tiles_of(scan, grid, cuts, halo)
    mine = math.ceil(len(tiles) / workers)
    pattern = math.prod(detector.shape_yx) * itemsize
    largest, pixels = max(count for count, _ in tiles), max(_pixels(window) for _, window in tiles)
    layer = 4 * settings.slices * (2 if settings.object == "complex" else 1)
    probes = settings.probe_modes * math.prod(grid.window_yx) * 8 * 8
    patterns = mine * largest * pattern if resident else 0
    # What is being read and what is being worked on, each with a copy whose zero frequency goes to the corner.
    buffer = 4 * (GROUP_BYTES + math.prod(CHUNK) * pattern)
    # A search remembers changes and turns of eight iterations, and works with some vectors more.
    mapped = settings.mistilt_map_smoothing_angstrom is not None
    vectors = 4 + 2 * 8 + 6 if settings.rule == "lbfgs" or mapped else 4
    held = mine * (pixels * (vectors * layer + 8) + probes + (largest * vectors * 16 if mapped else 0))
    running = pixels * (2 * layer + 16 * settings.slices + 8) + buffer + BUFFERS
    whole = math.prod(grid.shape_yx)
    if settings.filters_whole_object:  # one task holds all of it, and transforms a mirrored stack in double precision
        running = max(running, whole * settings.slices * 128)
    exact = tiles if halo == 0 else _tiles_of(scan, grid, cuts, 0)
    strips = max(0, sum(_pixels(window) for _, window in exact) - whole) * (layer + 4) * 2
    strips += _map_strips(scan, cuts, settings)
    alone = _alone([window for _, window in tiles], largest, settings, grid) if settings.tile_mode == "stitch" else None
    return Need(patterns, held, running, max(count for count, _ in exact), strips, alone)


def _alone(windows: Sequence[Rectangle], positions: int, settings: PtychographySettings, grid: ObjectGrid) -> Alone:
    """Return what tiles send each other where they meet: objects to compare, shares of the blend, and probes."""
    bounds = np.array(windows)
    common = np.minimum(bounds[:, None, :, 1], bounds[None, :, :, 1]) - np.maximum(
        bounds[:, None, :, 0], bounds[None, :, :, 0]
    )
    shared = np.prod(np.maximum(common, 0), axis=-1)
    np.fill_diagonal(shared, 0)
    layer = 4 * settings.slices * (2 if settings.object == "complex" else 1)
    compared = int(shared.sum()) // 2 * (layer + 4) if settings.stitch_meet_epochs > 1 else 0
    blended = int(shared.sum()) * (layer + 8 * settings.slices + 4)
    probes = len(windows) * settings.probe_modes * math.prod(grid.window_yx) * 8
    return Alone(positions, int(np.count_nonzero(shared)) // 2, compared + blended + probes)


def _pixels(window: Rectangle) -> int:
    return math.prod(stop - start for start, stop in window)


def _tiles_of(scan: Scan, grid: ObjectGrid, cuts: Sequence[Rectangle], halo: int) -> list[tuple[int, Rectangle]]:
    """Return the positions of each tile and its window, without looking at every position."""
    corners, found = grid.corners.reshape(*scan.shape_yx, 2), []
    for cut in cuts:
        (y0, y1), (x0, x1) = (
            (max(0, start - halo), min(length, stop + halo))
            for (start, stop), length in zip(cut, scan.shape_yx, strict=True)
        )
        # Positions of a scan are an affine map of its rows and columns: the outermost are at the corners.
        outer = corners[[y0, y1 - 1]][:, [x0, x1 - 1]].reshape(-1, 2)
        first = np.maximum(outer.min(axis=0) - MARGIN_PX, 0)
        last = np.minimum(outer.max(axis=0) + grid.window_yx + MARGIN_PX, grid.shape_yx)
        window = ((int(first[0]), int(last[0])), (int(first[1]), int(last[1])))
        whole = ((0, grid.shape_yx[0]), (0, grid.shape_yx[1]))
        found.append(((y1 - y0) * (x1 - x0), whole if grid.periodic else window))
    return found


def _map_strips(scan: Scan, cuts: Sequence[Rectangle], settings: PtychographySettings) -> int:
    """Return the bytes of a map of mistilts that tiles exchange in a step: two values and slopes of positions near."""
    width = settings.mistilt_map_smoothing_angstrom
    if width is None:
        return 0
    around = RasterGaussian(scan.step_angstrom_yx, width).around
    near = sum(math.prod(b - a for a, b in around(cut, scan.shape_yx)) for cut in cuts)
    return (near - scan.count) * 2 * 16


def cuts_of(scan: Scan, tiles_yx: tuple[int, int], shard_yx: tuple[int, int]) -> list[Rectangle]:
    """Return the rectangles of tiles: at shards where that makes them alike, else at chunks, the least that is read."""
    axes = zip(scan.shape_yx, tiles_yx, shard_yx, strict=True)
    units = [fair_unit(length, count, (shard, min(shard, CHUNK_POSITIONS))) for length, count, shard in axes]
    return rectangles(scan.shape_yx, tiles_yx, (units[0], units[1]))
