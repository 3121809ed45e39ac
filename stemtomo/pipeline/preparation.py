"""What [ingest] says is done to frames before they are stored, on whatever source they come from."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np

from stemtomo.distributed.executor import Executor
from stemtomo.distributed.executor import executor as make_executor
from stemtomo.errors import ConfigurationError
from stemtomo.geometry import Detector
from stemtomo.io.archive import StreamedMember
from stemtomo.io.prepared import (
    Preparation,
    PreparedFrames,
    mapped,
    read_dead_pixels,
    smallest_dtype,
)
from stemtomo.io.schema import tilt_name
from stemtomo.io.series import tilt_identities
from stemtomo.io.sources import FrameSource
from stemtomo.io.store import Store
from stemtomo.pipeline.config import IngestSettings

_LOOK_BYTES = 32 << 20


def prepare(
    source: FrameSource, detector: Detector, settings: IngestSettings, store: Store, executor: Executor | None
) -> tuple[FrameSource, Detector]:
    """Return the frames as they are to be stored, and their detector.

    With ``ingest.narrow`` all frames are looked at, unless ``store`` has some of the same files already.
    """
    source = prepared(source, settings)
    detector = _preparation(settings).detector(detector)
    if settings.narrow:
        dtype = _begun(store, source) or _smallest(source, executor or make_executor())
        source = mapped(source, lambda one: one.narrow(dtype) if isinstance(one, PreparedFrames) else one)
    return source, detector


def prepared(source: FrameSource, settings: IngestSettings) -> FrameSource:
    """Return ``source`` cropped, binned and without dead pixels, as [ingest] says; only headers are read.

    Raises
    ------
    ConfigurationError
        If that does not fit the detector, or the file can only be streamed.
    """
    told = _preparation(settings)
    if not told.changes and not settings.narrow:
        return source
    if isinstance(source, StreamedMember):
        raise ConfigurationError(
            f"{source.where}: is compressed as a whole and can only be copied as it is; write it with numpy.savez for "
            "ingest.crop, bin, dead_pixels or narrow"
        )
    return mapped(source, lambda one: PreparedFrames.of(one, told))


def prepared_detector(detector: Detector, settings: IngestSettings) -> Detector:
    """Return the detector of the frames that [ingest] stores of those of ``detector``."""
    return _preparation(settings).detector(detector)


class _Look(NamedTuple):
    tilt: int
    y0: int
    y1: int


def _preparation(settings: IngestSettings) -> Preparation:
    dead = None if settings.dead_pixels is None else read_dead_pixels(settings.dead_pixels)
    return Preparation(settings.crop, settings.bin, dead)


def _begun(store: Store, source: FrameSource) -> np.dtype | None:
    """Return the type that an earlier run has chosen for the same files."""
    for tilt, identity in zip(range(store.tilt_count), tilt_identities(source), strict=False):
        if not (store.path / "tilt" / tilt_name(tilt)).exists():
            continue
        known: dict[str, Any] = store.tilt_attrs(tilt).get("source", {})
        said = known.get("prepared", {})
        begun = {**known, "prepared": {**said, "dtype": ""}}
        if "dtype" in said and begun == {**identity, "prepared": {**identity["prepared"], "dtype": ""}}:
            return np.dtype(said["dtype"])
        return source.dtype  # of other files, or as they were recorded: ingest refuses it, before a look at all frames
    return None


def _smallest(source: FrameSource, executor: Executor) -> np.dtype:
    tilts, lines, line, ky, kx = source.shape
    step = max(1, _LOOK_BYTES // (line * math.prod((ky, kx)) * source.dtype.itemsize))
    looks = [_Look(tilt, y, min(y + step, lines)) for tilt, y in itertools.product(range(tilts), range(0, lines, step))]
    found = [values for _, values in executor.map_bounded(_values, looks, source)]
    return smallest_dtype(max(largest for largest, _ in found), all(whole for _, whole in found), source.dtype)


def _values(look: _Look, source: FrameSource) -> tuple[float, bool]:
    """Return the largest value of some lines of a tilt, and whether all are whole numbers that are not negative."""
    block = source.read(look.tilt, look.y0, look.y1)
    whole = bool(block.min() >= 0)
    if block.dtype.kind == "f":
        whole = whole and bool(np.isfinite(block).all()) and bool((block == np.rint(block)).all())
    return float(block.max()), whole
