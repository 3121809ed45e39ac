"""HDF5 while another process writes it (SWMR): only frames of complete chunks are ready, and all when it is closed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from stemtomo.errors import AcquisitionError, FormatError
from stemtomo.io.gaps import without_gaps
from stemtomo.io.growing import counts_records
from stemtomo.io.sources import check_complete, open_frames

WRITER = """
import sys
import h5py, numpy as np
frames = np.load(sys.argv[2])
with h5py.File(sys.argv[1], "w", libver="latest") as file:
    row = file.create_dataset("row", (0, 6, 7), "u2", maxshape=(None, 6, 7), chunks=(4, 6, 7))
    grid = file.create_dataset("grid", (0, 5, 6, 7), "u2", maxshape=(None, 5, 6, 7), chunks=(1, 5, 3, 7))
    preset = file.create_dataset("preset", (6, 5, 6, 7), "u2", chunks=(1, 2, 6, 7))
    file.swmr_mode = True
    for line in sys.stdin:
        count = int(line)
        row.resize(count, 0)
        row[:] = frames[:count]
        grid.resize(count // 5, 0)
        grid[:] = frames[:count // 5 * 5].reshape(-1, 5, 6, 7)
        for position in range(count):
            preset[position // 5, position % 5] = frames[position]
        for dataset in (row, grid, preset):
            dataset.flush()
        print("written", flush=True)
"""


class Writer:
    def __init__(self, path: Path, frames: np.ndarray) -> None:
        np.save(path.with_suffix(".npy"), frames)
        command = [sys.executable, "-c", WRITER, str(path), str(path.with_suffix(".npy"))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def put(self, count: int) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "written\n"

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(20) == 0


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(1, 900, (30, 6, 7)).astype("u2")


@pytest.fixture
def writer(tmp_path: Path, frames: np.ndarray) -> Iterator[Writer]:
    running = Writer(tmp_path / "a.h5", frames)
    yield running
    running.process.kill()
    running.process.wait()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("row", {2: 0, 9: 8, 16: 12, 17: 16, 30: 28}),  # chunks of 4 frames; the last one may still be filled
        ("grid", {9: 0, 16: 10, 17: 10, 30: 25}),  # chunks of one line
        ("preset", {2: 0, 9: 7, 16: 15, 17: 15, 30: 29}),  # chunks of 2, 2 and 1 positions of a line
    ],
)
def test_frames_of_complete_chunks_are_ready(
    name: str, expected: dict[int, int], writer: Writer, frames: np.ndarray, tmp_path: Path
) -> None:
    source = None
    for count, ready in expected.items():
        writer.put(count)
        source = source or open_frames(tmp_path / "a.h5", array=name, scan_shape=(6, 5))
        assert counts_records(source)
        assert source.shape == (1, 6, 5, 6, 7)
        assert source.ready() == ready
        if rows := ready // 5:
            np.testing.assert_array_equal(source.read(0, 0, rows).reshape(-1, 6, 7), frames[: 5 * rows])
    assert source is not None
    with pytest.raises(AcquisitionError, match=r"were never written|frames are missing"):
        check_complete(source)
    writer.close()
    check_complete(source)
    assert source.ready() == 30
    np.testing.assert_array_equal(source.read(0, 0, 6).reshape(-1, 6, 7), frames)


def test_what_is_not_there_yet_is_no_zeros(writer: Writer, tmp_path: Path) -> None:
    writer.put(16)
    source = open_frames(tmp_path / "a.h5", array="grid", scan_shape=(6, 5))
    with pytest.raises(AcquisitionError, match="y 4 to 5 are not there yet"):
        source.read(0, 4, 6)


@pytest.mark.parametrize(("shape", "chunks"), [((30, 6, 7), (2, 6, 7)), ((6, 5, 6, 7), (1, 5, 2, 7))])
def test_chunks_that_were_never_written_are_named_or_masked(
    shape: tuple[int, ...], chunks: tuple[int, ...], frames: np.ndarray, tmp_path: Path
) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("a", shape, "u2", chunks=chunks)
        if len(shape) == 3:
            dataset[:10], dataset[20:] = frames[:10], frames[20:]
        else:
            dataset[:2], dataset[4:] = frames[:10].reshape(2, 5, 6, 7), frames[20:].reshape(2, 5, 6, 7)
    source = open_frames(tmp_path / "a.h5", scan_shape=(6, 5))
    with pytest.raises(AcquisitionError, match="10 of 30 frames were never written: 10 to 19"):
        check_complete(source)
    masked = without_gaps(source)
    assert masked.missing == ((10, 20),)
    frames[10:20] = 0
    np.testing.assert_array_equal(masked.read(0, 0, 6).reshape(-1, 6, 7), frames)


def test_a_writer_without_swmr_is_named(tmp_path: Path) -> None:
    code = (
        "import h5py, sys; f = h5py.File(sys.argv[1], 'w'); f['a'] = [1]; f.flush(); print('open', flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.h5")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(FormatError, match=r"cannot be read as HDF5 .*still being written"):
            open_frames(tmp_path / "a.h5")
        process.communicate("\n")
