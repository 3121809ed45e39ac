"""Files of many microscopes, as RosettaSciIO reads them: shape, type, sum, smallest and largest value, all 68."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stemtomo.errors import FormatError
from stemtomo.io.formats import registry, rosetta
from stemtomo.io.sources import FrameSource, check_complete, open_frames
from tests.data import FOLDER, needs

FILES = FOLDER / "vendor_files" / "files"
_INDEX = FOLDER / "vendor_files" / "expected.json"
EXPECTED: list[dict[str, Any]] = json.loads(_INDEX.read_text())["files"] if _INDEX.is_file() else []
OWN = {"QuantumDetector": "merlin", "EMPAD": "empad", "Arina": "dectris"}
pytestmark = needs("vendor_files")


def own(entry: dict[str, Any]) -> bool:
    return entry["reader"] in OWN


def source_of(entry: dict[str, Any]) -> FrameSource:
    shape = entry["signals"][0]["shape"]
    scan = {2: (1, 1), 3: (1, shape[0]), 4: tuple(shape[:2])}[len(shape)]
    return pickle.loads(pickle.dumps(open_frames(FILES / entry["file"], scan_shape=scan)))


def compare(data: np.ndarray, expected: dict[str, Any]) -> None:
    assert data.size == math.prod(expected["shape"])
    if data.dtype.kind == "S":
        return
    if data.dtype.kind == "c":
        np.testing.assert_allclose(data.sum(dtype=complex), complex(expected["sum_re"], expected["sum_im"]))
        return
    np.testing.assert_allclose(data.sum(dtype=np.float64), expected["sum"], rtol=1e-12)
    if math.isfinite(expected["sum"]):
        assert (data.min(), data.max()) == (expected["min"], expected["max"])


def test_the_files_are_those_that_the_readers_were_compared_on() -> None:
    assert len(EXPECTED) == 68
    assert sum(map(own, EXPECTED)) == 18


@pytest.mark.parametrize("entry", [e for e in EXPECTED if own(e)], ids=lambda entry: Path(entry["file"]).name)
def test_own_readers(entry: dict[str, Any]) -> None:
    source, expected = source_of(entry), entry["signals"][0]
    assert registry.identify(FILES / entry["file"]) == OWN[entry["reader"]]
    assert source.shape[-len(expected["shape"]) :] == tuple(expected["shape"])
    wanted = np.dtype(expected["dtype"]).newbyteorder("=")
    # RosettaSciIO narrows Arina's uint32 to uint16 without looking at the values.
    assert source.dtype == (np.uint32 if entry["reader"] == "Arina" else wanted)
    check_complete(source)
    assert source.ready() == source.n_expected
    compare(source.read(0, 0, source.shape[1]), expected)


@pytest.mark.parametrize("entry", [e for e in EXPECTED if not own(e)], ids=lambda entry: Path(entry["file"]).name)
def test_every_other_file_through_the_extra(entry: dict[str, Any]) -> None:
    path = FILES / entry["file"]
    signals = rosetta.signals(path, entry["reader"])
    assert [list(one.signal_shape) for one in signals] == [one["shape"] for one in entry["signals"]]
    assert [one.dtype for one in signals] == [np.dtype(one["dtype"]) for one in entry["signals"]]
    for one, expected in zip(signals, entry["signals"], strict=True):
        with pickle.loads(pickle.dumps(one)).open() as array:
            compare(array[...], expected)


@pytest.mark.parametrize(
    "name",
    ["mrc/20241021_00405_movie.mrc", "blockfile/test1.blo", "emd/py4DSTEM_size2x3x4x5.h5", "mrc/Custom_movie.mrc"],
)
def test_four_dimensional_files_are_frames_by_their_suffix_alone(name: str) -> None:
    entry = next(entry for entry in EXPECTED if entry["file"] == name)
    source, expected = source_of(entry), entry["signals"][0]
    assert source.shape[-len(expected["shape"]) :] == tuple(expected["shape"])
    compare(source.read(0, 0, source.shape[1]), expected)


def test_merlin_rows_are_those_of_the_file_where_rosettasciio_turns_them() -> None:
    reader = pytest.importorskip("rsciio.quantumdetector")
    path = FILES / "quantumdetector" / "001_4x2_6bit.mib"
    theirs = reader.file_reader(str(path))[0]["data"]
    ours = open_frames(path, scan_shape=(2, 4)).read(0, 0, 2)
    np.testing.assert_array_equal(ours, theirs[..., ::-1, :])


def test_a_reader_that_is_not_lazy_counts_the_whole_signal_for_each_task() -> None:
    eager = open_frames(FILES / "pantarhei" / "panta_rhei_sample.prz")
    lazy = open_frames(FILES / "mrc" / "20241021_00405_movie.mrc")
    assert registry.read_overhead_bytes(eager) == 16 * 16 * 2
    assert registry.read_overhead_bytes(lazy) == 0


def test_a_dataset_named_by_its_path_is_read_without_the_extra_reader() -> None:
    import h5py

    path, name = FILES / "emd" / "Si100_4D.emd", "4DSTEM_simulation/data/datacubes/CBED_array_depth0001/datacube"
    with h5py.File(path) as file:
        expected = file[name][()]
    source = open_frames(path, array=name)
    assert source.shape == (1, *expected.shape)
    np.testing.assert_array_equal(source.read(0, 2, 9, 3, 7), expected[2:9, 3:7])


def test_what_is_no_frame_is_refused_and_listed() -> None:
    with pytest.raises(FormatError, match="has dtype complex64"):
        open_frames(FILES / "digitalmicrograph" / "2D" / "test-3.dm4")
    with pytest.raises(FormatError, match=r"no signal was named; it holds 0 'B-D' \[2, 2\] float32, 1 'DPC'"):
        open_frames(FILES / "emd" / "fei_example_dpc_titles.emd")
    with pytest.raises(
        FormatError, match=r"there is no dataset 'x'; it holds 4DSTEM.*datacube.*: name one as input.array"
    ):
        open_frames(FILES / "emd" / "Si100_4D.emd", array="x")
