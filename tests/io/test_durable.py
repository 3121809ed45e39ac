"""What was recorded outlives a power cut: files and the names of the folders above them are on the disk before."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from stemtomo.io.store import Store
from tests.io.cases import counts, experiment

SHAPE = (1, 40, 40, 6, 4)


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    paths: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        paths.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return paths


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to say which file a descriptor is")
@pytest.mark.parametrize(("dtype", "zeros"), [("u2", False), ("u2", True)])
def test_names_of_new_folders_are_on_the_disk_before_a_shard_counts_as_written(
    tmp_path: Path, synced: list[str], dtype: str, zeros: bool
) -> None:
    store = Store.create(tmp_path / "new" / "folders" / "s.zarr", "s")
    assert {str(tmp_path), str(tmp_path / "new"), str(tmp_path / "new/folders"), str(store.path)} <= set(synced)
    optics, scan, detector, tilts = experiment(SHAPE)
    store.declare_tilts(1)
    assert str(store.path) in synced[synced.index(str(store.path)) + 1 :]
    store.create_tilt(0, SHAPE[1:], dtype, optics, scan, detector, tilts[0])
    synced.clear()
    frames = counts(SHAPE)[0]
    store.write_frames(0, 32, 0, np.zeros_like(frames[32:, :32]) if zeros else frames[32:, :32])
    array = store.path / "tilt/000/frames"
    new = [array / "c/1/0/0", array / "c/1/0", array / "c/1", array / "c"]
    assert {str(path) for path in (*new, array)} <= set(synced)
