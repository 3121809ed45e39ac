"""How a tilt is cut into tiles, whether its patterns are held, and what that takes of every worker."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from stemtomo.algorithms.ptychography.advice import probe_diameter_angstrom
from stemtomo.algorithms.ptychography.tiles import (
    Rectangle,
    Tile,
    cut_scan,
    out_to_edges,
    with_halo,
)
from stemtomo.algorithms.ptychography.windows import ObjectGrid
from stemtomo.distributed import Executor
from stemtomo.errors import MemoryPlanError
from stemtomo.geometry import Detector, Optics, Scan
from stemtomo.io.schema import CHUNK_POSITIONS
from stemtomo.io.store import Store
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.pipeline.config import PtychographySettings, ResourceSettings
from stemtomo.pipeline.ptychography import GROUP, grid_of, padding_of
from stemtomo.pipeline.tile_need import BUFFERS, MARGIN_PX, Choice, Need, cuts_of, need_of

#: Memory of a worker of a cluster that holds nothing: the interpreter, its modules and compiled kernels.
_PROCESS_BYTES = 256 << 20
#: Halo of tiles on their own in diameters of the probe: with one, seams differ by more than a tenth of the noise.
_HALO = 4 / 3


@dataclass(frozen=True)
class Room:
    """What there is to work in.

    Parameters
    ----------
    limit_bytes
        Memory of one worker.
    workers, threads
        Number of workers, and of tasks that one of them runs at once.
    """

    limit_bytes: int
    workers: int = 1
    threads: int = 1

    @classmethod
    def of(cls, executor: Executor, settings: PtychographySettings) -> Room:
        """Return the room of ``executor``, cut to ``settings.memory_gib`` for all workers together."""
        from stemtomo.pipeline.plan import worker_limits

        limit, workers, threads = worker_limits(executor, ResourceSettings(memory_gib=settings.memory_gib))
        # The limit of a worker of a cluster is for all of its process.
        own = _PROCESS_BYTES if workers > 1 or getattr(executor, "client", None) is not None else 0
        return cls(limit - own, workers, threads)


@dataclass(frozen=True)
class Layout:
    """A tilt cut into tiles: small, and enough for a worker to find its tile.

    Parameters
    ----------
    cuts
        Rectangles of the scan, at shards.
    tiles_yx
        Rows and columns of them.
    resident
        Whether patterns are held.
    halo
        Scan positions of their neighbours that tiles see beyond their own.
    """

    path: Path
    tilt: int
    settings: PtychographySettings
    cuts: tuple[Rectangle, ...]
    tiles_yx: tuple[int, int]
    resident: bool
    halo: int = 0

    def tiles(self) -> tuple[Tile, ...]:
        """Return the tiles, whose grids are for the recorded positions."""
        return _tiles(self)

    def cut_as(self, tiles_yx: tuple[int, int]) -> Layout:
        """Return the layout with other tiles."""
        store = Store.open(self.path)
        cuts = cuts_of(store.scan(self.tilt), tiles_yx, shard_of(store, self.tilt))
        return replace(self, cuts=tuple(cuts), tiles_yx=tiles_yx)

    def grid(self) -> ObjectGrid:
        """Return the windows of all recorded positions in the whole object."""
        store = Store.open(self.path)
        recorded = np.flatnonzero(store.valid(self.tilt))
        whole = grid_of(
            store.scan(self.tilt), store.detector(self.tilt), padding_of(store.scan(self.tilt), self.settings)
        )
        return replace(whole, corners=whole.corners[recorded], shifts_px=whole.shifts_px[recorded])


def layout_of(store: Store, tilt: int, settings: PtychographySettings, room: Room) -> Layout | None:
    """Return how a tilt is cut into tiles; ``None`` where it is reconstructed in one piece.

    Raises
    ------
    MemoryPlanError
        If no cut makes it fit; the text names the number and what would fit.
    """
    scan, detector, shard = store.scan(tilt), store.detector(tilt), shard_of(store, tilt)
    settings = with_known_halo(settings, scan, store.optics(tilt))
    itemsize = store.frames(tilt, require_complete=False).dtype.itemsize
    found = chosen(scan, detector, itemsize, shard, settings, room, store.tilt_count)
    if found is None:
        return None
    if found.need.per_worker(room.threads) > room.limit_bytes:
        raise MemoryPlanError(_refusal(found.need, settings, room))
    cuts = cuts_of(scan, found.tiles_yx, shard)
    return Layout(store.path, tilt, settings, tuple(cuts), found.tiles_yx, found.resident)


@functools.lru_cache(maxsize=8)  # tilts of a series are alike
def chosen(
    scan: Scan,
    detector: Detector,
    itemsize: int,
    shard_yx: tuple[int, int],
    settings: PtychographySettings,
    room: Room,
    tilts: int = 1,
) -> Choice | None:
    """Return the fewest tiles that fit, or what needs the least; ``None`` for one piece without tiles."""
    frames = scan.count * math.prod(detector.shape_yx) * itemsize
    grid = _grid(scan, detector, padding_of(scan, settings))
    at_once = min(room.threads, math.ceil(tilts / room.workers))
    # In one piece a tilt is copied once when it is loaded and its zero frequency goes to the corner.
    piece = 2 * frames + math.prod(grid.shape_yx) * settings.slices * 44 + BUFFERS
    plain = settings.frames != "store" and settings.batch_block == 1
    if settings.tiles == "auto" and plain and at_once * piece <= room.limit_bytes:
        return None
    candidates = [settings.tiles] if settings.tiles != "auto" else list(_grids(scan, shard_yx, room))
    wanted = {"memory": (True,), "store": (False,), "auto": (True, False)}[settings.frames]
    choices = []
    for resident in wanted:
        for tiles_yx in candidates:
            need = need_of(scan, detector, grid, itemsize, shard_yx, settings, tiles_yx, resident, room.workers)
            choices.append(Choice(tiles_yx, resident, need))
            if need.per_worker(room.threads) <= room.limit_bytes:
                return choices[-1]
    least = min(choices, key=lambda choice: choice.need.per_worker(room.threads))
    # Buffers make tiles of a small tilt larger than the tilt in one piece, which then is what comes closest.
    piece_is_less = at_once * piece <= least.need.per_worker(room.threads)
    return None if settings.tiles == "auto" and plain and piece_is_less else least


def groups_of(
    scan: Scan,
    detector: Detector,
    itemsize: int,
    shard_yx: tuple[int, int],
    settings: PtychographySettings,
    room: Room,
    tilts: int,
    series: int,
) -> int:
    """Return into how many groups the workers are divided, each of which takes one tilt in tiles after another.

    As many as there are ``tilts`` to do (of a ``series``), or workers, as long as a tilt fits a group as well as it
    fits all workers: in memory where it does. Few tiles of many tilts exchange less, and wait less for each other,
    than many of one.
    """

    def fitting(groups: int) -> Choice | None:
        # Each worker holds its share of one tilt: with fewer workers to a tilt, more of it.
        smaller = replace(room, workers=room.workers // groups)
        found = chosen(scan, detector, itemsize, shard_yx, settings, smaller, series)
        return found if found is None or found.need.per_worker(room.threads) <= room.limit_bytes else None

    whole = fitting(1)
    least, most = 1, min(tilts, room.workers)
    while whole is not None and least < most:
        middle = (least + most + 1) // 2
        found = fitting(middle)
        if found is not None and found.resident >= whole.resident:
            least = middle
        else:
            most = middle - 1

    def rounds(groups: int) -> tuple[float, int]:
        """Time of the series in that of a tilt on one worker; each more to a tilt costs a percent (simulated)."""
        members = room.workers // groups
        return math.ceil(tilts / groups) / members * (1 + 0.01 * (members - 1)), -groups

    return min(range(1, least + 1), key=rounds)


@functools.lru_cache(maxsize=4)
def _grid(scan: Scan, detector: Detector, padding: float) -> ObjectGrid:
    return grid_of(scan, detector, padding)


def shard_of(store: Store, tilt: int) -> tuple[int, int]:
    """Return the scan positions along y and x of a shard of a tilt."""
    array = store.frames(tilt, require_complete=False)
    rows, columns = (array.shards or array.chunks)[:2]
    return rows, columns


def with_known_halo(settings: PtychographySettings, scan: Scan, optics: Optics) -> PtychographySettings:
    """Return ``settings`` with the halo of stitched tiles: 4/3 of the probe's diameter unless they say it."""
    if settings.tile_mode != "stitch" or settings.stitch_halo is not None:
        return settings
    depth = settings.slices * settings.mean_slice_angstrom
    defocus = optics.aberrations.get("C10", 0.0)
    probe = probe_diameter_angstrom(wavelength_angstrom(optics.energy_ev), optics.semiangle_rad, defocus, depth)
    return settings.model_copy(update={"stitch_halo": math.ceil(_HALO * probe / min(scan.step_angstrom_yx))})


@functools.lru_cache(maxsize=4)
def _tiles(layout: Layout) -> tuple[Tile, ...]:
    store, grid = Store.open(layout.path), layout.grid()
    recorded, shape = np.flatnonzero(store.valid(layout.tilt)), store.scan(layout.tilt).shape_yx
    found = cut_scan(grid, shape, recorded, layout.cuts, MARGIN_PX)
    if layout.settings.filters_whole_object:
        found = out_to_edges(found, grid)
    return tuple(with_halo(found, grid, shape, recorded, layout.halo, MARGIN_PX) if layout.halo else found)


def _grids(scan: Scan, shard_yx: tuple[int, int], room: Room) -> Iterator[tuple[int, int]]:
    """Yield rows and columns of ever more tiles, in rounds that keep all threads busy, as square as the scan allows."""
    pairs_of = zip(scan.shape_yx, shard_yx, strict=True)
    most = tuple(math.ceil(length / min(edge, CHUNK_POSITIONS)) for length, edge in pairs_of)
    slots, rounds, seen = room.workers * room.threads, 1, set()
    while True:
        wanted = min(slots * rounds, math.prod(most))
        rows = range(1, min(most[0], wanted) + 1)
        pairs = {(row, min(most[1], max(1, wanted // row))) for row in rows}
        # Work of the busiest thread first, then the length of all seams.
        best = min(
            pairs,
            key=lambda p: (
                round(math.ceil(math.prod(p) / slots) / math.prod(p), 4),
                p[0] * scan.shape_yx[1] + p[1] * scan.shape_yx[0],
            ),
        )
        if best not in seen:
            seen.add(best)
            yield best
        if wanted >= math.prod(most) or rounds > 64:
            return
        rounds *= 2


def _refusal(need: Need, settings: PtychographySettings, room: Room) -> str:
    size = need.per_worker(room.threads)
    fits = []
    if settings.tiles != "auto":
        fits.append('tiles = "auto"')
    if need.held_patterns and settings.frames == "memory":
        fits.append('frames = "store", which reads patterns when they are needed')
    one = need.per_worker(1)
    if room.threads > 1 and one <= room.limit_bytes:
        fits.append("workers of one thread")
    fits.append(f"workers with {size / 2**30:.2f} GiB")
    return (
        f"{GROUP} in tiles needs {size / 2**30:.2f} GiB on each of {room.workers} worker(s) of {room.threads} thread(s)"
        f" ({need.held_patterns / 2**30:.2f} GiB of patterns, {need.held_objects / 2**30:.2f} GiB of the object,"
        f" {need.running / 2**30:.2f} GiB per running task), but a worker has {room.limit_bytes / 2**30:.2f} GiB."
        f" Would fit: {'; or '.join(fits)}."
    )
