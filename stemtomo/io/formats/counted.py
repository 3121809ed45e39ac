"""4D Camera counted events: HDF5 files of stempy, versions 1 to 3, expanded to frames as they are read.

``electron_events/frames`` is a list of lists of pixel numbers, one per electron. Version 1 has one list per position;
version 2 may have several, whose positions ``electron_events/scan_positions`` names; version 3 has the same number for
every position, position by position. The frames of a position are added. ``Nx`` of the positions is the length of a
line, flyback included; of the frames, ``Nx`` and ``Ny`` are (ky, kx), as stempy writes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stemtomo.errors import AcquisitionError, FormatError
from stemtomo.io.formats.optional import open_hdf5
from stemtomo.io.formats.records import Run, placed, runs_of
from stemtomo.io.provenance import file_identity

EVENTS = "electron_events/frames"
_POSITIONS = "electron_events/scan_positions"
_PIECE_BYTES = 64 << 20
_LARGEST = np.iinfo(np.uint16).max


class _Owners(NamedTuple):
    """Which lists of events belong to which positions: lists and their positions, both ordered by the position."""

    lists: np.ndarray
    positions: np.ndarray

    def within(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the lists of positions [first, last) in the order of the file, and the position of each."""
        begin, end = np.searchsorted(self.positions, (first, last))
        order = np.argsort(self.lists[begin:end])
        return self.lists[begin:end][order], self.positions[begin:end][order]


@dataclass(frozen=True)
class CountedFrames:
    """Counted frames of one scan; a :class:`stemtomo.io.formats.records.FrameRecords`."""

    path: Path
    version: int
    recorded_scan: tuple[int, int]
    frame_shape: tuple[int, int]
    frames_per_position: int

    @property
    def where(self) -> str:
        """File and dataset, for messages."""
        return f"{self.path}[{EVENTS}]"

    @property
    def dtype(self) -> np.dtype:
        """uint16: electrons per pixel."""
        return np.dtype(np.uint16)

    def count(self) -> int:
        """Return the positions of the file: it is written when the scan is finished."""
        return math.prod(self.recorded_scan)

    def absent(self, expected: int) -> list[Run]:
        """Return the runs of positions without a list of events: their frames were lost in recording."""
        if self.version >= 3:
            return []
        with open_hdf5(self.path) as file:
            listed = np.bincount(file[_POSITIONS][()].astype(np.int64), minlength=self.count()) > 0
        return runs_of(np.flatnonzero(~listed[:expected]))

    def without(self, absent: list[Run]) -> CountedFrames:
        """Return itself: frames are found by their position."""
        return self

    def check(self, expected: int) -> None:
        """Check that every position has a list of events.

        Raises
        ------
        AcquisitionError
            With the positions that have none.
        """
        runs = self.absent(expected)
        if runs:
            count = sum(stop - start for start, stop in runs)
            shown = ", ".join(f"{start} to {stop - 1}" if stop > start + 1 else f"{start}" for start, stop in runs[:10])
            raise AcquisitionError(
                f"{self.path}: {count} of {self.count()} positions have no list of events: {shown}"
                f"{' ...' if len(runs) > 10 else ''}. Their frames were lost in recording and are not invented: leave "
                "this tilt out, or give ingest.missing = 'mask' to leave these positions out"
            )

    def read(self, runs: Sequence[Run], out: np.ndarray) -> None:
        """Fill ``out`` (position, ky, kx) with the frames of ``runs``, a few at a time.

        Raises
        ------
        FormatError
            If an event lies outside of the detector, or a pixel has more than 65535 electrons.
        """
        pixels = math.prod(self.frame_shape)
        step = max(1, _PIECE_BYTES // (pixels * np.dtype(np.int64).itemsize))
        with open_hdf5(self.path) as file:
            frames = file[EVENTS]
            owners = None if self.version >= 3 else _owners(self.path, *_state(self.path))
            for start, stop, part in placed(runs, out):
                for first in range(start, stop, step):
                    last = min(first + step, stop)
                    counts = self._expand(frames, owners, first, last, pixels)
                    part[first - start : last - start] = counts.reshape(-1, *self.frame_shape)

    def identity(self) -> dict[str, Any]:
        """Return the identity of the file."""
        return {**file_identity(self.path), "array": EVENTS}

    def _expand(self, frames: Any, owners: _Owners | None, first: int, last: int, pixels: int) -> np.ndarray:
        if owners is None:
            per = self.frames_per_position
            lists = frames[first * per : last * per]
            places = np.repeat(np.arange(last - first), per)
        else:
            rows, positions = owners.within(first, last)
            lists = _rows(frames, rows)
            places = positions - first
        if not len(lists):
            return np.zeros((last - first, pixels), self.dtype)
        events = np.concatenate(lists).astype(np.int64)
        if len(events) and int(events.max()) >= pixels:
            raise FormatError(
                f"{self.where}: has an event at pixel {int(events.max())}, its frames of {list(self.frame_shape)} have "
                f"{pixels}; the file is damaged, or its attributes Nx and Ny are wrong"
            )
        events += np.repeat(places * pixels, [len(events_of_one) for events_of_one in lists])
        counts = np.bincount(events, minlength=(last - first) * pixels)
        if int(counts.max()) > _LARGEST:
            raise FormatError(f"{self.where}: a pixel has {int(counts.max())} electrons, more than {_LARGEST}")
        return counts.reshape(last - first, pixels)


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@lru_cache(maxsize=2)
def _owners(path: Path, _size: int, _mtime_ns: int) -> _Owners:
    """Read which lists belong to which positions, once for all shards that a process copies from a file."""
    with open_hdf5(path) as file:
        positions = file[_POSITIONS][()].astype(np.int64)
    order = np.argsort(positions, kind="stable")
    return _Owners(order, positions[order])


def _rows(frames: Any, rows: np.ndarray) -> Any:
    """Return some lists of events; a slice where it can be, because h5py gathers single rows slowly."""
    if not len(rows):
        return np.empty(0, object)
    unbroken = int(rows[-1]) - int(rows[0]) + 1 == len(rows)
    return frames[int(rows[0]) : int(rows[-1]) + 1] if unbroken else frames[rows]


def open_counted(path: Path) -> CountedFrames:
    """Open a file of counted events.

    Raises
    ------
    FormatError
        If it is no such file, of an unknown version, or lacks the shape of scan or frames.
    AcquisitionError
        If events and positions do not match.
    """
    with open_hdf5(path) as file:
        if EVENTS not in file or _POSITIONS not in file:
            raise FormatError(f"{path}: has no {EVENTS} and {_POSITIONS}, so it is no file of counted events (stempy)")
        version = int(file.attrs.get("version", 1))
        frames, positions = file[EVENTS], file[_POSITIONS]
        if version not in (1, 2, 3):
            raise FormatError(f"{path}: counted events of version {version} are not known; 1, 2 and 3 are")
        try:
            scan = (int(positions.attrs["Ny"]), int(positions.attrs["Nx"]))
            frame_shape = (int(frames.attrs["Nx"]), int(frames.attrs["Ny"]))
        except KeyError as error:
            raise FormatError(f"{path}: lacks an attribute of {EVENTS} or {_POSITIONS}: {error}") from error
        lists, total = int(frames.shape[0]), math.prod(scan)
        numbers = positions[()] if version < 3 else None
    if min(*scan, *frame_shape) < 1:
        raise FormatError(
            f"{path}: says {scan[0]} x {scan[1]} positions and frames of {list(frame_shape)}; it is damaged"
        )
    if numbers is None:
        matches = lists > 0 and lists % total == 0
    else:
        matches = len(numbers) == lists and (not lists or 0 <= int(numbers.min()) <= int(numbers.max()) < total)
    if not matches:
        raise AcquisitionError(
            f"{path}: has {lists} lists of events for {scan[0]} x {scan[1]} (y, x) positions, {total}; "
            "they do not match, so the file is damaged or was cut off"
        )
    return CountedFrames(path, version, scan, frame_shape, lists // total)
