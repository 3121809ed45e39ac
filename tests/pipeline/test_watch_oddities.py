"""Frames that look wrong while they are recorded: counted and said as by ingest, or refused when too many."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stemtomo.errors import AcquisitionError, AcquisitionWarning, StalledError, StoreError
from stemtomo.io import frames as frame_arrays
from stemtomo.io.store import Store
from tests.io.cases import digest
from tests.pipeline.acquisitions import FRAME_BYTES, SHAPE, appended, configuration, follow, frames, ingested, tilts_of


def odd() -> np.ndarray:
    """One tilt with two empty frames, a dead pixel, five saturated values and one in the upper half."""
    data = frames()[0]
    data[3, 4] = data[39, 17] = 0
    data[:, :, 4, 5] = 0
    data[20, :5, 1, 1] = 65535
    data[7, 7, 2, 2] = 40000
    return data


def test_oddities_are_counted_as_by_ingest_and_said_once(tmp_path: Path) -> None:
    path, data = tmp_path / "a.raw", odd()
    config = configuration(path, files=None, tilts=1)
    steps = appended(path, data.tobytes(), [300 * FRAME_BYTES + 9])
    with pytest.raises(StalledError):  # half of it, and a restart that looks at what is there again
        follow(config, tmp_path / "s.zarr", steps[:1])
    with pytest.warns(AcquisitionWarning) as told:
        _, numbers = follow(config, tmp_path / "s.zarr", steps[1:])
    texts = [str(found.message) for found in told if found.category is AcquisitionWarning]
    assert [text.partition(", ")[2] for text in texts] == [text.partition(", ")[2] for text in numbers["warnings"]]
    assert len(texts) == 1
    for part in (
        "2 frames are empty",
        "5 values in 1 pixels are saturated",
        "6 values lie in",
        "1 pixels never counted",
    ):
        assert part in texts[0]
    noted = Store.open(tmp_path / "s.zarr").tilt_attrs(0)["noted"]
    assert (noted["empty_frames"], noted["saturated_values"], noted["dead_pixels"]) == (2, 5, 1)
    with pytest.warns(AcquisitionWarning):
        plain = ingested(config, tmp_path / "plain.zarr")
    assert tilts_of(digest(tmp_path / "s.zarr")) == plain  # their counts among it


def test_positions_without_a_frame_are_not_counted_as_empty(tmp_path: Path) -> None:
    path, data = tmp_path / "a.raw", odd()
    path.write_bytes(data.tobytes()[: 700 * FRAME_BYTES])
    config = configuration(path, files=None, tilts=1, missing="mask")
    with pytest.warns(AcquisitionWarning, match="100 frames are missing, .*masked; 1 frames are empty"):
        follow(config, tmp_path / "s.zarr")
    noted = Store.open(tmp_path / "s.zarr").tilt_attrs(0)["noted"]
    assert (noted["missing_frames"], noted["empty_frames"]) == (100, 1)


def test_a_share_of_values_need_not_be_finite(tmp_path: Path) -> None:
    path, data = tmp_path / "a.raw", frames()[0].astype("<f4")
    data[5, 6, 3, 3] = np.nan
    data[35, 6, 0, 0] = np.inf
    path.write_bytes(data.tobytes())
    share = 2 / data.size

    def config(allowed: float) -> object:
        ingest = {"shard_mib": 8 * 8 * 2 * FRAME_BYTES / 2**20, "nonfinite_fraction": allowed}
        return configuration(path, files=None, tilts=1, input_dtype="<f4", ingest=ingest)

    with pytest.raises(AcquisitionError, match=r"2 values of tilt 0 are not finite so far, 1 of 204800 are allowed"):
        follow(config(0.9 * share), tmp_path / "few.zarr")  # type: ignore[arg-type]
    store = Store.open(tmp_path / "few.zarr")
    assert len(store.recorded_frames(0)) < 15  # the shard that was too much is not
    with pytest.warns(AcquisitionWarning, match="2 values were not finite"):
        follow(config(1.01 * share), tmp_path / "s.zarr")  # type: ignore[arg-type]
    stored = Store.open(tmp_path / "s.zarr").frames(0)[:]
    assert np.isfinite(stored).all()
    assert (stored != data).sum() == 2


def test_a_disk_that_is_full_leaves_the_record_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, data = tmp_path / "a.raw", frames()[0]
    path.write_bytes(data.tobytes())
    config = configuration(path, files=None, tilts=1)
    write, calls = frame_arrays.write_shard, []

    def full(*told: object) -> None:
        calls.append(told)
        if len(calls) > 4:
            raise StoreError("the disk is full")
        write(*told)  # type: ignore[arg-type]

    monkeypatch.setattr(frame_arrays, "write_shard", full)
    with pytest.raises(StoreError, match="the disk is full"):
        follow(config, tmp_path / "s.zarr", workers=1)
    store = Store.open(tmp_path / "s.zarr")
    done = store.recorded_frames(0)
    assert 0 < len(done) <= 4
    assert store.fingerprint("tilt/000") is None
    monkeypatch.undo()
    follow(config, tmp_path / "s.zarr")
    assert tilts_of(digest(tmp_path / "s.zarr")) == ingested(config, tmp_path / "plain.zarr")
    np.testing.assert_array_equal(Store.open(tmp_path / "s.zarr").frames(0)[:], data)


def test_the_order_of_bytes_is_that_of_the_file(tmp_path: Path) -> None:
    path, data = tmp_path / "a.raw", frames()[0]
    path.write_bytes(data.astype(">u2").tobytes())
    config = configuration(path, files=None, tilts=1, input_dtype=">u2")
    follow(config, tmp_path / "s.zarr")
    np.testing.assert_array_equal(Store.open(tmp_path / "s.zarr").frames(0)[:], data)
    assert tilts_of(digest(tmp_path / "s.zarr")) == ingested(config, tmp_path / "plain.zarr")


def test_the_codec_that_is_asked_for_is_used(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(frames()[0].tobytes())
    config = configuration(path, files=None, tilts=1, ingest={"shard_mib": 1.0, "codec": "zstd"})
    follow(config, tmp_path / "s.zarr")
    assert "zstd" in (tmp_path / "s.zarr" / "tilt" / "000" / "frames" / "zarr.json").read_text()
    assert tilts_of(digest(tmp_path / "s.zarr")) == ingested(config, tmp_path / "plain.zarr")
    assert Store.open(tmp_path / "s.zarr").frames(0).shape == SHAPE[1:]


def test_values_that_are_not_finite_count_behind_a_restart(tmp_path: Path) -> None:
    path, data = tmp_path / "a.raw", frames()[0].astype("<f4")
    data[[0, -1], 3, 3, 3] = np.nan  # in the first and the last shard
    told = {"files": None, "tilts": 1, "input_dtype": "<f4", "ingest": {"nonfinite_fraction": 1.5 / data.size}}
    config, whole = configuration(path, **told), data.tobytes()
    steps = appended(path, whole, [len(whole) * 3 // 4])
    with pytest.raises(StalledError):
        follow(config, tmp_path / "s.zarr", steps[:1])
    with pytest.raises(AcquisitionError, match="2 values of tilt 0 are not finite so far, 1 of"):
        follow(config, tmp_path / "s.zarr", steps[1:])
