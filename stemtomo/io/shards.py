"""Shards of frames as bytes: whole inner chunks are compressed and expanded here, without the copies that Zarr makes.

A shard is the file that the ``sharding_indexed`` codec of Zarr v3 describes: encoded chunks one after another, row by
row of the chunk grid, then for each chunk its offset and length (uint64), then the CRC-32C of that index. A chunk of
nothing but zeros is left out; a shard of nothing else is its index alone, so that one that is gone is not taken for it.
Where the codec ``crc32c`` is the last of the chunks' codecs, as in every array made now, each ends with its own
checksum. Any reader of Zarr v3 reads what is written here, and what other writers of it have written is read here.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import zarr
from numcodecs.blosc import Blosc
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec

from stemtomo.errors import StoreError
from stemtomo.io.electrons import ElectronCodec, decode_counts, encode_counts
from stemtomo.locations import reader

Piece = tuple[int, int, np.ndarray]
"""First row and column, and the frames (y, x, ky, kx) of a rectangle of scan positions."""

Read = Callable[[int, int], bytes]
"""Reads a number of bytes, the second argument, from an offset, the first."""

EVERY_SHARD = "every_shard"
"""Attribute of an array of which every shard has a file when it is complete, one of zeros too."""

_ABSENT = 2**64 - 1
_CHECKSUM_BYTES = 4
_SHUFFLES = {"noshuffle": Blosc.NOSHUFFLE, "shuffle": Blosc.SHUFFLE, "bitshuffle": Blosc.BITSHUFFLE}


class Coder(NamedTuple):
    """How chunks of an array become bytes, and bytes fill a chunk; ``checked`` if a CRC-32C follows these bytes."""

    encode: Callable[[np.ndarray], bytes]
    decode: Callable[[Any, np.ndarray], Any]
    checked: bool


def coder(array: zarr.Array) -> Coder | None:
    """Return how the inner chunks of ``array`` are coded; ``None`` if it is in a way that only Zarr knows."""
    (sharding,) = array.metadata.codecs
    codecs = tuple(sharding.codecs)
    checked = isinstance(codecs[-1], Crc32cCodec)
    codecs = codecs[:-1] if checked else codecs
    if [type(codec) for codec in codecs] == [ElectronCodec] and sys.byteorder == "little":
        return Coder(encode_counts, decode_counts, checked)
    if [type(codec) for codec in codecs] != [BytesCodec, BloscCodec] or not _little(codecs[0]):
        return None
    packed = codecs[1]
    blosc = Blosc(packed.cname.value, packed.clevel, _SHUFFLES[packed.shuffle.value], packed.blocksize)
    return Coder(blosc.encode, blosc.decode, checked)


@dataclass(frozen=True)
class ShardCodec:
    """How the shards of one array of frames are encoded.

    Parameters
    ----------
    chunk_yx
        Scan positions of an inner chunk, which holds whole patterns.
    grid_yx
        Inner chunks of a shard.
    pattern
        Lengths of ky and kx.
    """

    chunk_yx: tuple[int, int]
    grid_yx: tuple[int, int]
    pattern: tuple[int, int]
    dtype: np.dtype
    coder: Coder
    every_shard: bool = True
    """Whether every shard has a file; before they had, one of zeros had none."""

    @classmethod
    def of(cls, array: zarr.Array) -> ShardCodec | None:
        """Return the codec of ``array`` (y, x, ky, kx); ``None`` if it is not one that is known here."""
        stages: Sequence[Any] = getattr(array.metadata, "codecs", ())
        outer = stages[0] if len(stages) == 1 else None
        if not isinstance(outer, ShardingCodec) or array.ndim != 4 or array.shards is None or array.fill_value != 0:
            return None
        chunk = outer.chunk_shape
        whole = chunk[2:] == array.shape[2:] == array.shards[2:]
        plain = [type(codec) for codec in outer.index_codecs] == [BytesCodec, Crc32cCodec]
        if not (whole and plain and _little(outer.index_codecs[0]) and outer.index_location.value == "end"):
            return None
        known = coder(array)
        grid = (array.shards[0] // chunk[0], array.shards[1] // chunk[1])
        pattern = (chunk[2], chunk[3])
        if known is None:
            return None
        return cls((chunk[0], chunk[1]), grid, pattern, np.dtype(array.dtype), known, EVERY_SHARD in array.attrs)

    @property
    def chunk_shape(self) -> tuple[int, int, int, int]:
        """Shape of an inner chunk (y, x, ky, kx)."""
        return (*self.chunk_yx, *self.pattern)

    def encode(self, frames: np.ndarray) -> bytes | None:
        """Return one chunk encoded, filled up with zeros where it is cut by the end of the scan; ``None`` for zeros."""
        if frames.shape != self.chunk_shape:
            whole = np.zeros(self.chunk_shape, self.dtype)
            whole[: frames.shape[0], : frames.shape[1]] = frames
            frames = whole
        frames = np.ascontiguousarray(frames)
        if not _any(frames):
            return None
        encoded = self.coder.encode(frames)
        return b"".join((encoded, _checksum(encoded))) if self.coder.checked else encoded

    def decode(self, encoded: bytes) -> np.ndarray:
        """Return the frames of one chunk.

        Raises
        ------
        StoreError, RuntimeError, ValueError
            If the bytes are damaged.
        """
        if self.coder.checked:
            encoded, found = encoded[:-_CHECKSUM_BYTES], encoded[-_CHECKSUM_BYTES:]
            if _checksum(encoded) != found:
                raise StoreError("it does not agree with its checksum")
        frames = np.empty(self.chunk_shape, self.dtype)
        self.coder.decode(encoded, frames)
        return frames


@dataclass
class ShardBuilder:
    """A shard that is put together: chunks are compressed as they come, in any order."""

    codec: ShardCodec
    chunks: dict[tuple[int, int], bytes] = field(default_factory=dict)

    def add(self, y: int, x: int, frames: np.ndarray) -> None:
        """Add a rectangle of whole chunks, cut at most by the end of the scan, at (y, x) within the shard."""
        height, width = self.codec.chunk_yx
        for row, column in itertools.product(range(0, frames.shape[0], height), range(0, frames.shape[1], width)):
            encoded = self.codec.encode(frames[row : row + height, column : column + width])
            if encoded is not None:
                self.chunks[((y + row) // height, (x + column) // width)] = encoded

    def buffers(self) -> list[bytes]:
        """Return what the file of the shard holds, in pieces; nothing for a shard of zeros that has no file."""
        if not self.chunks and not self.codec.every_shard:
            return []
        index = np.full((*self.codec.grid_yx, 2), _ABSENT, "<u8")
        parts, offset = [], 0
        for place in sorted(self.chunks):
            parts.append(self.chunks[place])
            index[place] = (offset, len(parts[-1]))
            offset += len(parts[-1])
        table = index.tobytes()
        return [*parts, table, _checksum(table)]


def read_pieces(
    codec: ShardCodec, file: Path, rows: int, columns: int, wanted: np.ndarray | None = None
) -> Iterator[Piece]:
    """Yield the chunks of the shard in ``file`` row by row, cut to the ``rows`` and ``columns`` that are in the scan.

    Parameters
    ----------
    wanted
        (row, column) bool; chunks without a position that is wanted are passed over. All unless given.

    Raises
    ------
    StoreError
        If the file is damaged.
    """
    height, width = codec.chunk_yx
    grid = itertools.product(range(math.ceil(rows / height)), range(math.ceil(columns / width)))
    places = [
        (row, column)
        for row, column in grid
        if wanted is None or wanted[row * height : (row + 1) * height, column * width : (column + 1) * width].any()
    ]
    with ExitStack() as opened:
        try:
            size, read = opened.enter_context(reader(file, whole=wanted is None))
        except FileNotFoundError:
            if codec.every_shard:
                raise _damaged(file, "it is gone") from None
            # A shard of zeros.
            for row, column in places:
                shape = (min(height, rows - row * height), min(width, columns - column * width), *codec.pattern)
                yield row * height, column * width, np.zeros(shape, codec.dtype)
            return
        index = _read_index(codec, file, size, read)
        for row, column in places:
            frames = _read_chunk(codec, file, read, *map(int, index[row, column]))
            yield row * height, column * width, frames[: rows - row * height, : columns - column * width]


def build(codec: ShardCodec, pieces: Iterable[Piece]) -> list[bytes]:
    """Return what the file of the shard of ``pieces`` holds; their places are those within the shard."""
    builder = ShardBuilder(codec)
    for y, x, frames in pieces:
        builder.add(y, x, frames)
    return builder.buffers()


def _checksum(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(_CHECKSUM_BYTES, "little")


def _read_index(codec: ShardCodec, file: Path, end: int, read: Read) -> np.ndarray:
    size = 16 * math.prod(codec.grid_yx)
    found = read(max(0, end - size - _CHECKSUM_BYTES), min(end, size + _CHECKSUM_BYTES))
    if len(found) != size + _CHECKSUM_BYTES or _checksum(found[:size]) != found[size:]:
        raise _damaged(file, "its index does not agree with its checksum")
    return np.frombuffer(found, "<u8", 2 * math.prod(codec.grid_yx)).reshape(*codec.grid_yx, 2)


def _read_chunk(codec: ShardCodec, file: Path, read: Read, offset: int, length: int) -> np.ndarray:
    if offset == _ABSENT:
        return np.zeros(codec.chunk_shape, codec.dtype)
    encoded = read(offset, length)
    if len(encoded) != length:
        raise _damaged(file, f"it ends inside the chunk at byte {offset}")
    try:
        return codec.decode(encoded)
    except (RuntimeError, ValueError, StoreError) as error:
        raise _damaged(file, f"the chunk at byte {offset} cannot be expanded: {error}") from error


def _little(codec: Any) -> bool:
    """Whether numbers lie in the file as they lie in memory."""
    order = codec.endian.value if codec.endian is not None else sys.byteorder
    return order == sys.byteorder == "little"


def _damaged(file: Path, what: str) -> StoreError:
    return StoreError(f"{file}: is damaged, {what}; remove the tilt and ingest it again")


def _any(frames: np.ndarray) -> bool:
    """Whether a bit of ``frames`` is set; -0.0 is no zero that may be left out."""
    words = frames.reshape(-1).view(np.uint8)
    step = 1 << 16
    return any(words[start : start + step].any() for start in range(0, words.size, step))
