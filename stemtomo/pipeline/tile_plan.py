"""What tilts in tiles take for the plan: from headers, and from a measurement if there is one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from stemtomo.distributed import PlanRow
from stemtomo.geometry import Detector, Scan
from stemtomo.io.schema import frame_shards
from stemtomo.pipeline.config import PtychographySettings
from stemtomo.pipeline.ptychography import GROUP, grid_of, padding_of
from stemtomo.pipeline.solving import alone_epochs
from stemtomo.pipeline.tile_layout import Choice, Room, chosen, groups_of

#: Numbers of workers that a plan with a measurement says the time for.
_CURVE = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def plan_row(
    scan: Scan,
    detector: Detector,
    itemsize: int,
    tilts: int,
    settings: PtychographySettings,
    room: Room,
    seconds_of: Callable[[Choice, int, int], float] | None = None,
) -> PlanRow | None:
    """Return the row of a plan for tilts in tiles, from headers alone; ``None`` where a tilt fits in one piece.

    ``seconds_of`` says what one tilt takes on so many workers, which are one of so many groups, where something was
    measured.
    """
    shape = (*scan.shape_yx, *detector.shape_yx)
    shard = frame_shards(shape)[:2]

    def on(workers: int) -> tuple[int, Choice | None]:
        """Return the groups of so many workers, and the tiles of a tilt in each."""
        many = replace(room, workers=workers)
        groups = groups_of(scan, detector, itemsize, shard, settings, many, tilts, tilts)
        many = replace(many, workers=workers // groups)
        return groups, chosen(scan, detector, itemsize, shard, settings, many, tilts)

    def seconds(workers: int) -> float | None:
        groups, choice = on(workers)
        if seconds_of is None or choice is None or choice.need.per_worker(room.threads) > room.limit_bytes:
            return None
        return math.ceil(tilts / groups) * seconds_of(choice, workers // groups, groups)

    groups, found = on(room.workers)
    if found is None:
        return None
    tiles_yx, resident, need = found.tiles_yx, found.resident, found.need
    grid = grid_of(scan, detector, padding_of(scan, settings))
    frames = scan.count * math.prod(detector.shape_yx) * itemsize
    pixels = math.prod(grid.shape_yx) * settings.slices
    curve = [(count, seconds(count)) for count in _CURVE] if seconds_of is not None else []
    return PlanRow(
        stage=f"{GROUP}, {tiles_yx[0]} x {tiles_yx[1]} tiles",
        tasks=math.prod(tiles_yx) * tilts,
        bytes_per_task=need.running,
        bytes_read=round(
            tilts * (frames * (2 if resident else 2 + passes(settings)) + _read_alone(settings, found, frames))
        ),
        bytes_written=(pixels * 8 + pixels * 8 // settings.slices) * tilts,
        seconds=seconds(room.workers),
        resident_bytes=(need.held_patterns + need.held_objects) * (room.workers // groups) * groups,
        seconds_over_workers=tuple((count, value) for count, value in curve if value is not None),
    )


def _read_alone(settings: PtychographySettings, choice: Choice, frames: int) -> float:
    """Return the bytes that stitched tiles read beside the passes of all: the patterns of their halos, once or more."""
    alone = choice.need.alone
    if alone is None:
        return 0.0
    tiles = math.prod(choice.tiles_yx)
    wider = frames * tiles * alone.positions / (tiles * choice.need.positions)
    if choice.resident:
        return wider
    epochs = alone_epochs(settings, settings.epochs)
    return (wider - frames) * epochs * (1 if settings.batch_block >= 8 else settings.batches_per_epoch)


def passes(settings: PtychographySettings) -> int:
    """Return how often the patterns of a tilt are read where they are not held: once per batch of scattered ones."""
    if settings.mistilt_map_smoothing_angstrom is not None:  # a search takes all of them in every iteration
        return settings.epochs
    settling = settings.settling_of(settings.epochs)
    stirred = settings.epochs - settling
    return settling + stirred * (1 if settings.batch_block >= 8 else settings.batches_per_epoch)
