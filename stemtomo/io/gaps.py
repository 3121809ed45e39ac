"""Frames that were lost or never came: which positions of the scan they leave empty, and reading what there is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from stemtomo.errors import AcquisitionError
from stemtomo.io.formats.records import Run, runs_of
from stemtomo.io.formats.tilts import StackedTilts
from stemtomo.io.prepared import PreparedFrames, mapped
from stemtomo.io.series import SeriesOfFiles
from stemtomo.io.sources import FrameSource, Shape


@runtime_checkable
class Gapped(Protocol):
    """A source that knows which of its frames are absent, also in the middle."""

    def missing(self) -> list[Run]:
        """Return the runs [start, stop) of positions, counted over tilt, y, x, whose frame is absent."""
        ...

    def tolerant(self) -> FrameSource:
        """Return the source that reads what is there, although frames are absent."""
        ...


@dataclass(frozen=True)
class MaskedFrames:
    """The frames of ``source``, with zeros at the positions of ``missing``; a :class:`FrameSource`.

    The zeros are only there to fill the array: whoever stores them stores the mask with them.
    """

    source: FrameSource
    missing: tuple[Run, ...]

    @property
    def path(self) -> Path:
        """The file."""
        return self.source.path

    @property
    def where(self) -> str:
        """File and array, for messages."""
        return self.source.where

    @property
    def shape(self) -> Shape:
        """Lengths of tilt, y, x, ky, kx."""
        return self.source.shape

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the frames read."""
        return self.source.dtype

    @property
    def n_expected(self) -> int:
        """Number of frames of the whole series, with those that are missing."""
        return self.source.n_expected

    def ready(self) -> int:
        """Return ``n_expected``: nothing more is waited for."""
        return self.n_expected

    def check(self) -> None:
        """What is missing is known; nothing more to check."""

    def identity(self) -> dict[str, Any]:
        """Return the identity of the file."""
        return self.source.identity()

    def read(self, tilt: int, y0: int, y1: int, x0: int = 0, x1: int | None = None) -> np.ndarray:
        """Return the frames (y, x, ky, kx) of a block of the scan, with zeros where they are missing."""
        lines, line = self.shape[1:3]
        x1 = line if x1 is None else x1
        first = tilt * lines * line
        there = np.ones((y1 - y0, line), bool)
        for start, stop in self.missing:
            begin = first + y0 * line
            there.reshape(-1)[max(0, start - begin) : max(0, stop - begin)] = False
        there = there[:, x0:x1]
        if there.all():
            return self.source.read(tilt, y0, y1, x0, x1)
        block = np.zeros((y1 - y0, x1 - x0, *self.shape[3:]), self.dtype)
        for y, row in enumerate(there):
            for start, stop in runs_of(np.flatnonzero(row)):
                block[y, start:stop] = self.source.read(tilt, y0 + y, y0 + y + 1, x0 + start, x0 + stop)[0]
        return block


def without_gaps(source: FrameSource) -> FrameSource:
    """Return ``source`` as it is if all of its frames are there, else with its missing positions known and zero.

    Raises
    ------
    AcquisitionError
        If it holds more frames than its scan, or none at all.
    """
    if isinstance(source, StackedTilts | SeriesOfFiles):
        return mapped(source, without_gaps)
    if isinstance(source, Gapped):
        missing, readable = source.missing(), source.tolerant()
    else:
        ready, expected = source.ready(), source.n_expected
        missing, readable = [(ready, expected)] if ready < expected else [], source
    if source.ready() > source.n_expected:
        raise AcquisitionError(
            f"{source.where}: is longer than its {source.n_expected} frames; correct the shape or the offset: "
            "a mask is for frames that are missing, frames are never dropped silently"
        )
    if sum(stop - start for start, stop in missing) >= source.n_expected:
        raise AcquisitionError(f"{source.where}: holds no whole frame; leave it out of the series, or wait for it")
    return MaskedFrames(readable, tuple(missing)) if missing else source


def missing_runs(source: FrameSource, tilt: int) -> list[Run]:
    """Return the runs of positions of ``tilt``, counted over y, x, that :func:`without_gaps` found without a frame."""
    if isinstance(source, StackedTilts):
        file, inside = divmod(tilt, source.sources[0].shape[0])
        return missing_runs(source.sources[file], inside)
    if isinstance(source, SeriesOfFiles):
        return missing_runs(source.sources[tilt], 0)
    if isinstance(source, PreparedFrames):
        return missing_runs(source.source, tilt)
    if not isinstance(source, MaskedFrames):
        return []
    count = math.prod(source.shape[1:3])
    begin = tilt * count
    cut = ((max(0, start - begin), min(count, stop - begin)) for start, stop in source.missing)
    return [(start, stop) for start, stop in cut if start < stop]
