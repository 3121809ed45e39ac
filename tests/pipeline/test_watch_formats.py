"""Detectors' own files while they are written: receivers out of step, HDF5 in SWMR mode, files that come in parts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from stemtomo.errors import AcquisitionError, StalledError
from stemtomo.io.store import Store
from tests.io.cases import digest
from tests.io.formats.files import write_arina, write_mib
from tests.io.formats.test_sectors import SCAN, record
from tests.io.formats.test_swmr import Writer
from tests.pipeline.acquisitions import appended, configuration, follow, ingested, tilts_of


def told(path: Path, scan: tuple[int, int] | None, **options: Any) -> Any:
    """Configuration of one tilt in one file whose format says what is in it."""
    options = {"input_dtype": None, "input_shape": None, "optics": {"energy_kev": 300, "semiangle_mrad": 5}, **options}
    section = {"scan": {"step_angstrom": 0.5, **({} if scan is None else {"shape": list(scan)})}}
    return configuration(path, files=None, tilts=1, **section, **options)


def same_as_ingested(config: Any, folder: Path, frames: np.ndarray) -> None:
    np.testing.assert_array_equal(Store.open(folder / "s.zarr").frames(0)[:].reshape(frames.shape), frames)
    assert tilts_of(digest(folder / "s.zarr")) == ingested(config, folder / "plain.zarr")


# -- four receivers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sectored() -> np.ndarray:
    ky, kx = np.indices((576, 576))
    return np.stack([(7 * ky + 3 * kx + 1000 * position) % 999 + 1 for position in range(15)]).astype("<u2")


def receivers(
    folder: Path, frames: np.ndarray, lost: tuple[tuple[int, int], ...] = ()
) -> tuple[Path, list[Callable[[], object]]]:
    """Steps in which four receivers write two files each, at their own pace, records cut anywhere."""
    rng = np.random.default_rng(0)
    queues = []
    for sector in range(4):
        for part in range(2):
            name = folder / f"data_scan0000000009_module{sector}_part{part}.data"
            mine = [p for p in range(15) if p % 2 == part and (sector, p) not in lost]
            data = b"".join(record(frames[p], p, sector, 5) for p in mine)
            queues.append(appended(name, data, rng.integers(1, 400000, 6).tolist()))
    steps = []
    queues[0][0]()  # the file that names the acquisition
    del queues[0][0]
    while queues:  # one of them is always far ahead
        queue = queues[int(rng.integers(len(queues)) * rng.random())]
        steps.append(queue.pop(0))
        queues = [left for left in queues if left]
    return folder / "data_scan0000000009_module0_part0.data", steps


def test_four_receivers_out_of_step(tmp_path: Path, sectored: np.ndarray) -> None:
    path, steps = receivers(tmp_path, sectored)
    config = told(path, None, input_format="sectors:5", deadline_s=60.0)
    reports, numbers = follow(config, tmp_path / "s.zarr", steps)
    assert numbers["missing_frames"] == 0
    assert reports[-1].frames == 15
    same_as_ingested(config, tmp_path, sectored)


def test_a_lost_sector_stops_the_tilt_or_is_masked(tmp_path: Path, sectored: np.ndarray) -> None:
    path, steps = receivers(tmp_path, sectored, lost=((2, 4), (0, 9)))
    config = told(path, None, input_format="sectors:5", deadline_s=60.0)
    with pytest.raises(StalledError, match=r"no new frame for 60 s; it has 4 of 15 frames.*frame 4 .*sectors 2"):
        follow(config, tmp_path / "s.zarr", steps)  # the sector may be late
    config = told(path, None, input_format="sectors:5", deadline_s=60.0, missing="mask")
    _, numbers = follow(config, tmp_path / "s.zarr")
    assert numbers["missing_frames"] == 2
    store = Store.open(tmp_path / "s.zarr")
    valid = store.valid(0).ravel()
    assert np.flatnonzero(~valid).tolist() == [4, 9]
    np.testing.assert_array_equal(store.frames(0)[:].reshape(sectored.shape)[valid], sectored[valid])
    assert not store.frames(0)[:].reshape(sectored.shape)[~valid].any()
    looked = store.read("quicklook/000")
    np.testing.assert_allclose(looked["mean_pattern"], sectored[valid].mean(axis=0), rtol=1e-6)
    assert store.scan(0).shape_yx == SCAN


# -- HDF5 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("array", ["row", "grid", "preset"])
def test_an_hdf5_file_in_swmr_mode(tmp_path: Path, array: str) -> None:
    frames = np.random.default_rng(0).integers(1, 900, (30, 6, 7)).astype("u2")
    path = tmp_path / "a.h5"
    writer: list[Writer] = []
    counts = (2, 9, 9, 16, 17, 30)
    steps: list[Callable[[], object]] = [lambda: None, lambda: writer.append(Writer(path, frames))]
    steps += [lambda count=count: writer[0].put(count) for count in counts]
    steps += [lambda: writer[0].close()]
    axes = ["position", "ky", "kx"] if array == "row" else ["y", "x", "ky", "kx"]
    config = told(path, (6, 5), input_array=array, input_axes=axes)
    follow(config, tmp_path / "s.zarr", steps)
    same_as_ingested(config, tmp_path, frames)


def test_an_hdf5_file_that_cannot_be_read_yet_or_at_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = np.random.default_rng(0).integers(1, 900, (6, 5, 6, 7)).astype("u2")
    path = tmp_path / "a.h5"
    with h5py.File(tmp_path / "whole.h5", "w") as file:
        file["frames"] = frames
    data = (tmp_path / "whole.h5").read_bytes()
    config = told(path, (6, 5), input_axes=["y", "x", "ky", "kx"])
    pause = [lambda: None] * 4
    steps = appended(path, data, [3, 600])  # an HDF5 file that is copied is none until it is whole
    with caplog.at_level(logging.INFO):
        follow(config, tmp_path / "s.zarr", [steps[0], *pause, steps[1], *pause, *steps[2:]])
    assert sum("cannot be read yet" in text for text in caplog.messages) == 1
    same_as_ingested(config, tmp_path, frames)
    path.write_bytes(data[:-60])
    with pytest.raises(StalledError, match=r"a.h5: could not be read until the deadline .*SWMR.*hdf5plugin") as caught:
        follow(config, tmp_path / "cut.zarr")
    assert "truncated" in str(caught.value.__cause__)
    assert not (tmp_path / "cut.zarr" / "tilt" / "000").exists()


def test_the_data_files_of_a_master_come_one_by_one(tmp_path: Path) -> None:
    frames = np.random.default_rng(1).integers(1, 900, (40, 8, 8)).astype("u2")
    (tmp_path / "made").mkdir()
    (tmp_path / "in").mkdir()
    made = write_arina(tmp_path / "made" / "a_master.h5", frames, per_file=11, promised=40)
    master = tmp_path / "in" / "a_master.h5"
    order = [tmp_path / "made" / "a_master.h5", *(made[index] for index in (0, 2, 1, 3))]
    steps = [lambda file=file: file.rename(tmp_path / "in" / file.name) for file in order]
    config = told(master, (8, 5))
    reports, _ = follow(config, tmp_path / "s.zarr", steps)
    assert len(reports) == 1  # one shard holds the scan
    same_as_ingested(config, tmp_path, frames)


# -- Merlin -----------------------------------------------------------------------------------------------------------


def mib(folder: Path) -> tuple[bytes, np.ndarray, int]:
    frames = np.random.default_rng(2).integers(1, 900, (200, 16, 16)).astype("u2")
    write_mib(folder / "whole.mib", frames, "U16", 16)
    data = (folder / "whole.mib").read_bytes()
    return data, frames, len(data) // 200


def test_a_mib_that_grows_by_pieces_of_frames(tmp_path: Path) -> None:
    data, frames, size = mib(tmp_path)
    path = tmp_path / "a.mib"
    config = told(path, (20, 10))
    follow(config, tmp_path / "s.zarr", appended(path, data, [100, size, 7 * size + 13, 90 * size, 1]))
    same_as_ingested(config, tmp_path, frames)


def test_lost_sequence_numbers_stop_the_tilt_or_are_masked(tmp_path: Path) -> None:
    data, frames, size = mib(tmp_path)
    path = tmp_path / "a.mib"
    steps = appended(path, data[: 50 * size] + data[53 * size :], [60 * size])
    config = told(path, (20, 10))
    with pytest.raises(AcquisitionError, match=r"frames were lost: sequence numbers 51 to 53"):
        follow(config, tmp_path / "s.zarr", steps)
    assert Store.open(tmp_path / "s.zarr").recorded_frames(0) == set()  # none that is moved by those that are lost
    config = told(path, (20, 10), missing="mask")
    follow(config, tmp_path / "s.zarr")
    store = Store.open(tmp_path / "s.zarr")
    valid = store.valid(0).ravel()
    assert np.flatnonzero(~valid).tolist() == [50, 51, 52]
    np.testing.assert_array_equal(store.frames(0)[:].reshape(frames.shape)[valid], frames[valid])
