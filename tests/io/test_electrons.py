"""Every chunk takes the form of its density and comes back, here and through Zarr."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from numcodecs.zstd import Zstd

from stemtomo.errors import StoreError
from stemtomo.io import frames as frame_arrays
from stemtomo.io.electrons import decode_counts, encode_counts

SHAPE = (20, 41, 6, 5)


def poisson(mean: float, dtype: str = "u2", shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(2).poisson(mean, shape).astype(dtype)


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "<u2", ">u2"])
@pytest.mark.parametrize(("mean", "form"), [(0.05, 1), (0.2, 1), (0.5, 2), (1.2, 2), (1.9, 0), (100.0, 0)])
def test_every_chunk_takes_the_form_of_its_density(dtype: str, mean: float, form: int) -> None:
    chunk = poisson(mean, dtype, (8, 8, 16, 16))
    data = encode_counts(chunk)
    assert data[0] == form
    out = np.full(chunk.shape, 7, chunk.dtype.newbyteorder("="))
    decode_counts(data, out)
    np.testing.assert_array_equal(out, chunk)


def test_few_but_bright_pixels_and_odd_numbers_of_pixels() -> None:
    for chunk in (
        np.where(poisson(0.3, "u2", (8, 8, 16, 16)) > 0, 5, 0).astype("u2"),  # packed: too many large counts
        poisson(0.5, "u2", (1, 1, 3, 5)),
        np.full((1, 1, 1, 1), 65535, "u2"),
        np.zeros((1, 2, 3, 1), "u2"),
    ):
        out = np.empty_like(chunk)
        decode_counts(encode_counts(chunk), out)
        np.testing.assert_array_equal(out, chunk)


def test_the_form_on_the_disk_is_the_one_that_is_documented() -> None:
    chunk = np.zeros((1, 1, 20, 20), "u2")
    chunk[0, 0, 0, [3, 5]] = 1, 2
    chunk[0, 0, 19, 19] = 1
    data = encode_counts(chunk)
    assert (data[0], bytes(Zstd().decode(data[1:]))) == (1, bytes([3, 2, 0, 255, 399 - 5 - 255]))
    chunk = np.tile(np.array([0, 1, 2, 0], "u2"), 4).reshape(1, 1, 4, 4)
    chunk[0, 0, 0, 3] = 300
    chunk[0, 0, 3, 3] = 0
    data = encode_counts(np.where(chunk == 300, 6, chunk))
    length = int.from_bytes(data[1:5], "little")
    assert data[0] == 2
    assert bytes(Zstd().decode(data[5 : 5 + length])) == bytes(
        [0b11_10_01_00, 0b00_10_01_00, 0b00_10_01_00, 0b00_10_01_00]
    )
    assert bytes(Zstd().decode(data[5 + length :])) == b"\x06\x00"


@pytest.mark.parametrize("cut", [0, 1, 5, 40, -1])
@pytest.mark.parametrize("mean", [0.1, 0.9, 50])
def test_damaged_chunks_are_named(mean: float, cut: int) -> None:
    chunk = poisson(mean, "u2", (8, 8, 16, 16))
    with pytest.raises(StoreError, match="the file of its shard is damaged"):
        decode_counts(encode_counts(chunk)[:cut], np.empty_like(chunk))


@pytest.mark.parametrize(("dtype", "codec"), [("u1", "auto"), ("u2", "auto"), ("u2", "lz4"), ("u4", "zstd")])
@pytest.mark.parametrize("mean", [0.01, 0.5, 30])
def test_shards_are_zarrs_and_zarrs_are_read(dtype: str, codec: str, mean: float, tmp_path: Path) -> None:
    block = poisson(mean, dtype)
    block[8:16, 32:] = 0  # an empty chunk at the end of the scan
    arrays = []
    for name in ("here", "zarr"):
        frame_arrays.create(tmp_path / name, SHAPE, np.dtype(dtype), 32, codec)
        arrays.append(frame_arrays.open_frames(tmp_path / name, "r+"))
    for x0 in (0, 32):
        frame_arrays.write_shard(arrays[0], tmp_path / "here/frames", 0, x0, [(0, x0, block[:, x0 : x0 + 32])])
    arrays[1][:] = block
    for name in ("here", "zarr"):
        fresh = zarr.open_array(str(tmp_path / name / "frames"), mode="r")
        np.testing.assert_array_equal(fresh[:], block)
        found = np.zeros_like(block)
        for x0 in (0, 32):
            for y, x, piece in frame_arrays.read_shard(fresh, tmp_path / name / "frames", 0, x0):
                found[y : y + piece.shape[0], x : x + piece.shape[1]] = piece
        np.testing.assert_array_equal(found, block)
