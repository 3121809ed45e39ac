"""Shards of Zarr v3 as files: all chunks of one shard encoded into one buffer, and a part of one read and decoded.

The format is that of the codec ``sharding_indexed`` with its index at the end (chunks, then offset and length of each,
uint64, then CRC-32C). It is written here because going through Zarr costs several times what the compressor does.
"""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from google_crc32c import value as crc32c
from numcodecs.blosc import Blosc

from stemtomo.errors import StoreError
from stemtomo.io.durable import PARTIAL_SUFFIX
from stemtomo.io.electrons import ElectronCodec, decode_counts, encode_counts

_EMPTY = np.iinfo(np.uint64).max


class Coder(NamedTuple):
    """How chunks of an array become bytes, and bytes fill a chunk."""

    encode: Callable[[np.ndarray], bytes]
    decode: Callable[[Any, np.ndarray], None]


def coder(array: zarr.Array) -> Coder | None:
    """Return how the chunks of ``array`` are coded; ``None`` if it is in a way that only Zarr knows."""
    (sharding,) = array.metadata.codecs
    codecs = [codec.to_dict() for codec in sharding.codecs]
    if [codec["name"] for codec in codecs] == [ElectronCodec().to_dict()["name"]]:
        return Coder(encode_counts, decode_counts)
    if [codec["name"] for codec in codecs] != ["bytes", "blosc"] or array.dtype.newbyteorder("<") != array.dtype:
        return None
    told = codecs[1]["configuration"]
    shuffle = {"noshuffle": Blosc.NOSHUFFLE, "shuffle": Blosc.SHUFFLE, "bitshuffle": Blosc.BITSHUFFLE}
    blosc = Blosc(told["cname"], told["clevel"], shuffle[told["shuffle"]], told["blocksize"], told["typesize"])
    return Coder(lambda chunk: bytes(blosc.encode(chunk)), lambda data, out: blosc.decode(data, out))


def encode_shard(block: np.ndarray, shard: tuple[int, ...], chunk: tuple[int, ...], code: Coder) -> bytes | None:
    """Return the file of the shard of frames ``block`` (y, x, ky, kx), cut at the end of the scan; ``None`` for zeros.

    Chunks follow one another row by row; those of zeros are left out.
    """
    grid = (shard[0] // chunk[0], shard[1] // chunk[1])
    index = np.full((*grid, 2), _EMPTY, "<u8")
    parts: list[bytes] = []
    offset = 0
    buffer = np.empty(chunk, block.dtype)
    for cy, cx in itertools.product(*map(range, grid)):
        part = block[cy * chunk[0] : (cy + 1) * chunk[0], cx * chunk[1] : (cx + 1) * chunk[1]]
        if part.shape != chunk:
            buffer[...] = 0
        buffer[: part.shape[0], : part.shape[1]] = part
        if not buffer.any():
            continue
        data = code.encode(buffer)
        index[cy, cx] = offset, len(data)
        parts.append(data)
        offset += len(data)
    if not parts:
        return None
    tail = index.tobytes()
    return b"".join([*parts, tail, crc32c(tail).to_bytes(4, "little")])


def write_file(file: Path, data: bytes) -> None:
    """Write ``data`` as ``file`` in one step, on the disk when it returns; the folder is for the caller to sync."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_shard(
    file: Path,
    shard: tuple[int, ...],
    chunk: tuple[int, ...],
    code: Coder,
    region: tuple[int, int, int, int],
    out: np.ndarray,
) -> None:
    """Fill ``out`` (y, x, ky, kx) with the positions ``region`` (y0, y1, x0, x1), counted inside the shard of ``file``.

    Raises
    ------
    StoreError
        If the file is damaged.
    """
    y0, y1, x0, x1 = region
    grid = (shard[0] // chunk[0], shard[1] // chunk[1])
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except FileNotFoundError:  # a shard of zeros
        out[...] = 0
        return
    try:
        index = _read_index(descriptor, file, grid)
        buffer = np.empty(chunk, out.dtype)
        for cy, cx in itertools.product(
            range(y0 // chunk[0], -(-y1 // chunk[0])), range(x0 // chunk[1], -(-x1 // chunk[1]))
        ):
            top, left = cy * chunk[0], cx * chunk[1]
            rows = slice(max(y0, top) - top, min(y1, top + chunk[0]) - top)
            columns = slice(max(x0, left) - left, min(x1, left + chunk[1]) - left)
            target = out[
                top + rows.start - y0 : top + rows.stop - y0, left + columns.start - x0 : left + columns.stop - x0
            ]
            offset, length = (int(value) for value in index[cy, cx])
            if offset == _EMPTY:
                target[...] = 0
                continue
            data = os.pread(descriptor, length, offset)
            if len(data) != length:
                raise StoreError(f"{file}: is shorter than its index says; it is damaged, remove it and ingest again")
            whole = target.shape == chunk and target.flags.c_contiguous
            code.decode(data, target if whole else buffer)
            if not whole:
                target[...] = buffer[rows, columns]
    finally:
        os.close(descriptor)


def _read_index(descriptor: int, file: Path, grid: tuple[int, int]) -> np.ndarray:
    size = 16 * grid[0] * grid[1]
    end = os.fstat(descriptor).st_size
    data = os.pread(descriptor, size + 4, end - size - 4) if end >= size + 4 else b""
    if len(data) != size + 4 or crc32c(data[:size]) != int.from_bytes(data[size:], "little"):
        raise StoreError(f"{file}: its index is damaged (CRC-32C); remove the file and ingest again")
    return np.frombuffer(data[:size], "<u8").reshape(*grid, 2)
