"""Bad acquisitions: one message that says what, where, expected and found; no frame lost, none invented."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from stemtomo.errors import AcquisitionError, FormatError, StoreError
from stemtomo.io.formats.registry import contents
from stemtomo.io.sources import check_complete, open_frames
from stemtomo.io.volume_files import read_volume
from tests.io.formats import files
from tests.pipeline.series import make_series

SCAN = (3, 4)
RECORD = 384 + 4 * 256


def refuse(error: type[Exception], message: str, path: Any, **options: Any) -> None:
    with pytest.raises(error, match=message):
        check_complete(open_frames(path, **options))


@pytest.fixture
def mib(tmp_path: Path) -> Path:
    files.write_mib(tmp_path / "a.mib", files.counts((12, 4, 256), 63), "U08", 6)
    return tmp_path / "a.mib"


@pytest.fixture
def arina(tmp_path: Path) -> Path:
    files.write_arina(tmp_path / "s_master.h5", files.counts((12, 6, 5), 99).astype("u4"), 5)
    return tmp_path / "s_master.h5"


def truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


# -- the scan ---------------------------------------------------------------------------------------------------------


def test_the_scan_is_never_guessed(mib: Path, arina: Path) -> None:
    for path, count in ((mib, 12), (arina, 12)):
        refuse(FormatError, rf"holds {count} frames in one row .* give scan.shape = \[y, x\]", path)
    square = mib.with_name("square.mib")
    files.write_mib(square, files.counts((9, 4, 256), 63), "U08", 6)
    refuse(FormatError, "cannot be told from the number of frames", square)


def test_more_and_fewer_frames_than_the_scan(mib: Path, arina: Path) -> None:
    for path in (mib, arina):
        refuse(
            AcquisitionError, r"holds 12 frames, a scan of 3 x 3 \(y, x\) has 9: 3 frames too", path, scan_shape=(3, 3)
        )
        refuse(AcquisitionError, "needs 16: 4 frames are missing", path, scan_shape=(4, 4))
    refuse(AcquisitionError, "flyback 1 needs 14: 2 frames are missing", mib, scan_shape=(3, 4), flyback=1)


def test_ready_counts_the_positions_whose_frames_are_whole(mib: Path) -> None:
    source = open_frames(mib, scan_shape=(3, 2), skip=1, flyback=2)  # frames 1 2 - - 5 6 - - 9 10 - -
    whole, found = mib.read_bytes(), []
    for frames in range(13):
        mib.write_bytes(whole[: frames * RECORD + RECORD // 2])  # and half of the next
        found.append(source.ready())
    assert found == [0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5, 6, 6]


# -- Merlin -----------------------------------------------------------------------------------------------------------


def test_a_mib_that_ends_inside_a_frame(mib: Path) -> None:
    truncate(mib, 11 * RECORD + 700)
    assert open_frames(mib, scan_shape=SCAN).ready() == 11
    refuse(AcquisitionError, rf"a.mib: ends inside frame 11 \(of 12\): 700 of {RECORD} bytes", mib, scan_shape=SCAN)
    with pytest.raises(AcquisitionError, match="ends after frame 11, frame 11 was asked for"):
        open_frames(mib, scan_shape=SCAN).read(0, 2, 3)


def test_lost_sequence_numbers_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "a.mib"
    files.write_mib(path, files.counts((16, 4, 256), 63), "U08", 6, lost=(3, 8, 9, 10))
    message = "a.mib: frames were lost: sequence numbers 3, 8 to 10 are missing"
    refuse(AcquisitionError, message, path, scan_shape=SCAN)
    with pytest.raises(AcquisitionError, match=message):
        open_frames(path, scan_shape=SCAN).read(0, 0, 1)


def test_sequence_numbers_lost_between_files(tmp_path: Path) -> None:
    files.write_mib(tmp_path / "a_1.mib", files.counts((6, 4, 256), 63), "U08", 6)
    files.write_mib(tmp_path / "a_2.mib", files.counts((6, 4, 256), 63), "U08", 6, first=9)
    (tmp_path / "a.hdr").write_text("HDR,\n")
    refuse(AcquisitionError, "a_2.mib: frames were lost: sequence numbers 7 to 8", tmp_path / "a.hdr", scan_shape=SCAN)


def test_fewer_frames_than_the_hdr_promises(mib: Path) -> None:
    mib.with_suffix(".hdr").write_text("HDR,\nFrames in Acquisition (Number):\t20\n")
    refuse(AcquisitionError, "holds 12 frames, its .hdr promises 20, the scan needs 20", mib, scan_shape=(4, 5))


def test_what_is_no_mib(tmp_path: Path) -> None:
    path = tmp_path / "a.mib"
    path.write_bytes(b"")
    refuse(FormatError, "does not begin like a Merlin .mib .* empty", path)
    path.write_bytes(b"RIFF" * 200)
    refuse(FormatError, "does not begin like a Merlin .mib .*'RIFFRIFF'", path)
    (tmp_path / "b.hdr").write_text("HDR,\n")
    refuse(FormatError, r"there is no b\*.mib beside it", tmp_path / "b.hdr")


def test_headers_that_say_nothing_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.mib").write_bytes(b"MQ1,000001,00000,01,0000,0000,U08,   1x1,00," + bytes(500))
    refuse(FormatError, r"a\.mib: .*says 0 bytes of header and 0 x 0 pixels", tmp_path / "a.mib")
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file.attrs["version"] = 3
        file.create_dataset("electron_events/frames", (4,), h5py.vlen_dtype("u4")).attrs.update({"Nx": 4, "Ny": 4})
        file.create_dataset("electron_events/scan_positions", data=np.arange(4)).attrs.update({"Nx": 0, "Ny": 2})
    refuse(FormatError, r"c\.h5: says 2 x 0 positions and frames of \[4, 4\]; it is damaged", tmp_path / "c.h5")


def test_a_raw_quad_of_24_bit_is_refused_by_name(tmp_path: Path) -> None:
    files.write_mib(tmp_path / "a.mib", files.counts((1, 512, 512), 99), "R64", 24, quad=True)
    refuse(FormatError, "raw frames of 4 chips, layout 2X2, 24 bit, .* export the file cooked", tmp_path / "a.mib")


# -- EMPAD ------------------------------------------------------------------------------------------------------------


def test_empad_that_is_cut_short_or_not_there(tmp_path: Path) -> None:
    path, frames = tmp_path / "a.xml", np.zeros((12, 128, 128), "f4")
    files.write_empad(path, frames, "<pix_x>4</pix_x><pix_y>3</pix_y>")
    raw = path.with_suffix(".raw")
    truncate(raw, 11 * 130 * 128 * 4 + 40)
    refuse(AcquisitionError, r"a.raw: ends inside frame 11 \(of 12\): 40 of 66560 bytes", path)
    truncate(raw, 10 * 130 * 128 * 4)
    refuse(AcquisitionError, "holds 10 frames, .* needs 12: 2 frames are missing", path)
    refuse(FormatError, "a .raw does not say what is in it; give the .xml of EMPAD or format = 'empad'", raw)
    raw.unlink()
    refuse(FormatError, "names a.raw, which is not beside it", path)
    path.write_text("<root>")
    refuse(FormatError, "cannot be read as well-formed XML", path)


# -- DECTRIS ----------------------------------------------------------------------------------------------------------


def test_missing_data_files_of_a_master(arina: Path) -> None:
    arina.with_name("s_data_000002.h5").unlink()
    source = open_frames(arina, scan_shape=SCAN)
    assert source.ready() == 5  # the third file is there, but not the second
    refuse(AcquisitionError, "1 of its data files cannot be read: s_data_000002.h5; copy", arina, scan_shape=SCAN)
    with pytest.raises(AcquisitionError, match="frame 7 is not there"):
        source.read(0, 1, 2)
    for number in (1, 3):
        arina.with_name(f"s_data_00000{number}.h5").unlink()
    refuse(AcquisitionError, "has no frames: s_data_000001.h5, s_data_000002.h5, s_data_000003.h5 cannot", arina)


def test_a_missing_part_of_a_virtual_dataset_is_no_zeros(tmp_path: Path) -> None:
    path = tmp_path / "s_master.h5"
    files.write_thresholds(path, np.ones((12, 1, 6, 5), "u2"), 5, ("threshold_1",))
    (tmp_path / "s_data_000003.h5").unlink()
    assert open_frames(path, scan_shape=SCAN).ready() == 10
    refuse(AcquisitionError, "1 of its data files cannot be read: s_data_000003.h5", path, scan_shape=SCAN)


def test_fewer_images_than_the_master_promises(tmp_path: Path) -> None:
    path = tmp_path / "s_master.h5"
    files.write_arina(path, files.counts((12, 6, 5), 99).astype("u4"), 5, promised=20)
    refuse(AcquisitionError, "its data files hold 12 frames, the master promises 20: 8 frames", path, scan_shape=SCAN)


def test_images_that_are_missing_between_data_files(arina: Path) -> None:
    for number, low in ((2, 8), (3, 13)):
        with h5py.File(arina.with_name(f"s_data_00000{number}.h5"), "r+") as file:
            file["entry/data/data"].attrs["image_nr_low"] = low
    message = "its first image has number 8, 6 was expected: images 6 to 7 are missing"
    refuse(AcquisitionError, message, arina, scan_shape=(2, 7))
    with h5py.File(arina.with_name("s_data_000003.h5"), "r+") as file:
        file["entry/data/data"].attrs["image_nr_low"] = 10
    refuse(AcquisitionError, "has number 10, the file before it ends with 12; .* not those of one", arina)


def test_a_choice_of_thresholds_is_not_made_silently(tmp_path: Path, arina: Path) -> None:
    path = tmp_path / "t_master.h5"
    files.write_thresholds(path, np.ones((12, 2, 6, 5), "u2"), 12, ("threshold_1", "threshold_2"))
    refuse(FormatError, r"holds 2 thresholds \(threshold_1, threshold_2\), none was named", path, scan_shape=SCAN)
    refuse(FormatError, "input.channel is 3; .* a number from 1 to 2", path, scan_shape=SCAN, channel=3)
    refuse(FormatError, "input.channel is 2, but the file has one threshold", arina, scan_shape=SCAN, channel=2)


def test_an_unknown_layout_is_refused_by_name(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a_master.h5", "w") as file:
        file["entry/data/data_000001"] = np.zeros((2, 2, 2, 2, 2), "u2")
    refuse(FormatError, r"5 axes, shape \[2, 2, 2, 2, 2\]; 3 .* and 4 .* are known", tmp_path / "a_master.h5")


# -- counted events ---------------------------------------------------------------------------------------------------


def test_counted_events_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    files.write_counted(path, np.ones((12, 7, 5), "u2"), (3, 4), 3)
    refuse(AcquisitionError, "holds 12 frames, a scan of 3 x 5", path, scan_shape=(3, 5))
    with h5py.File(path, "r+") as file:
        file["electron_events/scan_positions"].attrs["Nx"] = 5
    refuse(AcquisitionError, r"has 12 lists of events for 3 x 5 \(y, x\) positions, 15", path)
    with h5py.File(path, "r+") as file:
        file["electron_events/scan_positions"].attrs["Nx"] = 4
        file["electron_events/frames"].attrs["Nx"] = 6
    with pytest.raises(FormatError, match=r"has an event at pixel 34, its frames of \[6, 5\] have 30"):
        open_frames(path).read(0, 0, 3)
    with h5py.File(path, "r+") as file:
        file.attrs["version"] = 4
    refuse(FormatError, "counted events of version 4 are not known", path)


def test_positions_without_events_were_lost(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    files.write_counted(path, np.ones((12, 7, 5), "u2"), (3, 4), 1)
    with h5py.File(path, "r+") as file:
        file["electron_events/scan_positions"][3] = 2
    refuse(AcquisitionError, "1 of 12 positions have no list of events", path)


# -- HDF5, Zarr, folders, packages ------------------------------------------------------------------------------------


def test_an_hdf5_file_that_is_cut_off_or_holds_several_arrays(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["one"], file["two"] = np.zeros((2, 2, 3, 4), "u2"), np.zeros((2, 2, 3, 4), "f4")
    refuse(FormatError, r"no dataset was named; it holds one \[2, 2, 3, 4\] uint16, two", path)
    refuse(FormatError, "input.skip and input.flyback mean nothing", path, array="one", skip=1)
    truncate(path, path.stat().st_size - 60)
    refuse(FormatError, "cannot be read as HDF5 .*truncated.* damaged, still being written or copied", path)


def test_a_folder_that_is_no_zarr_array(tmp_path: Path) -> None:
    (tmp_path / "a.zarr").mkdir()
    refuse(FormatError, "is a folder, not a file of frames", tmp_path / "a.zarr")
    (tmp_path / "a.zarr" / "zarr.json").write_text("{}")
    refuse(FormatError, "is a group, no array was named; it holds no arrays", tmp_path / "a.zarr")
    (tmp_path / "a.zarr" / "zarr.json").write_text("null")
    with pytest.raises(FormatError, match="is neither a Zarr array nor a group of arrays"):
        contents(tmp_path / "a.zarr")


def test_unknown_formats_and_options_of_another_format(mib: Path) -> None:
    refuse(FormatError, "there is no format 'merlyn'; input.format can be npz, npy, raw, merlin", mib, format="merlyn")
    refuse(FormatError, "there is no format 'merlin:2'", mib, format="merlin:2")
    refuse(FormatError, "input.channel is for DECTRIS", mib, channel=1)
    refuse(FormatError, "leave input.axes and input.array out", mib, array="data")
    refuse(FormatError, "are for raw binary; merlin says them itself", mib, dtype="<u2")


@pytest.mark.parametrize(("module", "name"), [("h5py", "a.h5"), ("rsciio", "a.dm4")])
def test_a_package_that_is_not_installed_is_named(
    module: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(b"1234")
    _hide(monkeypatch, module)
    message = r"h5py, which is not installed; pip install 'stemtomo\[formats\]'"
    refuse(FormatError, message if module == "h5py" else r"come with RosettaSciIO: pip install", tmp_path / name)


def test_a_missing_decompressor_is_named(arina: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_frames(arina, scan_shape=SCAN)
    _hide(monkeypatch, "hdf5plugin")
    monkeypatch.setattr(h5py.Dataset, "__getitem__", _no_filter)
    with pytest.raises(FormatError, match=r"required filter.*hdf5plugin is not installed \(pip install"):
        source.read(0, 0, 1)


def _no_filter(self: Any, index: Any) -> None:
    raise OSError("Can't synchronously read data (required filter 'bitshuffle' is not registered)")


def _hide(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    load = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name.partition(".")[0] == module:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
        return load(name, package)

    monkeypatch.setattr(importlib, "import_module", without)


# -- one file per tilt ------------------------------------------------------------------------------------------------


def test_a_tilt_that_differs_from_the_first(tmp_path: Path, mib: Path) -> None:
    wider = tmp_path / "b.mib"
    files.write_mib(wider, files.counts((12, 8, 256), 63), "U08", 6)
    refuse(
        AcquisitionError,
        r"b.mib \(tilt file 1\): holds \[3, 4, 8, 256\] uint8 .* the first, .*a.mib, holds \[3, 4, 4, 256\] uint8",
        [mib, wider],
        scan_shape=SCAN,
    )
    files.write_mib(wider, files.counts((12, 4, 256), 63), "U16", 12)
    refuse(AcquisitionError, "uint16 .* the first, .* uint8", [mib, wider], scan_shape=SCAN)
    refuse(AcquisitionError, "named twice, as tilt files 0 and 1", [mib, mib], scan_shape=SCAN)
    refuse(FormatError, "empty list", [])


def test_the_tilt_that_is_short_is_named(tmp_path: Path, mib: Path) -> None:
    short = tmp_path / "b.mib"
    files.write_mib(short, files.counts((9, 4, 256), 63), "U08", 6)
    source = open_frames([mib, short, tmp_path / "c.mib"][:2], scan_shape=SCAN)
    assert (source.ready(), source.n_expected) == (21, 24)
    refuse(AcquisitionError, "b.mib: holds 9 frames, .* needs 12: 3 frames are missing", [mib, short], scan_shape=SCAN)


def test_a_row_of_frames_in_an_array_that_does_not_fit_or_is_compressed(tmp_path: Path) -> None:
    options: dict[str, Any] = {"axes": ("position", "ky", "kx"), "scan_shape": SCAN, "flyback": 1}
    np.save(tmp_path / "a.npy", np.zeros((16, 5, 6), "u2"))
    refuse(AcquisitionError, r"holds 16 frames, .* flyback 1 has 15: 1 frames too many", tmp_path / "a.npy", **options)
    truncate(tmp_path / "a.npy", 900)
    refuse(FormatError, "is truncated: 900 bytes, 1088 expected", tmp_path / "a.npy", **options)
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros((15, 5, 6), "u2"))
    refuse(FormatError, "is compressed; input.skip and input.flyback need numpy.savez", tmp_path / "a.npz", **options)


# -- headers that ask for too much -------------------------------------------------------------------------------------


def test_a_frame_larger_than_any_camera_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:  # takes no room: nothing is written
        file.create_dataset("frames", (2, 2, 40_000, 40_000), "u2", chunks=(1, 1, 100, 100))
    refuse(FormatError, "at most 1.07e.09 are read", tmp_path / "a.h5", axes=("y", "x", "ky", "kx"))


def test_an_array_shorter_than_its_header_says_is_not_allocated(tmp_path: Path) -> None:
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (10**6,) * 3})
    with pytest.raises(FormatError, match="is truncated: 128 bytes, 8000000000000000128 expected"):
        read_volume(tmp_path / "a.npy", 1.0)


def test_a_damaged_shard_of_a_store_is_named(tmp_path: Path) -> None:
    store = make_series(tmp_path / "s.zarr")
    shard = next(
        path for path in sorted((store.path / "tilt" / "001").rglob("*")) if path.is_file() and path.parent.name == "0"
    )
    data = bytearray(shard.read_bytes())
    data[-20] ^= 0xFF  # where the chunks lie is at the end
    shard.write_bytes(data)
    store.read_frames(0)
    with pytest.raises(StoreError, match=r"tilt/001/.* is damaged, .*remove the tilt and ingest it again"):
        store.read_frames(1)
