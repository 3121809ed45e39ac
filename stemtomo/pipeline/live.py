"""One tilt that is being recorded: its file, its shards, and the images of what has come so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from stemtomo.algorithms.imaging.virtual import virtual_images, virtual_weights
from stemtomo.distributed.follow import Follower, State
from stemtomo.errors import AcquisitionError, FormatError
from stemtomo.io.frames import shard_regions, shard_shape
from stemtomo.io.growing import GrowingTilt
from stemtomo.io.layout import check_values
from stemtomo.io.provenance import Provenance
from stemtomo.io.schema import tilt_name
from stemtomo.io.store import Store
from stemtomo.kernels.masks import frame_sums
from stemtomo.pipeline.config import QuicklookSettings
from stemtomo.pipeline.ingest import Experiment, ShardTask

QUICKLOOK = "quicklook"


class LiveTask(NamedTuple):
    """One shard: to be copied from the file, where ``available`` frames are whole, or to be looked at in the store."""

    shard: ShardTask
    source: GrowingTilt | None
    available: int


class Look(NamedTuple):
    """What a task leaves: sums under the weights (y, x, weight), and the sum of the patterns (ky, kx)."""

    weighted: np.ndarray
    pattern_sum: np.ndarray


def take(task: LiveTask, store: Store, weights: np.ndarray) -> Look | FormatError | AcquisitionError:
    """Copy one shard into the store, unless it is there, and look at its frames.

    A file that cannot be read any more is the business of its tilt alone, and so is returned.
    """
    shard = task.shard
    region = (shard.y0, shard.y1, shard.x0, shard.x1)
    if task.source is None:
        array = store.frames(shard.tilt, require_complete=False)
        block = array[shard.y0 : shard.y1, shard.x0 : shard.x1]
    else:
        try:
            block = np.ascontiguousarray(task.source.read(region, task.available))
            check_values(block, task.source.where, shard.tilt, shard.y0, shard.x0)
        except (FormatError, AcquisitionError) as error:
            return error
        except FileNotFoundError:
            return AcquisitionError(f"{task.source.where}: disappeared while it was read; finished shards are kept")
        store.write_frames(shard.tilt, shard.y0, shard.x0, block)
    sums = frame_sums(block, weights)
    return Look(sums.weighted, sums.pattern_sum)


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
    weights: np.ndarray
    images: np.ndarray
    seen: np.ndarray
    pattern_sum: np.ndarray
    queue: list[LiveTask] = field(default_factory=list)
    under_way: int = 0
    missing: list[tuple[int, int]] = field(default_factory=list)
    problem: str | None = None
    marked: bool = False

    @classmethod
    def begin(
        cls,
        store: Store,
        source: GrowingTilt,
        index: int,
        experiment: Experiment,
        settings: QuicklookSettings,
        edge: int,
    ) -> LiveTilt:
        """Make or continue tilt ``index`` of ``store``; shards that are there are looked at again for the images.

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
        array = store.create_tilt(
            index, shape, dtype, optics, scan, detector, tilts[index], source=identity, shard_positions=edge
        )
        store.remove_leftovers(index)
        rows = shard_shape(array)[0]
        follower = Follower(source, 0, rows * shape[1], followed)
        regions = {number: ShardTask(index, number, *region) for number, region in shard_regions(array)}
        done = store.recorded_frames(index)
        if store.fingerprint(f"tilt/{tilt_name(index)}") is None:
            # A run that was killed while it put zeros for missing frames: they may have come meanwhile.
            valid = store.valid(index)
            done = {n for n in done if valid[regions[n].y0 : regions[n].y1, regions[n].x0 : regions[n].x1].all()}
        weights = virtual_weights(
            optics,
            detector,
            bright_field_fraction=settings.bright_field_fraction,
            annular_fraction=settings.annular_fraction,
            dark_field_fraction=settings.dark_field_fraction,
        )
        tilt = cls(
            index=index,
            source=source,
            follower=follower,
            regions=regions,
            shard_rows=rows,
            done=done,
            weights=weights,
            images=np.zeros((*shape[:2], len(weights)), weights.dtype),
            seen=np.zeros(shape[:2], bool),
            pattern_sum=np.zeros(shape[2:]),
        )
        tilt.queue = [LiveTask(regions[number], None, 0) for number in sorted(done)]
        return tilt

    @property
    def frames_done(self) -> int:
        """Frames in recorded shards."""
        return sum((r.y1 - r.y0) * (r.x1 - r.x0) for n, r in self.regions.items() if n in self.done)

    @property
    def whole(self) -> bool:
        """Whether every shard is on the disk and looked at."""
        return len(self.done) == len(self.regions) and not self.queue and not self.under_way

    def poll(self) -> int:
        """Look at the file, queue the shards that became whole, and return how many frames are new."""
        before = self.follower.ready
        for start, stop in self.follower.poll():
            self._queue_rows(start, stop, self.follower.ready)
        return self.follower.ready - before

    def close(self, store: Store) -> None:
        """Take the file as finished, with nothing under way: queue the rest, zeros where frames never came."""
        ready, expected = self.follower.ready, self.source.n_expected
        self.missing = [(ready, expected)] if ready < expected else []
        store.close_source(
            self.index, store.tilt_attrs(self.index)["source"], self.missing
        )  # before any zero is stored
        self.follower.state = State.COMPLETE
        self.queue = [LiveTask(r, self.source, ready) for n, r in self.regions.items() if n not in self.done]

    def accept(self, task: LiveTask, look: Look) -> None:
        """Add what was seen in one shard."""
        shard = task.shard
        area = (slice(shard.y0, shard.y1), slice(shard.x0, shard.x1))
        self.images[area] = look.weighted
        self.pattern_sum = self.pattern_sum + look.pattern_sum
        self.seen[area] = True
        for start, stop in self.missing:
            self.seen.reshape(-1)[start:stop] = False

    def interim(self, settings: QuicklookSettings) -> tuple[xr.Dataset, Provenance]:
        """Return the images so far with the mask ``done`` (y, x), and a record that no finished result has."""
        units = {"com_x": "1/Å", "com_y": "1/Å"}
        images: dict[str, Any] = {
            name: (("y", "x"), image, {"units": units.get(name, "counts")})
            for name, image in virtual_images(self.images)._asdict().items()
        }
        count = max(1, int(self.seen.sum()))
        images["mean_pattern"] = (("ky", "kx"), (self.pattern_sum / count).astype(np.float32), {"units": "counts"})
        images["done"] = (("y", "x"), self.seen.copy(), {"units": "1"})
        said = {**settings.model_dump(), "interim_frames": int(self.seen.sum())}
        return xr.Dataset(images), Provenance.start(QUICKLOOK, said, {f"tilt/{tilt_name(self.index)}": None})

    def _queue_rows(self, start: int, stop: int, available: int) -> None:
        columns = self.source.source.shape[2]
        y0, y1 = start // columns, stop // columns
        self.queue += [
            LiveTask(region, self.source, available)
            for number, region in self.regions.items()
            if y0 <= region.y0 < y1 and number not in self.done
        ]
