"""The verb ``watch``: an acquisition goes into the store while it is recorded, and can be looked at meanwhile."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from stemtomo.distributed import Executor, Handle
from stemtomo.distributed import executor as default_executor
from stemtomo.distributed.follow import Clock, State, WallClock, stall_message
from stemtomo.errors import (
    AcquisitionError,
    AcquisitionWarning,
    ConfigurationError,
    FormatError,
    StalledError,
    StemtomoError,
)
from stemtomo.io.frames import MISSING
from stemtomo.io.growing import GrowingTilt
from stemtomo.io.schema import tilt_name
from stemtomo.io.store import Store
from stemtomo.locations import local_path
from stemtomo.pipeline.arrivals import Arrivals, unreadable_text
from stemtomo.pipeline.conclusion import Conclusions
from stemtomo.pipeline.config import Configuration
from stemtomo.pipeline.ingest import Experiment, mark_of_series, open_or_create, tilt_mark
from stemtomo.pipeline.intake import refuse_changes
from stemtomo.pipeline.live import QUICKLOOK, LiveTask, LiveTilt, take
from stemtomo.pipeline.meter import Meter, Partial
from stemtomo.pipeline.noted import store_warnings
from stemtomo.pipeline.progress import Progress, Silent
from stemtomo.pipeline.run import run_stages, with_dose, with_memory

STAGE = "watch"


def watch(
    path: str | Path,
    store: Store | str | Path,
    configuration: Configuration,
    *,
    executor: Executor | None = None,
    clock: Clock | None = None,
    progress: Progress | None = None,
) -> Generator[Partial, None, dict[str, Any]]:
    """Follow the acquisition at ``path`` into ``store``, and yield a report after every shard that is recorded.

    While it runs the store holds ``quicklook/NNN`` of the tilts under way: the images so far, with the mask ``done``.
    Call it again after whatever ended it: it continues, and ends with the bytes that :func:`~stemtomo.ingest` of the
    finished files gives.

    Parameters
    ----------
    path
        A growing file with all tilts, or the folder in which the files of ``input.files`` appear. Neither needs to be
        there yet.
    store
        An open store, or the path of one to make or continue.
    configuration
        Geometry, layout of the files ([input]), and [watch]: see :class:`~stemtomo.pipeline.config.WatchSettings`.

    Yields
    ------
    Partial

    Returns
    -------
    dict
        (As the value of the generator.) The numbers of the last report; ``missing_frames``; ``warnings``, what looks
        wrong in frames, also given as ``AcquisitionWarning`` once per tilt; with ``watch.then_run``, the numbers of
        :func:`~stemtomo.pipeline.run.run_stages` as ``run``.

    Raises
    ------
    ConfigurationError
        If the configuration does not say which file is which tilt; before anything is read.
    StalledError
        If no frame came for ``watch.deadline_s`` seconds.
    AcquisitionError
        At the end, if a file was replaced, shrank, holds too many frames, is unlike the first, or has a name that is
        duplicate or no tilt; the other tilts are complete then.
    """
    local_path(store.path if isinstance(store, Store) else store, "acquisitions are followed into stores")
    refuse_changes(path, configuration.ingest)
    arrivals = Arrivals.at(Path(path).expanduser().absolute(), configuration)
    configuration.to_tilts()
    watcher = _Watcher(
        store if isinstance(store, Store) else open_or_create(store, configuration.series.name),
        with_memory(with_dose(configuration)),
        arrivals,
        executor or default_executor(),
        clock or WallClock(),
        progress or Silent(),
    )
    return watcher.follow()


class _Watcher:
    """The state of one call of :func:`watch`; the calling thread polls, submits, records and reports."""

    def __init__(
        self,
        store: Store,
        configuration: Configuration,
        arrivals: Arrivals,
        executor: Executor,
        clock: Clock,
        progress: Progress,
    ) -> None:
        self.store, self.configuration, self.arrivals = store, configuration, arrivals
        self.executor, self.clock, self.progress = executor, clock, progress
        self.settings = configuration.watch
        self.tilts = len(configuration.to_tilts())
        self.live: dict[int, LiveTilt] = {}
        self.complete: set[int] = set()
        self.experiment: Experiment | None = None
        self.pending: list[tuple[LiveTask, Handle]] = []
        self.conclusions = Conclusions(store, configuration, executor)
        self.problems: dict[str, str] = {}
        self.last_growth = self.looked = clock.now()
        self.published: dict[int, float] = {}
        self.meter = Meter(self.clock, self.tilts, 0, 0)
        self.last: Partial | None = None
        store.declare_tilts(self.tilts)
        self.take_up()

    def follow(self) -> Generator[Partial, None, dict[str, Any]]:
        """See :func:`watch`."""
        stalled = False
        self.look()
        while not stalled:
            self.submit()
            if self.pending:
                yield from self.drain()
                if self.clock.now() - self.looked >= self.settings.poll_s:
                    self.look()
            elif self.ended():
                break
            elif self.clock.now() - self.last_growth < self.settings.deadline_s:
                self.clock.sleep(self.settings.poll_s)
                self.look()
            else:
                stalled = not self.close()
        self.problems |= self.conclusions.go_on(wait=True)
        self.progress.finish(STAGE)
        self.complain(stalled)
        return self.finish()

    # -- looking --------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Look at all files: what came, what grew, what is complete."""
        now = self.looked = self.clock.now()
        for index, source in self.arrivals.look(now):
            self.arrive(index, source)
            self.last_growth = now
        self.last_growth = max(self.last_growth, self.arrivals.changed_at)
        for tilt in self.live.values():
            if tilt.index in self.arrivals.refused_tilts and tilt.index not in self.complete:
                self.fail(tilt, "; ".join(self.arrivals.refused.values()))
            if tilt.problem is None and tilt.index not in self.complete:
                try:
                    grown = tilt.poll(self.store, self.settings.missing == "mask")
                except AcquisitionError as error:
                    self.fail(tilt, str(error))
                    continue
                self.last_growth = now if grown else self.last_growth
                self.mark(tilt)
        self.meter.saw(self.ready)
        self.problems |= self.conclusions.go_on()

    def arrive(self, index: int, source: GrowingTilt) -> None:
        """Begin to follow a tilt, unless the store has it from the same file."""
        if self.experiment is None:
            self.experiment = self.begin(source.source.shape, source.source.dtype)
        try:
            tilt = LiveTilt.begin(
                self.store,
                source,
                index,
                self.experiment,
                self.configuration.quicklook,
                self.configuration.ingest,
                self.executor,
            )
        except AcquisitionError as error:
            self.problems[f"tilt {index}"] = str(error)
            return
        if index not in self.complete:  # else its file is the one that was read: nothing is left to do
            self.live[index] = tilt
            self.count(tilt.frames_done)

    def begin(self, shape: tuple[int, ...], dtype: np.dtype) -> Experiment:
        """Learn frames of ``shape`` (tilt, y, x, ky, kx) from the first file, or from what the store has of it."""
        told = self.configuration
        self.meter = Meter(self.clock, self.tilts, shape[1] * shape[2], shape[3] * shape[4] * dtype.itemsize)
        self.progress.start(STAGE, self.tilts * self.meter.frames_per_tilt, "frame")
        scan, detector = told.to_scan((shape[1], shape[2])), told.to_detector((shape[3], shape[4]))
        return Experiment(told.to_optics(), scan, detector, told.to_tilts())

    def take_up(self) -> None:
        """Find what an earlier run left in the store; files of complete tilts need not be there any more."""
        begun = [i for i in range(self.tilts) if (self.store.path / "tilt" / tilt_name(i)).exists()]
        if not begun:
            return
        array = self.store.frames(begun[0], require_complete=False)
        self.experiment = self.begin((1, *array.shape), array.dtype)
        where = f"{self.store.path}, tilt {begun[0]},"
        self.arrivals.first = {"where": where, "shape": (1, *array.shape), "dtype": array.dtype}
        for index in begun:
            attrs = self.store.tilt_attrs(index)
            mark = tilt_mark(self.experiment, index, attrs["source"], attrs.get(MISSING, []))
            if self.store.is_complete(f"tilt/{tilt_name(index)}", mark.fingerprint):
                self.complete.add(index)
                self.conclusions.add(index)
                self.count(self.meter.frames_per_tilt)

    def count(self, frames: int) -> None:
        """Count frames that are in the store already."""
        self.meter.frames += frames
        self.progress.advance(frames)

    @property
    def ready(self) -> int:
        """Whole frames in all files; of those that are done with, all."""
        growing = (tilt.follower.ready for tilt in self.live.values() if tilt.index not in self.complete)
        return sum(growing) + len(self.complete) * self.meter.frames_per_tilt

    # -- copying --------------------------------------------------------------------------------------------------

    def submit(self) -> None:
        """Keep at most two tasks per worker under way."""
        for index in sorted(self.live):
            tilt = self.live[index]
            while tilt.queue and len(self.pending) < 2 * self.executor.workers:
                task = tilt.queue.pop(0)
                tilt.under_way += 1
                self.pending.append((task, self.executor.submit(take, task, self.store, tilt.eyes)))

    def drain(self) -> Iterator[Partial]:
        """Wait for one task, record its shard, and report."""
        ended = self.executor.as_completed([handle for _, handle in self.pending])
        number, value = next(ended)
        task, _ = self.pending.pop(number)
        tilt = self.live[task.shard.tilt]
        tilt.under_way -= 1
        if tilt.problem is None:
            partial = self.record(tilt, task, value)
            self.mark(tilt)
            if partial is not None:
                yield partial

    def record(
        self, tilt: LiveTilt, task: LiveTask, value: dict[str, Any] | FormatError | AcquisitionError
    ) -> Partial | None:
        """Record one shard if the file that it was read from is still the one that is followed."""
        if isinstance(value, StemtomoError):
            self.fail(tilt, str(value))
            return None
        if task.source is not None:
            try:
                tilt.follower.check()
            except (FileNotFoundError, AcquisitionError) as error:
                self.fail(tilt, _why(tilt, error))
                return None
        try:
            tilt.accept(task, value)
        except FormatError as error:
            self.fail(tilt, str(error))
            return None
        if task.source is not None:
            tilt.done.add(task.shard.number)
            self.store.record_frames(tilt.index, tilt.done)
        now = self.clock.now()
        if now - self.published.get(tilt.index, float("-inf")) >= self.settings.publish_s:
            self.published[tilt.index] = now
            dataset, provenance = tilt.interim(self.configuration.quicklook)
            self.store.write(f"{QUICKLOOK}/{tilt_name(tilt.index)}", dataset, provenance)
        if task.source is None:
            return None
        frames = (task.shard.y1 - task.shard.y0) * (task.shard.x1 - task.shard.x0)
        self.last = self.meter.report(tilt.index, frames, self.ready, len(self.complete), self.troubles())
        self.progress.advance(frames, lag_frames=self.last.lag_frames, lag_s=self.last.lag_s)
        return self.last

    # -- ending ---------------------------------------------------------------------------------------------------

    def mark(self, tilt: LiveTilt) -> None:
        """Mark ``tilt`` complete when all of it is on the disk and its file will not change any more."""
        if tilt.index in self.complete or tilt.follower.state is not State.COMPLETE or not tilt.whole:
            return
        try:
            tilt.check_finished()
            if tilt.source.source.shape[0] > 1 and not all(self.closed(other) for other in range(self.tilts)):
                return  # the identity of the file is known when all of it is there
            identity = self.arrivals.open_again(tilt.source.source.path).identity()
        except (AcquisitionError, FormatError, OSError) as error:
            self.fail(tilt, _why(tilt, error))
            return
        assert self.experiment is not None
        self.store.close_source(tilt.index, identity, tilt.missing)
        noted, odd = tilt.conclude()
        self.store.complete_tilt(tilt.index, tilt_mark(self.experiment, tilt.index, identity, tilt.missing), noted)
        if odd is not None:
            warnings.warn(odd, AcquisitionWarning, stacklevel=2)
        self.complete.add(tilt.index)
        try:
            self.conclusions.add(tilt.index, tilt)
        except ConfigurationError as error:
            self.problems[f"{QUICKLOOK} {tilt.index}"] = str(error)
        self.problems |= self.conclusions.go_on()

    def closed(self, index: int) -> bool:
        """Whether nothing more is expected of the tilt ``index``."""
        return index in self.complete or (index in self.live and self.live[index].follower.state is State.COMPLETE)

    def fail(self, tilt: LiveTilt, why: str) -> None:
        """Follow ``tilt`` no longer; what is recorded stays."""
        tilt.problem = why
        tilt.queue = []
        self.problems[f"tilt {tilt.index}"] = why

    def close(self) -> bool:
        """With missing = "mask", take the files that stopped growing as finished; return whether there were any."""
        open_tilts = [
            tilt
            for tilt in self.live.values()
            if tilt.problem is None and tilt.index not in self.complete and tilt.follower.ready
        ]
        if self.settings.missing != "mask" or all(self.closed(tilt.index) for tilt in open_tilts):
            return False
        for tilt in open_tilts:
            if tilt.follower.state is not State.COMPLETE:
                tilt.close(self.store)
        self.last_growth = self.clock.now()
        return True

    def ended(self) -> bool:
        """Whether no more frames are expected of any tilt."""
        given_up = {index for index, tilt in self.live.items() if tilt.problem} | self.arrivals.refused_tilts
        given_up |= {index for index in range(self.tilts) if f"tilt {index}" in self.problems}
        return self.complete | given_up == set(range(self.tilts))

    def troubles(self) -> tuple[str, ...]:
        """Everything that is wrong, each once."""
        return tuple(dict.fromkeys([*self.problems.values(), *self.arrivals.refused.values()]))

    def complain(self, stalled: bool) -> None:
        """Raise what kept the acquisition from being complete."""
        troubles = list(self.troubles())
        if not stalled and troubles:
            raise AcquisitionError("\n".join(troubles))
        if not stalled:
            return
        waiting = [
            stall_message(tilt.source, tilt.follower.ready, self.settings.deadline_s) + tilt.source.lost_text()
            for tilt in self.live.values()
            if tilt.problem is None and tilt.index not in self.complete
        ]
        unreadable = self.arrivals.unreadable
        waiting += [unreadable_text(path, error) for path, error in unreadable.items()]
        absent = sorted(set(range(self.tilts)) - set(self.live) - self.complete)
        if absent and not unreadable:
            waiting.append(
                f"{self.arrivals.path}: nothing of the tilts {absent} ({len(absent)} of {self.tilts}) came for "
                f"{self.settings.deadline_s:g} s; run the same command again when it does"
            )
        raise StalledError("\n".join(waiting + troubles)) from next(iter(unreadable.values()), None)

    def finish(self) -> dict[str, Any]:
        """Mark the series, and run the other stages if told."""
        marks = [self.store.fingerprint(f"tilt/{tilt_name(index)}") for index in range(self.tilts)]
        series = mark_of_series([mark for mark in marks if mark is not None])
        if not self.store.is_complete("tilt", series.fingerprint):
            self.store.complete_tilts(series)
        missing = sum(int((~self.store.valid(index)).sum()) for index in range(self.tilts))
        numbers: dict[str, Any] = {
            "tilts": self.tilts,
            "frames": self.meter.frames,
            "missing_frames": missing,
            "warnings": store_warnings(self.store),
            "wall_s": self.meter.seconds,
            **({} if self.last is None else {"last": asdict(self.last)}),
        }
        if self.settings.then_run:
            told = self.configuration
            numbers["run"] = run_stages(self.store, told, executor=self.executor, progress=self.progress)
        return numbers


def _why(tilt: LiveTilt, error: Exception) -> str:
    """Say why ``tilt`` is not followed any more."""
    gone = f"{tilt.source.where}: is no longer there; finished shards are kept"
    return gone if isinstance(error, FileNotFoundError) else str(error)
