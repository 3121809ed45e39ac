"""Ingest as the user says: cropped, binned, narrowed, masked; what looks wrong is counted, a kill changes nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import stemtomo
from stemtomo.cli import app
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.errors import AcquisitionError, AcquisitionWarning, ConfigurationError, FormatError
from stemtomo.io.prepared import read_dead_pixels
from stemtomo.io.sources import open_frames
from stemtomo.io.store import Store
from stemtomo.pipeline.config import IngestSettings
from stemtomo.pipeline.ingest import ingest, plan_ingest
from stemtomo.pipeline.quicklook import quicklook
from stemtomo.pipeline.watch import watch
from tests.io.cases import counts, digest, experiment
from tests.pipeline.acquisitions import configuration

SHAPE = (2, 20, 18, 8, 12)


def copied(folder: Path, frames: np.ndarray, name: str = "s", threads: int = 1, **settings: Any) -> dict[str, Any]:
    """Ingest ``frames`` (tilt, y, x, ky, kx) from an .npy."""
    if not (folder / "f.npy").exists():
        np.save(folder / "f.npy", frames)
    told = IngestSettings(**settings)
    source = open_frames(folder / "f.npy")
    return ingest(folder / f"{name}.zarr", source, *experiment(frames.shape), told, executor=ThreadExecutor(threads))


def stored(folder: Path, tilt: int = 0, name: str = "s") -> np.ndarray:
    return np.asarray(Store.open(folder / f"{name}.zarr").frames(tilt)[:])


# -- changed on their way ----------------------------------------------------------------------------------------------


def test_crop_and_bin_add_up_pixels_and_move_the_beam(tmp_path: Path) -> None:
    frames = counts(SHAPE)
    copied(tmp_path, frames, crop=(0, 6, 1, 10), bin=3)
    part = frames[:, :, :, 0:6, 1:10]
    expected = sum(part[..., i::3, j::3].astype(int) for i in range(3) for j in range(3))
    np.testing.assert_array_equal(stored(tmp_path, 1), expected[1])
    detector = Store.open(tmp_path / "s.zarr").detector(0)
    assert detector.shape_yx == (2, 3)
    assert detector.pixel_inv_angstrom == pytest.approx(0.15)
    # The beam was at 1.5, 2.0 of the whole detector: spatial frequencies of the bins are the means of their pixels.
    for axis, (first, centre) in enumerate(((0, 1.5), (1, 2.0))):
        frequency = (np.arange(first, first + 3 * detector.shape_yx[axis]) - centre).reshape(-1, 3).mean(1) * 0.05
        found = (np.arange(detector.shape_yx[axis]) - detector.centre_yx[axis]) * detector.pixel_inv_angstrom
        np.testing.assert_allclose(found, frequency, atol=1e-12)


def test_sums_of_bins_do_not_overflow(tmp_path: Path) -> None:
    with pytest.warns(AcquisitionWarning):
        copied(tmp_path, np.full(SHAPE, 65535, "u2"), bin=4, saturation_counts=16 * 65535)
    assert stored(tmp_path).dtype == np.uint32
    assert np.unique(stored(tmp_path)).tolist() == [16 * 65535]


def test_bins_of_the_widest_counts(tmp_path: Path) -> None:
    copied(tmp_path, counts(SHAPE, "<u8"), bin=2)
    np.testing.assert_array_equal(
        stored(tmp_path), counts(SHAPE)[0].reshape(20, 18, 4, 2, 6, 2).sum(axis=(3, 5), dtype="u8")
    )


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x93NUMPY"])
def test_a_damaged_file_of_dead_pixels_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "dead.npy").write_bytes(data)
    with pytest.raises(ConfigurationError, match=r"ingest\.dead_pixels = .*dead\.npy: cannot be read as \.npy"):
        read_dead_pixels(tmp_path / "dead.npy")


def test_dead_pixels_take_the_median_of_their_neighbours(tmp_path: Path) -> None:
    frames = counts(SHAPE)
    dead = np.zeros((8, 12), bool)
    dead[3, 4] = dead[0, 0] = dead[6, 6] = dead[6, 7] = True
    np.save(tmp_path / "dead.npy", dead)
    copied(tmp_path, frames, dead_pixels=tmp_path / "dead.npy")
    expected = frames[0].copy()
    for ky, kx in np.argwhere(dead):
        around = [
            frames[0, :, :, y, x]
            for y in range(max(0, ky - 1), min(8, ky + 2))
            for x in range(max(0, kx - 1), min(12, kx + 2))
            if not dead[y, x]
        ]
        expected[:, :, ky, kx] = np.sort(around, axis=0)[(len(around) - 1) // 2]
    np.testing.assert_array_equal(stored(tmp_path), expected)


def test_whole_numbers_are_narrowed_to_what_holds_them_all(tmp_path: Path) -> None:
    frames = counts(SHAPE, "<u4")
    copied(tmp_path, frames, narrow=True)
    assert stored(tmp_path).dtype == np.uint8
    np.testing.assert_array_equal(stored(tmp_path, 1), frames[1])
    again = copied(tmp_path, frames, narrow=True)
    assert again["shards_written"] == 0
    (tmp_path / "f.npy").unlink()
    frames[1, 19, 17, 7, 11] = 256
    copied(tmp_path, frames, "wider", narrow=True)
    np.testing.assert_array_equal(stored(tmp_path, 1, "wider"), frames[1])
    assert stored(tmp_path, 1, "wider").dtype == np.uint16


def test_frames_stored_as_recorded_are_not_narrowed_afterwards(tmp_path: Path) -> None:
    frames = counts(SHAPE, "<u4")
    copied(tmp_path, frames)
    with pytest.raises(AcquisitionError, match="differ in prepared"):
        copied(tmp_path, frames, narrow=True)
    np.testing.assert_array_equal(stored(tmp_path, 1), frames[1])


@pytest.mark.parametrize(("change", "dtype"), [(0.0, "u1"), (0.5, "f4"), (-300.0, "f4")])
def test_real_numbers_are_narrowed_only_if_they_are_counts(change: float, dtype: str, tmp_path: Path) -> None:
    frames = counts(SHAPE, "<f4")
    frames[0, 3, 3, 1, 1] += change
    copied(tmp_path, frames, narrow=True)
    assert stored(tmp_path).dtype == np.dtype(dtype)
    np.testing.assert_array_equal(stored(tmp_path), frames[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": (0, 9, 0, 12)}, r"crop = \[0, 9, 0, 12\] is not inside the detector of 8 x 12"),
        ({"bin": 3}, "bin = 3 does not divide the 8 x 12 .* not left out silently"),
    ],
)
def test_what_does_not_fit_the_detector_is_refused(settings: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        copied(tmp_path, counts(SHAPE), **settings)


def test_a_followed_or_streamed_source_is_not_changed_silently(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "f.npz", a=counts(SHAPE))
    source = open_frames(tmp_path / "f.npz")
    with pytest.raises(ConfigurationError, match=r"compressed as a whole .* numpy.savez"):
        ingest(tmp_path / "s.zarr", source, *experiment(SHAPE), IngestSettings(bin=2))
    with pytest.raises(ConfigurationError, match="are for ingest of finished files"):
        watch(tmp_path / "f.npz", tmp_path / "w.zarr", configuration(tmp_path / "f.npz", None, ingest={"bin": 2}))
    assert not (tmp_path / "w.zarr").exists()


def test_the_plan_is_that_of_the_frames_as_they_are_stored(tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", counts(SHAPE))
    row = plan_ingest(open_frames(tmp_path / "f.npy"), IngestSettings(bin=4))
    assert (row.bytes_read, row.bytes_written) == (2 * 20 * 18 * 96 * 2, 2 * 20 * 18 * 6 * 4)


# -- killed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [2, 7, 12, 16, 19, 23])
def test_killed_anywhere_with_all_of_it_the_bytes_are_the_same(step: int, tmp_path: Path) -> None:
    frames = counts((2, 40, 18, 8, 12), "<u4")
    frames[1, 5, 5] = 0
    told: dict[str, Any] = {"crop": (0, 8, 0, 8), "bin": 2, "narrow": True}
    np.save(tmp_path / "f.npy", frames)
    with pytest.warns(AcquisitionWarning, match="tilt 1: 1 frames are empty"):
        copied(tmp_path, frames, "whole", **told)
    child = os.fork()
    if child == 0:
        sync, seen = os.fsync, [0]

        def counted(descriptor: int) -> None:
            seen[0] += 1
            if seen[0] == step:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(descriptor)

        os.fsync = counted
        copied(tmp_path, frames, "killed", **told)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    copied(tmp_path, frames, "killed", **told)
    whole, killed = digest(tmp_path / "whole.zarr"), digest(tmp_path / "killed.zarr")
    del whole["zarr.json"], killed["zarr.json"]  # the name of the series
    assert killed == whole
    stores = [Store.open(tmp_path / f"{name}.zarr") for name in ("whole", "killed")]
    for tilt in range(2):
        assert stores[0].tilt_attrs(tilt)["noted"] == stores[1].tilt_attrs(tilt)["noted"]
    assert stores[1].tilt_attrs(1)["noted"]["empty_frames"] == 1


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_what_looks_wrong_is_counted_and_said_once_for_each_tilt(tmp_path: Path) -> None:
    frames = counts(SHAPE) + np.uint16(1)
    frames[0, 3, 4] = frames[0, 19, 17] = 0
    frames[0, :, :, 4, 5] = 0
    frames[0, 2, :5, 1, 1] = 65535
    frames[0, 7, 7, 2, 2] = 40000
    with pytest.warns(AcquisitionWarning) as told:
        numbers = copied(tmp_path, frames, threads=2)
    assert len(told) == 1
    text = str(told[0].message)
    for part in ("tilt 0: 2 frames are empty", "5 values in 1 pixels are saturated", "6 values lie in the upper half"):
        assert part in text
    assert "1 pixels never counted" in text
    assert numbers["warnings"] == [text]
    noted = Store.open(tmp_path / "s.zarr").tilt_attrs(0)["noted"]
    assert noted == {
        "largest_value": 65535,
        "empty_frames": 2,
        "dead_pixels": 1,
        "zero_pixels": 1,
        "saturated_pixels": 1,
        "saturated_values": 5,
        "upper_half_values": 6,
        "nonfinite_values": 0,
        "missing_frames": 0,
    }
    clean = Store.open(tmp_path / "s.zarr").tilt_attrs(1)["noted"]
    assert clean["largest_value"] == frames[1].max()
    assert not any(value for key, value in clean.items() if key != "largest_value")


def test_a_share_of_values_need_not_be_finite(tmp_path: Path) -> None:
    frames = counts(SHAPE, "<f4")
    frames[1, 5, 6, 3, 3] = np.nan
    frames[1, 5, 6, 0, 0] = np.inf
    share = 2 / frames[0].size
    with pytest.raises(FormatError, match=r"2 values of tilt 1 are not finite so far, 1 of 34560 are allowed"):
        copied(tmp_path, frames, "few", nonfinite_fraction=0.9 * share)
    with pytest.warns(AcquisitionWarning, match="tilt 1: 2 values were not finite"):
        copied(tmp_path, frames, nonfinite_fraction=1.01 * share)
    expected = frames[1].copy()
    around = np.delete(frames[1, 5, 6, 2:5, 2:5].ravel(), 4)
    expected[5, 6, 3, 3] = np.sort(around)[3]
    expected[5, 6, 0, 0] = np.sort([frames[1, 5, 6, 0, 1], frames[1, 5, 6, 1, 0], frames[1, 5, 6, 1, 1]])[1]
    np.testing.assert_array_equal(stored(tmp_path, 1), expected)


def test_too_many_values_that_are_not_finite_are_too_many_again(tmp_path: Path) -> None:
    frames = counts((1, 40, 18, 8, 12), "<f4")
    frames[0, [5, 39], 6, 3, 3] = np.nan  # in two shards
    for _ in range(2):
        with pytest.raises(FormatError, match=r"2 values of tilt 0 are not finite so far, 1 of 69120 are allowed"):
            copied(tmp_path, frames, nonfinite_fraction=1.5 / frames.size)


def test_gaps_are_a_mask_that_later_steps_use_when_asked(tmp_path: Path) -> None:
    from tests.io.formats.files import write_mib

    frames = counts((16 * 18, 8, 256)).astype("u1") + np.uint8(1)
    write_mib(tmp_path / "a.mib", frames, "U08", 6, lost=(4, 100, 101))
    source = open_frames(tmp_path / "a.mib", scan_shape=(16, 18))
    geometry = experiment((1, 16, 18, 8, 256))
    with pytest.raises(AcquisitionError, match=r"sequence numbers 4, 100 to 101 are missing.* ingest.missing = 'mask'"):
        ingest(tmp_path / "s.zarr", source, *geometry)
    with pytest.warns(AcquisitionWarning, match="3 frames are missing, their positions are masked"):
        numbers = ingest(tmp_path / "s.zarr", source, *geometry, IngestSettings(missing="mask"))
    assert numbers["missing_frames"] == 3
    store = Store.open(tmp_path / "s.zarr", "r+")
    valid = np.ones(16 * 18, bool)
    valid[[3, 99, 100]] = False
    np.testing.assert_array_equal(store.valid(0).ravel(), valid)
    assert store.tilt_attrs(0)["noted"]["empty_frames"] == 0
    np.testing.assert_array_equal(np.asarray(store.frames(0)[:]).reshape(-1, 8, 256)[valid], frames[valid])
    assert ingest(tmp_path / "s.zarr", source, *geometry, IngestSettings(missing="mask"))["shards_written"] == 0
    quicklook(store)
    mean = store.read("quicklook/000")["mean_pattern"].values
    np.testing.assert_allclose(mean, frames[valid].mean(0), rtol=1e-5)


# -- the verb and the command ------------------------------------------------------------------------------------------


TOML = """
[input]
path = "f.npy"
[optics]
energy_kev = 300
semiangle_mrad = 21
[scan]
step_angstrom = 0.5
[detector]
pixel_inv_angstrom = 0.2
[tilts]
theta_deg = [-10, 10]
"""


def test_a_series_is_ingested_by_its_file_and_continued(tmp_path: Path) -> None:
    frames = counts(SHAPE)
    np.save(tmp_path / "f.npy", frames)
    (tmp_path / "a.toml").write_text(TOML)
    numbers = stemtomo.ingest(tmp_path / "a.toml", tmp_path / "a.zarr", overrides=["ingest.bin=2"])
    assert (numbers["tilts"], numbers["store"]) == (2, str(tmp_path / "a.zarr"))
    command = ["ingest", str(tmp_path / "a.toml"), str(tmp_path / "a.zarr"), "--set", "ingest.bin=2"]
    result = CliRunner().invoke(app, [*command, "--json", str(tmp_path / "n.json")])
    assert result.exit_code == 0, result.output
    assert "a.zarr: 2 tilts, 720 frames" in result.output
    assert '"shards_written": 0' in (tmp_path / "n.json").read_text()
    refused = CliRunner().invoke(app, command[:3])
    assert refused.exit_code == 2
    assert "differ in " in refused.output
