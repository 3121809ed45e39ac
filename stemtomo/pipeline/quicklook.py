"""The verb ``quicklook``: mean pattern, virtual images and centre of mass of every tilt in one pass over the frames."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from stemtomo.algorithms.imaging.virtual import Superpixels
from stemtomo.distributed import Executor, Handle, Parts, PlanRow
from stemtomo.distributed import executor as default_executor
from stemtomo.errors import ConfigurationError
from stemtomo.geometry import Detector, Optics, Scan
from stemtomo.io.frames import shard_regions
from stemtomo.io.provenance import Provenance
from stemtomo.io.schema import CHUNK_POSITIONS, SHARD_POSITIONS, tilt_name
from stemtomo.io.store import Store
from stemtomo.pipeline.config import QuicklookSettings
from stemtomo.pipeline.lookup import BlockLook, detectors, lazy_quicklook, merge_patterns, whole_look
from stemtomo.pipeline.progress import Progress, Silent

GROUP = "quicklook"


def quicklook(
    store: Store | str | Path | xr.Dataset | xr.DataArray,
    settings: QuicklookSettings | None = None,
    *,
    executor: Executor | None = None,
    progress: Progress | None = None,
    optics: Optics | None = None,
    detector: Detector | None = None,
    tilts: Sequence[int] | None = None,
) -> Any:
    """Look once at every frame of every tilt whose result is missing or out of date.

    Each shard is read by one task; images are put together and patterns summed from what the tasks leave, so frames
    are never all in memory.

    Parameters
    ----------
    store
        Store with frames, opened with mode ``"r+"``; the results are written to ``quicklook/NNN``. Or frames as xarray
        (``stemtomo.open(path)["tilt/000"]``): nothing is computed now, see
        :func:`stemtomo.pipeline.lookup.lazy_quicklook`.
    settings
        See :class:`~stemtomo.pipeline.config.QuicklookSettings`.
    executor
        Where the shards are read; the active Dask client, else threads.
    optics, detector
        For frames as xarray that do not carry these as attributes.
    tilts
        Numbers of the tilts to look at; all unless given.

    Returns
    -------
    A lazy Dataset for frames as xarray; for a store a dict:
        ``mean_counts``: per tilt, the mean counts of a pattern; ``bright_field_fraction``: per tilt, the part of them
        inside the convergence disc; ``computed``: number of tilts that were not there already.

    Raises
    ------
    StoreError
        If the frames of a tilt are missing.
    ConfigurationError
        If the convergence disc lies beside the detector, or nothing at all was counted in a tilt.
    """
    settings = settings or QuicklookSettings()
    if isinstance(store, (xr.Dataset, xr.DataArray)):
        return lazy_quicklook(store, settings, optics, detector)
    store = Store.of(store)
    executor = executor or default_executor()
    progress = progress or Silent()
    jobs = [_job(store, index, settings) for index in (range(store.tilt_count) if tilts is None else tilts)]
    todo = [job for job in jobs if not store.is_complete(job.group, job.provenance.fingerprint)]
    progress.start(GROUP, len(jobs), "tilt")
    progress.advance(len(jobs) - len(todo))
    for job, passed in _submitted(store, todo, settings, executor):
        images, patterns = executor.gather((list(passed.images.handles), passed.patterns))
        dataset = _dataset(store, job.tilt, passed, images, patterns)
        store.write(job.group, dataset, job.provenance)
        progress.advance(mean_counts=float(dataset["total_counts"].mean()))
    progress.finish(GROUP)
    return {**_numbers(store, jobs), "computed": len(todo)}


def plan_quicklook(store: Store, settings: QuicklookSettings | None = None) -> PlanRow:
    """Say what :func:`quicklook` will hold, read and write, from the store's metadata alone."""
    frames = store.frames(0, require_complete=False)
    return plan_row(store.scan(0), store.detector(0), frames.dtype.itemsize, store.tilt_count, settings)


def plan_row(
    scan: Scan, detector: Detector, itemsize: int, tilts: int, settings: QuicklookSettings | None = None
) -> PlanRow:
    """Say the same for a series that is not ingested yet, with frames of ``itemsize`` bytes per pixel."""
    pixels = int(np.prod(detector.shape_yx))
    shards = int(np.prod([-(-count // SHARD_POSITIONS) for count in scan.shape_yx]))
    stack = min((settings or QuicklookSettings()).superpixels, pixels)
    chunk = CHUNK_POSITIONS**2 * pixels * itemsize
    return PlanRow(
        stage=GROUP,
        tasks=tilts * shards,
        # An inner chunk as stored and decoded; weights and patterns; what is kept of every position.
        bytes_per_task=2 * chunk + 60 * pixels + 4 * (6 + stack) * min(SHARD_POSITIONS**2, scan.count),
        bytes_read=tilts * scan.count * pixels * itemsize,
        bytes_written=tilts * (4 * (7 + stack) * scan.count + 16 * pixels),
    )


class _Job(NamedTuple):
    tilt: int
    group: str
    provenance: Provenance


@dataclass(frozen=True)
class _Region:
    """One shard of one tilt, as a task finds it."""

    path: Path
    tilt: int
    y0: int
    y1: int
    x0: int
    x1: int


class _Pass(NamedTuple):
    """The pass over one tilt under way."""

    regions: list[_Region]
    blocks: Superpixels
    images: Parts
    patterns: Handle


def _job(store: Store, index: int, settings: QuicklookSettings) -> _Job:
    return _Job(index, f"{GROUP}/{tilt_name(index)}", look_provenance(store, index, settings))


def look_provenance(store: Store, index: int, settings: QuicklookSettings) -> Provenance:
    """Begin the record of the look at tilt ``index``."""
    source = f"tilt/{tilt_name(index)}"
    return Provenance.start(GROUP, settings.model_dump(), {source: store.fingerprint(source)})


def _submitted(
    store: Store, jobs: list[_Job], settings: QuicklookSettings, executor: Executor
) -> Iterator[tuple[_Job, _Pass]]:
    """Yield the passes in order, with enough of the next tilts under way that no worker waits for the end of one."""
    under_way: deque[tuple[_Job, _Pass]] = deque()
    for job in jobs:
        under_way.append((job, _begin(store, job.tilt, settings, executor)))
        while sum(len(passed.regions) for _, passed in under_way) > 2 * executor.workers and len(under_way) > 1:
            yield under_way.popleft()
    while under_way:
        yield under_way.popleft()


def _begin(store: Store, index: int, settings: QuicklookSettings, executor: Executor) -> _Pass:
    weights, blocks = detectors(store.optics(index), store.detector(index), settings)
    regions = [_Region(store.path, index, *edges) for _, edges in shard_regions(store.frames(index))]
    parts = Parts.create(executor, look_at, regions, weights, blocks.labels)
    return _Pass(
        regions, blocks, parts.pick("images"), executor.submit(merge_patterns, list(parts.pick("patterns").handles))
    )


def look_at(region: _Region, weights: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Read one shard, piece by piece, and return the sums of its frames and its patterns."""
    edges = (region.y0, region.y1, region.x0, region.x1)
    look = BlockLook(edges, weights, labels)
    for y, x, frames in Store(region.path).read_pieces(region.tilt, region.y0, region.x0):
        look.add(y, x, frames)
    return look.result()


def _dataset(
    store: Store, index: int, passed: _Pass, blocks: list[dict[str, np.ndarray]], patterns: dict[str, np.ndarray]
) -> xr.Dataset:
    scan = store.scan(index)
    whole = {}
    for name, first in blocks[0].items():
        whole[name] = np.empty((*scan.shape_yx, first.shape[-1]), dtype=first.dtype)
        for region, block in zip(passed.regions, blocks, strict=True):
            whole[name][region.y0 : region.y1, region.x0 : region.x1] = block[name]
    if not patterns["sum"].any():
        raise empty_tilt(store, index)
    return whole_look(whole["weighted"], whole["superpixels"], patterns, passed.blocks, store.valid(index))


def empty_tilt(store: Store, index: int) -> ConfigurationError:
    """Return the error for a tilt in which nothing was counted."""
    return ConfigurationError(f"{store.path}: all frames of tilt {index} are empty; check input.array and input.path")


def _numbers(store: Store, jobs: list[_Job]) -> dict[str, Any]:
    mean, bright = [], []
    for job in jobs:
        result = store.read(job.group)
        total, recorded = float(result["total_counts"].sum()), int(store.valid(job.tilt).sum())
        mean.append(total / recorded)
        bright.append(float(result["bright_field"].sum()) / total)
    return {"mean_counts": mean, "bright_field_fraction": bright}
