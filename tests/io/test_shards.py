"""Shards made here are those of the Zarr v3 specification: Zarr reads ours and we read Zarr's, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from stemtomo.errors import StoreError
from stemtomo.io import frames as module
from stemtomo.io.shards import EVERY_SHARD, ShardCodec
from tests.io.cases import counts

SHAPE = (40, 21, 6, 4)


def made(folder: Path, dtype: str = "u2") -> zarr.Array:
    return module.create(folder, SHAPE, np.dtype(dtype), 16, "lz4")


def made_by_others(folder: Path, dtype: str = "u2") -> zarr.Array:
    """An array of which nobody promises that shards of zeros have files: as other writers, and older stores, leave."""
    array = made(folder, dtype)
    del array.attrs[EVERY_SHARD]
    return array


def in_pieces(frames: np.ndarray, region: tuple[int, int, int, int], step: int = 8):
    y0, y1, x0, x1 = region
    for x in range(x0, x1, step):  # not the order of the file
        for y in range(y0, y1, step):
            yield y, x, frames[y : min(y + step, y1), x : min(x + step, x1)]


def values(dtype: str) -> np.ndarray:
    frames = counts(SHAPE).astype(dtype)
    frames[:16, 16:] = 0  # a shard of zeros
    frames[16:24, :8] = 0  # a chunk of zeros
    if dtype.startswith("f"):
        frames[16, 0, 0, 0] = -0.0
        frames[25, 3, 1, 1] = np.float32(1e-40)
    return frames


@pytest.mark.parametrize("dtype", ["u1", "u2", "i4", "f4", "f8"])
def test_what_is_written_here_zarr_reads_and_the_other_way_round(tmp_path: Path, dtype: str) -> None:
    frames = values(dtype)
    ours, theirs = made(tmp_path / "ours", dtype=dtype), made_by_others(tmp_path / "theirs", dtype=dtype)
    theirs[:] = frames
    for _, region in module.shard_regions(ours):
        module.write_shard(ours, tmp_path / "ours" / "frames", region[0], region[2], in_pieces(frames, region))
    written = np.asarray(ours[:])
    np.testing.assert_array_equal(written.view(np.uint8), frames.view(np.uint8))  # the sign of zero, too
    assert module.shard_file(ours, tmp_path / "ours" / "frames", 0, 16).exists()  # of zeros
    for folder, array in ((tmp_path / "ours", ours), (tmp_path / "theirs", theirs)):
        read = np.full_like(frames, 1)
        for _, (y0, _y1, x0, _x1) in module.shard_regions(array):
            for y, x, piece in module.read_shard(array, folder / "frames", y0, x0):
                read[y : y + piece.shape[0], x : x + piece.shape[1]] = piece
        np.testing.assert_array_equal(read, frames)


def test_chunks_have_the_bytes_that_zarr_gives_them(tmp_path: Path) -> None:
    """Equal up to the order of the chunks in a file, which the specification leaves open."""
    frames = values("u2")
    ours, theirs = made(tmp_path / "ours"), made_by_others(tmp_path / "theirs")
    theirs[:] = frames
    for _, (y0, y1, x0, x1) in module.shard_regions(ours):
        module.write_shard(ours, tmp_path / "ours" / "frames", y0, x0, [(y0, x0, frames[y0:y1, x0:x1])])
        files = [module.shard_file(ours, tmp_path / name / "frames", y0, x0) for name in ("ours", "theirs")]
        assert files[0].exists()
        if files[1].exists():
            assert len(files[0].read_bytes()) == len(files[1].read_bytes())
            assert sorted(_chunks(files[0])) == sorted(_chunks(files[1]))


def _chunks(file: Path) -> list[bytes]:
    data = file.read_bytes()
    index = np.frombuffer(data[-68:-4], "<u8").reshape(-1, 2)
    return [data[int(start) : int(start + size)] for start, size in index if start != 2**64 - 1]


@pytest.mark.parametrize(
    ("codec", "dtype", "mean"),
    [
        ("auto", "u1", 0.05),
        ("auto", "u2", 1.0),
        ("auto", "u2", 30.0),
        ("auto", "f4", 30.0),
        ("lz4", "u2", 30.0),
        ("zstd", "u2", 30.0),
    ],
)
def test_a_flipped_bit_anywhere_in_a_chunk_is_named_and_not_used(
    tmp_path: Path, codec: str, dtype: str, mean: float
) -> None:
    """In all forms of chunks, by both ways of reading."""
    array = module.create(tmp_path, (16, 16, 8, 8), np.dtype(dtype), 16, codec)  # type: ignore[arg-type]
    frames = np.random.default_rng(3).poisson(mean, array.shape).astype(dtype)
    module.write_shard(array, tmp_path / "frames", 0, 0, [(0, 0, frames)])
    file = module.shard_file(array, tmp_path / "frames", 0, 0)
    whole = file.read_bytes()
    second = len(_chunks(file)[0])
    for place in range(second, second + len(_chunks(file)[1]), 37):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        pieces = module.read_shard(array, tmp_path / "frames", 0, 0)
        np.testing.assert_array_equal(next(pieces)[2], frames[:8, :8])  # the one before chunk is whole
        with pytest.raises(StoreError, match=f"c/0/0/0/0: is damaged, the chunk at byte {second} .* checksum"):
            next(pieces)
        with pytest.raises(ValueError, match="checksum"):
            array[:8, 8:]


@pytest.mark.parametrize("codec", ["auto", "lz4", "zstd"])
def test_arrays_from_before_chunks_had_checksums_are_read_and_continued(tmp_path: Path, codec: str) -> None:
    frames = values("u2")
    options = module._codecs(np.dtype("u2"), codec)  # type: ignore[arg-type]
    before = options["compressors"][0] if isinstance(options["compressors"], tuple) else None
    array = zarr.create_array(
        store=str(tmp_path / "frames"), shape=SHAPE, dtype="u2", chunks=(8, 8, 6, 4), shards=(16, 16, 6, 4),
        fill_value=0, **{**options, "compressors": before},
    )  # fmt: skip
    assert not any(isinstance(one, Crc32cCodec) for one in array.metadata.codecs[0].codecs)
    array[:16] = frames[:16]
    for _, region in list(module.shard_regions(array))[2:]:
        module.write_shard(array, tmp_path / "frames", region[0], region[2], in_pieces(frames, region))
    np.testing.assert_array_equal(array[:], frames)
    for y0, x0 in ((0, 0), (16, 16)):
        for y, x, piece in module.read_shard(array, tmp_path / "frames", y0, x0):
            np.testing.assert_array_equal(piece, frames[y : y + piece.shape[0], x : x + piece.shape[1]])


@pytest.mark.parametrize(
    "pieces",
    [
        [(0, 0, (16, 8))],  # half of it
        [(0, 0, (16, 4)), (0, 4, (16, 12))],  # cut through chunks
        [(0, 0, (16, 16)), (16, 0, (8, 16))],  # beyond
        [(0, -8, (16, 24))],
        [],
    ],
)
def test_pieces_that_are_not_one_shard_are_refused(tmp_path: Path, pieces: list) -> None:
    array = made(tmp_path)
    given = [(y, x, np.ones((*shape, 6, 4), "u2")) for y, x, shape in pieces]
    with pytest.raises(StoreError, match="not one whole shard"):
        module.write_shard(array, tmp_path / "frames", 0, 0, given)
    assert not list((tmp_path / "frames").rglob("c/*"))


def test_a_failed_piece_leaves_the_shard_that_was_there(tmp_path: Path) -> None:
    array, frames = made(tmp_path), counts(SHAPE)

    def broken():
        yield 0, 0, frames[:8, :16]
        raise ValueError("the file ended")

    module.write_shard(array, tmp_path / "frames", 0, 0, [(0, 0, frames[:16, :16])])
    with pytest.raises(ValueError, match="the file ended"):
        module.write_shard(array, tmp_path / "frames", 0, 0, broken())
    np.testing.assert_array_equal(array[:16, :16], frames[:16, :16])
    assert not list(tmp_path.rglob("*.partial"))


def test_damage_is_named(tmp_path: Path) -> None:
    array, frames = made(tmp_path), counts(SHAPE)
    module.write_shard(array, tmp_path / "frames", 0, 0, [(0, 0, frames[:16, :16])])
    file = module.shard_file(array, tmp_path / "frames", 0, 0)
    whole = file.read_bytes()
    for data, message in (
        (whole[:-1], "checksum"),
        (whole[:-10] + bytes([whole[-10] ^ 1]) + whole[-9:], "checksum"),
        (b"", "checksum"),
        (bytes(16) + whole[16:], "cannot be expanded"),
    ):
        file.write_bytes(data)
        with pytest.raises(StoreError, match=f"0/0/0/0: is damaged, .*{message}"):
            list(module.read_shard(array, tmp_path / "frames", 0, 0))


@pytest.mark.parametrize("zeros", [False, True])
def test_a_shard_that_is_gone_is_not_taken_for_one_of_zeros(tmp_path: Path, zeros: bool) -> None:
    frames = counts(SHAPE) * (not zeros)
    for array, folder in ((made(tmp_path / "a"), "a"), (made_by_others(tmp_path / "b"), "b")):
        place = tmp_path / folder / "frames"
        for _, (y0, y1, x0, x1) in module.shard_regions(array):
            module.write_shard(array, place, y0, x0, [(y0, x0, frames[y0:y1, x0:x1])])
        np.testing.assert_array_equal(module.read_part(array, place, ()), frames)
        file = module.shard_file(array, place, 16, 0)
        file.unlink(missing_ok=True)
        np.testing.assert_array_equal(module.read_part(array, place, (slice(16),)), frames[:16])
        if folder == "b":
            assert not module.read_part(array, place, (slice(16, 20), 3)).any()
            continue
        with pytest.raises(StoreError, match="c/1/0/0/0: is damaged, it is gone"):
            module.read_part(array, place, (20, 3))


@pytest.mark.parametrize(
    "part",
    [
        (),
        (3,),
        (slice(5, 38), 20),
        (slice(None, None, 7), slice(2, 21, 5), slice(1, 4)),
        (slice(30, 2, -3), slice(None), 2, 1),
        (slice(1), slice(1), slice(None), slice(3)),
    ],
)
def test_parts_are_those_of_an_array_in_memory(tmp_path: Path, part: tuple) -> None:
    frames, array = values("u2"), made(tmp_path)
    for _, (y0, y1, x0, x1) in module.shard_regions(array):
        module.write_shard(array, tmp_path / "frames", y0, x0, [(y0, x0, frames[y0:y1, x0:x1])])
    np.testing.assert_array_equal(module.read_part(array, tmp_path / "frames", part), frames[part])


@pytest.mark.parametrize("compressor", [ZstdCodec(level=1), BloscCodec(cname="zstd", clevel=1, shuffle="shuffle")])
def test_other_codecs_are_written_and_read_too(tmp_path: Path, compressor: object) -> None:
    """Zarr does what is not known here."""
    frames = counts(SHAPE)
    array = zarr.create_array(
        store=str(tmp_path / "frames"),
        shape=SHAPE,
        dtype="u2",
        chunks=(8, 8, 6, 4),
        shards=(16, 16, 6, 4),
        compressors=compressor,
        fill_value=0,
    )
    assert (ShardCodec.of(array) is None) == isinstance(compressor, ZstdCodec)
    module.write_shard(array, tmp_path / "frames", 32, 16, in_pieces(frames, (32, 40, 16, 21)))
    np.testing.assert_array_equal(array[32:, 16:], frames[32:, 16:])
    got = np.concatenate([piece for _, _, piece in module.read_shard(array, tmp_path / "frames", 32, 16)])
    np.testing.assert_array_equal(got, frames[32:, 16:])
