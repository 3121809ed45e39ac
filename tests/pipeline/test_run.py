"""The runner calls the stages in order, once each, passes what they need, and counts what they took."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from stemtomo.errors import ConfigurationError, FormatError, MemoryPlanError, StoreError
from stemtomo.io.store import Store
from stemtomo.pipeline import run as runner
from stemtomo.pipeline.config import STAGES
from stemtomo.pipeline.plan import plan
from stemtomo.pipeline.references import load_configuration
from stemtomo.pipeline.run import recorded_runs, run, run_stages, stage_settings, with_dose, with_memory

EXAMPLES = Path(__file__).parents[2] / "examples"
DATA = Path(os.environ.get("STEMTOMO_DATA", Path(__file__).parents[2].parent / "shared" / "data"))

TOML = """
[series]
store = "{folder}/series.zarr"
[input]
path = "frames.npz"
array = "frames"
[optics]
energy_kev = 300
semiangle_mrad = 21
[scan]
step_angstrom = 1.25
[detector]
pixel_inv_angstrom = 0.1
[tilts]
theta_deg = [-10, 0, 10]
[dose]
electrons_per_pattern = 5000
[ptychography]
epochs = 2
settling_epochs = 0
"""

#: What runs where no other way is asked for.
SEQUENTIAL = [stage for stage in STAGES if stage != "joint"]


@pytest.fixture
def toml(tmp_path):
    frames = np.random.default_rng(0).poisson(5, (3, 8, 8, 32, 32)).astype(np.uint16)
    np.savez(tmp_path / "frames.npz", frames=frames)
    path = tmp_path / "series.toml"
    path.write_text(TOML.format(folder=tmp_path))
    return path


@pytest.fixture
def calls(monkeypatch):
    """Stand-ins for the stages after ingest, and what they were called with."""
    calls = []

    def verb(stage):
        def stand_in(store, settings, *, executor, progress):
            calls.append((stage, settings))
            numbers = {"loss": [3.0, 2.0]} if stage == "tomography" else {}
            if stage == "score":
                numbers |= {"recall": 1.0, "precision": 0.5, "rmsd_pm": 4.0, "species_accuracy": None, "found": 2}
            return numbers

        return stand_in

    monkeypatch.setattr(runner, "stage_verb", verb)
    return calls


@pytest.fixture
def truth(tmp_path):
    path = tmp_path / "known.xyz"
    path.write_text("1\nknown\nAu 0 0 0\n")
    return path


def test_stages_run_in_order_and_the_score_only_with_a_truth(toml, calls, truth):
    numbers = run(load_configuration(toml))
    assert [stage for stage, _ in calls] == SEQUENTIAL[1:-1]
    assert numbers["recall"] is None
    calls.clear()
    numbers = run(load_configuration(toml, [f"score.truth={truth}"]))
    assert [stage for stage, _ in calls] == SEQUENTIAL[1:]
    assert {key: numbers[key] for key in ("recall", "precision", "rmsd_pm", "species_accuracy")} == {
        "recall": 1.0,
        "precision": 0.5,
        "rmsd_pm": 4.0,
        "species_accuracy": None,
    }


def test_a_joint_volume_of_a_run_before_is_not_traced_where_joint_is_off_now(toml, calls, monkeypatch):
    run(load_configuration(toml))
    assert dict(calls)["find_atoms"].volume == "auto"
    real = Store.fingerprint
    monkeypatch.setattr(Store, "fingerprint", lambda self, group: "made" if group == "joint" else real(self, group))
    for overrides, volume in (
        ([], "tomography"),
        (["joint.enabled=true"], "auto"),
        (["atoms.volume=joint"], "joint"),
    ):
        calls.clear()
        run(load_configuration(toml, overrides))
        assert dict(calls)["find_atoms"].volume == volume


@pytest.mark.parametrize("until", ["ingest", "quicklook", "align"])
def test_until_is_the_last_stage_that_runs(toml, calls, until):
    numbers = run(load_configuration(toml), until=until)
    assert list(numbers["stages"]) == SEQUENTIAL[: SEQUENTIAL.index(until) + 1]
    assert numbers["until"] == until


def test_each_stage_gets_its_own_section_and_ptychography_the_dose(toml, calls):
    run(load_configuration(toml, ["tomography.iterations=7"]))
    given = dict(calls)
    assert given["ptychography"].epochs == 2
    assert given["ptychography"].electrons_per_pattern == 5000
    assert given["tomography"].iterations == 7
    calls.clear()
    run(load_configuration(toml, ["ptychography.electrons_per_pattern=40"]))
    assert dict(calls)["ptychography"].electrons_per_pattern == 40


def test_the_numbers_are_json_with_losses_and_costs(toml, calls):
    numbers = json.loads(json.dumps(run(load_configuration(toml)), allow_nan=False))
    assert numbers["loss"] == {"tomography": [3.0, 2.0]}
    assert numbers["stages"]["ingest"]["frames"] == 192
    for cost in (numbers, *numbers["stages"].values()):
        assert cost["wall_s"] >= 0
        assert cost["cpu_s"] >= 0
        assert cost["peak_rss_mb"] > 20
    assert numbers["wall_s"] >= sum(stage["wall_s"] for stage in numbers["stages"].values()) - 0.01


def test_what_runs_took_is_kept_with_the_store(toml, calls):
    for _ in range(2):
        numbers = run(load_configuration(toml))
    first, second = recorded_runs(Store.open(numbers["store"]))
    assert second["wall_s"] == numbers["wall_s"]
    assert first["stages"]["ingest"]["wall_s"] >= 0
    assert "loss" not in second


def test_a_second_run_finds_everything_done(toml):
    configuration = load_configuration(toml)
    first = run(configuration, until="ptychography")
    again = run(configuration, until="ptychography")
    assert [first["stages"][stage]["computed"] for stage in ("quicklook", "ptychography")] == [3, 3]
    assert [again["stages"][stage]["computed"] for stage in ("quicklook", "ptychography")] == [0, 0]
    assert again["stages"]["ingest"]["shards_written"] == 0
    assert again["loss"] == first["loss"]
    assert len(first["loss"]["ptychography"]) == 3


def test_a_store_that_has_its_frames_goes_through_the_other_stages(toml, calls):
    path = run(load_configuration(toml), until="ingest")["store"]
    numbers = run_stages(Store.open(path, "r+"))
    assert list(numbers["stages"]) == SEQUENTIAL[1:-1]


def test_settings_of_a_stage_are_those_of_its_last_result(toml):
    store = Store.open(run(load_configuration(toml, ["quicklook.dark_field_fraction=1.3"]), until="quicklook")["store"])
    assert stage_settings(store, "quicklook").dark_field_fraction == 1.3
    assert stage_settings(store, "quicklook", ["dark_field_fraction=1.4"]).dark_field_fraction == 1.4
    assert stage_settings(store, "tomography").iterations == 200
    with pytest.raises(ConfigurationError, match="did you mean dark_field_fraction"):
        stage_settings(store, "quicklook", ["dark_field_fractoin=1"])


def test_the_plan_names_every_stage_and_touches_nothing(toml, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    planned = plan(load_configuration(toml), workers=2)
    assert [row.stage for row in planned.rows] == SEQUENTIAL[:-1]
    assert planned.rows[0].bytes_written == 3 * 8 * 8 * 32 * 32 * 2
    assert sorted(tmp_path.rglob("*")) == before


def test_the_plan_of_the_joint_way_counts_its_volume_and_leaves_out_the_sequential_one(toml):
    series = load_configuration(toml, ["joint.enabled=true"])
    rows = {row.stage: row for row in plan(series, workers=2).rows}
    assert list(rows) == ["ingest", "quicklook", "joint", "find_atoms"]
    assert rows["joint"].tasks == 3 * 14
    assert rows["joint"].resident_bytes == 3 * 8 * 8 * 32 * 32 * 2
    assert rows["joint"].seconds > 0
    both = load_configuration(toml, ["joint.enabled=true", 'joint.start="sequential"'])
    assert [row.stage for row in plan(both).rows] == list(STAGES)[:-1]
    with pytest.raises(MemoryPlanError, match="joint needs"):
        plan(load_configuration(toml, ["joint.enabled=true", "scan.step_angstrom=20"])).check(2**30)


def test_both_ways_start_from_the_dose_that_is_known(toml):
    known = with_dose(load_configuration(toml, ["joint.enabled=true"]))
    assert known.joint.electrons_per_pattern == known.ptychography.electrons_per_pattern == 5000
    own = with_dose(load_configuration(toml, ["joint.electrons_per_pattern=4000"]))
    assert (own.joint.electrons_per_pattern, own.ptychography.electrons_per_pattern) == (4000, 5000)


def test_the_memory_of_a_run_reaches_the_stages_that_fit_blocks_to_it(toml):
    told = with_memory(load_configuration(toml, ["resources.memory_gib=3"]))
    assert told.ptychography.memory_gib == told.tomography.memory_gib == 3
    own = with_memory(load_configuration(toml, ["resources.memory_gib=3", "tomography.memory_gib=1.5"]))
    assert (own.ptychography.memory_gib, own.tomography.memory_gib) == (3, 1.5)
    assert with_memory(load_configuration(toml)).tomography.memory_gib is None


def test_a_method_that_cannot_stream_is_refused_before_anything_is_written(toml, tmp_path):
    with pytest.raises(ConfigurationError, match="take one of fista, fista_tv, resire, sirt, cgls, wbp"):
        run(load_configuration(toml, ["tomography.method=genfire", "tomography.stream=always"]))
    assert not (tmp_path / "series.zarr").exists()


def test_a_plan_that_does_not_fit_stops_before_anything_is_written(toml, tmp_path):
    with pytest.raises(MemoryPlanError, match=r"needs .* MiB on each of"):
        run(load_configuration(toml, ["resources.memory_gib=0.05"]))
    assert not (tmp_path / "series.zarr").exists()


def test_bad_requests_stop_before_anything_is_written(toml, tmp_path):
    with pytest.raises(ConfigurationError, match="did you mean find_atoms"):
        run(load_configuration(toml), until="atoms")
    with pytest.raises(FormatError, match="no such file of known atoms"):
        run(load_configuration(toml, ["score.truth=absent.xyz"]))
    with pytest.raises(ConfigurationError, match="an angle is missing"):
        run(load_configuration(toml, ["tilts.theta_deg=[0, 1]"]))
    assert not (tmp_path / "series.zarr").exists()


def test_a_folder_that_is_not_a_store_is_left_alone(toml, tmp_path):
    (tmp_path / "series.zarr").mkdir()
    (tmp_path / "series.zarr" / "mine.txt").write_text("keep")
    with pytest.raises(StoreError, match="not a store"):
        run(load_configuration(toml))
    assert (tmp_path / "series.zarr" / "mine.txt").read_text() == "keep"
