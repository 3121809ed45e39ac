"""Ingest: detector frames into the store, shard by shard, checked, in parallel where the file allows, restartable."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stemtomo.distributed.executor import Executor
from stemtomo.distributed.memory import PlanRow
from stemtomo.errors import AcquisitionError
from stemtomo.geometry import Detector, Optics, Scan, TiltSeries
from stemtomo.io.archive import StreamedMember
from stemtomo.io.formats.registry import read_overhead_bytes
from stemtomo.io.gaps import without_gaps
from stemtomo.io.schema import frame_shards, tilt_name
from stemtomo.io.series import SeriesOfFiles, TiltFiles, tilt_identities
from stemtomo.io.sources import FrameSource, check_complete, open_frames
from stemtomo.io.store import Store
from stemtomo.locations import location
from stemtomo.pipeline.config import IngestSettings, InputSettings
from stemtomo.pipeline.intake import (
    STAGE,
    Experiment,
    Intake,
    ShardTask,
    mark_of_series,
    shard_edge,
    tilt_mark,
)
from stemtomo.pipeline.noted import Limits
from stemtomo.pipeline.preparation import prepare, prepared
from stemtomo.pipeline.progress import Progress, Silent

__all__ = [
    "STAGE",
    "Experiment",
    "ShardTask",
    "ingest",
    "mark_of_series",
    "open_file",
    "open_input",
    "open_or_create",
    "plan_ingest",
    "shard_edge",
    "tilt_mark",
]

_COPIES_IN_A_TASK = 3


def ingest(
    store: Store | str | Path,
    source: FrameSource,
    optics: Optics,
    scan: Scan,
    detector: Detector,
    tilts: TiltSeries,
    settings: IngestSettings | None = None,
    *,
    name: str | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Copy the frames of ``source`` into ``store``, with the geometry of every tilt; continue where a run ended.

    Uncompressed files are copied by one task per shard. A compressed archive member is streamed forward once by the
    calling process, with a shard row (or, for files whose axes do not begin with tilt and y, a tilt) in memory.
    Changed geometry is written again without touching finished frames.

    Parameters
    ----------
    store
        An open store, or the path of one to make or continue. A new one is made when the source has been checked,
        and called ``name``, or after its file.
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
    began, progress, settings = time.perf_counter(), progress or Silent(), settings or IngestSettings()
    _check_match(source, scan, detector, tilts)
    limits = Limits.of(source.dtype, settings)
    source = _complete(source, settings)
    store = store if isinstance(store, Store) else open_or_create(store, name)
    source, detector = prepare(source, detector, settings, store, executor)
    identities = tilt_identities(source)
    _check_identity(store, source, identities)
    intake = Intake.prepare(store, source, Experiment(optics, scan, detector, tilts), settings, identities, limits)
    _copy(intake, executor, progress)
    if tilt_identities(source) != identities:
        raise AcquisitionError(f"{source.where}: changed while it was read; remove {store.path} and ingest again")
    intake.mark()
    progress.finish(STAGE)
    return intake.numbers(time.perf_counter() - began)


def _complete(source: FrameSource, settings: IngestSettings) -> FrameSource:
    """Return ``source`` if it is whole, or with a mask of what is missing where that is allowed."""
    if settings.missing == "mask":
        return without_gaps(source)
    check_complete(source)
    return source


def _copy(intake: Intake, executor: Executor | None, progress: Progress) -> None:
    progress.start(STAGE, intake.shard_total, "shard")
    progress.advance(intake.shard_total - len(intake.tasks))
    intake.check_room()
    for task in intake.steps(executor):
        intake.record(task)
        progress.advance(1)


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
        files = TiltFiles(settings.path, settings.files, theta_deg)
        return SeriesOfFiles.open(files, lambda path: open_file(settings, scan_shape, path))
    return open_file(settings, scan_shape, settings.path)


def open_file(settings: InputSettings, scan_shape: tuple[int, int] | None, path: Path) -> FrameSource:
    """Open the file ``path`` of frames that are laid out as the section [input] says."""
    told = settings.files is None or "axes" in settings.model_fields_set
    return open_frames(
        path,
        format=settings.format,
        array=settings.array,
        axes=settings.axes if told else settings.axes[1:],  # a file is a tilt
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
    raw_bytes = math.prod(source.shape) * source.dtype.itemsize
    source = prepared(source, settings)
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
        bytes_read=source.path.stat().st_size if streamed else raw_bytes,
        bytes_written=total,
        resident_bytes=source.buffer_bytes(shards[0]) if isinstance(source, StreamedMember) else 0,
    )


def open_or_create(path: str | Path, name: str | None = None) -> Store:
    """Open the store at ``path`` for writing, or make one called ``name``, or after its file."""
    return Store.open(path, "r+") if Store.is_store(path) else Store.create(path, name or location(path).stem)


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
