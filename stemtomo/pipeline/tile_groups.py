"""Several tilts in tiles at once, each on a group of the workers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace

from stemtomo.distributed import Executor
from stemtomo.io.store import Store
from stemtomo.pipeline.progress import Progress
from stemtomo.pipeline.ptychography import GROUP, Job
from stemtomo.pipeline.tile_layout import Room, groups_of, layout_of, shard_of, with_known_halo
from stemtomo.pipeline.tiled_ptychography import reconstruct_tiled


def reconstruct_in_groups(jobs: Sequence[Job], room: Room, executor: Executor, progress: Progress) -> None:
    """Reconstruct tilts that are cut into tiles: at once on groups of workers that hold a tilt each.

    Raises
    ------
    MemoryPlanError
        If a tilt does not fit.
    """
    if not jobs:
        return
    groups = executor.groups(_groups(jobs, room))
    if len(groups) == 1:
        for job in jobs:
            _reconstruct(job, groups[0], room, progress)
        return
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    together = _Together(progress)
    epochs = sum(job.settings.epochs for job in jobs)
    progress.start(f"{GROUP}, {len(jobs)} tilts on {len(groups)} groups of workers", epochs, "epoch")
    stopped = threading.Event()

    def work(group: Executor) -> None:
        while not stopped.is_set():
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            _reconstruct(job, group, replace(room, workers=group.members), together)

    with ThreadPoolExecutor(len(groups), thread_name_prefix="stemtomo-tilt") as threads:
        running = [threads.submit(work, group) for group in groups]
        # What fails stops the others at the end of their tilts; their checkpoints are there.
        done, _ = wait(running, return_when=FIRST_EXCEPTION)
        if any(each.exception() for each in done):
            stopped.set()
    for each in running:
        each.result()
    progress.finish(GROUP)


def _groups(jobs: Sequence[Job], room: Room) -> int:
    store, tilt = Store.open(jobs[0].path), jobs[0].tilt
    scan = store.scan(tilt)
    settings = with_known_halo(jobs[0].settings, scan, store.optics(tilt))
    itemsize, shard = store.frames(tilt).dtype.itemsize, shard_of(store, tilt)
    return groups_of(scan, store.detector(tilt), itemsize, shard, settings, room, len(jobs), store.tilt_count)


def _reconstruct(job: Job, executor: Executor, room: Room, progress: Progress) -> None:
    layout = layout_of(Store.open(job.path), job.tilt, job.settings, room)
    assert layout is not None
    reconstruct_tiled(job, layout, executor, progress)


class _Together:
    """Progress of several tilts at once as that of one stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._lock = progress, threading.Lock()

    def start(self, stage: str, total: int | None, unit: str = "") -> None:
        """Nothing: the stage of all is begun."""

    def advance(self, n: int = 1, **numbers: float) -> None:
        """Pass on what one tilt has done."""
        with self._lock:
            self._progress.advance(n, **numbers)

    def finish(self, stage: str) -> None:
        """Nothing: other tilts go on."""
