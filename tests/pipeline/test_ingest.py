"""Ingest: the frames in the store are the frames in the file, whatever is killed, and wrong input is named."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client

from stemtomo.distributed.executor import executor
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.errors import AcquisitionError, FormatError, StoreError
from stemtomo.geometry import TiltSeries
from stemtomo.io.sources import open_frames
from stemtomo.io.store import Store
from stemtomo.pipeline.config import IngestSettings, InputSettings
from stemtomo.pipeline.ingest import ingest, open_input, plan_ingest
from tests.io.cases import counts, digest, experiment

SHAPE = (2, 40, 70, 6, 4)
SHARDS = 2 * 2 * 3
FORMS = ["npy", "npz", "raw"]


def write(folder: Path, frames: np.ndarray, form: str) -> dict[str, Any]:
    """Write ``frames`` as ``form`` and return how to open them."""
    path = folder / f"frames.{form}"
    if form == "npy":
        np.save(path, frames)
        return {"path": path}
    if form == "npz":
        np.savez_compressed(path, data=frames, angles=np.zeros(2))
        return {"path": path, "array": "data"}
    path.write_bytes(frames.tobytes())
    return {"path": path, "dtype": frames.dtype, "shape": frames.shape}


@pytest.mark.parametrize("form", FORMS)
def test_frames_in_the_store_are_the_frames_in_the_file(form: str, tmp_path: Path) -> None:
    frames = counts(SHAPE)
    source = open_frames(**write(tmp_path, frames, form))
    numbers = ingest(tmp_path / "s.zarr", source, *experiment(SHAPE), executor=ThreadExecutor(3))
    store = Store.open(tmp_path / "s.zarr")
    for tilt in range(2):
        np.testing.assert_array_equal(store.frames(tilt)[:], frames[tilt])
        assert store.scan(tilt) == experiment(SHAPE)[1]
    assert store.fingerprint("tilt") is not None
    assert (numbers["shards_written"], numbers["shards_kept"]) == (SHARDS, 0)
    assert numbers["bytes_written"] == frames.nbytes
    assert numbers["compression_ratio"] == pytest.approx(frames.nbytes / numbers["bytes_stored"])
    json.dumps(numbers)


def test_every_form_of_a_file_gives_the_same_store(tmp_path: Path) -> None:
    frames = counts(SHAPE)
    stores = []
    for form in FORMS:
        ingest(tmp_path / f"{form}.zarr", open_frames(**write(tmp_path, frames, form)), *experiment(SHAPE))
        found = digest(tmp_path / f"{form}.zarr")
        stores.append({name: value for name, value in found.items() if "/c/" in name})
    assert stores[0] == stores[1] == stores[2]
    assert len(stores[0]) == SHARDS


def test_a_second_run_writes_nothing(tmp_path: Path) -> None:
    source = open_frames(**write(tmp_path, counts(SHAPE), "npy"))
    ingest(tmp_path / "s.zarr", source, *experiment(SHAPE))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s.zarr").rglob("*")}
    numbers = ingest(tmp_path / "s.zarr", source, *experiment(SHAPE))
    assert (numbers["shards_written"], numbers["shards_kept"]) == (0, SHARDS)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "s.zarr").rglob("*")}


def test_corrected_geometry_is_taken_without_copying_frames_again(tmp_path: Path) -> None:
    source = open_frames(**write(tmp_path, counts(SHAPE), "npy"))
    optics, *others = experiment(SHAPE)
    ingest(tmp_path / "s.zarr", source, optics, *others)
    store = Store.open(tmp_path / "s.zarr")
    first = store.fingerprint("tilt"), store.fingerprint("tilt/000")
    numbers = ingest(tmp_path / "s.zarr", source, replace(optics, semiangle_rad=0.03), *others)
    assert numbers["shards_written"] == 0
    assert store.optics(1).semiangle_rad == pytest.approx(0.03)
    second = store.fingerprint("tilt"), store.fingerprint("tilt/000")
    assert None not in second
    assert second[0] != first[0]
    assert second[1] != first[1]


def test_the_same_call_runs_on_a_dask_client(tmp_path: Path) -> None:
    frames = counts(SHAPE)
    source = open_frames(**write(tmp_path, frames, "npy"))
    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None) as client:
        ingest(tmp_path / "client.zarr", source, *experiment(SHAPE), executor=executor(client))
    ingest(tmp_path / "here.zarr", source, *experiment(SHAPE), executor=ThreadExecutor(1))
    here, there = digest(tmp_path / "here.zarr"), digest(tmp_path / "client.zarr")
    del here["zarr.json"], there["zarr.json"]  # the name of the series is that of its store
    assert here == there


def test_progress_counts_every_shard_once(tmp_path: Path) -> None:
    class Watcher:
        def __init__(self) -> None:
            self.total, self.done, self.finished = 0, 0, ""

        def start(self, stage: str, total: int, unit: str = "") -> None:
            self.total = total

        def advance(self, n: int = 1, **numbers: float) -> None:
            self.done += n

        def finish(self, stage: str) -> None:
            self.finished = stage

    source = open_frames(**write(tmp_path, counts(SHAPE), "npz"))
    for _ in range(2):
        watcher = Watcher()
        ingest(tmp_path / "s.zarr", source, *experiment(SHAPE), progress=watcher)
        assert (watcher.total, watcher.done, watcher.finished) == (SHARDS, SHARDS, "ingest")


# -- killed ----------------------------------------------------------------------------------------------------------

KILL = """
import os, signal, sys
from pathlib import Path
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.io.sources import open_frames
from stemtomo.pipeline.ingest import ingest
from tests.io.cases import experiment

folder, array, path, steps = Path(sys.argv[1]), sys.argv[2] or None, sys.argv[3], map(int, sys.argv[4:])
source = open_frames(path, array=array)

def run(store, kill_at=None):
    child = os.fork()
    if child == 0:
        done, sync = 0, os.fsync
        def counted(descriptor):  # every change of the store that matters passes here
            nonlocal done
            done += 1
            if done == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(descriptor)
        os.fsync = counted
        ingest(store, source, *experiment(source.shape), executor=ThreadExecutor(2))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

for step in steps:
    killed = run(folder / f"{step}" / "s.zarr", step)
    again = run(folder / f"{step}" / "s.zarr")
    print(step, killed, again)
print(0, run(folder / "whole" / "s.zarr"), 0)
"""


@pytest.mark.parametrize(
    ("form", "steps"),
    [("npy", [1, 2, 3, 5, 9, 10, 11, 12, 23, 30, 44, 64, 66]), ("npz", [4, 8, 13, 14, 17, 24, 37, 45, 63, 65, 67])],
)
def test_killed_anywhere_a_second_ingest_ends_with_the_same_bytes(form: str, steps: list[int], tmp_path: Path) -> None:
    """A process is killed (SIGKILL) at one of its writes, from the first metadata to the last mark; then run again."""
    opened = write(tmp_path, counts(SHAPE), form)
    arguments = [str(tmp_path), opened.get("array", ""), str(opened["path"]), *map(str, steps)]
    result = subprocess.run(
        [sys.executable, "-c", KILL, *arguments], capture_output=True, text=True, timeout=120, check=True
    )
    outcomes = {
        int(step): (int(killed), int(again)) for step, killed, again in map(str.split, result.stdout.splitlines())
    }
    assert set(outcomes) == {0, *steps}
    assert all(again == 0 for _, again in outcomes.values())
    assert {outcomes[step][0] for step in steps} == {-9}
    assert outcomes[0] == (0, 0)
    expected = digest(tmp_path / "whole" / "s.zarr")
    assert len(expected) == SHARDS + 6
    for step in steps:
        assert digest(tmp_path / f"{step}" / "s.zarr") == expected, f"killed at write {step}"


# -- memory ----------------------------------------------------------------------------------------------------------

PEAK = """
import sys
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.io.sources import open_frames
from stemtomo.pipeline.ingest import ingest
from tests.io.cases import experiment

small, large = sys.argv[1:3]
def peak():
    status = open("/proc/self/status").read()  # ru_maxrss would begin with that of the process that started this one
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
for path in (small, large):
    before, source = peak(), open_frames(path)
    ingest(path + ".zarr", source, *experiment(source.shape), executor=ThreadExecutor(2))
    print(peak() - before)
"""


@pytest.mark.parametrize(("form", "allowed"), [("npz", 1.4), ("npy", 0.6)])
def test_memory_is_that_of_a_shard_row_or_of_the_shards_in_work(form: str, allowed: float, tmp_path: Path) -> None:
    """A series of 201 MB, one shard row of 101 MB per tilt, 16 shards in a row, two tasks at a time.

    A stream holds one row, and what Zarr takes to encode one shard (about two copies of it); tasks hold their shards.
    """
    shape, small = (2, 32, 512, 64, 48), (1, 32, 32, 8, 8)
    row = 32 * 512 * 64 * 48 * 2
    pattern = (counts((1, 32, 128, *shape[3:])) // 190).astype("<u2").tobytes()
    for name, frames in (("small", small), ("large", shape)):
        if form == "npz":
            with zipfile.ZipFile(tmp_path / f"{name}.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
                _write_rows(archive.open("data.npy", "w"), frames, pattern)
        else:
            _write_rows((tmp_path / f"{name}.npy").open("wb"), frames, pattern)
    paths = [str(tmp_path / f"{name}.{form}") for name in ("small", "large")]
    arguments = [sys.executable, "-c", PEAK, *paths]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True)
    used = int(result.stdout.split()[-1])
    assert used < allowed * row, f"{used / 1e6:.0f} MB for a shard row of {row / 1e6:.0f} MB"
    if form == "npz":
        assert used > row  # else the peak was not seen


def _write_rows(stream: Any, shape: tuple[int, ...], pattern: bytes) -> None:
    size = int(np.prod(shape)) * 2
    with stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "<u2", "fortran_order": False, "shape": shape})
        for start in range(0, size, len(pattern)):
            stream.write(pattern[: size - start])


def test_the_plan_says_tasks_and_memory_from_headers_alone(tmp_path: Path) -> None:
    shape = (36, 800, 800, 256, 256)
    path = tmp_path / "large.raw"
    with path.open("wb") as file:
        file.truncate(int(np.prod(shape)) * 2)  # a hole: 3 TB that take no room
    row = plan_ingest(open_frames(path, dtype="<u2", shape=shape))
    assert (row.stage, row.tasks) == ("ingest", 36 * 625)
    assert row.bytes_per_task == 3 * 32 * 32 * 256 * 256 * 2
    assert row.bytes_read == row.bytes_written == int(np.prod(shape)) * 2
    half = plan_ingest(open_frames(path, dtype="<u2", shape=shape), IngestSettings(shard_mib=64))
    assert half.tasks == 36 * 2500
    np.savez_compressed(tmp_path / "f.npz", data=counts(SHAPE))
    streamed = plan_ingest(open_frames(tmp_path / "f.npz"))
    assert (streamed.tasks, streamed.resident_bytes) == (1, 32 * 70 * 6 * 4 * 2)


# -- wrong input -----------------------------------------------------------------------------------------------------


def test_a_file_that_changed_between_two_runs_is_refused(tmp_path: Path) -> None:
    opened = write(tmp_path, counts(SHAPE), "npy")
    ingest(tmp_path / "s.zarr", open_frames(**opened), *experiment(SHAPE))
    before = digest(tmp_path / "s.zarr")
    write(tmp_path, counts(SHAPE, seed=1), "npy")
    message = (
        r"tilt 0 was begun from frames\.npy \(268928 bytes.*now .*frames\.npy is .*, ends .* differ in .*another store"
    )
    with pytest.raises(AcquisitionError, match=message):
        ingest(tmp_path / "s.zarr", open_frames(**opened), *experiment(SHAPE))
    assert digest(tmp_path / "s.zarr") == before


def test_a_file_that_changes_while_it_is_read_is_not_marked(tmp_path: Path) -> None:
    opened = write(tmp_path, counts(SHAPE), "npy")

    class Replacing(ThreadExecutor):
        def map_bounded(self, function: Any, items: Any, *shared: Any, window: int | None = None) -> Any:
            yield from super().map_bounded(function, items, *shared, window=window)
            write(tmp_path, counts(SHAPE, seed=1), "npy")

    with pytest.raises(AcquisitionError, match="changed while it was read"):
        ingest(tmp_path / "s.zarr", open_frames(**opened), *experiment(SHAPE), executor=Replacing(2))
    assert Store.open(tmp_path / "s.zarr").fingerprint("tilt") is None


@pytest.mark.parametrize("form", FORMS)
def test_bad_values_stop_ingest_and_good_shards_stay(form: str, tmp_path: Path) -> None:
    frames = counts(SHAPE, "<f4")
    frames[1, 35, 3, 2, 1] = np.nan
    source = open_frames(**write(tmp_path, frames, form))
    with pytest.raises(FormatError, match=r"1 non-finite values .* tilt 1, y 32 to 39, x 0 to 31, .* y 35, x 3"):
        ingest(tmp_path / "s.zarr", source, *experiment(SHAPE), executor=ThreadExecutor(1))
    store = Store.open(tmp_path / "s.zarr")
    assert store.fingerprint("tilt/000") is not None
    assert store.recorded_frames(1) == {0, 1, 2}


def test_negative_counts_are_refused(tmp_path: Path) -> None:
    frames = counts(SHAPE, "<i2")
    frames[0, 0, 0, 0, 0] = -7
    with pytest.raises(FormatError, match="1 negative counts in 1 of the 1024 patterns at tilt 0"):
        ingest(tmp_path / "s.zarr", open_frames(**write(tmp_path, frames, "npy")), *experiment(SHAPE))


def test_geometry_that_does_not_fit_the_frames_is_named(tmp_path: Path) -> None:
    source = open_frames(**write(tmp_path, counts(SHAPE), "npy"))
    optics, scan, detector, tilts = experiment(SHAPE)
    path = tmp_path / "s.zarr"
    with pytest.raises(
        AcquisitionError, match=r"number of tilts is 2 in the file, but 3 was given; give one angle per tilt"
    ):
        ingest(path, source, optics, scan, detector, TiltSeries.from_degrees([0, 1, 2]))
    with pytest.raises(AcquisitionError, match=r"scan \(y, x\) is \(40, 70\) in the file, but \(70, 40\) was given"):
        ingest(path, source, optics, replace(scan, shape_yx=(70, 40)), detector, tilts)
    with pytest.raises(AcquisitionError, match=r"detector \(ky, kx\) is \(6, 4\) in the file, but \(4, 6\)"):
        ingest(path, source, optics, scan, replace(detector, shape_yx=(4, 6)), tilts)
    assert not path.exists()


def test_missing_frames_are_named_before_a_store_is_made(tmp_path: Path) -> None:
    source = open_frames(**write(tmp_path, counts(SHAPE), "raw"))
    with source.path.open("r+b") as file:
        file.truncate(48 * 100)
    with pytest.raises(AcquisitionError, match="ends after frame 100 of 5600"):
        ingest(tmp_path / "s.zarr", source, *experiment(SHAPE))
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize(
    ("dtype", "free", "message", "kept"),
    [
        ("<f4", 100_000, r"100 kB free, the 538 kB of frames still to come need about 538 kB \(real numbers", 0),
        ("<u2", 50_000, r"50 kB free, the 220 kB of .* need about .* kB \(compressed 1\.\d times, like the first", 0),
    ],
)
def test_a_disk_that_is_clearly_too_small_is_named_at_once(
    dtype: str, free: int, message: str, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stemtomo.pipeline.intake.free_bytes", lambda path: free)
    source = open_frames(**write(tmp_path, counts(SHAPE, dtype), "npy"))
    with pytest.raises(StoreError, match=message + ".*make room or choose another store"):
        ingest(tmp_path / "s.zarr", source, *experiment(SHAPE))
    assert len(Store.open(tmp_path / "s.zarr").recorded_frames(0)) == kept


def test_counts_that_compress_are_not_refused_for_their_raw_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stemtomo.pipeline.intake.free_bytes", lambda path: 50_000)
    sparse = (counts(SHAPE) > 198).astype("<u2")
    ingest(tmp_path / "s.zarr", open_frames(**write(tmp_path, sparse, "npy")), *experiment(SHAPE))
    np.testing.assert_array_equal(Store.open(tmp_path / "s.zarr").frames(1)[:], sparse[1])


def test_the_input_section_opens_what_it_names(tmp_path: Path) -> None:
    frames = counts((2, 15, 6, 4))
    np.savez(tmp_path / "f.npz", data=frames, other=np.zeros(1))
    settings = InputSettings(path=tmp_path / "f.npz", array="data", axes="tilt, position, ky, kx")
    source = open_input(settings, (3, 5))
    np.testing.assert_array_equal(source.read(1, 0, 3), frames[1].reshape(3, 5, 6, 4))
