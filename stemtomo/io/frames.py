"""Frames of one tilt: a sharded Zarr array, written one whole shard at a time, with a record of finished shards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from stemtomo.errors import StoreError
from stemtomo.io.durable import replace_bytes, storage_errors, sync, sync_up
from stemtomo.io.electrons import ElectronCodec, suits
from stemtomo.io.object_store import zarr_store
from stemtomo.io.schema import CHUNK_POSITIONS, FRAME_DIMS, frame_chunks, frame_shards, frame_units
from stemtomo.io.shards import EVERY_SHARD, Piece, ShardCodec, build, read_pieces
from stemtomo.io.untrusted import DAMAGED, reading

FRAMES = "frames"
PROGRESS = "progress"
"""Attribute of an unfinished tilt: number of shards, and runs [start, stop) of those on the disk."""

NOTED = "noted"
"""Attribute of a tilt: what was counted of its frames while they were copied (saturated, dead, empty ...)."""

FrameCodec = Literal["auto", "lz4", "zstd"]
"""How chunks are coded: "auto" by their density where they are counts, else behind bitshuffle by the one named."""

MISSING = "missing"
"""Attribute of a tilt: runs [start, stop) of scan positions, counted row by row, whose frame never came."""


def create(
    folder: Path, shape: tuple[int, int, int, int], dtype: np.dtype, shard_positions: int, codec: FrameCodec = "auto"
) -> zarr.Array:
    """Make the empty array ``frames`` of ``shape`` (y, x, ky, kx) in ``folder``; no data are written."""
    if shard_positions < CHUNK_POSITIONS or shard_positions % CHUNK_POSITIONS:
        raise StoreError(f"a shard of {shard_positions} positions is not a multiple of {CHUNK_POSITIONS}")
    return zarr.create_array(
        store=zarr_store(folder / FRAMES),
        shape=shape,
        dtype=dtype.newbyteorder("="),
        chunks=frame_chunks(shape),
        shards=frame_shards(shape, shard_positions),
        **_codecs(dtype, codec),
        fill_value=0,
        dimension_names=FRAME_DIMS,
        attributes={"units": frame_units(dtype), "long_name": "diffraction patterns", EVERY_SHARD: True},
        zarr_format=3,
    )


def _codecs(dtype: np.dtype, codec: FrameCodec) -> dict[str, Any]:
    """Return how chunks of ``dtype`` are coded; "auto": counts by their density, other numbers behind lz4.

    A checksum follows each chunk: Blosc has none, and expands what a flipped bit makes of it to other numbers.
    """
    if codec == "auto" and suits(dtype):
        return {"serializer": ElectronCodec(), "compressors": Crc32cCodec()}
    name, level = ("zstd", 1) if codec == "zstd" else ("lz4", 5)
    return {"compressors": (BloscCodec(cname=name, clevel=level, shuffle="bitshuffle"), Crc32cCodec())}


def open_frames(folder: Path, mode: Literal["r", "r+"] = "r") -> zarr.Array:
    """Open the frames of the tilt in ``folder``."""
    try:
        return zarr.open_array(store=zarr_store(folder / FRAMES), mode=mode, zarr_format=3)
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise StoreError(
            f"{folder}: its frames cannot be opened ({error}); remove this folder and run ingest again"
        ) from error


def shard_shape(array: zarr.Array) -> tuple[int, int]:
    """Positions along y and x of one shard."""
    if array.shards is None:
        raise StoreError(f"{array.store_path}: is not sharded, so stemtomo did not write it; run ingest again")
    return (array.shards[0], array.shards[1])


def shard_grid(array: zarr.Array) -> tuple[int, int]:
    """Number of shards along y and x."""
    edges = shard_shape(array)
    return (math.ceil(array.shape[0] / edges[0]), math.ceil(array.shape[1] / edges[1]))


def shard_count(array: zarr.Array) -> int:
    """Number of shards."""
    return math.prod(shard_grid(array))


def shard_regions(array: zarr.Array) -> Iterator[tuple[int, tuple[int, int, int, int]]]:
    """Yield the number of each shard and its region (y0, y1, x0, x1) in scan positions, row by row."""
    edge_y, edge_x = shard_shape(array)
    rows, columns = shard_grid(array)
    for number in range(rows * columns):
        y0, x0 = (number // columns) * edge_y, (number % columns) * edge_x
        yield number, (y0, min(y0 + edge_y, array.shape[0]), x0, min(x0 + edge_x, array.shape[1]))


def shard_file(array: zarr.Array, folder: Path, y0: int, x0: int) -> Path:
    """File of the shard at scan position (y0, x0)."""
    edge_y, edge_x = shard_shape(array)
    return folder / "c" / str(y0 // edge_y) / str(x0 // edge_x) / "0" / "0"


def write_shard(array: zarr.Array, folder: Path, y0: int, x0: int, pieces: Iterable[Piece]) -> None:
    """Write one whole shard at scan position (y0, x0) and wait until it is on the disk; see ``Store.write_pieces``."""
    height, width = _extent(array, folder, y0, x0)
    inside = _within(array, folder, (y0, y0 + height, x0, x0 + width), pieces)
    file = shard_file(array, folder, y0, x0)
    needed = height * width * math.prod(array.shape[2:]) * array.dtype.itemsize
    codec = ShardCodec.of(array)
    if codec is None:
        _write_by_zarr(array, folder, (y0, y0 + height, x0, x0 + width), inside)
        return
    buffers = build(codec, inside)
    with storage_errors(folder, needed):
        if buffers:
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_bytes(file, buffers)
        else:
            file.unlink(missing_ok=True)
        sync_up(file.parent, folder)


def _write_by_zarr(array: zarr.Array, folder: Path, region: tuple[int, int, int, int], inside: Iterable[Piece]) -> None:
    y0, y1, x0, x1 = region
    file = shard_file(array, folder, y0, x0)
    block = np.zeros((y1 - y0, x1 - x0, *array.shape[2:]), array.dtype)
    for y, x, frames in inside:
        block[y : y + frames.shape[0], x : x + frames.shape[1]] = frames
    with storage_errors(file, block.nbytes):
        # Zarr would read a shard that is there and is cut by the end of the scan, to merge it with the new one.
        file.unlink(missing_ok=True)
        array[y0:y1, x0:x1] = block
        sync(file)  # a shard of zeros has no file
        sync_up(file.parent, folder)


def read_shard(array: zarr.Array, folder: Path, y0: int, x0: int, wanted: np.ndarray | None = None) -> Iterator[Piece]:
    """Yield the frames of the shard at scan position (y0, x0) in pieces, row by row; see ``Store.read_pieces``."""
    height, width = _extent(array, folder, y0, x0)
    codec = ShardCodec.of(array)
    with reading(shard_file(array, folder, y0, x0), "a shard of frames", DAMAGED, (OSError,), StoreError):
        if codec is None:
            for y in range(y0, y0 + height, CHUNK_POSITIONS):
                if wanted is not None and not wanted[y - y0 : y - y0 + CHUNK_POSITIONS].any():
                    continue
                yield y, x0, np.asarray(array[y : min(y + CHUNK_POSITIONS, y0 + height), x0 : x0 + width])
            return
        for y, x, frames in read_pieces(codec, shard_file(array, folder, y0, x0), height, width, wanted):
            yield y0 + y, x0 + x, frames


def read_part(array: zarr.Array, folder: Path, part: tuple[slice | int, ...]) -> np.ndarray:
    """Return a ``part`` of the frames (y, x, ky, kx), or all of them, from the shards that hold it.

    A shard that is gone or damaged is named; Zarr takes the first for zeros.
    """
    chosen = [*part, *[slice(None)] * (4 - len(part))]
    rows, columns = (np.atleast_1d(np.arange(n)[one]) for n, one in zip(array.shape[:2], chosen[:2], strict=True))
    inner = tuple(np.atleast_1d(np.arange(n)[one]) for n, one in zip(array.shape[2:], chosen[2:], strict=True))
    found = np.empty((len(rows), len(columns), *map(len, inner)), array.dtype)
    wanted = np.zeros(array.shape[:2], bool)
    wanted[np.ix_(rows, columns)] = True
    whole = [slice(None) if len(kept) == n else kept for kept, n in zip(inner, array.shape[2:], strict=True)]
    for _, (y0, y1, x0, x1) in shard_regions(array):
        asked = wanted[y0:y1, x0:x1]
        if not asked.any():
            continue
        for y, x, frames in read_shard(array, folder, y0, x0, None if asked.all() else asked):
            down = (rows >= y) & (rows < y + frames.shape[0])
            across = (columns >= x) & (columns < x + frames.shape[1])
            piece = frames[np.ix_(rows[down] - y, columns[across] - x)]
            found[np.ix_(down, across)] = piece[:, :, whole[0]][:, :, :, whole[1]]
    kept = tuple(0 if isinstance(one, (int, np.integer)) else slice(None) for one in chosen)
    return np.asarray(found[kept])


def _extent(array: zarr.Array, folder: Path, y0: int, x0: int) -> tuple[int, int]:
    """Rows and columns of the shard that begins at (y0, x0)."""
    edge_y, edge_x = shard_shape(array)
    height, width = min(edge_y, array.shape[0] - y0), min(edge_x, array.shape[1] - x0)
    if min(height, width) <= 0 or min(y0, x0) < 0 or y0 % edge_y or x0 % edge_x:
        raise _not_whole(array, folder, f"what begins at y {y0}, x {x0}")
    return height, width


def _within(
    array: zarr.Array, folder: Path, region: tuple[int, int, int, int], pieces: Iterable[Piece]
) -> Iterator[Piece]:
    """Yield ``pieces`` with places within the shard of ``region``; check that they fill it, in whole chunks."""
    y0, y1, x0, x1 = region
    seen = np.zeros((y1 - y0, x1 - x0), bool)
    for y, x, frames in pieces:
        if frames.dtype != array.dtype:
            raise StoreError(f"{folder}: the block is {frames.dtype}, the frames are {array.dtype}; convert it first")
        first, last = (y - y0, x - x0), (y - y0 + frames.shape[0], x - x0 + frames.shape[1])
        fits = all(
            0 <= start < stop <= edge and start % chunk == 0 and (stop == edge or stop % chunk == 0)
            for start, stop, edge, chunk in zip(first, last, seen.shape, array.chunks, strict=False)
        )
        if not fits or frames.shape[2:] != array.shape[2:]:
            raise _not_whole(array, folder, f"a block of shape {frames.shape} at y {y}, x {x}")
        seen[first[0] : last[0], first[1] : last[1]] = True
        yield *first, frames
    if not seen.all():
        raise _not_whole(array, folder, f"{int(seen.sum())} of the {seen.size} positions from y {y0}, x {x0} on")


def _not_whole(array: zarr.Array, folder: Path, what: str) -> StoreError:
    edges = shard_shape(array)
    return StoreError(
        f"{folder}: {what} is not one whole shard; shards of {edges[0]} x {edges[1]} positions, in chunks of "
        f"{array.chunks[0]} x {array.chunks[1]}, begin at multiples of that, and are cut only where the scan of "
        f"{array.shape[0]} x {array.shape[1]} ends"
    )


def recorded(attrs: Mapping[str, Any]) -> set[int]:
    """Return the numbers of the finished shards from the attributes of a tilt."""
    return {number for start, stop in attrs.get(PROGRESS, {}).get("done", []) for number in range(start, stop)}


def valid_positions(attrs: Mapping[str, Any], shape_yx: tuple[int, int]) -> np.ndarray:
    """Return the mask (y, x), bool, of the positions with a frame from the attributes of a tilt."""
    valid = np.ones(math.prod(shape_yx), bool)
    for start, stop in attrs.get(MISSING, []):
        valid[start:stop] = False
    return valid.reshape(shape_yx)


def progress_attrs(array: zarr.Array, done: set[int]) -> dict[str, Any]:
    """Return the record of finished shards as attributes of the tilt."""
    runs: list[list[int]] = []
    for number in sorted(done):
        if runs and runs[-1][1] == number:
            runs[-1][1] = number + 1
        else:
            runs.append([number, number + 1])
    return {PROGRESS: {"shards": shard_count(array), "done": runs}}
