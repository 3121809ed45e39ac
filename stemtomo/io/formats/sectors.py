"""4D Camera (NCEM) raw data: every receiver writes its sector of a frame into files of its own.

A record is a header of 16 bytes (scan and frame number, uint32; size of the scan x, y and position x, y, uint16, all
little-endian) and a sector of 144 x 576 pixels, uint16: columns of the frame (576, 144) in version 4, rows (144, 576)
in version 5, sector k from 144 k on. Which sector a file holds is the ``module<k>`` of its name. The layout is that of
stempy's documentation of the header versions; the files do not say their version, so the user does.

Receivers are not in step, and lose packets. A frame is whole when all four sectors with its number and position are
there. Nothing is assembled in memory: the position of every record is looked up, and its bytes are read when needed.
"""

from __future__ import annotations

import functools
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stemtomo.errors import AcquisitionError, FormatError
from stemtomo.io.formats.records import Run, placed, runs_of
from stemtomo.io.provenance import file_identity, fingerprint_of

SECTORS = 4
VERSIONS = (4, 5)
_SIDE = 576
_WIDTH = _SIDE // SECTORS
_HEADER = np.dtype([("scan", "<u4"), ("frame", "<u4"), ("size_xy", "<u2", 2), ("position_xy", "<u2", 2)])
_PIXEL_BYTES = 2 * _WIDTH * _SIDE
RECORD_BYTES = _HEADER.itemsize + _PIXEL_BYTES
_NAME = re.compile(r"(?P<before>.*)module(?P<sector>\d+)(?P<after>.*)\.data", re.IGNORECASE)
_MOST_POSITIONS = 1 << 24
"""Of a scan: 4096 x 4096, more than such cameras record; what is kept of each is allocated when a file is opened."""

_WINDOW = 1024
"""Positions by which a receiver may write out of order: a sector that is later than this counts as lost."""


class _Place(NamedTuple):
    """Where the sectors of all positions lie: (sector, position) arrays; file -1 where a sector is absent."""

    file: np.ndarray
    record: np.ndarray
    frame: np.ndarray


@dataclass(frozen=True)
class SectorFrames:
    """Frames of one scan in the files of its receivers; a :class:`stemtomo.io.formats.records.FrameRecords`.

    A frame's number is its position in the scan, counted row by row, flyback included.
    """

    path: Path
    version: int
    scan_number: int
    recorded_scan: tuple[int, int]
    fixed_scan: bool = True
    grows: bool = True

    @property
    def where(self) -> str:
        """Files of all receivers, for messages."""
        return f"{self.path.parent / _parse(self.path)[0]}module*.data"

    @property
    def frame_shape(self) -> tuple[int, int]:
        """576 x 576 pixels."""
        return (_SIDE, _SIDE)

    @property
    def dtype(self) -> np.dtype:
        """uint16."""
        return np.dtype(np.uint16)

    def count(self) -> int:
        """Return the frames from the first on that every receiver has written or lost.

        A sector counts as lost when its receiver has gone on by more than 1024 positions; until then it may be late.
        """
        present = self._place()[0].file >= 0
        return min(_settled(of_sector) for of_sector in present)

    def absent(self, expected: int) -> list[Run]:
        """Return the runs of frames, of the first ``expected``, that lack a sector or mix sectors of two frames."""
        return runs_of(np.flatnonzero(~self._whole()[:expected]))

    def without(self, absent: list[Run]) -> SectorFrames:
        """Return itself: frames are found by their position."""
        return self

    def check(self, expected: int) -> None:
        """Check that every frame has its four sectors.

        Raises
        ------
        AcquisitionError
            Naming the frames and the sectors that are missing, and records that are cut off.
        """
        place, files = self._place()
        for file in files:
            records, rest = divmod(file.stat().st_size, RECORD_BYTES)
            if rest:
                raise AcquisitionError(
                    f"{file}: ends inside record {records} (of {expected}): {rest} of {RECORD_BYTES} bytes; "
                    "copy the file again if it is cut off, wait if it is still being written"
                )
        absent = self.absent(min(expected, place.file.shape[1]))
        if absent:
            total = sum(stop - start for start, stop in absent)
            shown = ", ".join(self._described(run, place) for run in absent[:8])
            more = f" and {len(absent) - 8} more runs" if len(absent) > 8 else ""
            raise AcquisitionError(
                f"{self.where}: {total} of {expected} frames lack sectors: {shown}{more}. Copy the files of all "
                "receivers, wait if they are still being written, or give ingest.missing = 'mask' to leave these "
                "positions out"
            )

    def read(self, runs: Sequence[Run], out: np.ndarray) -> None:
        """Fill ``out`` (frame, ky, kx) with the frames of ``runs``, sector by sector.

        Raises
        ------
        AcquisitionError
            If a frame is not whole.
        """
        place, files = self._place()
        whole = self._whole()
        for start, stop in runs:
            if not whole[start:stop].all():
                first = start + int(np.argmin(whole[start:stop]))
                raise AcquisitionError(f"{self.where}: {self._described((first, first + 1), place)} lacks a sector")
        shape = (_SIDE, _WIDTH) if self.version == 4 else (_WIDTH, _SIDE)
        sector_pixels = np.empty(shape, "<u2")
        for number, file in enumerate(files):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                for start, stop, part in placed(runs, out):
                    sectors, frames = np.nonzero(place.file[:, start:stop] == number)
                    for sector, frame in zip(sectors.tolist(), frames.tolist(), strict=True):
                        offset = int(place.record[sector, start + frame]) * RECORD_BYTES + _HEADER.itemsize
                        if os.preadv(descriptor, [sector_pixels.data.cast("B")], offset) != _PIXEL_BYTES:
                            raise AcquisitionError(f"{file}: was cut off while it was read; copy it again")
                        pixels = slice(sector * _WIDTH, (sector + 1) * _WIDTH)
                        part[(frame, slice(None), pixels) if self.version == 4 else (frame, pixels)] = sector_pixels
            finally:
                os.close(descriptor)

    def identity(self) -> dict[str, Any]:
        """Return the identity of the files of all receivers."""
        parts = [file_identity(file) for file in _files(self.path)]
        return {
            "file": self.path.name,
            "size_bytes": sum(part["size_bytes"] for part in parts),
            "mtime_ns": max(part["mtime_ns"] for part in parts),
            "head_tail_sha256": fingerprint_of(parts),
            "version": self.version,
        }

    def _whole(self) -> np.ndarray:
        place, _ = self._place()
        return (place.file >= 0).all(axis=0) & (place.frame == place.frame[0]).all(axis=0)

    def _place(self) -> tuple[_Place, tuple[Path, ...]]:
        """Return where every sector is, as the files are now."""
        files = _files(self.path)
        state = tuple((file, file.stat().st_ino, file.stat().st_size // RECORD_BYTES) for file in files)
        return _located(state, self.recorded_scan, self.scan_number), files

    def _described(self, run: Run, place: _Place) -> str:
        start, stop = run
        lines = self.recorded_scan[1]
        sectors = np.flatnonzero((place.file[:, start:stop] < 0).any(axis=1)).tolist()
        what = f"sectors {', '.join(map(str, sectors))}" if sectors else "sectors of different frames"
        name = f"frame {start}" if stop == start + 1 else f"frames {start} to {stop - 1}"
        return f"{name} (from y {start // lines}, x {start % lines}; {what})"


def open_sectors(path: Path, version: int | None) -> SectorFrames:
    """Open the acquisition to which the file ``path`` of one receiver belongs.

    Raises
    ------
    FormatError
        If the name does not say the sector, the version is not given or not known, or no record is whole.
    """
    if version not in VERSIONS:
        raise FormatError(
            f"{path}: sector files do not say their version; give format = 'sectors:4' (sectors are columns) or "
            "'sectors:5' (sectors are rows, since 2020)"
        )
    _parse(path)
    for file in _files(path):
        if file.stat().st_size >= RECORD_BYTES:
            header = _headers(file, 0, 1)[0]
            size_x, size_y = (int(length) for length in header["size_xy"])
            if size_x < 1 or size_y < 1:
                break
            if size_x * size_y > _MOST_POSITIONS:
                raise FormatError(
                    f"{file}: says a scan of {size_x} x {size_y} (x, y) positions, more than {_MOST_POSITIONS}; its "
                    "first header is damaged: copy the file again"
                )
            return SectorFrames(path, version, int(header["scan"]), (size_y, size_x))
    raise FormatError(f"{path}: no file of this acquisition holds a whole record of {RECORD_BYTES} bytes with a scan")


def is_sector_file(path: Path) -> bool:
    """Whether the name of ``path`` is that of a sector file."""
    return _NAME.fullmatch(path.name) is not None


def _parse(path: Path) -> tuple[str, int]:
    match = _NAME.fullmatch(path.name)
    if match is None or int(match["sector"]) >= SECTORS:
        raise FormatError(f"{path}: the name of a sector file says its module, 0 to 3, as in data_scan1_module0.data")
    return match["before"], int(match["sector"])


def _files(path: Path) -> tuple[Path, ...]:
    """Return the files of all receivers of the acquisition of ``path``, by name."""
    before = _parse(path)[0]
    names = [path.with_name(name) for name in os.listdir(path.parent) if name.startswith(f"{before}module")]
    return tuple(sorted(file for file in names if is_sector_file(file)))


def _settled(present: np.ndarray) -> int:
    """Return how many positions, from the first on, are there or will not come any more."""
    seen = np.flatnonzero(present)
    if not len(seen):
        return 0
    last = int(seen[-1])
    recent = max(0, last + 1 - _WINDOW)
    late = np.flatnonzero(~present[recent : last + 1])
    return recent + int(late[0]) if len(late) else last + 1


class _Headers:
    """The headers of a file that may grow; those that were read are kept."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.known = np.empty(0, _HEADER)
        self.lock = threading.Lock()

    def first(self, count: int) -> np.ndarray:
        """Return the headers of the first ``count`` records."""
        with self.lock:
            known = len(self.known)
            ends = [0, known - 1] if known else []
            if known > count or any(_headers(self.file, end, end + 1)[0] != self.known[end] for end in ends):
                known = 0  # rewritten in place
            self.known = np.concatenate([self.known[:known], _headers(self.file, known, count)])
            return self.known[:count]


@functools.lru_cache(maxsize=256)
def _kept(file: Path, inode: int) -> _Headers:
    return _Headers(file)


@functools.lru_cache(maxsize=2)
def _located(state: tuple[tuple[Path, int, int], ...], scan: tuple[int, int], scan_number: int) -> _Place:
    """Look up the records of ``state``, (file, inode, records), of a scan (lines, positions per line)."""
    total = scan[0] * scan[1]
    place = _Place(*(np.full((SECTORS, total), -1, dtype) for dtype in (np.int16, np.int32, np.int64)))
    for number, (file, inode, count) in enumerate(state):
        headers = _kept(file, inode).first(count)
        x, y = headers["position_xy"].astype(np.int64).T
        foreign = (headers["scan"] != scan_number) | (headers["size_xy"] != scan[::-1]).any(axis=1)
        foreign |= (x >= scan[1]) | (y >= scan[0])
        if foreign.any():
            first = int(np.argmax(foreign))
            raise FormatError(
                f"{file}: record {first} says {headers[first]} (scan, frame, size x y, position x y), expected scan "
                f"{scan_number} of {scan[1]} x {scan[0]} (x, y) positions; the file is damaged or of another scan"
            )
        positions, sector = y * scan[1] + x, _parse(file)[1]
        record = np.arange(count, dtype=np.int32)
        new = place.file[sector, positions] < 0
        for target, value in ((place.file, number), (place.record, record), (place.frame, headers["frame"])):
            values = np.broadcast_to(value, count)[new]
            target[sector, positions[new][::-1]] = values[::-1]  # of equal positions the first stays
        other = headers["frame"] != place.frame[sector, positions]
        if other.any():
            where = int(positions[np.argmax(other)])
            raise AcquisitionError(
                f"{file}: has several frames at y {where // scan[1]}, x {where % scan[1]}; frames of one position are "
                "not added or chosen silently: count the electrons first (format 'counted' reads the result)"
            )
    return place


def _headers(file: Path, start: int, stop: int) -> np.ndarray:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        size = _HEADER.itemsize
        data = b"".join(os.pread(descriptor, size, number * RECORD_BYTES) for number in range(start, stop))
    finally:
        os.close(descriptor)
    if len(data) != (stop - start) * _HEADER.itemsize:
        raise AcquisitionError(f"{file}: shrank while it was read; copy it again")
    return np.frombuffer(data, _HEADER)
