"""Frames of independent simulators to atoms, blind: the numbers a user may count on, and the ways a run may go."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from stemtomo.distributed.executor import executor
from stemtomo.io.store import Store
from stemtomo.pipeline.atoms import find_atoms
from stemtomo.pipeline.config import AtomSettings, ScoreSettings
from stemtomo.pipeline.references import load_configuration
from stemtomo.pipeline.run import run
from stemtomo.pipeline.score import score
from tests.data import FOLDER, needs

pytestmark = pytest.mark.heavy
EXAMPLES = Path(__file__).parents[2] / "examples"
COMMAND = [sys.executable, "-m", "stemtomo.cli"]
RESULTS = ("ptychography/003", "ptychography/011", "projections", "alignment", "volume", "atoms")


def settings(name, member, store, *more):
    overrides = [f"input.path={FOLDER / name / member}", f"series.store={store}", *more]
    return load_configuration(EXAMPLES / f"{name}.toml", overrides)


def assert_same_bits(path, other):
    for group in RESULTS:
        left, right = Store.open(path).read(group), Store.open(other).read(group)
        for name in left.variables:
            np.testing.assert_array_equal(left[name].values, right[name].values, err_msg=f"{group}/{name}")


def separation(path):
    atoms = Store.open(path).read("atoms")
    copper, gold = (atoms["intensity"].values[atoms["species"].values.astype(object) == name] for name in ("Cu", "Au"))
    return (gold.mean() - copper.mean()) / (gold.std() + copper.std())


@pytest.fixture(scope="module")
def cuau(tmp_path_factory):
    path = tmp_path_factory.mktemp("cuau") / "threads.zarr"
    truth = f"score.truth={FOLDER / 'cuau_tilt' / 'truth.npz'}"
    return path, run(settings("cuau_tilt", "data.npz", path, truth))


@needs("cuau_tilt")
def test_every_atom_of_the_particle_is_found_named_and_placed(cuau):
    _, numbers = cuau
    assert numbers["recall"] >= 0.99
    assert numbers["precision"] >= 0.99
    assert numbers["species_accuracy"] >= 0.99
    assert numbers["rmsd_pm"] <= 4


@needs("cuau_tilt")
def test_two_thirds_of_the_errors_are_within_the_stated_uncertainty(cuau):
    store = Store.open(cuau[0])
    atoms, score = store.read("atoms").load(), store.read("score").load()
    found = score["found_atom"].values
    within = [np.abs(score[f"deviation_{axis}"].values) < atoms[f"sigma_{axis}"].values[found] for axis in "xyz"]
    assert 0.6 < np.mean(within) < 0.76


@needs("cuau_tilt")
def test_refinement_places_the_atoms_better_and_names_them_no_worse(cuau, tmp_path):
    path, after = cuau
    traced = shutil.copytree(path, tmp_path / "traced.zarr")
    find_atoms(traced, AtomSettings(species=("Cu", "Au"), refine=False))
    before = score(traced, ScoreSettings(truth=FOLDER / "cuau_tilt" / "truth.npz"))
    print({key: (before[key], after[key]) for key in ("recall", "precision", "species_accuracy", "rmsd_pm")})
    assert all(after[key] >= before[key] for key in ("recall", "precision", "species_accuracy"))
    assert after["rmsd_pm"] < 0.75 * before["rmsd_pm"]
    # Atoms are told apart by how far the classes lie from each other in their own spreads.
    assert separation(path) > separation(traced)


@needs("cuau_tilt")
def test_two_workers_give_the_bits_of_threads(cuau, client, tmp_path):
    path, _ = cuau
    run(settings("cuau_tilt", "data.npz", tmp_path / "cluster.zarr"), executor=executor(client))
    assert_same_bits(path, tmp_path / "cluster.zarr")


@needs("cuau_tilt")
@pytest.mark.parametrize("reached", ["ptychography/004", ".checkpoints/volume"])
def test_a_run_killed_in_the_middle_ends_with_the_same_bits(cuau, tmp_path, reached):
    path, _ = cuau
    store = tmp_path / "killed.zarr"
    arguments = ["run", str(EXAMPLES / "cuau_tilt.toml"), "--set", f"series.store={store}"]
    arguments += ["--set", f"input.path={FOLDER / 'cuau_tilt' / 'data.npz'}"]
    process = subprocess.Popen([*COMMAND, *arguments], start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (store / reached).exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not Store.open(store).members("atoms")
    assert subprocess.run([*COMMAND, *arguments], check=False, capture_output=True).returncode == 0
    assert_same_bits(path, store)


@needs("mset_cuau")
def test_the_conventions_of_the_published_set_are_ours(tmp_path):
    losses = {}
    for name, overrides in {
        "right": [],
        "defocus": ["optics.defocus_c1_angstrom=-200"],
        "transposed": ['input.axes=["tilt","y","x","kx","ky"]'],
        "mirrored": ['input.axes=["tilt","x","y","ky","kx"]'],
    }.items():
        numbers = run(settings("mset_cuau", "data4d.npz", tmp_path / f"{name}.zarr", *overrides), until="ptychography")
        losses[name] = float(np.mean([loss[-1] for loss in numbers["loss"]["ptychography"]]))
    assert all(losses[name] > 4 * losses["right"] for name in ("defocus", "transposed", "mirrored")), losses


@needs("mset_cuau")
def test_the_published_set_ends_in_a_volume_with_its_atoms(tmp_path):
    numbers = run(settings("mset_cuau", "data4d.npz", tmp_path / "mset.zarr"))
    json.dumps(numbers)
    volume = Store.open(tmp_path / "mset.zarr").read("volume")["potential"]
    assert volume.shape == (24, 24, 24)
    # Eleven atoms of one element: equally bright, and nothing else above a tenth of them.
    atoms = Store.open(tmp_path / "mset.zarr").read("atoms")
    assert atoms.sizes["atom"] == 11
    assert float(atoms["intensity"].std() / atoms["intensity"].mean()) < 0.05
