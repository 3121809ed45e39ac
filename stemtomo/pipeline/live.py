"""One tilt that is being recorded: its file, its shards, and the images of what has come so far."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import xarray as xr

from stemtomo.algorithms.imaging.virtual import Superpixels
from stemtomo.distributed import Executor, Handle
from stemtomo.distributed.follow import Follower, State
from stemtomo.errors import AcquisitionError, FormatError
from stemtomo.io.formats.records import Run
from stemtomo.io.frames import shard_regions, shard_shape
from stemtomo.io.growing import GrowingTilt
from stemtomo.io.provenance import Provenance
from stemtomo.io.schema import tilt_name
from stemtomo.io.shards import Piece
from stemtomo.io.store import Store
from stemtomo.io.transfer import piece_regions
from stemtomo.pipeline.config import IngestSettings, QuicklookSettings
from stemtomo.pipeline.ingest import Experiment, ShardTask, shard_edge
from stemtomo.pipeline.intake import nonfinite_values
from stemtomo.pipeline.lookup import BlockLook, detectors, merge_patterns, whole_look
from stemtomo.pipeline.noted import Limits, Noted, warning_text
from stemtomo.pipeline.quicklook import empty_tilt

QUICKLOOK = "quicklook"

Seen: TypeAlias = dict[str, Any]
"""What :meth:`stemtomo.pipeline.lookup.BlockLook.result` says of one shard, and ``noted`` of its frames."""


@dataclass(frozen=True)
class LiveTask:
    """One shard: to be copied from ``source``, zeros at the positions ``missing``; or to be looked at in the store.

    What was repaired of one in the store, only its ``file`` tells.
    """

    shard: ShardTask
    source: GrowingTilt | None
    missing: tuple[Run, ...] = ()
    file: GrowingTilt | None = None


@dataclass(frozen=True)
class Eyes:
    """With what the frames of a tilt are looked at; the same for all of its tasks."""

    weights: np.ndarray
    labels: np.ndarray
    limits: Limits
    dtype: np.dtype


def take(task: LiveTask, store: Store, eyes: Eyes) -> Seen | FormatError | AcquisitionError:
    """Copy one shard into the store, unless it is there, and look at its frames on the way.

    A file that cannot be read any more is the business of its tilt alone, and so is returned.
    """
    shard = task.shard
    region = (shard.y0, shard.y1, shard.x0, shard.x1)
    look = BlockLook(region, eyes.weights, eyes.labels)
    noted = Noted.nothing((eyes.weights.shape[1], eyes.weights.shape[2]), eyes.dtype)
    if task.source is None:
        for y, x, block in store.read_pieces(shard.tilt, shard.y0, shard.x0):
            noted.look(block, eyes.limits, look.add(y, x, block))
        try:
            noted.nonfinite_values += 0 if task.file is None else _repaired(shard, task.file)
        except (FormatError, AcquisitionError) as error:
            return error
        return {**look.result(), "noted": noted}
    try:
        store.write_pieces(shard.tilt, shard.y0, shard.x0, _seen(task, task.source, look, noted, eyes.limits))
    except (FormatError, AcquisitionError) as error:
        return error
    return {**look.result(), "noted": noted}


def _seen(task: LiveTask, source: GrowingTilt, look: BlockLook, noted: Noted, limits: Limits) -> Iterator[Piece]:
    """Yield the pieces of a shard as they are read, each looked at while it is in the cache."""
    shard, readable = task.shard, source.readable(task.missing)
    try:
        for y0, y1, x0, x1 in piece_regions(readable, (shard.y0, shard.y1, shard.x0, shard.x1)):
            block = readable.read(source.tilt, y0, y1, x0, x1)
            block = noted.valid(block, source.where, source.tilt, (y0, x0), limits)
            noted.look(block, limits, look.add(y0, x0, block))
            yield y0, x0, block
    except FileNotFoundError:
        raise _disappeared(source) from None


def _repaired(shard: ShardTask, source: GrowingTilt) -> int:
    """Return how many values of ``shard`` are not finite in its file."""
    try:
        return nonfinite_values(shard, source.source, source.tilt)
    except FileNotFoundError:
        raise _disappeared(source) from None


def _disappeared(source: GrowingTilt) -> AcquisitionError:
    return AcquisitionError(f"{source.where}: disappeared while it was read; finished shards are kept")


@dataclass
class LiveTilt:
    """A tilt that is followed: what is read, what is under way, what is on the disk.

    ``problem`` is why it is not followed any more; the others go on.
    """

    index: int
    source: GrowingTilt
    follower: Follower
    regions: dict[int, ShardTask]
    shard_rows: int
    done: set[int]
    eyes: Handle
    blocks: Superpixels
    seen: np.ndarray
    limits: Limits
    noted: Noted
    images: dict[str, np.ndarray] = field(default_factory=dict)
    patterns: dict[str, np.ndarray] | None = None
    queue: list[LiveTask] = field(default_factory=list)
    under_way: int = 0
    missing: list[Run] = field(default_factory=list)
    problem: str | None = None

    @classmethod
    def begin(
        cls,
        store: Store,
        source: GrowingTilt,
        index: int,
        experiment: Experiment,
        settings: QuicklookSettings,
        intake: IngestSettings,
        executor: Executor,
    ) -> LiveTilt:
        """Make or continue tilt ``index`` of ``store``; shards that are there are looked at again for the images.

        Of ``intake``, what says how frames are laid out and what is odd in them is used.

        Raises
        ------
        AcquisitionError
            If the store was begun from another file.
        """
        optics, scan, detector, tilts = experiment
        known = store.tilt_attrs(index).get("source") if (store.path / "tilt" / tilt_name(index)).exists() else None
        followed = known if known and "inode" in known else None
        source = GrowingTilt.begin(source.source, source.tilt, followed)
        if known and followed is None and known != source.source.identity():
            raise AcquisitionError(
                f"{store.path}: tilt {index} was begun from {known}, now {source.where} is {source.source.identity()}; "
                "follow it into another store, or remove this one"
            )
        identity = known or source.identity()
        shape, dtype = source.source.shape[1:], source.source.dtype
        told: dict[str, Any] = {"shard_positions": shard_edge(source.source, intake), "codec": intake.codec}
        array = store.create_tilt(index, shape, dtype, optics, scan, detector, tilts[index], source=identity, **told)
        store.remove_leftovers(index)
        rows = shard_shape(array)[0]
        follower = Follower(source, 0, rows * shape[1], followed)
        regions = {number: ShardTask(index, number, *region) for number, region in shard_regions(array)}
        done = store.recorded_frames(index)
        if store.fingerprint(f"tilt/{tilt_name(index)}") is None:
            # A run that was killed while it put zeros for missing frames: they may have come meanwhile.
            valid = store.valid(index)
            done = {n for n in done if valid[regions[n].y0 : regions[n].y1, regions[n].x0 : regions[n].x1].all()}
        weights, blocks = detectors(optics, detector, settings)
        limits = Limits.of(dtype, intake)
        eyes = executor.broadcast(Eyes(weights, blocks.labels, limits, dtype))
        seen, noted = np.zeros(shape[:2], bool), Noted.nothing(shape[2:], dtype)
        tilt = cls(index, source, follower, regions, rows, done, eyes, blocks, seen, limits, noted)
        file = source if limits.nonfinite_fraction > 0 and dtype.kind == "f" else None
        tilt.queue = [LiveTask(regions[number], None, file=file) for number in sorted(done)]
        return tilt

    @property
    def frames_done(self) -> int:
        """Frames in recorded shards."""
        return sum((r.y1 - r.y0) * (r.x1 - r.x0) for n, r in self.regions.items() if n in self.done)

    @property
    def whole(self) -> bool:
        """Whether every shard is on the disk and looked at."""
        return len(self.done) == len(self.regions) and not self.queue and not self.under_way

    def poll(self, store: Store, mask: bool) -> int:
        """Look at the file, queue the shards that became whole, and return how many frames are new.

        With ``mask``, frames that the file says are lost are left out; without, reading them is an error.
        """
        before = self.follower.ready
        for start, stop in self.follower.poll():
            if mask:
                self._leave_out(store, self.source.missing(self.follower.ready))
            columns = self.source.source.shape[2]
            y0, y1 = start // columns, stop // columns
            self._queue(r for n, r in self.regions.items() if y0 <= r.y0 < y1 and n not in self.done)
        return self.follower.ready - before

    def close(self, store: Store) -> None:
        """Take the file as finished, with nothing under way: queue the rest, zeros where frames never came."""
        ready, expected = self.follower.ready, self.source.n_expected
        lost = self.source.missing(expected)
        self._leave_out(store, lost or ([(ready, expected)] if ready < expected else []))
        self.follower.state = State.COMPLETE
        self.queue = []
        self._queue(r for n, r in self.regions.items() if n not in self.done)

    def check_finished(self) -> None:
        """Check that the file, taken as finished, has not gone on.

        Raises
        ------
        AcquisitionError
            With what it has now.
        """
        ready, seen = self.source.ready(), self.follower.ready
        if ready != seen:
            raise AcquisitionError(
                f"{self.source.where}: was taken as finished with {seen} frames of {self.source.n_expected}, and now "
                f"has {ready}; correct the shape of the scan, or begin another store"
            )

    def accept(self, task: LiveTask, look: Seen) -> None:
        """Add what was seen in one shard.

        Raises
        ------
        FormatError
            If more values of the tilt are not finite than is allowed.
        """
        shard = task.shard
        self.noted.add(look["noted"])
        self.noted.check(self.source.where, self.index, math.prod(self.source.source.shape[1:]), self.limits)
        area = (slice(shard.y0, shard.y1), slice(shard.x0, shard.x1))
        for name, part in look["images"].items():
            if name not in self.images:
                self.images[name] = np.zeros((*self.seen.shape, part.shape[-1]), part.dtype)
            self.images[name][area] = part
        known = self.patterns
        self.patterns = look["patterns"] if known is None else merge_patterns([known, look["patterns"]])
        self.seen[area] = True
        for start, stop in self.missing:
            self.seen.reshape(-1)[start:stop] = False

    def interim(self, settings: QuicklookSettings) -> tuple[xr.Dataset, Provenance]:
        """Return the images so far with the mask ``done`` (y, x), and a record that no finished result has."""
        assert self.patterns is not None  # a shard has been accepted
        nothing = np.zeros((*self.seen.shape, 0), np.float32)
        none = Superpixels(self.blocks.labels, *(values[:0] for values in self.blocks[1:]))
        dataset = whole_look(self.images["weighted"], nothing, self.patterns, none, self.seen)
        dataset = dataset.drop_vars("valid", errors="ignore").assign(done=(("y", "x"), self.seen, {"units": "1"}))
        said = {**settings.model_dump(), "interim_frames": int(self.seen.sum())}
        return dataset, Provenance.start(QUICKLOOK, said, {f"tilt/{tilt_name(self.index)}": None})

    def conclude(self) -> tuple[dict[str, Any], str | None]:
        """Return what was counted of all frames of the complete tilt, and what looks wrong in them, if anything."""
        noted = self.noted.to_attrs(self.limits, sum(stop - start for start, stop in self.missing))
        return noted, warning_text(self.source.where, self.index, noted)

    def finished(self, store: Store) -> xr.Dataset:
        """Return the quicklook of the complete tilt, made of what its shards left on their way, and let go of it.

        Raises
        ------
        ConfigurationError
            If nothing was counted.
        """
        images, patterns = self.images, self.patterns
        self.images, self.patterns = {}, None
        if patterns is None or not patterns["sum"].any():
            raise empty_tilt(store, self.index)
        return whole_look(images["weighted"], images["superpixels"], patterns, self.blocks, store.valid(self.index))

    def _leave_out(self, store: Store, missing: list[Run]) -> None:
        """Note the positions without a frame in the store: before any zero is."""
        if missing != self.missing:
            self.missing = missing
            store.close_source(self.index, store.tilt_attrs(self.index)["source"], missing)

    def _queue(self, shards: Iterable[ShardTask]) -> None:
        self.queue += [LiveTask(shard, self.source, tuple(self.missing)) for shard in shards]
