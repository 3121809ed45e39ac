"""The copy of one source into one store: what is left to do, how a shard is copied, and the record of what is done."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from stemtomo.distributed.executor import Executor
from stemtomo.distributed.executor import executor as make_executor
from stemtomo.errors import AcquisitionWarning, ConfigurationError, StoreError
from stemtomo.geometry import Detector, Optics, Scan, TiltSeries
from stemtomo.io.archive import StreamedMember
from stemtomo.io.durable import free_bytes, human_bytes, stored_bytes
from stemtomo.io.frames import FRAMES, MISSING, NOTED, shard_count, shard_file, shard_regions, shard_shape
from stemtomo.io.gaps import missing_runs
from stemtomo.io.nodes import MARK
from stemtomo.io.provenance import Provenance, fingerprint_of
from stemtomo.io.schema import shard_positions_for, tilt_name
from stemtomo.io.shards import Piece
from stemtomo.io.sources import FrameSource
from stemtomo.io.store import Store
from stemtomo.io.transfer import piece_regions
from stemtomo.pipeline.config import IngestSettings
from stemtomo.pipeline.noted import Limits, Noted, warning_text

STAGE = "ingest"


class ShardTask(NamedTuple):
    """One shard of one tilt: its number in the shard grid and its region in scan positions."""

    tilt: int
    number: int
    y0: int
    y1: int
    x0: int
    x1: int


class Experiment(NamedTuple):
    """The geometry of a series: the same optics, scan and detector for every pose."""

    optics: Optics
    scan: Scan
    detector: Detector
    tilts: TiltSeries


def tilt_mark(
    experiment: Experiment, tilt: int, identity: Mapping[str, Any], missing: Sequence[tuple[int, int]] = ()
) -> Provenance:
    """Begin the record of ``tilt``, from a file of ``identity``; ``missing`` are runs of positions without a frame."""
    optics, scan, detector, tilts = experiment
    said: dict[str, Any] = {"optics": optics.to_attrs(), "scan": scan.to_attrs(), "detector": detector.to_attrs()}
    said["pose"] = tilts[tilt].to_attrs()
    if missing:
        said["missing"] = [list(run) for run in missing]
    return Provenance.start(STAGE, said, {"source": fingerprint_of(identity)})


def mark_of_series(fingerprints: Sequence[str]) -> Provenance:
    """Begin the record of a series whose tilts have these fingerprints."""
    inputs = {f"tilt/{tilt_name(tilt)}": fingerprint for tilt, fingerprint in enumerate(fingerprints)}
    return Provenance.start(STAGE, {"tilts": len(fingerprints)}, inputs)


@dataclass
class Intake:
    """The copy of one source into one store: what is left to do, and the record of what is done."""

    store: Store
    source: FrameSource
    limits: Limits
    marks: list[Provenance]
    series_mark: Provenance
    missing_frames: list[int]
    done: list[set[int]]
    tasks: list[ShardTask]
    kept: list[ShardTask]
    shard_counts: list[int]
    noted: dict[int, Noted] = field(default_factory=dict)
    written_bytes: int = 0
    written_shards: int = 0

    @classmethod
    def prepare(
        cls,
        store: Store,
        source: FrameSource,
        experiment: Experiment,
        settings: IngestSettings,
        identities: list[dict[str, Any]],
        limits: Limits,
    ) -> Intake:
        """Make or continue every tilt of the store, and list the shards that are missing."""
        optics, scan, detector, tilts = experiment
        store.declare_tilts(len(tilts))
        options: dict[str, Any] = {"shard_positions": shard_edge(source, settings), "codec": settings.codec}
        marks, done, tasks, kept, lost, counts = [], [], [], [], [], []
        for tilt, pose in enumerate(tilts):
            frames = (source.shape[1:], source.dtype)
            array = store.create_tilt(tilt, *frames, optics, scan, detector, pose, source=identities[tilt], **options)
            store.remove_leftovers(tilt)
            missing = missing_runs(source, tilt)
            attrs = store.tilt_attrs(tilt)
            if attrs.get(MISSING, []) != [list(run) for run in missing]:
                store.close_source(tilt, identities[tilt], missing)  # before any zero is stored
            finished = store.recorded_frames(tilt)
            regions = [ShardTask(tilt, n, *region) for n, region in shard_regions(array)]
            tasks += [task for task in regions if task.number not in finished]
            if NOTED not in attrs and MARK not in attrs:
                kept += [task for task in regions if task.number in finished]
            counts.append(shard_count(array))
            done.append(finished)
            lost.append(sum(stop - start for start, stop in missing))
            marks.append(tilt_mark(experiment, tilt, identities[tilt], missing))
        series_mark = mark_of_series([mark.fingerprint for mark in marks])
        return cls(store, source, limits, marks, series_mark, lost, done, tasks, kept, counts)

    @property
    def shard_total(self) -> int:
        """Shards of all tilts."""
        return sum(self.shard_counts)

    def steps(self, executor: Executor | None) -> Iterable[ShardTask]:
        """Copy the missing shards in the way that the source allows, and yield each when it is on the disk."""
        executor = executor or make_executor()
        # What was repaired is finite in the store: only the file still tells how much that was.
        repaired = self.limits.nonfinite_fraction > 0 and self.source.dtype.kind == "f"
        file = self.source if repaired and not isinstance(self.source, StreamedMember) else None
        for index, noted in executor.map_bounded(look_again, self.kept, self.store, self.limits, file):
            self.note(self.kept[index].tilt, noted)  # copied by a run that was killed
        if not self.tasks:
            return
        if isinstance(self.source, StreamedMember):
            yield from self.stream(self.source)
        else:
            yield from self.parallel(executor)

    def parallel(self, executor: Executor) -> Iterable[ShardTask]:
        """Copy the missing shards, one task each, and yield them as they end."""
        first, *rest = self.tasks
        self.note(first.tilt, copy_shard(first, self.store, self.source, self.limits))
        self._check_room_after(first)
        yield first
        for index, noted in executor.map_bounded(copy_shard, rest, self.store, self.source, self.limits):
            self.note(rest[index].tilt, noted)
            yield rest[index]

    def stream(self, source: StreamedMember) -> Iterable[ShardTask]:
        """Copy the missing shards from one forward pass through ``source``, and yield them as they are written."""
        rows: dict[tuple[int, int], list[ShardTask]] = {}
        for task in self.tasks:
            rows.setdefault((task.tilt, task.y0), []).append(task)
        edge_y, _edge_x = shard_shape(self.store.frames(0, require_complete=False))
        first = self.tasks[0]
        for tilt, y0, block in source.blocks(edge_y, (first.tilt, first.y0)):
            for task in rows.get((tilt, y0), ()):
                noted = Noted.nothing((source.shape[3], source.shape[4]), source.dtype)
                part = noted.checked(
                    block[:, task.x0 : task.x1], source.where, task.tilt, (task.y0, task.x0), self.limits
                )
                self.store.write_frames(tilt, task.y0, task.x0, part)
                self.note(tilt, noted)
                if task is first:
                    self._check_room_after(first)
                yield task

    def note(self, tilt: int, noted: Noted) -> None:
        """Add what was counted in a shard of ``tilt``, and check that it is not too much."""
        if tilt in self.noted:
            self.noted[tilt].add(noted)
        else:
            self.noted[tilt] = noted
        self.noted[tilt].check(self.source.where, tilt, math.prod(self.source.shape[1:]), self.limits)

    def record(self, task: ShardTask) -> None:
        """Record that the shard of ``task`` is on the disk; mark its tilt when it was the last one."""
        self.done[task.tilt].add(task.number)
        self.store.record_frames(task.tilt, self.done[task.tilt])
        self.written_bytes += _task_bytes(task, self.source)
        self.written_shards += 1
        if len(self.done[task.tilt]) == self.shard_counts[task.tilt]:
            self.complete(task.tilt)

    def complete(self, tilt: int) -> None:
        """Mark ``tilt``, with what was noted of it, and warn of what looks wrong."""
        noted = None
        if tilt in self.noted:
            noted = self.noted[tilt].to_attrs(self.limits, self.missing_frames[tilt])
            text = warning_text(self.source.where, tilt, noted)
            if text is not None:
                warnings.warn(text, AcquisitionWarning, stacklevel=2)
        self.store.complete_tilt(tilt, self.marks[tilt], noted)

    def mark(self) -> None:
        """Set the marks that changed geometry took away, and the mark of the whole series."""
        for tilt, mark in enumerate(self.marks):
            if not self.store.is_complete(f"tilt/{tilt_name(tilt)}", mark.fingerprint):
                self.complete(tilt)
        if not self.store.is_complete("tilt", self.series_mark.fingerprint):
            self.store.complete_tilts(self.series_mark)

    def numbers(self, wall_s: float) -> dict[str, Any]:
        """Return the numbers of this run."""
        size = math.prod(self.source.shape) * self.source.dtype.itemsize
        stored = stored_bytes(self.store.path / "tilt")
        noted = [self.store.tilt_attrs(tilt).get(NOTED, {}) for tilt in range(self.source.shape[0])]
        told = [warning_text(self.source.where, tilt, counts) for tilt, counts in enumerate(noted) if counts]
        return {
            "tilts": self.source.shape[0],
            "frames": self.source.n_expected,
            "missing_frames": sum(self.missing_frames),
            "shards_written": self.written_shards,
            "shards_kept": self.shard_total - self.written_shards,
            "bytes_read": self.written_bytes,
            "bytes_written": self.written_bytes,
            "bytes_stored": stored,
            "compression_ratio": size / stored,
            "warnings": [text for text in told if text is not None],
            "wall_s": wall_s,
        }

    def check_room(self) -> None:
        """Refuse to begin what clearly cannot end."""
        if self.tasks:
            _check_room(self.store, self.source, self.tasks, 1.0 if self.source.dtype.kind == "f" else math.inf)

    def _check_room_after(self, first: ShardTask) -> None:
        """Check the room for whole numbers with the compression that the first shard of this run showed."""
        if self.source.dtype.kind == "f":
            return
        folder = self.store.path / "tilt" / tilt_name(first.tilt) / FRAMES
        array = self.store.frames(first.tilt, require_complete=False)
        file = shard_file(array, folder, first.y0, first.x0)
        stored = file.stat().st_size if file.exists() else 0
        ratio = _task_bytes(first, self.source) / stored if stored else math.inf
        _check_room(self.store, self.source, self.tasks[1:], ratio)


def copy_shard(task: ShardTask, store: Store, source: FrameSource, limits: Limits) -> Noted:
    """Copy one shard from ``source`` to ``store``, piece by piece; file and store are opened here, wherever that is."""
    noted = Noted.nothing((source.shape[3], source.shape[4]), source.dtype)

    def pieces() -> Iterator[Piece]:
        for y0, y1, x0, x1 in piece_regions(source, (task.y0, task.y1, task.x0, task.x1)):
            block = source.read(task.tilt, y0, y1, x0, x1)
            yield y0, x0, noted.checked(block, source.where, task.tilt, (y0, x0), limits)

    store.write_pieces(task.tilt, task.y0, task.x0, pieces())
    return noted


def look_again(task: ShardTask, store: Store, limits: Limits, source: FrameSource | None = None) -> Noted:
    """Count the frames of a shard that is in the store, and what is not finite of it in ``source``, if given."""
    array = store.frames(task.tilt, require_complete=False)
    noted = Noted.nothing((array.shape[2], array.shape[3]), array.dtype)
    for _y, _x, block in store.read_pieces(task.tilt, task.y0, task.x0):
        noted.look(block, limits)
    if source is not None:
        noted.nonfinite_values += nonfinite_values(task, source, task.tilt)
    return noted


def nonfinite_values(task: ShardTask, source: FrameSource, tilt: int) -> int:
    """Return how many values of a shard are not finite in ``source``, whose ``tilt`` is that of the shard."""
    regions = piece_regions(source, (task.y0, task.y1, task.x0, task.x1))
    return sum(int((~np.isfinite(source.read(tilt, *region))).sum()) for region in regions)


def _task_bytes(task: ShardTask, source: FrameSource) -> int:
    return (task.y1 - task.y0) * (task.x1 - task.x0) * math.prod(source.shape[3:]) * source.dtype.itemsize


def shard_edge(source: FrameSource, settings: IngestSettings) -> int:
    """Return the edge of a shard in scan positions."""
    detector_shape = (source.shape[3], source.shape[4])
    return shard_positions_for(detector_shape, source.dtype, settings.shard_mib * 2**20)


def refuse_changes(where: object, settings: IngestSettings) -> None:
    """Refuse to change frames on their way where an acquisition is followed: only ingest changes them.

    Raises
    ------
    ConfigurationError
        If ``settings`` ask for it.
    """
    if settings.crop or settings.bin > 1 or settings.dead_pixels or settings.narrow:
        raise ConfigurationError(
            f"{where}: ingest.crop, bin, dead_pixels and narrow are for ingest of finished files; leave them out where "
            "an acquisition is followed"
        )


def _check_room(store: Store, source: FrameSource, tasks: list[ShardTask], ratio: float) -> None:
    """Refuse to begin what clearly cannot end: ``tasks`` at a compression of ``ratio`` must fit the disk."""
    size = sum(_task_bytes(task, source) for task in tasks)
    needed, free = int(size / ratio), free_bytes(store.path)
    if needed > free:
        how = "real numbers hardly compress" if ratio == 1 else f"compressed {ratio:.1f} times, like the first shard"
        raise StoreError(
            f"{store.path}: the disk has {human_bytes(free)} free, the {human_bytes(size)} of frames still to come "
            f"need about {human_bytes(needed)} ({how}); make room or choose another store and run again, "
            "finished shards are kept"
        )
