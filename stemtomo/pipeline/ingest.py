"""Ingest: detector frames into the store, shard by shard, checked, in parallel where the file allows, restartable."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stemtomo.distributed.executor import Executor
from stemtomo.distributed.executor import executor as make_executor
from stemtomo.distributed.memory import PlanRow
from stemtomo.errors import AcquisitionError, ConfigurationError, StoreError
from stemtomo.geometry import Detector, Optics, Scan, TiltSeries
from stemtomo.io.archive import StreamedMember
from stemtomo.io.durable import free_bytes, human_bytes, stored_bytes
from stemtomo.io.formats.registry import read_overhead_bytes
from stemtomo.io.frames import FRAMES, shard_count, shard_file, shard_regions, shard_shape
from stemtomo.io.layout import check_values
from stemtomo.io.provenance import Provenance, fingerprint_of
from stemtomo.io.schema import frame_shards, shard_positions_for, tilt_name
from stemtomo.io.series import SeriesOfFiles, TiltFiles, tilt_identities
from stemtomo.io.sources import FrameSource, check_complete, open_frames
from stemtomo.io.store import Store
from stemtomo.pipeline.config import IngestSettings, InputSettings
from stemtomo.pipeline.progress import Progress, Silent

STAGE = "ingest"
_COPIES_IN_A_TASK = 3


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


def ingest(
    store: Store | str | Path,
    source: FrameSource,
    optics: Optics,
    scan: Scan,
    detector: Detector,
    tilts: TiltSeries,
    settings: IngestSettings | None = None,
    *,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Copy the frames of ``source`` into ``store``, with the geometry of every tilt; continue where a run ended.

    Uncompressed files are copied by one task per shard, which opens file and store where it runs. A compressed archive
    member is streamed forward once by the calling process, with a shard row (or, for files whose axes do not begin
    with tilt and y, a tilt) in memory. Changed geometry is written again without touching finished frames.

    Parameters
    ----------
    store
        An open store, or the path of one to make or continue; a new one is named after its file.
    source
        Frames (tilt, y, x, ky, kx), see :func:`stemtomo.io.sources.open_frames`.
    tilts
        One pose per tilt, in the order of the frames.

    Returns
    -------
    dict
        ``tilts``, ``frames``, ``shards_written``, ``shards_kept``, ``bytes_read`` and ``bytes_written`` (by this run,
        before compression), ``bytes_stored`` (all tilts on the disk), ``compression_ratio``, ``wall_s``.

    Raises
    ------
    AcquisitionError
        If the frames do not match the scan, detector or tilts, frames are missing or left over, or the store was begun
        from another file.
    FormatError
        If the file is damaged, or frames hold non-finite values or negative counts.
    StoreError
        If the store cannot be written or clearly has not enough room.
    """
    began = time.perf_counter()
    progress = progress or Silent()
    _check_match(source, scan, detector, tilts)
    check_complete(source)
    store = store if isinstance(store, Store) else open_or_create(store)
    identities = tilt_identities(source)
    _check_identity(store, source, identities)
    experiment = Experiment(optics, scan, detector, tilts)
    copy = _Copy.prepare(store, source, experiment, settings or IngestSettings(), identities)
    total = copy.shard_total
    progress.start(STAGE, total, "shard")
    progress.advance(total - len(copy.tasks))
    if copy.tasks:
        _check_room(store, source, copy.tasks, ratio=1.0 if source.dtype.kind == "f" else math.inf)
        for task in copy.steps(executor):
            copy.record(task)
            progress.advance(1)
    if tilt_identities(source) != identities:
        raise AcquisitionError(f"{source.where}: changed while it was read; remove {store.path} and ingest again")
    copy.mark()
    progress.finish(STAGE)
    return copy.numbers(time.perf_counter() - began)


def open_input(
    settings: InputSettings, scan_shape: tuple[int, int] | None = None, theta_deg: Sequence[float] | None = None
) -> FrameSource:
    """Open the frames that the section [input] names; ``scan_shape`` is scan.shape, (y, x), where it is given.

    ``theta_deg``, one angle per tilt, says which tilts the files of ``input.files`` are; not needed without them.

    Raises
    ------
    FormatError, AcquisitionError
        See :func:`stemtomo.io.sources.open_frames`.
    """
    if settings.files is not None and theta_deg is not None:
        if not isinstance(settings.path, Path):
            raise ConfigurationError(
                "input.files names files in one folder, but input.path is a list; give one of them"
            )
        files = TiltFiles(settings.path, settings.files, theta_deg)
        return SeriesOfFiles.open(files, lambda path: open_file(settings, scan_shape, path))
    return open_file(settings, scan_shape, settings.path)


def open_file(
    settings: InputSettings, scan_shape: tuple[int, int] | None, path: Path | tuple[Path, ...]
) -> FrameSource:
    """Open the file ``path`` (or one file per tilt) of frames that are laid out as the section [input] says."""
    return open_frames(
        path,
        format=settings.format,
        array=settings.array,
        axes=settings.axes,
        scan_shape=scan_shape,
        skip=settings.skip,
        flyback=settings.flyback,
        channel=settings.channel,
        dtype=settings.dtype,
        shape=settings.shape,
        offset_bytes=settings.offset_bytes,
    )


def plan_ingest(source: FrameSource, settings: IngestSettings | None = None) -> PlanRow:
    """Return what :func:`ingest` of ``source`` would read, write and hold; only headers are read.

    A task holds its shard three times while Zarr encodes it: as read, cut into chunks, and in the buffers of the
    compressor. ``bytes_written`` is before compression.
    """
    settings = settings or IngestSettings()
    frame_shape = source.shape[1:]
    shards = frame_shards(frame_shape, shard_edge(source, settings))
    shard_bytes = math.prod(shards) * source.dtype.itemsize
    count = source.shape[0] * math.ceil(frame_shape[0] / shards[0]) * math.ceil(frame_shape[1] / shards[1])
    total = math.prod(source.shape) * source.dtype.itemsize
    streamed = isinstance(source, StreamedMember)
    return PlanRow(
        stage=STAGE,
        tasks=1 if streamed else count,
        bytes_per_task=_COPIES_IN_A_TASK * shard_bytes + read_overhead_bytes(source),
        bytes_read=source.path.stat().st_size if streamed else total,
        bytes_written=total,
        resident_bytes=source.buffer_bytes(shards[0]) if isinstance(source, StreamedMember) else 0,
    )


def open_or_create(path: str | Path) -> Store:
    """Open the store at ``path`` for writing, or make one named after its file."""
    return Store.open(path, "r+") if Store.is_store(path) else Store.create(path, Path(path).stem)


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
class _Copy:
    """The copy of one source into one store: what is left to do, and the record of what is done."""

    store: Store
    source: FrameSource
    marks: list[Provenance]
    series_mark: Provenance
    done: list[set[int]]
    tasks: list[ShardTask]
    shard_total: int
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
    ) -> _Copy:
        """Make or continue every tilt of the store, and list the shards that are missing."""
        optics, scan, detector, tilts = experiment
        store.declare_tilts(len(tilts))
        positions = shard_edge(source, settings)
        marks, done, tasks, total = [], [], [], 0
        for tilt, pose in enumerate(tilts):
            frames = (source.shape[1:], source.dtype)
            array = store.create_tilt(
                tilt, *frames, optics, scan, detector, pose, source=identities[tilt], shard_positions=positions
            )
            store.remove_leftovers(tilt)
            finished = store.recorded_frames(tilt)
            tasks += [ShardTask(tilt, n, *region) for n, region in shard_regions(array) if n not in finished]
            total += shard_count(array)
            done.append(finished)
            marks.append(tilt_mark(experiment, tilt, identities[tilt]))
        series_mark = mark_of_series([mark.fingerprint for mark in marks])
        return cls(store, source, marks, series_mark, done, tasks, total)

    def steps(self, executor: Executor | None) -> Iterable[ShardTask]:
        """Copy the missing shards in the way that the source allows, and yield each when it is on the disk."""
        if isinstance(self.source, StreamedMember):
            return self.stream(self.source)
        return self.parallel(executor or make_executor())

    def parallel(self, executor: Executor) -> Iterable[ShardTask]:
        """Copy the missing shards, one task each, and yield them as they end."""
        first, *rest = self.tasks
        copy_shard(first, self.store, self.source)
        self._check_room_after(first)
        yield first
        for index, _ in executor.map_bounded(copy_shard, rest, self.store, self.source):
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
                part = block[:, task.x0 : task.x1]
                check_values(part, source.where, tilt, task.y0, task.x0)
                self.store.write_frames(tilt, task.y0, task.x0, part)
                if task is first:
                    self._check_room_after(first)
                yield task

    def record(self, task: ShardTask) -> None:
        """Record that the shard of ``task`` is on the disk; mark its tilt when it was the last one."""
        self.done[task.tilt].add(task.number)
        self.store.record_frames(task.tilt, self.done[task.tilt])
        self.written_bytes += _task_bytes(task, self.source)
        self.written_shards += 1
        if len(self.done[task.tilt]) * len(self.done) == self.shard_total:
            self.store.complete_tilt(task.tilt, self.marks[task.tilt])

    def mark(self) -> None:
        """Set the marks that changed geometry took away, and the mark of the whole series."""
        for tilt, mark in enumerate(self.marks):
            if not self.store.is_complete(f"tilt/{tilt_name(tilt)}", mark.fingerprint):
                self.store.complete_tilt(tilt, mark)
        if not self.store.is_complete("tilt", self.series_mark.fingerprint):
            self.store.complete_tilts(self.series_mark)

    def numbers(self, wall_s: float) -> dict[str, Any]:
        """Return the numbers of this run."""
        size = math.prod(self.source.shape) * self.source.dtype.itemsize
        stored = stored_bytes(self.store.path / "tilt")
        return {
            "tilts": self.source.shape[0],
            "frames": self.source.n_expected,
            "shards_written": self.written_shards,
            "shards_kept": self.shard_total - self.written_shards,
            "bytes_read": self.written_bytes,
            "bytes_written": self.written_bytes,
            "bytes_stored": stored,
            "compression_ratio": size / stored,
            "wall_s": wall_s,
        }

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


def copy_shard(task: ShardTask, store: Store, source: FrameSource) -> None:
    """Copy one shard from ``source`` to ``store``; file and store are opened here, wherever that is."""
    block = source.read(task.tilt, task.y0, task.y1, task.x0, task.x1)
    check_values(block, source.where, task.tilt, task.y0, task.x0)
    store.write_frames(task.tilt, task.y0, task.x0, block)


def _task_bytes(task: ShardTask, source: FrameSource) -> int:
    return (task.y1 - task.y0) * (task.x1 - task.x0) * math.prod(source.shape[3:]) * source.dtype.itemsize


def shard_edge(source: FrameSource, settings: IngestSettings) -> int:
    """Return the edge of a shard in scan positions."""
    detector_shape = (source.shape[3], source.shape[4])
    return shard_positions_for(detector_shape, source.dtype, settings.shard_mib * 2**20)


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


def _check_match(source: FrameSource, scan: Scan, detector: Detector, tilts: TiltSeries) -> None:
    found = (source.shape[0], source.shape[1:3], source.shape[3:])
    said = (len(tilts), tuple(scan.shape_yx), tuple(detector.shape_yx))
    names = ("number of tilts", "scan (y, x)", "detector (ky, kx)")
    advice = ("give one angle per tilt", "correct the scan shape or the axes", "correct the detector or the axes")
    for name, here, there, what in zip(names, found, said, advice, strict=True):
        if here != there:
            raise AcquisitionError(f"{source.where}: the {name} is {here} in the file, but {there} was given; {what}")


def _check_identity(store: Store, source: FrameSource, identities: list[dict[str, Any]]) -> None:
    """Refuse to continue a store that another file began: it would mix two acquisitions."""
    for tilt, identity in zip(range(store.tilt_count), identities, strict=False):
        if not (store.path / "tilt" / tilt_name(tilt)).exists():
            continue
        begun = store.tilt_attrs(tilt).get("source")
        if begun != identity:
            before = begun or {}
            differing = sorted(key for key in {*identity, *before} if before.get(key) != identity.get(key))
            raise AcquisitionError(
                f"{store.path}: tilt {tilt} was begun from {_described(begun)}, now {source.path} is "
                f"{_described(identity)}; they differ in {', '.join(differing)}. Ingest the new file into another "
                "store, or remove this one"
            )


def _described(identity: dict[str, Any] | None) -> str:
    if not identity:
        return "an unnamed source"
    if "mtime_ns" not in identity:  # a file that was followed while it grew
        return ", ".join(f"{key} {value}" for key, value in identity.items())
    array = f"[{identity['array']}]" if identity.get("array") else ""
    modified = np.datetime64(int(identity["mtime_ns"]), "ns").astype("datetime64[s]")
    return (
        f"{identity['file']}{array} ({identity['size_bytes']} bytes, modified {modified}Z, "
        f"ends {identity['head_tail_sha256'][:12]}, axes {','.join(identity['axes'])}, {identity['dtype']})"
    )
