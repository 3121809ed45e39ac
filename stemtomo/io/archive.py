"""Members of an .npz archive: headers, and a forward stream through a compressed member with one bounded buffer."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from stemtomo.errors import FormatError
from stemtomo.io.layout import AxisLayout
from stemtomo.io.provenance import file_identity
from stemtomo.io.untrusted import reading

_PIECE_BYTES = 1 << 20
_LOCAL_HEADER_BYTES = 30
_WRITE_AGAIN = "write the archive again with numpy.savez"


def member_names(path: Path) -> list[str]:
    """Return the names of the arrays in the archive ``path``.

    Raises
    ------
    FormatError
        If it is no archive or cut off (the directory of an archive is at its end).
    """
    with _archive(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def open_member(path: Path, array: str) -> tuple[zipfile.ZipInfo, IO[bytes]]:
    """Open the member that holds ``array`` for reading from its beginning."""
    with _archive(path) as archive, reading(f"{path}[{array}]", "a member of an .npz", _WRITE_AGAIN):
        info = archive.getinfo(f"{array}.npy")  # its method may be unknown, or it may be encrypted
        return info, archive.open(info)


def member_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Return where the bytes of the uncompressed member ``info`` begin in the file.

    The local header repeats name and extra field with lengths of its own (APPNOTE.TXT 4.3.7).
    """
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(_LOCAL_HEADER_BYTES)
    name_bytes, extra_bytes = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return info.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes


def array_header(stream: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Read the header of an .npy stream: shape, whether it is in Fortran order, dtype, and the bytes it takes.

    Raises
    ------
    FormatError
        If ``stream`` is not an .npy of version 1 or 2.
    """
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    counted = _Counted(stream)
    with reading(where, "an .npy array", "it does not begin like one, so it is damaged or another format"):
        version = np.lib.format.read_magic(counted)
        if version not in readers:
            raise ValueError(f"version {version[0]}.{version[1]} of the format is for structured arrays")
        shape, fortran, dtype = readers[version](counted)
    return tuple(shape), bool(fortran), dtype, counted.count


def load_array(path: Path) -> np.ndarray:
    """Return the array of the .npy file ``path``, which is as long as its header says.

    Raises
    ------
    FormatError
        If it is no .npy, has objects in it, or is cut off.
    """
    with path.open("rb") as stream:
        shape, _, dtype, header_bytes = array_header(stream, str(path))
    promised, found = header_bytes + math.prod(shape) * dtype.itemsize, path.stat().st_size
    if found < promised:
        raise FormatError(f"{path}: is truncated: {found} bytes, {promised} expected; copy the file again")
    with reading(path, "an .npy array"):
        loaded: np.ndarray = np.load(path, allow_pickle=False)
    return loaded


@dataclass(frozen=True)
class StreamedMember:
    """A compressed member of an .npz. It can only be read forward; :meth:`blocks` does so once, in bounded memory.

    The buffer is a few rows of the scan if the file's axes begin with tilt, y; one tilt if they begin with tilt;
    else the whole array, because the first row then needs bytes from everywhere.
    """

    path: Path
    array: str
    layout: AxisLayout
    file_dtype: np.dtype

    @property
    def where(self) -> str:
        """File and array, for messages."""
        return f"{self.path}[{self.array}]"

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Lengths of tilt, y, x, ky, kx."""
        return self.layout.canonical_shape

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the frames read, in the machine's byte order."""
        return self.file_dtype.newbyteorder("=")

    @property
    def n_expected(self) -> int:
        """Number of frames of the whole series."""
        return math.prod(self.shape[:3])

    def ready(self) -> int:
        """Return ``n_expected``: an archive has its directory, and so its frames, only when it is finished."""
        return self.n_expected

    def buffer_bytes(self, rows: int) -> int:
        """Bytes of the buffer that :meth:`blocks` holds for blocks of ``rows`` rows."""
        return math.prod(self._unit_shape(rows)) * self.file_dtype.itemsize

    def blocks(self, rows: int, start: tuple[int, int] = (0, 0)) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield (tilt, y0, block) forward through the member: ``rows`` rows (y, x, ky, kx) each, from ``start`` on.

        A block is a view of a buffer that the next one reuses: take what is needed before going on. What lies before
        ``start`` (tilt, y0; y0 a multiple of ``rows``) is decompressed and dropped.

        Raises
        ------
        FormatError
            If the member ends early or its checksum is wrong; the last block is yielded only after that check.
        """
        unit = self._unit_shape(rows)
        tilts, height = self.shape[:2]
        buffer = np.empty(math.prod(unit), self.file_dtype)
        with self._stream() as stream:
            for tilt, y0 in self._units(rows):
                unit_tilts, unit_rows = self._unit_extent(rows, y0)
                shape = tuple(
                    {"tilt": unit_tilts, "y": unit_rows}.get(name, length)
                    for name, length in zip(self.layout.axes, self.layout.shape, strict=True)
                )
                part = buffer[: math.prod(shape)]
                if (tilt + unit_tilts - 1, y0 + unit_rows - 1) < start:
                    self._skip(stream, part.nbytes)
                    continue
                self._fill(stream, part)
                if tilt + unit_tilts == tilts and y0 + unit_rows == height:
                    self._skip(stream, 1, at_end=True)  # the checksum is compared when the end is met
                yield from self._cut(self.layout.to_canonical(part.reshape(shape)), tilt, y0, rows, start)

    def read(self, tilt: int, y0: int, y1: int, x0: int = 0, x1: int | None = None) -> np.ndarray:
        """Return the frames (y, x, ky, kx) of a block of the scan, decompressing all that comes before it.

        For looking at a few frames; :meth:`blocks` reads a series.
        """
        wanted = [
            block[max(y0 - first, 0) : y1 - first, x0:x1].copy()
            for number, first, block in self._rows_until(tilt, y0, y1)
            if number == tilt and first < y1 and first + len(block) > y0
        ]
        return np.concatenate(wanted)

    def identity(self) -> dict[str, Any]:
        """Return the identity of the file and of the array in it."""
        return {
            **file_identity(self.path),
            "array": self.array,
            "axes": list(self.layout.axes),
            "shape": list(self.layout.shape),
            "dtype": self.file_dtype.str,
        }

    def _rows_until(self, tilt: int, y0: int, y1: int) -> Iterator[tuple[int, int, np.ndarray]]:
        for number, first, block in self.blocks(1, (tilt, y0)):
            if (number, first) >= (tilt, y1):
                return
            yield number, first, block

    def _unit_extent(self, rows: int, y0: int) -> tuple[int, int]:
        """Tilts and rows that one filling of the buffer holds."""
        tilts, height = self.shape[:2]
        if self.layout.leading == 0:
            return (tilts, height)
        return (1, height) if self.layout.leading == 1 else (1, min(rows, height - y0))

    def _unit_shape(self, rows: int) -> tuple[int, ...]:
        tilts, height = self._unit_extent(rows, 0)
        return (tilts, height, *self.shape[2:])

    def _units(self, rows: int) -> Iterator[tuple[int, int]]:
        tilts, height = self.shape[:2]
        step_tilts, step_rows = self._unit_extent(rows, 0)
        return ((tilt, y0) for tilt in range(0, tilts, step_tilts) for y0 in range(0, height, step_rows))

    def _cut(
        self, unit: np.ndarray, tilt: int, y0: int, rows: int, start: tuple[int, int]
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        if not unit.dtype.isnative:
            unit = unit.byteswap(inplace=True).view(self.dtype)
        for index, frames in enumerate(unit):
            for first in range(0, len(frames), rows):
                if (tilt + index, y0 + first) >= start:
                    yield tilt + index, y0 + first, frames[first : first + rows]

    @contextmanager
    def _stream(self) -> Iterator[IO[bytes]]:
        _info, stream = open_member(self.path, self.array)
        with stream:
            array_header(stream, self.where)
            with reading(self.where, "a compressed array", "it is damaged; copy or write the archive again"):
                yield stream

    def _fill(self, stream: IO[bytes], part: np.ndarray) -> None:
        view = part.view(np.uint8).data
        filled = 0
        while filled < len(view):
            piece = stream.read(min(_PIECE_BYTES, len(view) - filled))
            if not piece:
                raise FormatError(
                    f"{self.where}: ends {len(view) - filled} bytes early; copy or write the archive again"
                )
            view[filled : filled + len(piece)] = piece
            filled += len(piece)

    def _skip(self, stream: IO[bytes], count: int, at_end: bool = False) -> None:
        while count:
            piece = stream.read(min(_PIECE_BYTES, count))
            if not piece and not at_end:
                raise FormatError(f"{self.where}: ends {count} bytes early; copy or write the archive again")
            if not piece:
                return
            count -= len(piece)


class _Counted:
    """A stream that counts what is read from it: a header does not say how long it is."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.count = 0

    def read(self, size: int = -1) -> bytes:
        """Read up to ``size`` bytes."""
        data = self._stream.read(size)
        self.count += len(data)
        return data


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    with reading(path, "an .npz archive", "it is none, or is cut off; copy the file again"):
        archive = zipfile.ZipFile(path)
    with archive:
        yield archive
