"""What bad acquisitions get at the command line: what, where, expected and found, what to do, and exit code 2.

One test per row of the table in docs/formats.md, with ``stemtomo ingest``; rows on growing files are in
``tests/pipeline/test_watch*.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from stemtomo.cli import app
from stemtomo.io.store import Store
from tests.io.formats import files
from tests.io.formats.test_sectors import record

SCAN = (6, 4)
FRAME_BYTES = 2 * 8 * 8
RAW = 'path = "a.raw"\ndtype = "<u2"\naxes = ["y", "x", "ky", "kx"]\nshape = [6, 4, 8, 8]'
MIB = 'path = "a.mib"'


@pytest.fixture
def frames() -> np.ndarray:
    return files.counts((24, 8, 8), 90).astype("<u2") + np.uint16(1)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def ingest(section: str, *options: str, theta: str = "theta_deg = [0]", scan: Any = None) -> Any:
    """Run the command on a series whose section [input] is given."""
    Path("s.toml").write_text(
        f"[input]\n{section}\n[optics]\nenergy_kev = 300\nsemiangle_mrad = 5\n[detector]\npixel_inv_angstrom = 0.1\n"
        f"[scan]\nstep_angstrom = 0.5\n{'' if scan is None else f'shape = {list(scan)}'}\n[tilts]\n{theta}\n"
    )
    return CliRunner().invoke(app, ["ingest", "s.toml", "s.zarr", *options])


def refused(result: Any, *parts: str) -> None:
    text = " ".join(result.stderr.split())
    assert result.exit_code == 2, result.output
    assert "Traceback" not in text
    for part in parts:
        assert part in text


def test_partial_last_record(frames: np.ndarray) -> None:
    Path("a.raw").write_bytes(frames.tobytes()[: 23 * FRAME_BYTES + 50])
    refused(
        ingest(RAW), "a.raw: ends inside frame 23 (of 24)", "1 frames are missing", "ingest.missing = 'mask' to keep 23"
    )
    assert not Path("s.zarr").exists()
    assert ingest(RAW, "--missing", "mask").exit_code == 0
    assert Store.open("s.zarr").valid(0).sum() == 23


def test_lost_sequence_numbers() -> None:
    counts = files.counts((24, 4, 256), 63).astype("u1") + np.uint8(1)
    files.write_mib(Path("a.mib"), counts, "U08", 6, lost=(3, 8, 9, 10))
    refused(ingest(MIB, scan=SCAN), "a.mib", "sequence numbers 3, 8 to 10 are missing", "ingest.missing = 'mask'")
    result = ingest(MIB, "--missing", "mask", scan=SCAN)
    assert result.exit_code == 0
    assert "4 missing" in result.output
    store = Store.open("s.zarr")
    assert np.flatnonzero(~store.valid(0)).tolist() == [2, 7, 8, 9]
    np.testing.assert_array_equal(store.frames(0)[:][store.valid(0)], counts[store.valid(0).ravel()])


def test_a_missing_sector() -> None:
    """Position 7 of a scan of 3 x 5 came from three of four receivers."""
    ky, kx = np.indices((576, 576))
    for sector in range(4):
        there = [p for p in range(15) if (sector, p) != (2, 7)]
        data = b"".join(record(((ky + kx + p) % 99 + 1).astype("<u2"), p, sector, 5) for p in there)
        Path(f"data_scan0000000009_module{sector}_part0.data").write_bytes(data)
    section = 'path = "data_scan0000000009_module0_part0.data"\nformat = "sectors:5"'
    refused(ingest(section), "frame 7", "sectors 2", "ingest.missing = 'mask'")
    assert ingest(section, "--missing", "mask").exit_code == 0
    assert np.flatnonzero(~Store.open("s.zarr").valid(0)).tolist() == [7]


def test_more_frames_than_the_scan() -> None:
    counts = files.counts((24, 4, 256), 63).astype("u1")
    files.write_mib(Path("a.mib"), counts, "U08", 6)
    refused(ingest(MIB, scan=(5, 4)), "holds 24 frames", "5 x 4 (y, x) has 20", "4 frames too many")
    assert ingest(f"{MIB}\nskip = 4", scan=(5, 4)).exit_code == 0
    np.testing.assert_array_equal(Store.open("s.zarr").frames(0)[:].reshape(20, 4, 256), counts[4:])


def test_a_file_that_was_replaced(frames: np.ndarray) -> None:
    Path("a.raw").write_bytes(frames.tobytes())
    assert ingest(RAW).exit_code == 0
    Path("a.raw").write_bytes(frames[::-1].tobytes())
    refused(ingest(RAW), "tilt 0 was begun from a.raw", "3072 bytes", "they differ in", "another store")
    np.testing.assert_array_equal(Store.open("s.zarr").frames(0)[:].reshape(frames.shape), frames)


def test_an_unreadable_hdf5_file(frames: np.ndarray) -> None:
    with h5py.File("a.h5", "w") as file:
        file["frames"] = frames.reshape(*SCAN, 8, 8)
    data = Path("a.h5").read_bytes()
    Path("a.h5").write_bytes(data[:-60])
    section = 'path = "a.h5"\naxes = ["y", "x", "ky", "kx"]'
    refused(ingest(section), "a.h5", "truncated", "still being written or copied")
    Path("a.h5").write_bytes(data)
    assert ingest(section).exit_code == 0


def test_a_tilt_unlike_the_first(frames: np.ndarray) -> None:
    section = 'path = "."\nfiles = "t{theta_deg}.npy"'
    np.save("t-5.npy", frames.reshape(*SCAN, 8, 8))
    for other in (frames.reshape(*SCAN, 8, 8).astype("<i4"), frames.reshape(3, 8, 8, 8)):
        np.save("t5.npy", other)
        refused(ingest(section, theta=""), "t5.npy: holds", "like", "t-5.npy with [1, 6, 4, 8, 8] uint16", "not taken")


def test_duplicate_and_unparsable_angles(frames: np.ndarray) -> None:
    section = 'path = "."\nfiles = "t{theta_deg}.npy"'
    for name in ("t5.npy", "t5.0.npy"):
        np.save(name, frames.reshape(*SCAN, 8, 8))
    refused(ingest(section, theta=""), "t5.0.npy and t5.npy both have the angle 5 deg", "remove or rename one")
    Path("t5.0.npy").rename("tx.npy")
    refused(ingest(section, theta=""), "tx.npy", "'x' is no angle", "rename the file")
    refused(ingest('path = "t*.npy"'), "order of names is not that of angles", "t")


def test_saturated_dead_and_empty_are_finished_and_said(frames: np.ndarray) -> None:
    frames[5] = 0
    frames[:, 4, 4] = 0
    frames[7, 2, 2], frames[8, 2, 3] = 65535, 40000
    Path("a.raw").write_bytes(frames.tobytes())
    result = ingest(RAW)
    assert result.exit_code == 0
    assert result.stderr.count("Warning: ") == 1
    for part in ("1 frames are empty", "1 values in 1 pixels are saturated", "upper half", "1 pixels never counted"):
        assert part in result.stderr
    assert Store.open("s.zarr").tilt_attrs(0)["noted"]["saturated_values"] == 1


def test_values_that_are_not_finite(frames: np.ndarray) -> None:
    values = frames.astype("<f4")
    values[3, 1, 2] = np.nan
    Path("a.raw").write_bytes(values.tobytes())
    section = RAW.replace("<u2", "<f4")
    refused(ingest(section), "a.raw", "1 non-finite value", "y 0, x 3")
    assert Store.open("s.zarr").fingerprint("tilt/000") is None
    assert ingest(section, "--set", "ingest.nonfinite_fraction=0.001").exit_code == 0
    assert np.isfinite(Store.open("s.zarr").frames(0)[:]).all()


def test_frames_that_are_not_the_number_of_tilts(frames: np.ndarray) -> None:
    Path("a.raw").write_bytes(frames.tobytes())
    refused(ingest(RAW, theta="theta_deg = [0, 5]"), "2 angles for 1 tilts", "give one per tilt")
