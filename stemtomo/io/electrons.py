"""The Zarr codec ``stemtomo.electrons``: chunks of whole counts, each in the form that is smallest for it.

Chosen for every chunk by its mean count: a list of events (up to a quarter of an electron per pixel), two bits per
pixel (up to 2), both behind zstd, or the plain array behind bitshuffle and lz4. The numbers behind the choice are in
``docs/performance.md``. A chunk is one byte that names the form, and its data; ``docs/store.md`` says it bit by bit.
"""

from __future__ import annotations

import asyncio
import struct
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from numcodecs.blosc import Blosc
from numcodecs.zstd import Zstd
from zarr.abc.codec import ArrayBytesCodec
from zarr.registry import register_codec

from stemtomo.errors import StoreError
from stemtomo.kernels.electrons import PER_BYTE, add_events, gap_list, pack, total, unpack

NAME = "stemtomo.electrons"
_DENSE, _EVENTS, _PACKED, _ZEROS = 0, 1, 2, 3
_EVENTS_BELOW = 0.25
_PACKED_BELOW = 2.0
_MOST_RARE = 0.25
_LENGTH = struct.Struct("<I")
_BLOSC_PLAIN_SIZE_AT, _BLOSC_SIZE_AT = 4, 12
_ZSTD = Zstd(level=1)


def suits(dtype: np.dtype) -> bool:
    """Whether chunks of ``dtype`` can be encoded: unsigned whole numbers of 1, 2 or 4 bytes."""
    return dtype.kind == "u" and dtype.itemsize <= 4


def encode_counts(chunk: np.ndarray) -> bytes:
    """Return the bytes of ``chunk``, unsigned whole numbers of any shape, in C order."""
    counts = np.ascontiguousarray(chunk, chunk.dtype.newbyteorder("=")).reshape(-1)
    if total(counts[: counts.size // 8]) > _PACKED_BELOW * counts.size:  # dense whatever the rest holds
        return _as_dense(counts)
    electrons = total(counts)
    if electrons == 0:
        return bytes([_ZEROS])
    if electrons <= _EVENTS_BELOW * counts.size:
        return bytes([_EVENTS]) + bytes(_ZSTD.encode(gap_list(counts, electrons)))
    if electrons <= _PACKED_BELOW * counts.size and counts.size % PER_BYTE == 0:
        parts = pack(counts, int(_MOST_RARE * counts.size))
        if parts is not None:
            packed = bytes(_ZSTD.encode(parts[0]))
            rare = bytes(_ZSTD.encode(_little(parts[1]).view(np.uint8))) if parts[1].size else b""
            return bytes([_PACKED]) + _LENGTH.pack(len(packed)) + packed + rare
    return _as_dense(counts)


def decode_counts(data: Any, out: np.ndarray) -> None:
    """Fill the contiguous array ``out`` with the chunk of ``data`` (bytes).

    Raises
    ------
    StoreError
        If the data are damaged.
    """
    view = memoryview(data)
    counts = out.reshape(-1)
    try:
        whole = _decode(view[0], view[1:], counts)
    except (RuntimeError, ValueError, IndexError, struct.error) as error:
        raise StoreError(f"a chunk of frames cannot be decoded ({error}); the file of its shard is damaged") from error
    if not whole:
        raise StoreError("a chunk of frames does not fit its shape; the file of its shard is damaged")


def _decode(form: int, data: memoryview, counts: np.ndarray) -> bool:
    if form == _EVENTS:
        counts[...] = 0
        return add_events(_bytes(_ZSTD.decode(data)), counts) < counts.size
    if form == _PACKED:
        (length,) = _LENGTH.unpack_from(data)
        stop = _LENGTH.size + length
        packed = _bytes(_ZSTD.decode(data[_LENGTH.size : stop]))
        rare = np.empty(0, counts.dtype)
        if len(data) > stop:
            rare = _bytes(_ZSTD.decode(data[stop:])).view(counts.dtype.newbyteorder("<")).astype(counts.dtype)
        return packed.size * PER_BYTE == counts.size and unpack(packed, rare, counts) == rare.size
    if form == _DENSE and len(data) == _LENGTH.unpack_from(data, _BLOSC_SIZE_AT)[0]:
        if _LENGTH.unpack_from(data, _BLOSC_PLAIN_SIZE_AT)[0] != counts.nbytes:
            return False
        _dense(counts.dtype).decode(data, counts.view(np.uint8))
        if sys.byteorder == "big":
            counts.byteswap(inplace=True)
        return True
    if form == _ZEROS:
        counts[...] = 0
    return form == _ZEROS and not len(data)


def _bytes(data: Any) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def _as_dense(counts: np.ndarray) -> bytes:
    return b"".join((bytes([_DENSE]), _dense(counts.dtype).encode(_little(counts))))


def _little(counts: np.ndarray) -> np.ndarray:
    return counts.astype(counts.dtype.newbyteorder("<"), copy=False)


def _dense(dtype: np.dtype) -> Blosc:
    return Blosc("lz4", 5, Blosc.BITSHUFFLE, typesize=dtype.itemsize)


@dataclass(frozen=True)
class ElectronCodec(ArrayBytesCodec):
    """Zarr's face of :func:`encode_counts` and :func:`decode_counts`."""

    is_fixed_size = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ElectronCodec:
        """Make the codec of a ``zarr.json``."""
        return cls()

    def to_dict(self) -> dict[str, Any]:
        """Return the codec as it stands in a ``zarr.json``."""
        return {"name": NAME, "configuration": {}}

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: Any) -> int:
        """Refuse: the size of an encoded chunk depends on its electrons."""
        raise ValueError("the size of a chunk of electrons is not known before it is encoded")

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        return await asyncio.to_thread(self._decode_now, chunk_bytes, chunk_spec)

    async def _encode_single(self, chunk_array: Any, chunk_spec: Any) -> Any:
        encoded = await asyncio.to_thread(encode_counts, chunk_array.as_numpy_array())
        return chunk_spec.prototype.buffer.from_bytes(encoded)

    def _decode_now(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        counts = np.empty(chunk_spec.shape, chunk_spec.dtype.to_native_dtype().newbyteorder("="))
        decode_counts(chunk_bytes.to_bytes(), counts)
        return chunk_spec.prototype.nd_buffer.from_ndarray_like(counts)


register_codec(NAME, ElectronCodec)
