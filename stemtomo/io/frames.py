"""Frames of one tilt: a sharded Zarr array, written one whole shard at a time, with a record of finished shards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from zarr.codecs import BloscCodec

from stemtomo.errors import StoreError
from stemtomo.io.durable import storage_errors, sync
from stemtomo.io.electrons import ElectronCodec, suits
from stemtomo.io.schema import CHUNK_POSITIONS, FRAME_DIMS, frame_chunks, frame_shards, frame_units
from stemtomo.io.shards import coder, encode_shard, read_shard, write_file

FRAMES = "frames"
PROGRESS = "progress"
"""Attribute of an unfinished tilt: number of shards, and runs [start, stop) of those on the disk."""

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
        store=str(folder / FRAMES),
        shape=shape,
        dtype=dtype.newbyteorder("="),
        chunks=frame_chunks(shape),
        shards=frame_shards(shape, shard_positions),
        **_codecs(dtype, codec),
        fill_value=0,
        dimension_names=FRAME_DIMS,
        attributes={"units": frame_units(dtype), "long_name": "diffraction patterns"},
        zarr_format=3,
    )


def _codecs(dtype: np.dtype, codec: FrameCodec) -> dict[str, Any]:
    """Return how chunks of ``dtype`` are coded; "auto": counts by their density, other numbers behind lz4."""
    if codec == "auto" and suits(dtype):
        return {"serializer": ElectronCodec(), "compressors": None}
    name, level = ("zstd", 1) if codec == "zstd" else ("lz4", 5)
    return {"compressors": BloscCodec(cname=name, clevel=level, shuffle="bitshuffle")}


def open_frames(folder: Path, mode: Literal["r", "r+"] = "r") -> zarr.Array:
    """Open the frames of the tilt in ``folder``."""
    try:
        return zarr.open_array(store=str(folder / FRAMES), mode=mode, zarr_format=3)
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
    """File of the shard at scan position (y0, x0); a shard of zeros has none."""
    edge_y, edge_x = shard_shape(array)
    return folder / "c" / str(y0 // edge_y) / str(x0 // edge_x) / "0" / "0"


def write_shard(array: zarr.Array, folder: Path, y0: int, x0: int, block: np.ndarray) -> None:
    """Write one whole shard at scan position (y0, x0) and wait until it is on the disk; see ``Store.write_frames``."""
    edge_y, edge_x = shard_shape(array)
    inside = 0 <= y0 < array.shape[0] and 0 <= x0 < array.shape[1]
    expected = (min(edge_y, array.shape[0] - y0), min(edge_x, array.shape[1] - x0), *array.shape[2:])
    if not inside or y0 % edge_y or x0 % edge_x or block.shape != expected:
        raise StoreError(
            f"{folder}: a block of shape {block.shape} at y {y0}, x {x0} is not one whole shard; shards of "
            f"{edge_y} x {edge_x} positions begin at multiples of that, and are cut only where the scan of "
            f"{array.shape[0]} x {array.shape[1]} ends"
        )
    if block.dtype != array.dtype:
        raise StoreError(f"{folder}: the block is {block.dtype}, the frames are {array.dtype}; convert it first")
    file = shard_file(array, folder, y0, x0)
    with storage_errors(folder, block.nbytes):
        code = coder(array)
        if code is None:  # another program's codecs
            # Zarr would read a shard that is there and is cut by the end of the scan, to merge it with the new one.
            file.unlink(missing_ok=True)
            array[y0 : y0 + expected[0], x0 : x0 + expected[1]] = block
            sync(file)
        else:
            data = encode_shard(block, tuple(array.shards or ()), array.chunks, code)
            if data is None:  # a shard of zeros has no file
                file.unlink(missing_ok=True)
            else:
                write_file(file, data)
        sync(file.parent)


def read_frames(array: zarr.Array, folder: Path, region: tuple[int, int, int, int]) -> np.ndarray:
    """Return the frames (y, x, ky, kx) at the positions ``region`` (y0, y1, x0, x1), shard by shard."""
    y0, y1, x0, x1 = region
    code = coder(array)
    if code is None:
        return np.asarray(array[y0:y1, x0:x1])
    edge_y, edge_x = shard_shape(array)
    out = np.empty((y1 - y0, x1 - x0, *array.shape[2:]), array.dtype)
    for top in range(y0 - y0 % edge_y, y1, edge_y):
        for left in range(x0 - x0 % edge_x, x1, edge_x):
            rows = (max(y0, top), min(y1, top + edge_y))
            columns = (max(x0, left), min(x1, left + edge_x))
            inside = (rows[0] - top, rows[1] - top, columns[0] - left, columns[1] - left)
            part = out[rows[0] - y0 : rows[1] - y0, columns[0] - x0 : columns[1] - x0]
            file = shard_file(array, folder, top, left)
            read_shard(file, tuple(array.shards or ()), array.chunks, code, inside, part)
    return out


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
