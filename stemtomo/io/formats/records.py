"""Frames recorded one after another, without a scan: how a raster of positions picks its frames from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from stemtomo.errors import AcquisitionError, FormatError

Run = tuple[int, int]
"""First frame and last + 1 of frames that follow one another."""


def runs_of(numbers: np.ndarray) -> list[Run]:
    """Return the unbroken runs [start, stop) of ascending whole ``numbers``."""
    if not len(numbers):
        return []
    breaks = np.flatnonzero(np.diff(numbers) != 1)
    starts = [int(numbers[0]), *(int(number) for number in numbers[breaks + 1])]
    stops = [*(int(number) + 1 for number in numbers[breaks]), int(numbers[-1]) + 1]
    return list(zip(starts, stops, strict=True))


def placed(runs: Sequence[Run], out: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield start and stop of each run, and the part of ``out`` that is its own."""
    filled = 0
    for start, stop in runs:
        yield start, stop, out[filled : filled + stop - start]
        filled += stop - start


class FrameRecords(Protocol):
    """The frames of one acquisition in the order of recording, in one file or several.

    ``frame_shape`` is (ky, kx), ``dtype`` that of the frames read, in the machine's byte order. ``recorded_scan`` is
    what the file says on its raster, (lines, frames per line), flyback included; ``None`` where it does not say.
    """

    @property
    def path(self) -> Path:
        """The file that was named."""
        ...

    @property
    def where(self) -> str:
        """File and array, for messages."""
        ...

    @property
    def frame_shape(self) -> tuple[int, int]:
        """Lengths of ky and kx."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the frames read."""
        ...

    @property
    def recorded_scan(self) -> tuple[int, int] | None:
        """Lines and frames per line, if the file says so."""
        ...

    def count(self) -> int:
        """Return the number of whole frames from the first on, as the files are now."""
        ...

    def read(self, runs: Sequence[Run], out: np.ndarray) -> None:
        """Fill ``out`` (frame, ky, kx) with the frames of ``runs``, one run after another; a file is opened once."""
        ...

    def check(self, expected: int) -> None:
        """Check that a finished acquisition of ``expected`` frames has no hole and no frame cut in two."""
        ...

    def identity(self) -> dict[str, Any]:
        """Return what tells these files from others."""
        ...


@runtime_checkable
class Interrupted(Protocol):
    """Records that know which frames are absent among them."""

    def absent(self, expected: int) -> list[Run]:
        """Return the runs of frames, of the first ``expected``, that are absent."""
        ...

    def without(self, absent: list[Run]) -> FrameRecords:
        """Return the records with each frame at its place, although those of ``absent`` are not there."""
        ...


@runtime_checkable
class Extended(Protocol):
    """Records whose frames carry numbers, so that those behind a gap are known."""

    def extent(self) -> int:
        """Return how many frames were recorded up to the last one that is there, with those that are absent."""
        ...


@dataclass(frozen=True)
class Raster:
    """Which frame belongs to which position: line by line, with frames to leave out.

    Parameters
    ----------
    shape_yx
        Positions along y and x that are kept.
    skip
        Frames recorded before the first position.
    flyback
        Frames at the end of every line that are left out.
    """

    shape_yx: tuple[int, int]
    skip: int = 0
    flyback: int = 0

    @property
    def needed(self) -> int:
        """Frames up to the last position."""
        lines, line = self.shape_yx
        return self.skip + (lines - 1) * (line + self.flyback) + line

    @property
    def allowed(self) -> int:
        """Frames up to the end of the last flyback, which need not have been recorded."""
        return self.skip + self.shape_yx[0] * (self.shape_yx[1] + self.flyback)

    def positions(self, frames: int) -> int:
        """Return how many positions, from the first on, the first ``frames`` frames hold."""
        lines, rest = divmod(max(0, frames - self.skip), self.shape_yx[1] + self.flyback)
        return min(lines * self.shape_yx[1] + min(rest, self.shape_yx[1]), math.prod(self.shape_yx))

    def positions_of(self, runs: Sequence[Run]) -> list[Run]:
        """Return the runs of positions, counted row by row, whose frames are among ``runs``."""
        lines, line = self.shape_yx
        frames = np.zeros(self.skip + lines * (line + self.flyback), bool)
        for start, stop in runs:
            frames[start:stop] = True
        return runs_of(np.flatnonzero(frames[self.skip :].reshape(lines, -1)[:, :line]))

    def runs(self, y0: int, y1: int, x0: int, x1: int) -> Iterator[Run]:
        """Yield the first and last + 1 frame of each unbroken run of a block of positions."""
        line = self.shape_yx[1] + self.flyback
        if x0 == 0 and x1 == line:
            yield self.skip + y0 * line, self.skip + y1 * line
            return
        for y in range(y0, y1):
            yield self.skip + y * line + x0, self.skip + y * line + x1

    def __str__(self) -> str:
        """Say the scan in the words of the configuration."""
        extra = f", skip {self.skip}" if self.skip else ""
        extra += f", flyback {self.flyback}" if self.flyback else ""
        return f"{self.shape_yx[0]} x {self.shape_yx[1]} (y, x){extra}"


@dataclass(frozen=True)
class ScannedFrames:
    """One tilt: recorded frames seen as a scan; a :class:`stemtomo.io.sources.FrameSource`."""

    records: FrameRecords
    raster: Raster

    @property
    def path(self) -> Path:
        """The file."""
        return self.records.path

    @property
    def where(self) -> str:
        """File and array, for messages."""
        return self.records.where

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Lengths of tilt (1), y, x, ky, kx."""
        return (1, *self.raster.shape_yx, *self.records.frame_shape)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the frames read."""
        return self.records.dtype

    @property
    def n_expected(self) -> int:
        """Positions of the scan."""
        return math.prod(self.raster.shape_yx)

    def ready(self) -> int:
        """Return the positions whose frames are whole, from the first on; with frames left over, more than expected."""
        count = self.records.count()
        return self.raster.positions(count) + max(0, count - self.raster.allowed)

    @property
    def grows(self) -> bool:
        """Whether :meth:`ready` can be trusted while the files are written."""
        return bool(getattr(self.records, "grows", False))

    def missing(self) -> list[Run]:
        """Return the runs of positions whose frames are absent: lost in the middle, or beyond the end of the files.

        Raises
        ------
        AcquisitionError
            If there are frames beyond the scan as well.
        """
        needed, count = self.raster.needed, self.records.count()
        if isinstance(self.records, Interrupted):
            absent = self.records.absent(needed)
        else:
            absent = [(count, needed)] if count < needed else []
        beyond = self.records.extent() - self.raster.allowed if absent and isinstance(self.records, Extended) else 0
        if beyond > 0:
            raise AcquisitionError(
                f"{self.where}: holds {beyond} frames beyond its scan of {self.raster}, and some in it are missing; "
                "correct scan.shape, input.skip or input.flyback: frames are never dropped silently"
            )
        return self.raster.positions_of(absent)

    def tolerant(self) -> ScannedFrames:
        """Return the same scan over records that can be read although frames are absent among them."""
        if not isinstance(self.records, Interrupted):
            return self
        return replace(self, records=self.records.without(self.records.absent(self.raster.needed)))

    def check(self) -> None:
        """Check that a finished acquisition holds the frames of the scan, and none beyond.

        Raises
        ------
        AcquisitionError
            With both counts, if frames are missing, lost, cut off or left over.
        """
        count, raster = self.records.count(), self.raster
        self.records.check(raster.needed)
        advice = "correct scan.shape, input.skip or input.flyback"
        if count < raster.needed:
            raise AcquisitionError(
                f"{self.where}: holds {count} frames, a scan of {raster} needs {raster.needed}: "
                f"{raster.needed - count} frames are missing; copy the file again if it is cut off, wait if it is "
                f"still being written, {advice}, or give ingest.missing = 'mask' to leave these positions out"
            )
        if count > raster.allowed:
            raise AcquisitionError(
                f"{self.where}: holds {count} frames, a scan of {raster} has {raster.allowed}: "
                f"{count - raster.allowed} frames too many; {advice}: frames are never dropped silently"
            )

    def read(self, tilt: int, y0: int, y1: int, x0: int = 0, x1: int | None = None) -> np.ndarray:
        """Return the frames (y, x, ky, kx) of a block of the scan; ``tilt`` is 0.

        Raises
        ------
        FormatError, AcquisitionError
            If the files end before the block does, are damaged, or miss frames.
        """
        if tilt:
            raise IndexError(f"{self.where}: tilt {tilt} of a file with one tilt")
        x1 = self.raster.shape_yx[1] if x1 is None else x1
        runs = list(self.raster.runs(y0, y1, x0, x1))
        shape = (y1 - y0, x1 - x0, *self.records.frame_shape)
        block = np.empty((math.prod(shape[:2]), *shape[2:]), self.dtype)
        self.records.read(runs, block)
        return block.reshape(shape)

    def identity(self) -> dict[str, Any]:
        """Return the identity of the files and of the scan seen in them."""
        return {
            "array": None,
            **self.records.identity(),
            "axes": ["y", "x", "ky", "kx"],
            "shape": list(self.shape[1:]),
            "dtype": self.dtype.str,
            "skip": self.raster.skip,
            "flyback": self.raster.flyback,
        }


def scan(
    records: FrameRecords, scan_shape: tuple[int, int] | None = None, skip: int = 0, flyback: int = 0
) -> ScannedFrames:
    """Return ``records`` as a scan of ``scan_shape`` (y, x) positions.

    Raises
    ------
    FormatError
        If neither ``scan_shape`` nor the file says the scan: it is never guessed from the number of frames.
    AcquisitionError
        If every frame says its position in another scan (``fixed_scan``).
    """
    if scan_shape is None and records.recorded_scan is not None:
        lines, line = records.recorded_scan
        if line <= flyback:
            raise FormatError(f"{records.where}: its lines have {line} frames, {flyback} of flyback leave none")
        scan_shape = (lines, line - flyback)
    if scan_shape is None:
        raise FormatError(
            f"{records.where}: holds {records.count()} frames in one row and does not say its scan; give scan.shape = "
            "[y, x], and input.skip and input.flyback for frames recorded before the scan and after each line: the "
            "scan cannot be told from the number of frames"
        )
    if getattr(records, "fixed_scan", False) and (skip, scan_shape[0], scan_shape[1] + flyback) != (
        0,
        *(records.recorded_scan or ()),
    ):
        raise AcquisitionError(
            f"{records.where}: every frame says its position in a scan of {records.recorded_scan} (y, x), flyback "
            f"included; {tuple(scan_shape)} with flyback {flyback} and skip {skip} was given: correct scan.shape or "
            "input.flyback"
        )
    return ScannedFrames(records, Raster((int(scan_shape[0]), int(scan_shape[1])), skip, flyback))
