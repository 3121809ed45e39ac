"""Quantum Detectors Merlin: .mib files of 1, 6, 12 and 24 bit, cooked and raw, single chips and quads.

A frame is an ASCII header (``MQ1,000001,00384,01,0256,0256,U08,   1x1,...``: sequence number, bytes of the header,
chips, width, height, type, layout) and its pixels: cooked ones big-endian, raw ones as they leave the chip, in
64-bit words whose pixels run backwards. A raw quad writes its four chips side by side, 4, 3, 2, 1, the lower two
turned by 180 degrees. Raw frames of 24 bit are two of 12 bit, the high bits first. The raw layouts are as in the
Merlin manual (Quantum Detectors) and in LiberTEM (doi:10.21105/joss.02006).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from stemtomo.errors import AcquisitionError, FormatError
from stemtomo.io.formats.records import Run, placed, runs_of
from stemtomo.io.provenance import file_identity, fingerprint_of

_CHIP_PIXELS = 256
_PIECE_BYTES = 16 << 20
_HEADER_SAMPLE_BYTES = 2048
_SEQUENCE = slice(4, 10)
_SEQUENCE_WRAP = 10**6  # six digits
_DTYPES = {"U08": "u1", "U8": "u1", "U16": ">u2", "U32": ">u4"}
_RAW_BYTES = {1: 1 / 8, 6: 1, 12: 2, 24: 4}
_RAW_DTYPES = {1: "u1", 6: "u1", 12: "u2", 24: "u4"}


@dataclass(frozen=True)
class MerlinHeader:
    """What the header of a frame says: sizes in bytes and pixels, the type, and the chips."""

    header_bytes: int
    frame_shape: tuple[int, int]
    pixel_bytes: int
    file_dtype: str
    raw_bits: int | None = None
    quad: bool = False

    @property
    def record_bytes(self) -> int:
        """Bytes of header and pixels of one frame."""
        return self.header_bytes + self.pixel_bytes

    @property
    def dtype(self) -> np.dtype:
        """Dtype of decoded frames."""
        return np.dtype(self.file_dtype).newbyteorder("=")

    def decode(self, pixels: np.ndarray) -> np.ndarray:
        """Return the frames (frame, ky, kx) of ``pixels``, bytes (frame, byte)."""
        count = len(pixels)
        if self.raw_bits is None:
            return pixels.view(self.file_dtype).reshape(count, *self.frame_shape)
        frames = _unpack(pixels, self.raw_bits)
        return _assemble_quad(frames, *self.frame_shape) if self.quad else frames.reshape(count, *self.frame_shape)


@dataclass(frozen=True)
class MerlinFrames:
    """Frames of one or more .mib files of one acquisition; a :class:`stemtomo.io.formats.records.FrameRecords`."""

    path: Path
    files: tuple[Path, ...]
    header: MerlinHeader
    promised: int | None = None
    recorded_scan: tuple[int, int] | None = field(default=None)
    lost: tuple[Run, ...] = ()
    grows: bool = True

    @property
    def where(self) -> str:
        """File, for messages."""
        return str(self.path)

    @property
    def frame_shape(self) -> tuple[int, int]:
        """Lengths of ky and kx."""
        return self.header.frame_shape

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the frames read."""
        return self.header.dtype

    def count(self) -> int:
        """Return the whole frames of all files, up to the first file that ends inside a frame."""
        total = 0
        for file in self.files:
            frames, rest = divmod(file.stat().st_size, self.header.record_bytes)
            total += frames
            if rest:
                break
        return total

    def absent(self, expected: int) -> list[Run]:
        """Return the runs of frames, of the first ``expected``, whose sequence numbers are missing."""
        places = self._places()
        there = np.zeros(expected, bool)
        there[places[places < expected]] = True
        return runs_of(np.flatnonzero(~there))

    def extent(self) -> int:
        """Return the number of frames up to the last one, counted by their sequence numbers."""
        return int(self._places().max(initial=-1)) + 1

    def without(self, absent: list[Run]) -> MerlinFrames:
        """Return the same files, with the frames behind those of ``absent`` at their own places."""
        return replace(self, lost=tuple(absent))

    def check(self, expected: int) -> None:
        """Check that no file ends inside a frame, and that the sequence numbers have no gap.

        Raises
        ------
        AcquisitionError
            Naming the frame that is cut, or the ranges of frames that were lost.
        """
        before = 0
        last = None
        for file in self.files:
            frames, rest = divmod(file.stat().st_size, self.header.record_bytes)
            if rest:
                raise AcquisitionError(
                    f"{file}: ends inside frame {before + frames} (of {max(expected, self.promised or 0)}): "
                    f"{rest} of {self.header.record_bytes} bytes; copy the file again if it is cut off, wait if it is "
                    f"still being written, or give ingest.missing = 'mask' to keep {before + frames}"
                )
            if frames:
                first, end = self._sequence(file, 0), self._sequence(file, frames - 1)
                lost = [] if last is None or first in (1, last + 1) else [(last + 1, first - 1)]
                if (end - first - (frames - 1)) % _SEQUENCE_WRAP:
                    lost += self._gaps(file, frames)
                if lost:
                    raise _lost(file, lost)
                last = end
            before += frames
        if self.promised is not None and before < min(self.promised, expected):
            raise AcquisitionError(
                f"{self.where}: holds {before} frames, its .hdr promises {self.promised}, the scan needs {expected}: "
                f"{expected - before} frames are missing; copy the file again, or correct scan.shape"
            )

    def read(self, runs: Sequence[Run], out: np.ndarray) -> None:
        """Fill ``out`` (frame, ky, kx) with the frames of ``runs``, read in pieces through one buffer.

        Raises
        ------
        AcquisitionError
            If the files end before a run does, or sequence numbers jump.
        """
        runs = [self._records_of(run) for run in runs]
        before = 0
        for file in self.files:
            frames = file.stat().st_size // self.header.record_bytes
            for start, stop, part in placed(runs, out):
                first, last = max(start, before), min(stop, before + frames)
                if first < last:
                    self._read_file(file, first - before, part[first - start : last - start])
            before += frames
        if runs[-1][1] > before:
            raise AcquisitionError(f"{self.where}: ends after frame {before}, frame {runs[-1][1] - 1} was asked for")

    def identity(self) -> dict[str, Any]:
        """Return the identity of the file, or of all files of the acquisition."""
        parts = [file_identity(file) for file in self.files]
        if len(parts) == 1:
            return parts[0]
        return {
            "file": self.path.name,
            "size_bytes": sum(part["size_bytes"] for part in parts),
            "mtime_ns": max(part["mtime_ns"] for part in parts),
            "head_tail_sha256": fingerprint_of(parts),
        }

    def _places(self) -> np.ndarray:
        """Return which frame each whole record is, from 0 on, by its sequence number."""
        places: list[int] = []
        last = None
        for file in self.files:
            for number in self._numbers(file, file.stat().st_size // self.header.record_bytes):
                # each file may count from 1
                step = 1 if last is None or number == 1 else (number - last) % _SEQUENCE_WRAP
                places.append((places[-1] if places else -1) + step)
                last = number
        return np.array(places, np.int64)

    def _records_of(self, run: Run) -> Run:
        """Return where the frames of ``run``, all of which are there, lie among the records."""
        before = sum(min(stop, run[0]) - start for start, stop in self.lost if start < run[0])
        return run[0] - before, run[1] - before

    def _read_file(self, file: Path, first: int, out: np.ndarray) -> None:
        record, header = self.header.record_bytes, self.header.header_bytes
        step = max(1, _PIECE_BYTES // record)
        buffer = np.empty((min(step, len(out)), record), np.uint8)
        with file.open("rb", buffering=0) as stream:
            stream.seek(first * record)
            # Frames lost before this piece would shift it; where lost frames are known, its own numbers must follow.
            origin = None if self.lost else self._sequence(file, 0) + first
            for done in range(0, len(out), step):
                piece = buffer[: min(step, len(out) - done)]
                if stream.readinto(piece.reshape(-1).data) != piece.nbytes:
                    raise AcquisitionError(f"{file}: was cut off while it was read; copy it again")
                for index, row in enumerate(piece[:, _SEQUENCE]):
                    number = _number(file, row.tobytes())
                    origin = number - done - index if origin is None else origin
                    if (number - origin - done - index) % _SEQUENCE_WRAP:
                        raise _lost(file, self._gaps(file, file.stat().st_size // record))
                out[done : done + len(piece)] = self.header.decode(piece[:, header:])

    def _sequence(self, file: Path, index: int) -> int:
        with file.open("rb") as stream:
            stream.seek(index * self.header.record_bytes)
            return _number(file, stream.read(_SEQUENCE.stop)[_SEQUENCE])

    def _numbers(self, file: Path, frames: int) -> list[int]:
        numbers = []
        with file.open("rb", buffering=0) as stream:
            for index in range(frames):
                stream.seek(index * self.header.record_bytes)
                numbers.append(_number(file, stream.read(_SEQUENCE.stop)[_SEQUENCE]))
        return numbers

    def _gaps(self, file: Path, frames: int) -> list[tuple[int, int]]:
        """Ranges of sequence numbers that are missing in ``file``; reversed where the numbers go back."""
        numbers = self._numbers(file, frames)
        return [
            (before + 1, after - 1)
            for before, after in itertools.pairwise(numbers)
            if (after - before - 1) % _SEQUENCE_WRAP
        ]


def open_merlin(path: Path) -> MerlinFrames:
    """Open a .mib, or with its .hdr all .mib files of that acquisition (``name.hdr``: ``name*.mib``).

    Raises
    ------
    FormatError
        If there is no .mib, or its header is not one of Merlin.
    """
    if path.suffix.lower() == ".hdr":
        pattern = re.compile(re.escape(path.stem) + r"[_-]?\d*", re.IGNORECASE)
        files = [f for f in path.parent.iterdir() if f.suffix.lower() == ".mib" and pattern.fullmatch(f.stem)]
        if not files:
            raise FormatError(f"{path}: there is no {path.stem}*.mib beside it; the .hdr alone holds no frames")
        heads = {file: _read_header(file) for file in files}
        files.sort(key=lambda file: (heads[file][1], file.name))
        if len({head for head, _ in heads.values()}) > 1:
            raise FormatError(f"{path}: its .mib files differ in detector or depth: {', '.join(f.name for f in files)}")
    else:
        files = [path]
    header, _ = _read_header(files[0])
    beside = path.with_suffix(".hdr")
    promised, recorded = _read_hdr(beside) if beside.is_file() else (None, None)
    return MerlinFrames(path, tuple(files), header, promised, recorded)


def _read_hdr(path: Path) -> tuple[int | None, tuple[int, int] | None]:
    """Frames of the acquisition, and the scan (ScanY, ScanX) where the operator entered one.

    Frames per trigger are no scan: a trigger may be a line, a line with its flyback, a position, or the whole scan.
    """
    lines = path.read_text(encoding="latin-1").splitlines()
    entries = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    promised = entries.get("Frames in Acquisition (Number)", "")
    x, y = entries.get("ScanX", ""), entries.get("ScanY", "")
    scan = (int(y), int(x)) if x.isdigit() and y.isdigit() else None
    return (int(promised) if promised.isdigit() else None), scan


def _read_header(path: Path) -> tuple[MerlinHeader, int]:
    with path.open("rb") as stream:
        data = stream.read(_HEADER_SAMPLE_BYTES)
    fields = data.decode("latin-1").split(",")
    try:
        if not fields[0].startswith("MQ"):
            raise ValueError(f"begins with {fields[0][:8]!r}, not with MQ1")
        sequence, header_bytes, chips, width, height = (int(text) for text in fields[1:6])
        if min(header_bytes, width, height) < 1:
            raise ValueError(f"says {header_bytes} bytes of header and {width} x {height} pixels")
        kind, layout = fields[6].strip().upper(), fields[7].strip().upper().replace("G", "")
        text = data[:header_bytes].split(b"\0")[0].decode("latin-1").strip().rstrip(",")
        depth = text.rpartition(",")[2].strip()
        return _header(header_bytes, chips, (height, width), kind, layout, depth), sequence
    except (ValueError, IndexError) as error:
        raise FormatError(
            f"{path}: does not begin like a Merlin .mib ({error}); it is damaged, empty, or another format"
        ) from error


def _header(header_bytes: int, chips: int, shape: tuple[int, int], kind: str, layout: str, depth: str) -> MerlinHeader:
    height, width = shape
    if kind in _DTYPES:
        dtype = _DTYPES[kind]
        return MerlinHeader(header_bytes, shape, height * width * np.dtype(dtype).itemsize, dtype)
    bits = int(depth)
    if kind != "R64" or bits not in _RAW_BYTES:
        raise ValueError(f"type {kind} of {bits} bit is not known; U08, U16, U32 or R64 of 1, 6, 12 or 24 bit are")
    if chips > 1 and (layout != "2X2" or chips != 4 or bits == 24 or width != 4 * _CHIP_PIXELS):
        raise ValueError(
            f"raw frames of {chips} chips, layout {layout}, {bits} bit, {width} pixels a row are not known; one chip, "
            "and 2x2 chips of 1, 6 and 12 bit are; export the file cooked"
        )
    if bits == 24 and width > _CHIP_PIXELS:
        width //= 2  # its two halves are counted as if they lay side by side
    pixel_bytes = int(height * width * _RAW_BYTES[bits])
    frame = (2 * height, width // 2) if chips > 1 else (height, width)
    return MerlinHeader(header_bytes, frame, pixel_bytes, _RAW_DTYPES[bits], bits, chips > 1)


def _unpack(pixels: np.ndarray, bits: int) -> np.ndarray:
    """Return raw bytes (frame, byte) as pixels (frame, pixel): 64-bit words run backwards."""
    count = len(pixels)
    if bits == 24:
        high, low = (_unpack(half, 12) for half in np.split(pixels, 2, axis=1))
        return (high.astype(np.uint32) << 12) + low
    if bits == 12:
        return pixels.view(">u2").reshape(count, -1, 4)[..., ::-1].reshape(count, -1)
    words = pixels.reshape(count, -1, 8)[..., ::-1].reshape(count, -1)
    return np.unpackbits(words, axis=1, bitorder="little") if bits == 1 else words


def _assemble_quad(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return rows of the chips 4, 3, 2, 1 as the square 1 2 / 3 4; the lower two are turned by 180 degrees."""
    chips = frames.reshape(len(frames), height // 2, 4, width // 2)
    upper = [chips[:, :, 3], chips[:, :, 2]]
    lower = [chips[:, ::-1, 1, ::-1], chips[:, ::-1, 0, ::-1]]
    return np.concatenate([np.concatenate(half, axis=2) for half in (upper, lower)], axis=1)


def _number(path: Path, text: bytes) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise FormatError(f"{path}: the header of a frame has no sequence number ({text!r}); it is damaged") from error


def _lost(path: Path, ranges: list[tuple[int, int]]) -> AcquisitionError:
    shown = ", ".join(
        f"{a} to {b}" if b > a else f"{a}" if a == b else f"after {a - 1} comes {b + 1}" for a, b in ranges[:10]
    )
    more = f" and {len(ranges) - 10} more" if len(ranges) > 10 else ""
    return AcquisitionError(
        f"{path}: frames were lost: sequence numbers {shown}{more} are missing; record this tilt again, "
        "leave it out of the series, or give ingest.missing = 'mask' to leave these positions out"
    )
