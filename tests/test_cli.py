"""The command line: its commands, its exit codes, and one clear message for every kind of bad input."""

import importlib
import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from stemtomo import __version__, cli
from stemtomo.cli import shell
from stemtomo.errors import (
    AcquisitionError,
    ConfigurationError,
    FormatError,
    MemoryPlanError,
    RefusedError,
    StalledError,
    StoreError,
    UnfinishedError,
)

TOML = """
[series]
store = "{folder}/series.zarr"
[input]
path = "frames.npz"
[optics]
energy_kev = 300
semiangle_mrad = 21
[scan]
step_angstrom = 1.25
[detector]
pixel_inv_angstrom = 0.1
[tilts]
theta_deg = [-10, 0, 10]
"""


@pytest.fixture
def frames():
    return np.random.default_rng(0).poisson(5, (3, 8, 8, 32, 32)).astype(np.uint16)


@pytest.fixture
def toml(tmp_path, frames, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "frames.npz", frames=frames)
    path = tmp_path / "series.toml"
    path.write_text(TOML.format(folder=tmp_path))
    return path


def call(*arguments):
    """Run the command line in this process."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def refused(result, *words):
    """Assert that ``result`` is one clear message, with ``words`` in it, and exit code 2."""
    assert result.exit_code == 2, result.output
    message = result.stderr.strip()
    assert message.startswith("Error: ")
    assert len(message.splitlines()) == 1
    assert "Traceback" not in result.output
    for word in words:
        assert word in message


# -- bad input --------------------------------------------------------------------------------------------------------


def test_a_missing_angle(toml):
    refused(call("run", toml, "--set", "tilts.theta_deg=[0, 10]"), "tilts.theta_deg", "2 angles for 3 tilts", "missing")


def test_a_duplicate_angle(toml):
    refused(call("run", toml, "--set", "tilts.theta_deg=[0, 10, 10]"), "tilts 1 and 2", "same angles", "10 deg")


def test_a_wrong_shape(toml, frames, tmp_path):
    np.save(tmp_path / "four.npy", frames[0])
    refused(call("run", toml, "--set", "input.path=four.npy"), "four.npy", "4 axes", "5 were named")


def test_a_wrong_dtype(toml, frames, tmp_path):
    np.save(tmp_path / "complex.npy", frames.astype(complex))
    refused(call("run", toml, "--set", "input.path=complex.npy"), "complex.npy", "complex128", "whole or real numbers")


def test_an_unknown_key(toml):
    toml.write_text(toml.read_text() + "\n[tomography]\niteratoins = 3\n")
    refused(call("run", toml), "tomography.iteratoins", "did you mean iterations")


def test_a_negative_voltage(toml):
    refused(call("run", toml, "--set", "optics.energy_kev=-300"), "optics.energy_kev = -300", "greater than 0", "keV")


def test_a_scan_shape_that_does_not_match_the_frame_count(toml, frames, tmp_path):
    refused(call("run", toml, "--set", "scan.shape=[8, 9]"), "8 x 9", "72 frames", "64")
    np.save(tmp_path / "list.npy", frames.reshape(3, 64, 32, 32))
    listed = ("--set", "input.path=list.npy", "--set", "input.axes=tilt,position,ky,kx")
    refused(call("run", toml, *listed, "--set", "scan.shape=[9, 9]"), "9 x 9", "81 frames", "64")


@pytest.mark.parametrize("name", ["frames.npz", "frames.npy", "frames.bin"])
def test_a_truncated_file(toml, frames, tmp_path, name):
    np.save(tmp_path / "frames.npy", frames)
    frames.tofile(tmp_path / "frames.bin")
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    raw = ("--set", "input.dtype=<u2", "--set", "input.shape=[3, 8, 8, 32, 32]") if name.endswith("bin") else ()
    refused(call("run", toml, "--set", f"input.path={name}", *raw), name)


def test_a_damaged_member(toml, frames, tmp_path):
    np.savez_compressed(tmp_path / "frames.npz", frames=frames)
    data = bytearray((tmp_path / "frames.npz").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "frames.npz").write_bytes(data)
    refused(call("run", toml), "frames.npz")


def test_a_store_of_a_newer_schema(toml, tmp_path):
    assert call("run", toml, "--until", "ingest").exit_code == 0
    root = tmp_path / "series.zarr" / "zarr.json"
    node = json.loads(root.read_text())
    node["attributes"]["stemtomo_schema"] = 99
    root.write_text(json.dumps(node))
    for arguments in (("run", toml), ("info", tmp_path / "series.zarr"), ("report", tmp_path / "series.zarr")):
        refused(call(*arguments), "schema 99", "update stemtomo")


def test_no_room_on_the_disk(toml, frames, tmp_path):
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # a quota, as the writer meets it

    np.save(tmp_path / "frames.npy", np.random.default_rng(0).integers(0, 60000, frames.shape).astype(np.uint16))
    command = [sys.executable, "-m", "stemtomo.cli", "run", toml, "--set", "input.path=frames.npy", "--until", "ingest"]
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_files)
    assert result.returncode == 2, result.stderr
    assert "the disk is full or a quota is reached" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_input_store_or_configuration(toml, tmp_path):
    refused(call("run", toml, "--set", "input.path=absent.npz"), "absent.npz", "no such file")
    refused(call("run", "absent.toml"), "absent.toml", "no such configuration file")
    refused(call("info", tmp_path / "absent.zarr"), "no such store")
    refused(call("quicklook", tmp_path), "not a stemtomo store")


def test_a_place_for_the_numbers_that_is_not_there_is_refused_before_the_work(toml, tmp_path):
    refused(call("run", toml, "--json", tmp_path / "absent" / "numbers.json"), "--json")
    refused(call("run", toml, "--json", tmp_path), "--json", "is a folder; give the name of a file")
    assert not (tmp_path / "series.zarr").exists()
    refused(call("underway", tmp_path, "--image", tmp_path / "absent" / "a.png"), "--image", "does not exist")
    refused(call("simulate-particle", tmp_path / "absent" / "a.npz"), "a.npz: the folder", "does not exist")
    refused(call("order", "a.xyz", "--out", tmp_path / "absent" / "a.xyz"), "--out", "does not exist")


@pytest.mark.parametrize(
    "scheduler", ["host", "http://host:1", "tcp://host:x", "absent.json", "torn.json", "other.json"]
)
def test_a_scheduler_that_cannot_be_one(toml, tmp_path, monkeypatch, scheduler):
    monkeypatch.setattr(shell, "_PATIENCE_S", 0.0)
    (tmp_path / "torn.json").write_text("{")
    (tmp_path / "other.json").write_text("{}")
    refused(call("run", toml, "--scheduler", scheduler), f"--scheduler {scheduler}: no Dask scheduler answers there")


@pytest.mark.parametrize(
    ("command", "key"),
    [
        (("simulate", "a.xyz", "--dose", "abc"), "study.dose_per_square_angstrom = '[abc]'"),
        (("simulate", "a.xyz", "--set", "simulation.seed=x"), "simulation.seed = 'x'"),
        (("order", "a.xyz", "--set", "cutoff_angstrom=-3"), "order.cutoff_angstrom = -3: should be greater than 0 ("),
        (("local-orbital", "a.zarr", "--set", "pixels=x"), "local_orbital."),
    ],
)
def test_a_value_that_is_not_allowed_is_told_with_its_key(tmp_path, monkeypatch, command, key):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.xyz").write_text("1\n\nAu 0 0 0\n")
    refused(call(*command), key)


def test_numbers_that_are_none_are_null(tmp_path):
    shell.write_json({"loss": [1.0, float("nan")], "rmsd": (float("inf"), 2)}, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == {"loss": [1.0, None], "rmsd": [None, 2]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_scheduler_and_workers_exclude_each_other(toml):
    refused(call("run", toml, "--scheduler", "tcp://127.0.0.1:1", "--workers", "2"), "exclude each other")


# -- exit codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [ConfigurationError, FormatError, StoreError, MemoryPlanError, AcquisitionError, RefusedError]
)
def test_what_the_user_can_correct_is_code_2(error):
    assert shell.exit_code(error("text")) == 2


def test_what_can_be_run_again_is_code_1_and_a_stall_code_3():
    assert shell.exit_code(RuntimeError("lost a worker")) == 1
    assert shell.exit_code(StalledError("no new frames")) == 3


def test_an_unforeseen_failure_says_how_to_go_on(toml, monkeypatch):
    module = importlib.import_module("stemtomo.pipeline.run")

    def fail(*arguments, **options):
        raise RuntimeError("worker lost")

    monkeypatch.setattr(module, "run", fail)
    result = call("run", toml)
    assert result.exit_code == 1
    assert "RuntimeError: worker lost" in result.stderr
    assert "run the same command again" in result.stderr
    assert "Traceback" not in result.stderr
    assert isinstance(call("run", toml, "--debug").exception, RuntimeError)


# -- what the commands do ---------------------------------------------------------------------------------------------


def test_run_writes_numbers_and_a_report_and_continues(toml, tmp_path):
    numbers_file = tmp_path / "numbers.json"
    result = call("run", toml, "--until", "quicklook", "--json", numbers_file)
    assert result.exit_code == 0, result.output
    assert f"Report: {tmp_path / 'series-report.html'}" in result.stdout
    assert (tmp_path / "series-report.html").is_file()
    numbers = json.loads(numbers_file.read_text())
    assert {
        "recall",
        "precision",
        "rmsd_pm",
        "species_accuracy",
        "wall_s",
        "cpu_s",
        "peak_rss_mb",
        "loss",
    } <= numbers.keys()
    again = call("run", toml, "--until", "quicklook", "--json", numbers_file)
    assert again.exit_code == 0
    assert json.loads(numbers_file.read_text())["stages"]["quicklook"]["computed"] == 0


def test_a_plan_prints_a_table_and_touches_nothing(toml, tmp_path):
    before = sorted(tmp_path.iterdir())
    result = call("run", toml, "--plan")
    assert result.exit_code == 0, result.output
    for stage in ("ingest", "quicklook", "ptychography", "tomography", "find_atoms", "total"):
        assert stage in result.stdout
    assert sorted(tmp_path.iterdir()) == before
    refused(call("run", toml, "--plan", "--set", "resources.memory_gib=0.01"), "needs", "Would fit")


def test_info_lists_what_is_there(toml, tmp_path):
    call("run", toml, "--until", "quicklook")
    table = call("info", tmp_path / "series.zarr").stdout
    assert "3/3" in table
    said = " ".join(re.sub("│", " ", table).split())
    assert "uint16 [counts]" in said
    assert "com_x (y 8, x 8) float32 [1/Å]" in said
    assert "missing: run tomography" in table
    rows = json.loads(call("info", tmp_path / "series.zarr", "--json").stdout)
    assert rows["tilts"] == 3
    assert {row["group"]: row["done"] for row in rows["groups"]}["quicklook"] == 3


def test_a_stage_runs_alone_with_the_settings_of_last_time(toml, tmp_path):
    call("run", toml, "--until", "quicklook", "--set", "quicklook.dark_field_fraction=1.3")
    numbers = tmp_path / "numbers.json"
    assert call("quicklook", tmp_path / "series.zarr", "--json", numbers).exit_code == 0
    assert json.loads(numbers.read_text())["computed"] == 0
    assert (
        call("quicklook", tmp_path / "series.zarr", "--set", "dark_field_fraction=1.2", "--json", numbers).exit_code
        == 0
    )
    assert json.loads(numbers.read_text())["computed"] == 3
    refused(call("tomography", tmp_path / "series.zarr"), "projections")


@pytest.mark.heavy
def test_workers_of_this_machine_give_the_same_numbers(toml, tmp_path):
    numbers = []
    for store, options in (("threads", ()), ("workers", ("--workers", "1"))):
        file = tmp_path / f"{store}.json"
        arguments = ("--set", f"series.store={tmp_path / store}.zarr", "--until", "quicklook", "--json", file)
        assert call("run", toml, *arguments, *options).exit_code == 0
        numbers.append(json.loads(file.read_text())["stages"]["quicklook"]["mean_counts"])
    assert numbers[0] == numbers[1]


def test_the_report_command_prints_where_the_report_is(toml, tmp_path):
    call("run", toml, "--until", "ingest")
    result = call("report", tmp_path / "series.zarr", "--out", tmp_path / "here.html")
    assert result.stdout.strip() == str(tmp_path / "here.html")


def test_version_and_help():
    assert call("--version").stdout.strip() == f"stemtomo {__version__}"
    text = call("--help").stdout
    for command in ("demo", "run", "info", "report", "quicklook", "find-atoms"):
        assert command in text


def test_help_imports_nothing_heavy():
    heavy = ("numpy", "zarr", "dask", "rich.progress", "pydantic")
    code = f"import sys, stemtomo.cli; print([name for name in {heavy} if name in sys.modules])"
    began = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert time.perf_counter() - began < 5  # 0.1 s on an idle machine


def test_public_names_are_there_and_cheap():
    import stemtomo

    for name in stemtomo.__all__:
        assert getattr(stemtomo, name) is not None
    code = "import sys, stemtomo; print('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    assert Path(stemtomo.__file__).parent.name == "stemtomo"


# -- ptychography of some tilts ---------------------------------------------------------------------------------------


def test_tilts_are_listed_as_slurm_lists_them():
    assert shell.numbers_of("0-2,7") == [0, 1, 2, 7]
    assert shell.numbers_of(None) is None
    for text in ("a", "2-1", "1,,2", "-1"):
        with pytest.raises(ConfigurationError, match="0-3,7"):
            shell.numbers_of(text)


def test_some_tilts_alone_are_ptychography_alone(toml):
    refused(call("run", toml, "--tilts", "0"), "until = 'ptychography'")
    refused(call("run", toml, "--tilts", "3", "--until", "ptychography"), "[3]", "series of 3")


def test_work_that_was_stopped_is_code_75(toml, monkeypatch):
    module = importlib.import_module("stemtomo.pipeline.run")

    def stop(*arguments, **options):
        raise UnfinishedError("Stopped as asked.")

    monkeypatch.setattr(module, "run", stop)
    result = call("run", toml)
    assert (result.exit_code, result.stderr.strip()) == (75, "Stopped as asked.")
