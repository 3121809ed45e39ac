"""Every kind of file gives the same frames in canonical order; a bad one gives one clear message."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stemtomo.errors import AcquisitionError, FormatError
from stemtomo.io.archive import StreamedMember
from stemtomo.io.layout import check_values
from stemtomo.io.raw import ArrayFile
from stemtomo.io.sources import FrameSource, check_complete, open_frames
from tests.io.cases import counts

SHAPE = (3, 5, 7, 4, 6)
CANONICAL = ("tilt", "y", "x", "ky", "kx")
ORDERS = [CANONICAL, ("tilt", "x", "y", "kx", "ky"), ("ky", "kx", "y", "x", "tilt"), ("y", "tilt", "kx", "x", "ky")]


def in_order(frames: np.ndarray, axes: tuple[str, ...]) -> np.ndarray:
    return np.ascontiguousarray(frames.transpose([CANONICAL.index(name) for name in axes]))


def as_npy(path: Path, array: np.ndarray, axes: tuple[str, ...]) -> FrameSource:
    np.save(path / "f.npy", array)
    return open_frames(path / "f.npy", axes=axes)


def as_fortran_npy(path: Path, array: np.ndarray, axes: tuple[str, ...]) -> FrameSource:
    np.save(path / "f.npy", np.asfortranarray(array))
    return open_frames(path / "f.npy", axes=axes)


def as_raw(path: Path, array: np.ndarray, axes: tuple[str, ...]) -> FrameSource:
    (path / "f.bin").write_bytes(b"header." + array.astype(">u2").tobytes())
    return open_frames(path / "f.bin", axes=axes, dtype=">u2", shape=array.shape, offset_bytes=7)


def as_stored_npz(path: Path, array: np.ndarray, axes: tuple[str, ...]) -> FrameSource:
    np.savez(path / "f.npz", angles=np.zeros(3), data=array, after=np.ones(9))
    return open_frames(path / "f.npz", array="data", axes=axes)


def as_compressed_npz(path: Path, array: np.ndarray, axes: tuple[str, ...]) -> FrameSource:
    np.savez_compressed(path / "f.npz", angles=np.zeros(3), data=array.astype(">u2"))
    return open_frames(path / "f.npz", array="data", axes=axes)


WRITERS = [as_npy, as_fortran_npy, as_raw, as_stored_npz, as_compressed_npz]


@pytest.mark.parametrize("axes", ORDERS, ids="-".join)
@pytest.mark.parametrize("write", WRITERS)
def test_axes_in_any_order_come_in_canonical_order(write: Callable, axes: tuple[str, ...], tmp_path: Path) -> None:
    frames = counts(SHAPE)
    source = pickle.loads(pickle.dumps(write(tmp_path, in_order(frames, axes), axes)))
    assert isinstance(source, FrameSource)
    assert (source.shape, source.dtype, source.n_expected) == (SHAPE, np.dtype("=u2"), 3 * 5 * 7)
    assert source.dtype.isnative
    check_complete(source)
    for tilt, y0, y1, x0, x1 in ((0, 0, 5, 0, 7), (2, 1, 4, 2, 5), (1, 4, 5, 6, 7)):
        block = source.read(tilt, y0, y1, x0, x1)
        assert block.dtype == source.dtype
        np.testing.assert_array_equal(block, frames[tilt, y0:y1, x0:x1])
    np.testing.assert_array_equal(source.read(1, 2, 4), frames[1, 2:4])


@pytest.mark.parametrize("axes", ORDERS, ids="-".join)
@pytest.mark.parametrize("start", [(0, 0), (1, 2), (2, 4)])
def test_a_stream_gives_every_block_from_its_start_once_and_in_order(
    axes: tuple[str, ...], start: tuple[int, int], tmp_path: Path
) -> None:
    frames = counts(SHAPE)
    source = as_compressed_npz(tmp_path, in_order(frames, axes), axes)
    assert isinstance(source, StreamedMember)
    seen = []
    for tilt, y0, block in source.blocks(2, start):
        np.testing.assert_array_equal(block, frames[tilt, y0 : y0 + 2])
        seen.append((tilt, y0))
    assert seen == [(tilt, y0) for tilt in range(3) for y0 in (0, 2, 4) if (tilt, y0) >= start]


def test_long_runs_are_read_without_mapping_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = counts((2, 6, 9, 32, 48))
    source = as_raw(tmp_path, frames, CANONICAL)
    monkeypatch.delattr(np, "memmap")
    np.testing.assert_array_equal(source.read(1, 2, 5, 3, 9), frames[1, 2:5, 3:9])


def test_uncompressed_members_of_an_archive_are_read_in_place(tmp_path: Path) -> None:
    assert isinstance(as_stored_npz(tmp_path, counts(SHAPE), CANONICAL), ArrayFile)


@pytest.mark.parametrize("axes", [("position", "ky", "kx"), ("kx", "ky", "position")])
def test_one_axis_of_positions_becomes_the_scan_row_by_row(axes: tuple[str, ...], tmp_path: Path) -> None:
    frames = counts((5 * 7, 4, 6))
    array = frames if axes[0] == "position" else frames.transpose(2, 1, 0)
    np.save(tmp_path / "f.npy", np.ascontiguousarray(array))
    source = open_frames(tmp_path / "f.npy", axes=axes, scan_shape=(5, 7))
    assert source.shape == (1, 5, 7, 4, 6)
    np.testing.assert_array_equal(source.read(0, 0, 5), frames.reshape(5, 7, 4, 6))


def test_positions_of_a_fortran_ordered_series(tmp_path: Path) -> None:
    frames = counts((2, 35, 4, 6))
    np.save(tmp_path / "f.npy", np.asfortranarray(frames))
    source = open_frames(tmp_path / "f.npy", axes=("tilt", "position", "ky", "kx"), scan_shape=(5, 7))
    np.testing.assert_array_equal(source.read(1, 1, 3), frames[1].reshape(5, 7, 4, 6)[1:3])


def test_the_only_member_needs_no_name(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "f.npz", anything=counts(SHAPE))
    assert open_frames(tmp_path / "f.npz").shape == SHAPE


def test_identity_says_how_a_file_is_understood(tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", counts((2, 3, 3, 4, 4)))
    first = open_frames(tmp_path / "f.npy").identity()
    assert first == open_frames(tmp_path / "f.npy").identity()
    assert first != open_frames(tmp_path / "f.npy", axes=("tilt", "x", "y", "ky", "kx")).identity()


# -- bad input: what, where, expected and found, what to do --------------------------------------------------------


def refuse(error: type[Exception], message: str, path: Path, **options: object) -> None:
    with pytest.raises(error, match=message) as raised:
        check_complete(open_frames(path, **options))
    assert path.name in str(raised.value)


def test_a_missing_file_a_folder_and_an_unknown_format(tmp_path: Path) -> None:
    refuse(FormatError, "no such file", tmp_path / "f.npz")
    refuse(FormatError, "is a folder", tmp_path)
    (tmp_path / "f.xyz").write_bytes(b"1234")
    refuse(FormatError, r"'\.xyz' is not known; .* dtype and shape", tmp_path / "f.xyz")


def test_a_missing_member_lists_those_present(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", angles=np.zeros(3), data=counts(SHAPE))
    refuse(FormatError, "there is no array 'dat'; it holds angles, data", tmp_path / "f.npz", array="dat")
    refuse(FormatError, "no array was named; it holds angles, data", tmp_path / "f.npz")
    refuse(
        FormatError,
        r"angles\]: the array has 1 axes, shape \[3\], but 5 were named",
        tmp_path / "f.npz",
        array="angles",
    )


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_options_of_another_format_are_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"f.{suffix}"
    (np.save if suffix == "npy" else np.savez)(path, counts(SHAPE))
    refuse(FormatError, "are for raw binary", path, dtype="<u2")
    np.save(tmp_path / "g.npy", counts(SHAPE))
    refuse(FormatError, "holds one array without a name", tmp_path / "g.npy", array="data")


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (("tilt", "y", "x", "k"), "are not tilt"),
        (("tilt", "y", "y", "ky", "kx"), "each once"),
        (("tilt", "position", "x", "ky", "kx"), "are not tilt"),
        (("y", "x", "ky", "kx"), "5 axes, shape .*, but 4 were named"),
    ],
)
def test_wrong_axes(axes: tuple[str, ...], message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", counts(SHAPE))
    refuse(FormatError, message, tmp_path / "f.npy", axes=axes)


@pytest.mark.parametrize("dtype", ["c8", "?", "O", "U3", "i4,f4"])
@pytest.mark.parametrize("compressed", [True, False])
def test_a_dtype_that_frames_cannot_have(dtype: str, compressed: bool, tmp_path: Path) -> None:
    array = np.zeros((1, 2, 2, 2, 2), dtype)
    (np.savez_compressed if compressed else np.savez)(tmp_path / "f.npz", data=array)
    refuse(FormatError, "has dtype .* frames are whole or real numbers", tmp_path / "f.npz", array="data")


def test_a_raw_dtype_that_is_unknown_or_not_a_number(tmp_path: Path) -> None:
    (tmp_path / "f.raw").write_bytes(bytes(32))
    refuse(FormatError, "dtype 'u3' is not known", tmp_path / "f.raw", dtype="u3", shape=(1, 2, 2, 2, 2))
    refuse(FormatError, "has dtype complex64", tmp_path / "f.raw", dtype="c8", shape=(1, 1, 1, 2, 2))


def test_a_scan_that_does_not_match_the_frames(tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", counts((37, 4, 6)))
    axes = ("position", "ky", "kx")
    message = r"scan of 5 x 7 \(y, x\) promises 35 frames per tilt, the file holds 37, 2 too many"
    refuse(AcquisitionError, message, tmp_path / "f.npy", axes=axes, scan_shape=(5, 7))
    refuse(AcquisitionError, "holds 37, 3 too few", tmp_path / "f.npy", axes=axes, scan_shape=(5, 8))
    refuse(FormatError, "one axis of 37 positions; give the shape of the scan", tmp_path / "f.npy", axes=axes)
    np.save(tmp_path / "g.npy", counts(SHAPE))
    refuse(AcquisitionError, r"the scan is 7 x 5 .* holds 5 x 7", tmp_path / "g.npy", scan_shape=(7, 5))


@pytest.mark.parametrize("write", [as_npy, as_raw])
def test_a_truncated_or_extended_file(write: Callable, tmp_path: Path) -> None:
    source = write(tmp_path, counts(SHAPE), CANONICAL)
    path, size = source.path, source.path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 4 * 48 - 1)
    assert source.ready() == 105 - 5
    with pytest.raises(AcquisitionError, match=r"ends inside frame 100 \(of 105\): 5 frames are missing.* to keep 100"):
        check_complete(source)
    with pytest.raises(FormatError, match=rf"is truncated: {size - 193} bytes, {size} expected"):
        source.read(2, 0, 5)
    with path.open("r+b") as file:
        file.truncate(size + 2 * 48)
    with pytest.raises(AcquisitionError, match="longer than its 105 frames, 2 frames too many"):
        check_complete(source)
    with path.open("r+b") as file:
        file.truncate(size + 3)
    with pytest.raises(AcquisitionError, match="longer than its 105 frames"):
        check_complete(source)


def test_a_truncated_or_foreign_archive(tmp_path: Path) -> None:
    source = as_compressed_npz(tmp_path, counts(SHAPE), CANONICAL)
    data = source.path.read_bytes()
    source.path.write_bytes(data[: len(data) // 2])
    refuse(FormatError, "cannot be read as an .npz archive .* is cut off", source.path, array="data")
    source.path.write_bytes(b"")
    refuse(FormatError, "cannot be read as an .npz archive .* is cut off", source.path, array="data")
    with zipfile.ZipFile(source.path, "w") as archive:
        archive.writestr("data.npy", b"no numpy header")
    refuse(FormatError, "does not begin like one", source.path, array="data")
    (tmp_path / "f.npy").write_bytes(b"\x93NUM")
    refuse(FormatError, "does not begin like one", tmp_path / "f.npy")


def test_a_member_shorter_than_its_header_says(tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", counts(SHAPE))
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        with zipfile.ZipFile(tmp_path / "f.npz", "w", method) as archive:
            archive.writestr("data.npy", (tmp_path / "f.npy").read_bytes()[:-10])
        refuse(FormatError, "the member has 5158 bytes, its header .* promises 5168", tmp_path / "f.npz", array="data")


def test_a_damaged_member_is_found_before_its_last_block_is_given(tmp_path: Path) -> None:
    source = as_compressed_npz(tmp_path, np.zeros(SHAPE, "u2"), CANONICAL)
    with zipfile.ZipFile(source.path) as archive:
        info = archive.getinfo("data.npy")
    data = bytearray(source.path.read_bytes())
    at = data.index(info.CRC.to_bytes(4, "little"), info.header_offset + 30)  # the sum in the directory
    data[at] ^= 1
    source.path.write_bytes(data)
    blocks = source.blocks(5)
    assert [next(blocks)[:2] for _ in range(2)] == [(0, 0), (1, 0)]
    with pytest.raises(FormatError, match=re.escape("f.npz[data]: cannot be read as a compressed array (Bad CRC-32")):
        next(blocks)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_counted_and_placed(bad: float) -> None:
    block = np.zeros((4, 5, 3, 3), "f4")
    block[1, 2, 0, :2] = bad
    block[3, 3, 1, 1] = bad
    message = r"3 non-finite values in 2 of the 20 patterns at tilt 6, y 8 to 11, x 16 to 20, .* at y 9, x 18; repair"
    with pytest.raises(FormatError, match=message):
        check_values(block, "f.npy", 6, 8, 16)


def test_negative_counts_are_refused_and_negative_real_numbers_are_not() -> None:
    block = np.zeros((2, 2, 3, 3), "i4")
    check_values(block, "f.npy", 0, 0, 0)
    check_values(block.astype("f4") - 1, "f.npy", 0, 0, 0)
    check_values(np.full((2, 2, 3, 3), 6e4, "f2"), "f.npy", 0, 0, 0)  # the sum is beyond float16
    block[0, 1, 2, 2] = -1
    with pytest.raises(FormatError, match=r"1 negative counts in 1 of the 4 patterns .* y 0, x 1; check the dtype"):
        check_values(block, "f.npy", 0, 0, 0)
