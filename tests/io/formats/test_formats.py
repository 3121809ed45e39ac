"""Every format gives the frames that were written, wherever a block is cut; also through a task's pickle."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr

from stemtomo.io.formats.registry import identify
from stemtomo.io.sources import FrameSource, check_complete, open_frames
from tests.io.formats import files

SCAN = (3, 4)
LARGEST = {1: 1, 6: 63, 12: 4095, 24: 2**24 - 1}
DTYPES = {1: "u1", 6: "u1", 12: "u2", 24: "u4"}


def check(source: FrameSource, frames: np.ndarray) -> None:
    """Compare ``source`` with ``frames`` (y, x, ky, kx) of its only tilt, whole and in blocks."""
    source = pickle.loads(pickle.dumps(source))
    assert isinstance(source, FrameSource)
    assert source.shape == (1, *frames.shape)
    assert source.dtype == frames.dtype
    check_complete(source)
    assert source.ready() == source.n_expected == frames.shape[0] * frames.shape[1]
    height, width = frames.shape[:2]
    blocks = itertools.product(
        itertools.combinations(range(height + 1), 2), itertools.combinations(range(width + 1), 2)
    )
    for (y0, y1), (x0, x1) in blocks:
        block = source.read(0, y0, y1, x0, x1)
        assert block.dtype == source.dtype
        np.testing.assert_array_equal(block, frames[y0:y1, x0:x1])
    assert source.identity() == pickle.loads(pickle.dumps(source)).identity()


@pytest.mark.parametrize("bits", [1, 6, 12, 24])
@pytest.mark.parametrize("raw", [False, True], ids=["cooked", "raw"])
def test_merlin_of_each_depth(bits: int, raw: bool, tmp_path: Path) -> None:
    frames = files.counts((12, 8, 256), LARGEST[bits])
    kind = "R64" if raw else {1: "U08", 6: "U08", 12: "U16", 24: "U32"}[bits]
    files.write_mib(tmp_path / "a.mib", frames, kind, bits)
    check(open_frames(tmp_path / "a.mib", scan_shape=SCAN), frames.astype(DTYPES[bits]).reshape(*SCAN, 8, 256))


@pytest.mark.parametrize("bits", [1, 6, 12])
@pytest.mark.parametrize("raw", [False, True], ids=["cooked", "raw"])
def test_merlin_quads(bits: int, raw: bool, tmp_path: Path) -> None:
    frames = files.counts((2, 512, 512), LARGEST[bits])
    files.write_mib(tmp_path / "a.mib", frames, "R64" if raw else "U16", bits, quad=True)
    expected = frames.astype(DTYPES[bits] if raw else "u2").reshape(1, 2, 512, 512)
    check(open_frames(tmp_path / "a.mib", scan_shape=(1, 2)), expected)


def test_merlin_in_several_files_is_read_from_its_hdr(tmp_path: Path) -> None:
    frames = files.counts((12, 4, 256), 63)
    for number, (start, stop) in enumerate([(0, 5), (5, 6), (6, 12)]):
        files.write_mib(tmp_path / f"a_{number}.mib", frames[start:stop], "U08", 6, first=start + 1)
    (tmp_path / "a.hdr").write_text("HDR,\nFrames in Acquisition (Number):\t12\nScanX:\t4\nScanY:\t3\n")
    check(open_frames(tmp_path / "a.hdr"), frames.astype("u1").reshape(*SCAN, 4, 256))


def test_merlin_sequence_numbers_turn_over_after_six_digits(tmp_path: Path) -> None:
    frames = files.counts((12, 4, 256), 63)
    files.write_mib(tmp_path / "a.mib", frames, "U08", 6, first=999_995)
    data = (tmp_path / "a.mib").read_bytes()
    for number in range(1_000_000, 1_000_007):  # six digits are all there is room for
        data = data.replace(f"MQ1,{number},".encode(), f"MQ1,{number - 1_000_000:06d},".encode())
    record = 384 + 4 * 256
    data = b"".join(
        part[:384].rstrip(b"\0").ljust(384, b"\0") + part[-4 * 256 :] for part in _records(data, len(frames))
    )
    assert len(data) == 12 * record
    (tmp_path / "a.mib").write_bytes(data)
    check(open_frames(tmp_path / "a.mib", scan_shape=SCAN), frames.astype("u1").reshape(*SCAN, 4, 256))


def _records(data: bytes, count: int) -> list[bytes]:
    starts = [i for i in range(len(data)) if data.startswith(b"MQ1,", i)]
    assert len(starts) == count
    return [data[a:b] for a, b in itertools.pairwise([*starts, len(data)])]


@pytest.mark.parametrize("xml", ["<pix_x>4</pix_x><pix_y>3</pix_y>", "<other/>"], ids=["pix", "name"])
def test_empad_leaves_the_rows_of_metadata_out(xml: str, tmp_path: Path) -> None:
    frames = np.random.default_rng(0).normal(size=(12, 128, 128)).astype("f4")
    modes = '<scan_parameters mode="search"><scan_resolution_x>64</scan_resolution_x></scan_parameters>'
    files.write_empad(tmp_path / "scan_x4_y3.xml", frames, xml + modes)
    expected = frames.reshape(*SCAN, 128, 128)
    check(open_frames(tmp_path / "scan_x4_y3.xml"), expected)
    check(open_frames(tmp_path / "scan_x4_y3.raw", format="empad", scan_shape=SCAN), expected)


@pytest.mark.parametrize("per_file", [5, 12])
def test_dectris_over_several_compressed_data_files(per_file: int, tmp_path: Path) -> None:
    frames = files.counts((12, 6, 5), 2**20).astype("u4")
    files.write_arina(tmp_path / "s_master.h5", frames, per_file)
    assert identify(tmp_path / "s_master.h5") == "dectris"
    check(open_frames(tmp_path / "s_master.h5", scan_shape=SCAN), frames.reshape(*SCAN, 6, 5))


def test_dectris_thresholds_are_chosen_by_name_or_number(tmp_path: Path) -> None:
    frames = files.counts((12, 2, 6, 5), 2**15).astype("u2")
    files.write_thresholds(tmp_path / "s_master.h5", frames, 5, ("threshold_1", "threshold_2"))
    for channel, index in ((1, 0), ("threshold_2", 1), (2, 1)):
        source = open_frames(tmp_path / "s_master.h5", scan_shape=SCAN, channel=channel)
        check(source, frames[:, index].reshape(*SCAN, 6, 5))


def test_a_single_threshold_needs_no_name(tmp_path: Path) -> None:
    frames = files.counts((12, 1, 6, 5), 2**15).astype("u2")
    files.write_thresholds(tmp_path / "s_master.h5", frames, 12, ("threshold_1",))
    check(open_frames(tmp_path / "s_master.h5", scan_shape=SCAN), frames.reshape(*SCAN, 6, 5))


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("scan_shape", [None, SCAN], ids=["as recorded", "said"])
def test_counted_events_become_frames(version: int, scan_shape: tuple[int, int] | None, tmp_path: Path) -> None:
    frames = np.random.default_rng(version).poisson(0.3, (12, 7, 5)).astype("u2")
    frames[4] = 0
    frames[0, 2, 3] = 4
    files.write_counted(tmp_path / "a.h5", frames, SCAN, version)
    check(open_frames(tmp_path / "a.h5", scan_shape=scan_shape), frames.reshape(*SCAN, 7, 5))


def test_the_flyback_column_of_counted_events_is_left_out(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).poisson(0.3, (12, 7, 5)).astype("u2")
    files.write_counted(tmp_path / "a.h5", frames, SCAN, 3)
    check(open_frames(tmp_path / "a.h5", flyback=1), frames.reshape(*SCAN, 7, 5)[:, :3])


@pytest.mark.parametrize("last_flyback", [True, False])
def test_frames_before_the_scan_and_after_each_line_are_left_out(last_flyback: bool, tmp_path: Path) -> None:
    frames = files.counts((2 + 3 * (4 + 2), 4, 256), 63).astype("u1")
    expected = frames[2:].reshape(3, 6, 4, 256)[:, :4]
    files.write_mib(tmp_path / "a.mib", frames if last_flyback else frames[:-2], "U08", 6)
    check(open_frames(tmp_path / "a.mib", scan_shape=SCAN, skip=2, flyback=2), expected)


@pytest.mark.parametrize("kind", ["npy", "fortran", "npz", "raw"])
def test_a_row_of_frames_in_plain_arrays(kind: str, tmp_path: Path) -> None:
    frames = files.counts((2 + 3 * (4 + 1), 5, 6), 200).astype("u2")
    path, options = tmp_path / f"a.{'npy' if kind == 'fortran' else kind}", {}
    if kind == "raw":
        path.write_bytes(b"x" + frames.astype(">u2").tobytes())
        options = {"dtype": ">u2", "shape": frames.shape, "offset_bytes": 1}
    elif kind == "npz":
        np.savez(path, a=frames)
    else:
        np.save(path, np.asfortranarray(frames) if kind == "fortran" else frames)
    source = open_frames(path, axes=("position", "ky", "kx"), scan_shape=SCAN, skip=2, flyback=1, **options)
    check(source, frames[2:].reshape(3, 5, 5, 6)[:, :4])


@pytest.mark.parametrize("kind", ["hdf5", "zarr"])
def test_a_named_array_with_axes_in_any_order(kind: str, tmp_path: Path) -> None:
    frames = files.counts((*SCAN, 5, 6), 200).astype(">u2" if kind == "hdf5" else "u2")
    expected = frames.astype("u2")
    path = tmp_path / f"a.{kind}"
    for name, axes in (("plain", ("y", "x", "ky", "kx")), ("turned", ("kx", "x", "ky", "y"))):
        array = np.ascontiguousarray(frames.transpose([("y", "x", "ky", "kx").index(axis) for axis in axes]))
        _put(kind, path, f"g/{name}", array)
        check(open_frames(path, array=f"g/{name}", axes=axes), expected)
    check(open_frames(path, array="g/plain"), expected)
    _put(kind, path, "row", np.concatenate([frames[:1, 0], frames.reshape(12, 5, 6)]))
    check(open_frames(path, array="row", scan_shape=SCAN, skip=1), expected)


def _put(kind: str, path: Path, name: str, array: np.ndarray) -> None:
    if kind == "hdf5":
        with h5py.File(path, "a") as file:
            file.create_dataset(name, data=array, chunks=True, compression="gzip")
    else:
        zarr.create_array(str(path), name=name, data=array, chunks=tuple(max(1, n // 2) for n in array.shape))


def test_a_row_of_positions_for_every_tilt(tmp_path: Path) -> None:
    frames = files.counts((2, 12, 5, 6), 200).astype("u2")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["frames"] = frames
    source = open_frames(tmp_path / "a.h5", axes=("tilt", "position", "ky", "kx"), scan_shape=SCAN)
    assert source.shape == (2, *SCAN, 5, 6)
    check_complete(source)
    np.testing.assert_array_equal(source.read(1, 1, 3), frames[1].reshape(*SCAN, 5, 6)[1:3])


def test_one_file_per_tilt_of_any_format(tmp_path: Path) -> None:
    frames = files.counts((3, 12, 4, 256), 63).astype("u1")
    expected = frames.reshape(3, *SCAN, 4, 256)
    for tilt in range(3):
        files.write_mib(tmp_path / f"{tilt}.mib", frames[tilt], "U08", 6)
        np.save(tmp_path / f"{tilt}.npy", expected[tilt])
    for suffix in ("mib", "npy"):
        source = open_frames([tmp_path / f"{tilt}.{suffix}" for tilt in range(3)], scan_shape=SCAN)
        source = pickle.loads(pickle.dumps(source))
        assert isinstance(source, FrameSource)
        assert (source.shape, source.n_expected, source.ready()) == (expected.shape, 36, 36)
        check_complete(source)
        for tilt in range(3):
            np.testing.assert_array_equal(source.read(tilt, 1, 3, 1, 4), expected[tilt, 1:3, 1:4])
        assert source.identity()["files"] == 3
