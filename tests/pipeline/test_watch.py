"""Watch: whatever the files do meanwhile, the store is that of a plain ingest, or the error has a name."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stemtomo
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.errors import AcquisitionError, ConfigurationError, StalledError, StoreError
from stemtomo.io.store import Store
from stemtomo.pipeline.quicklook import quicklook
from stemtomo.pipeline.watch import Partial, watch
from tests.clock import ScriptedClock
from tests.io.cases import digest
from tests.pipeline.acquisitions import (
    ANGLES,
    FRAME_BYTES,
    SHAPE,
    TILT_BYTES,
    appended,
    configuration,
    follow,
    frames,
    ingested,
    tilts_of,
)

TOTAL = 3 * 40 * 20
NAMES = [f"scan_{angle:g}.raw" for angle in ANGLES]


def name(tmp_path: Path, tilt: int) -> Path:
    return tmp_path / "in" / NAMES[tilt]


@pytest.fixture
def data(tmp_path: Path) -> np.ndarray:
    (tmp_path / "in").mkdir()
    return frames()


def test_frames_split_across_writes(tmp_path: Path, data: np.ndarray) -> None:
    path = tmp_path / "in" / "series.raw"
    sizes = np.random.default_rng(3).integers(1, 70000, 30).tolist()
    config = configuration(path, files=None)
    reports, numbers = follow(config, tmp_path / "s.zarr", appended(path, data.tobytes(), sizes))
    assert tilts_of(digest(tmp_path / "s.zarr")) == ingested(config, tmp_path / "plain.zarr")
    np.testing.assert_array_equal(Store.open(tmp_path / "s.zarr").frames(2)[:], data[2])
    assert [report.frames for report in reports] == sorted(report.frames for report in reports)
    assert (numbers["frames"], numbers["missing_frames"], reports[-1].lag_frames) == (TOTAL, 0, 0)
    assert all(report.frames + report.lag_frames == report.ready <= report.expected == TOTAL for report in reports)
    assert max(report.lag_s for report in reports) >= 1  # a shard row takes several writes to fill


def test_files_one_by_one_out_of_order_and_late(tmp_path: Path, data: np.ndarray) -> None:
    steps = appended(name(tmp_path, 1), data[1].tobytes(), [12345, 100000])
    steps += [lambda: None] * 15  # late, but before the deadline
    interleaved = [appended(name(tmp_path, tilt), data[tilt].tobytes(), [70001] * 5) for tilt in (2, 0)]
    steps += [step for pair in zip(*interleaved, strict=True) for step in pair]
    config = configuration(tmp_path / "in")
    follow(config, tmp_path / "s.zarr", steps)
    assert tilts_of(digest(tmp_path / "s.zarr")) == ingested(config, tmp_path / "plain.zarr")


def test_renamed_after_the_copy_and_the_folder_itself_late(tmp_path: Path, data: np.ndarray) -> None:
    folder = tmp_path / "later"
    config = configuration(folder, files=[f"t{i}.npy" for i in range(3)], input_dtype=None, input_shape=None)

    def copy(tilt: int) -> None:
        folder.mkdir(exist_ok=True)
        np.save(folder / f".t{tilt}.npy.XYZ.npy", data[tilt])
        (folder / f".t{tilt}.npy.XYZ.npy").rename(folder / f"t{tilt}.npy")

    follow(config, tmp_path / "s.zarr", [lambda tilt=tilt: copy(tilt) for tilt in (1, 0, 2)])
    assert tilts_of(digest(tmp_path / "s.zarr")) == ingested(config, tmp_path / "plain.zarr")


def test_an_npy_is_followed_while_numpy_or_a_camera_writes_it(tmp_path: Path, data: np.ndarray) -> None:
    np.save(tmp_path / "whole.npy", data[:1])
    path = tmp_path / "in" / "growing.npy"
    config = configuration(path, files=None, tilts=1, input_dtype=None, input_shape=None)
    sizes = [3, 40, 90000, 1, 200000]  # a header in pieces, too
    reports, _ = follow(config, tmp_path / "s.zarr", appended(path, (tmp_path / "whole.npy").read_bytes(), sizes))
    np.testing.assert_array_equal(Store.open(tmp_path / "s.zarr").frames(0)[:], data[0])
    assert reports[0].ready < 800


def test_an_opaque_file_is_taken_when_it_has_settled(tmp_path: Path, data: np.ndarray) -> None:
    np.savez(tmp_path / "whole.npz", frames=data[:1])
    path = tmp_path / "in" / "t.npz"
    config = configuration(path, files=None, tilts=1, input_dtype=None, input_shape=None)
    clock = ScriptedClock(appended(path, (tmp_path / "whole.npz").read_bytes(), [100, 200000]))
    list(watch(path, tmp_path / "s.zarr", config, clock=clock, executor=ThreadExecutor(1)))
    np.testing.assert_array_equal(Store.open(tmp_path / "s.zarr").frames(0)[:], data[0])
    assert clock.pauses >= 3 + 3  # three writes, and three seconds without one


def test_a_stall_and_a_restart(tmp_path: Path, data: np.ndarray) -> None:
    config = configuration(tmp_path / "in")
    name(tmp_path, 0).write_bytes(data[0].tobytes())
    name(tmp_path, 1).write_bytes(data[1].tobytes()[: 500 * FRAME_BYTES + 7])
    message = r"scan_0.5.raw: no new frame for 20 s; it ends inside frame 500 of 800 frames(.|\n)*tilts \[2\]"
    with pytest.raises(StalledError, match=message):
        follow(config, tmp_path / "s.zarr")
    store = Store.open(tmp_path / "s.zarr")
    assert store.fingerprint("tilt/000")
    assert len(store.recorded_frames(1)) == 9  # three shard rows of 8 x 20 positions fit 500 frames
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "s.zarr").rglob("c/*/*/0/0")}
    steps = appended(name(tmp_path, 1), data[1].tobytes()[500 * FRAME_BYTES + 7 :], [1000])
    steps += appended(name(tmp_path, 2), data[2].tobytes(), [])
    follow(config, tmp_path / "s.zarr", steps)
    assert tilts_of(digest(tmp_path / "s.zarr")) == ingested(config, tmp_path / "plain.zarr")
    assert {path: path.stat().st_mtime_ns for path in written if "tilt" in str(path)} == {
        path: time_ns for path, time_ns in written.items() if "tilt" in str(path)
    }


def test_a_stopped_watch_goes_on_where_it_was(tmp_path: Path, data: np.ndarray) -> None:
    config = configuration(tmp_path / "in")
    for tilt in range(3):
        name(tmp_path, tilt).write_bytes(data[tilt].tobytes())
    for stop in (1, 7, 20):
        reports = watch(tmp_path / "in", tmp_path / "s.zarr", config, clock=ScriptedClock(), executor=ThreadExecutor(2))
        for _ in range(stop):
            next(reports)
        reports.close()
    follow(config, tmp_path / "s.zarr")
    assert tilts_of(digest(tmp_path / "s.zarr")) == ingested(config, tmp_path / "plain.zarr")
    reports, numbers = follow(config, tmp_path / "s.zarr")
    assert reports == []
    assert numbers["frames"] == TOTAL


def test_the_files_may_go_when_their_tilts_are_complete(tmp_path: Path, data: np.ndarray) -> None:
    config = configuration(tmp_path / "in")
    name(tmp_path, 0).write_bytes(data[0].tobytes())
    with pytest.raises(StalledError):
        follow(config, tmp_path / "s.zarr")
    name(tmp_path, 0).unlink()
    for tilt in (1, 2):
        name(tmp_path, tilt).write_bytes(data[tilt].tobytes())
    _, numbers = follow(config, tmp_path / "s.zarr")
    assert numbers["frames"] == TOTAL


def broken(config: Any, store: Path, steps: list[Any], message: str) -> None:
    with pytest.raises(AcquisitionError, match=message) as caught:
        follow(config, store, steps)
    assert not isinstance(caught.value, StalledError)


def test_a_file_of_all_tilts_that_goes_behind_its_first_one_is_named(tmp_path: Path, data: np.ndarray) -> None:
    path = tmp_path / "in" / "a.raw"
    first = data.nbytes // 3
    steps = appended(path, data.tobytes()[: first + 9 * FRAME_BYTES], [first])
    gone = r"tilt 0: is no longer there(.|\n)*tilt 2: is no longer there"
    broken(configuration(path, files=None), tmp_path / "s.zarr", [*steps, path.unlink], gone)


def test_a_truncated_file_stops_its_tilt_and_no_other(tmp_path: Path, data: np.ndarray) -> None:
    steps = appended(name(tmp_path, 0), data[0].tobytes(), [300 * FRAME_BYTES])[:1]
    steps.append(lambda: name(tmp_path, 0).open("r+b").truncate(100 * FRAME_BYTES))
    steps += appended(name(tmp_path, 1), data[1].tobytes(), [50000])
    steps += appended(name(tmp_path, 2), data[2].tobytes(), [50000])
    broken(configuration(tmp_path / "in"), tmp_path / "s.zarr", steps, "scan_-30.raw: shrank from 300 to 100 frames")
    store = Store.open(tmp_path / "s.zarr")
    assert len(store.recorded_frames(0)) == 3
    np.testing.assert_array_equal(store.frames(2)[:], data[2])


def test_a_replaced_file_is_told_with_both_identities(tmp_path: Path, data: np.ndarray) -> None:
    config = configuration(tmp_path / "in" / "a.raw", files=None, tilts=1)
    path, other = tmp_path / "in" / "a.raw", tmp_path / "in" / "b.raw"
    steps = appended(path, data[0].tobytes(), [300 * FRAME_BYTES])[:1]

    def replace() -> None:
        other.write_bytes(frames(seed=1)[0].tobytes())
        other.rename(path)

    broken(config, tmp_path / "s.zarr", [*steps, replace], "a.raw: was replaced .* it was .*inode.*now it is .*inode")
    with pytest.raises(AcquisitionError, match="was replaced"):  # a restart does not mix the two either
        follow(config, tmp_path / "s.zarr")


def test_too_many_frames_are_not_cut_off(tmp_path: Path, data: np.ndarray) -> None:
    path = tmp_path / "in" / "a.raw"
    config = configuration(path, files=None, tilts=1)
    steps = appended(path, data[0].tobytes() + bytes(2 * FRAME_BYTES), [300 * FRAME_BYTES])
    broken(config, tmp_path / "s.zarr", steps, "holds 802 frames, 2 more than the 800 of its scan")


def test_a_tilt_unlike_the_first_is_refused(tmp_path: Path, data: np.ndarray) -> None:
    config = configuration(tmp_path / "in", files="t{tilt}.npy", input_dtype=None, input_shape=None)
    kinds = [data[0], data[1].astype(np.int32), data[2][:, :10]]
    steps = [lambda i=i, kind=kind: np.save(tmp_path / "in" / f"t{i}.npy", kind) for i, kind in enumerate(kinds)]
    message = r"t1.npy: holds .* int32; expected one tilt, like .*t0.npy with .* uint16(.|\n)*t2.npy: holds"
    broken(config, tmp_path / "s.zarr", steps, message)
    assert Store.open(tmp_path / "s.zarr").fingerprint("tilt/000")


def test_duplicate_and_unreadable_angles_are_refused(tmp_path: Path, data: np.ndarray) -> None:
    for file in ("scan_-30.raw", "scan_-30.0.raw", "scan_0.5.raw", "scan_30.raw", "notes_-30.raw", ".scan_30.raw.x"):
        (tmp_path / "in" / file).write_bytes(data[0].tobytes())
    message = r"scan_-30.0.raw and scan_-30.raw are both tilt 0 \(-30 deg\); none of them is taken"
    broken(configuration(tmp_path / "in"), tmp_path / "s.zarr", [], message)
    assert Store.open(tmp_path / "s.zarr").fingerprint("tilt/001")
    assert not (tmp_path / "s.zarr" / "tilt" / "000").exists()
    (tmp_path / "in" / "scan_-30.0.raw").rename(tmp_path / "in" / "scan_oops.raw")
    broken(configuration(tmp_path / "in"), tmp_path / "s2.zarr", [], "scan_oops.raw: 'oops' is not a tilt angle")


def test_which_file_is_which_tilt_must_be_said(tmp_path: Path, data: np.ndarray) -> None:
    def refuse(files: Any, message: str) -> None:
        config = configuration(tmp_path / "in", files=files)
        with pytest.raises(ConfigurationError, match=message):
            watch(tmp_path / "in", tmp_path / "s.zarr", config)

    refuse(None, "is a folder: say with input.files")
    refuse("a.raw", "exactly one of")
    refuse(["a.raw", "b.raw", "a.raw"], "2 different files for 3 tilts")


def test_bad_frames_stop_their_tilt(tmp_path: Path, data: np.ndarray) -> None:
    config = configuration(tmp_path / "in" / "a.raw", files=None, tilts=1, input_dtype="<f4")
    bad = data[0].astype("<f4")
    bad[30, 3, 2, 2] = np.nan
    (tmp_path / "in" / "a.raw").write_bytes(bad.tobytes())
    broken(config, tmp_path / "s.zarr", [], "1 non-finite values in 1 of the .* the first in the pattern at y 30, x 3")


def test_an_unreadable_file_is_waited_for_and_its_error_is_chained(tmp_path: Path, data: np.ndarray) -> None:
    path = tmp_path / "in" / "t.npy"
    path.write_bytes(b"\x93NUMPY garbage")
    config = configuration(path, files=None, tilts=1, input_dtype=None, input_shape=None)
    with pytest.raises(StalledError, match=r"read until the deadline .* is it still being copied") as caught:
        follow(config, tmp_path / "s.zarr")
    assert caught.value.__cause__ is not None


def test_missing_frames_are_masked_when_asked(tmp_path: Path, data: np.ndarray) -> None:
    config = configuration(tmp_path / "in", missing="mask")
    for tilt, part in enumerate((800, 630, 800)):
        name(tmp_path, tilt).write_bytes(data[tilt].tobytes()[: part * FRAME_BYTES + 5 * (part < 800)])
    _, numbers = follow(config, tmp_path / "s.zarr")
    assert numbers["missing_frames"] == 170
    store = Store.open(tmp_path / "s.zarr")
    valid = store.valid(1)
    assert valid.sum() == 630
    assert not valid.ravel()[630:].any()
    assert store.valid(0).all()
    np.testing.assert_array_equal(store.frames(1)[:][valid], data[1][valid])
    assert not store.frames(1)[:][~valid].any()
    looked = store.read("quicklook/001")
    np.testing.assert_array_equal(looked["valid"], valid)
    np.testing.assert_allclose(looked["mean_pattern"], data[1][valid].mean(axis=0), rtol=1e-6)
    assert "valid" not in store.read("quicklook/000")
    np.testing.assert_array_equal(stemtomo.open(tmp_path / "s.zarr")["tilt/001"]["valid"], valid)
    _, again = follow(config, tmp_path / "s.zarr")
    assert again["missing_frames"] == 170


def test_frames_that_come_after_a_kill_take_the_place_of_the_mask(tmp_path: Path, data: np.ndarray) -> None:
    path = tmp_path / "in" / "a.raw"
    path.write_bytes(data[0].tobytes()[: 630 * FRAME_BYTES])
    config = configuration(path, files=None, tilts=1, missing="mask")
    reports = watch(path, tmp_path / "s.zarr", config, clock=ScriptedClock(), executor=ThreadExecutor(1))
    while next(reports).frames < 720:  # 560 are in whole shard rows, the others were closed with zeros
        pass
    reports.close()
    assert Store.open(tmp_path / "s.zarr").valid(0).sum() == 630
    path.open("ab").write(data[0].tobytes()[630 * FRAME_BYTES :])
    follow(config, tmp_path / "s.zarr")
    assert tilts_of(digest(tmp_path / "s.zarr")) == ingested(config, tmp_path / "plain.zarr")


def test_interim_images_hold_what_has_come(tmp_path: Path, data: np.ndarray) -> None:
    path = tmp_path / "in" / "a.raw"
    config = configuration(path, files=None, tilts=1, publish_s=0.0)
    path.write_bytes(data[0].tobytes()[: 400 * FRAME_BYTES])
    with pytest.raises(StalledError):
        follow(config, tmp_path / "s.zarr")
    with pytest.raises(StoreError, match="incomplete"):
        Store.open(tmp_path / "s.zarr").frames(0)
    for _ in range(2):  # a restart shows them again
        looked = stemtomo.open(tmp_path / "s.zarr")["quicklook/000"]
        done = looked["done"].values
        assert done.sum() == 2 * 8 * 20
        np.testing.assert_allclose(looked["total_counts"].values[done], data[0].sum(axis=(-2, -1))[done])
        assert not looked["total_counts"].values[~done].any()
        np.testing.assert_allclose(looked["mean_pattern"], data[0][done].mean(axis=0), rtol=1e-6)
        with pytest.raises(StalledError):
            follow(config, tmp_path / "s.zarr")
    path.write_bytes(data[0].tobytes())
    follow(config, tmp_path / "s.zarr")
    store = Store.open(tmp_path / "s.zarr", "r+")
    assert "done" not in store.read("quicklook/000")
    assert quicklook(store, config.quicklook)["computed"] == 0


def test_reports_say_rates_and_the_window_is_bounded(tmp_path: Path, data: np.ndarray) -> None:
    class Counting(ThreadExecutor):
        most = 0

        def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
            handle = super().submit(function, *args, **kwargs)
            self.handles = [h for h in getattr(self, "handles", []) if not h.done()] + [handle]
            self.most = max(self.most, len(self.handles))
            return handle

    path = tmp_path / "in" / "a.raw"
    path.write_bytes(data.tobytes())
    executor = Counting(2)
    reports = list(watch(path, tmp_path / "s.zarr", configuration(path, files=None), executor=executor))
    assert executor.most <= 2 * 2 + 1  # and what follows a tilt's mark
    assert len(reports) == 3 * 5 * 3
    assert isinstance(reports[-1], Partial)
    assert reports[-1].frames_per_s > 0
    assert reports[-1].bytes_per_s == pytest.approx(reports[-1].frames_per_s * FRAME_BYTES)


WRITER = """
import sys, time, pathlib
data = pathlib.Path(sys.argv[1]).read_bytes()
with open(sys.argv[2], "ab", buffering=0) as file:
    for start in range(0, len(data), 60001):
        file.write(data[start:start + 60001]); time.sleep(0.01)
"""

WATCHER = """
import pathlib, sys
from tests.pipeline.acquisitions import configuration
from stemtomo.pipeline.watch import watch
from stemtomo.distributed.threads import ThreadExecutor
path = pathlib.Path(sys.argv[1])
config = configuration(path, files=None, poll_s=0.02)
for partial in watch(path, sys.argv[2], config, executor=ThreadExecutor(2)):
    print(partial.frames, flush=True)
"""


def test_live_with_a_writing_process_and_a_kill(tmp_path: Path, data: np.ndarray) -> None:
    (tmp_path / "data").write_bytes(data.tobytes())
    path, store = tmp_path / "in" / "live.raw", tmp_path / "s.zarr"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "data"), str(path)])
    first = subprocess.Popen([sys.executable, "-c", WATCHER, str(path), str(store)], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    for _ in range(4):
        first.stdout.readline()
    first.send_signal(signal.SIGKILL)
    first.wait()
    first.stdout.close()
    config = configuration(path, files=None, poll_s=0.02)
    began = time.monotonic()
    for partial in watch(path, store, config, executor=ThreadExecutor(2)):
        assert partial.frames <= TOTAL
    assert writer.wait() == 0
    assert time.monotonic() - began < 30
    assert tilts_of(digest(store)) == ingested(config, tmp_path / "plain.zarr")
    assert Store.open(store).frames(1).shape == SHAPE[1:]
    assert path.stat().st_size == 3 * TILT_BYTES
