"""Watch goes on into the reconstruction: tilt by tilt, without the positions that have no frame, from the shell too."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from stemtomo import cli
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.errors import FormatError
from stemtomo.io.store import Store
from stemtomo.pipeline import watch as module
from stemtomo.pipeline.conclusion import Conclusions
from stemtomo.pipeline.config import PtychographySettings
from stemtomo.pipeline.ptychography import load_counts, ptychography
from tests.pipeline.acquisitions import FRAME_BYTES, configuration, follow, frames
from tests.pipeline.series import ANGLES_DEG, SCAN, make_series

QUICK = {"epochs": 4, "settling_epochs": 0, "probe_update_start_epoch": 99}


def test_phases_of_a_tilt_are_there_while_the_next_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_series(tmp_path / "made.zarr")
    folder = tmp_path / "in"
    folder.mkdir()
    config = configuration(
        folder,
        files=[f"t{i}.npy" for i in range(3)],
        input_dtype=None,
        input_shape=None,
        then_run=True,
        optics={"energy_kev": 300, "semiangle_mrad": 21, "defocus_c1_angstrom": 120},
        scan={"step_angstrom": 1.2},
        detector={"pixel_inv_angstrom": 1 / 12.8},
        angles=ANGLES_DEG,
        ptychography=QUICK,
    )
    ran: list[Any] = []
    monkeypatch.setattr(module, "run_stages", lambda store, settings, **_: ran.append(settings) or {"name": "s"})
    found = []

    def write(tilt: int) -> None:
        store = Store.open(tmp_path / "s.zarr")
        found.append(store.fingerprint("ptychography/000") is not None)
        np.save(folder / f"t{tilt}.npy", made.frames(tilt)[:])

    steps = [lambda: write(0), lambda: write(1), lambda: write(2)]
    _, numbers = follow(config, tmp_path / "s.zarr", steps, workers=1)  # one worker does one thing after the other
    assert found == [False, False, True]
    assert numbers["run"] == {"name": "s"}
    store = Store.open(tmp_path / "s.zarr", "r+")
    assert ptychography(store, ran[0].ptychography)["computed"] == 0


def test_positions_without_a_frame_are_left_out_of_the_reconstruction(tmp_path: Path) -> None:
    store = make_series(tmp_path / "s.zarr", tilts=2)
    whole = store.frames(0)[:]
    settled: dict[str, Any] = {**QUICK, "epochs": 16, "settling_epochs": 10, "batches": 8}
    settings = PtychographySettings(**settled)
    ptychography(store, settings)
    full = store.read("ptychography/000")["phase_sum"].values
    cut = whole.copy()
    cut[8:] = 0
    store.write_frames(0, 0, 0, cut)
    with pytest.raises(FormatError, match="22 patterns without a single electron, the first at scan position 88"):
        load_counts(store, 0)
    store.close_source(0, {}, [(88, 110)])
    assert load_counts(store, 0).shape == (88, 32, 32)
    ptychography(store, PtychographySettings(**settled, seed=1), tilts=[0])
    result = store.read("ptychography/000")
    partial, lit = result["phase_sum"].values, result["illumination"].values
    assert partial.shape == full.shape
    seen = lit > 0.3 * lit.max()
    assert seen.sum() < 0.95 * (store.read("ptychography/001")["illumination"].values > 0.3 * lit.max()).sum()
    assert np.corrcoef(partial[seen], full[seen])[0, 1] > 0.95
    assert int(store.valid(0).sum()) == SCAN.count - 22


def toml(tmp_path: Path) -> Path:
    path = tmp_path / "series.toml"
    path.write_text(
        """
        input = {path = "elsewhere", files = "t{tilt}.raw", axes = "y,x,ky,kx", dtype = "<u2", shape = [40, 20, 16, 16]}
        optics = {energy_kev = 300, semiangle_mrad = 21}
        scan = {step_angstrom = 0.5}
        detector = {pixel_inv_angstrom = 0.2}
        tilts = {theta_deg = [-10, 10]}
        ingest = {shard_mib = 0.125}
        """.replace("\n        ", "\n")
    )
    return path


def call(*words: object) -> Any:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def test_the_command_says_done_stalled_and_bad_input(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    data = frames()
    words = ("watch", tmp_path / "in", tmp_path / "s.zarr", "--config", toml(tmp_path))
    quick = ("--deadline", 0.05, "--poll", 0.01)
    (tmp_path / "in" / "t0.raw").write_bytes(data[0].tobytes())
    (tmp_path / "in" / "t1.raw").write_bytes(data[1].tobytes()[: 700 * FRAME_BYTES])
    result = call(*words, *quick)
    assert result.exit_code == 3, result.output
    assert "no new frame for 0.05 s; it has 700 of 800 frames" in result.output
    result = call(*words, *quick, "--missing", "mask", "--json", tmp_path / "n.json")
    assert result.exit_code == 0, result.output
    assert "2 tilts, 1600 frames, 100 missing" in result.output
    numbers = json.loads((tmp_path / "n.json").read_text())
    assert (numbers["missing_frames"], numbers["last"]["tilts_complete"]) == (100, 1)
    (tmp_path / "in" / "tx.raw").write_bytes(b"")
    result = call(*words[:2], tmp_path / "s2.zarr", *words[3:], *quick, "--missing", "mask")
    assert result.exit_code == 2, result.output
    assert "'x' is not the number of a tilt" in result.output
    assert call(*words, "--missing", "guess").exit_code == 2


def test_the_command_says_what_looks_wrong_when_it_comes_up(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    odd = frames()[0]
    odd[3, 3] = 0
    (tmp_path / "in" / "t0.raw").write_bytes(odd.tobytes())  # the second tilt never comes
    words = ("watch", tmp_path / "in", tmp_path / "s.zarr", "--config", toml(tmp_path))
    result = call(*words, "--deadline", 0.05, "--poll", 0.01)
    assert result.exit_code == 3, result.output
    assert result.output.count("Warning: ") == 1
    assert "1 frames are empty" in result.output


def test_tilts_that_are_reconstructed_at_once_share_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_series(tmp_path / "s.zarr")
    made = configuration(tmp_path, then_run=True, ptychography={**QUICK, "memory_gib": 6.0})
    told: list[Any] = []

    class Busy(ThreadExecutor):
        def submit(self, function: Any, *args: Any, **_: Any) -> Any:
            told.append(args[-1])
            return SimpleNamespace(done=lambda: False)

    conclusions = Conclusions(store, made, Busy(4))
    for tilt in range(3):
        conclusions.add(tilt)
    conclusions.go_on()
    # Three of four threads reconstruct; the fourth is for frames.
    assert [settings.memory_gib for settings in told] == [pytest.approx(2.0)] * 3
    assert {"memory_gib"} <= PtychographySettings.HOW  # which changes no result
