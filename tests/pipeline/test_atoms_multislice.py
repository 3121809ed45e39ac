"""Atoms refined by multislice against the patterns of an independent simulation."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from stemtomo.algorithms.atoms.scoring import match_atoms
from stemtomo.algorithms.joint.atoms import Atoms
from stemtomo.cli import app
from stemtomo.distributed import executor
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.errors import ConfigurationError
from stemtomo.geometry import TiltSeries
from stemtomo.io.provenance import Provenance
from stemtomo.io.store import Store
from stemtomo.pipeline.atoms import find_atoms
from stemtomo.pipeline.atoms_multislice import _Work, pixel_offsets
from stemtomo.pipeline.config import AtomSettings, JointSettings
from stemtomo.pipeline.joint import joint
from stemtomo.pipeline.progress import Silent
from tests.pipeline.test_joint import ATOMS, DETECTOR, OPTICS, PHASE, SCAN, THETA_DEG, simulated

QUICK = JointSettings(
    single_slice_epochs=2,
    sweeps=0,
    settling_sweeps=2,
    slice_thickness_angstrom=1.6,
    electrons_per_pattern=2e4,
    precision="double",
    # The likelihood weighs dark pixels more, where waves of this simulation fold back; fewer electrons weigh them less.
    loss="anscombe",
    most_electrons=1e6,
)
PROJECTIONS = AtomSettings(species=1)
MULTISLICE = AtomSettings(species=1, refine_model="multislice", multislice_iterations=8)


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """Four atoms in six tilts, counted, with their joint volume."""
    store = Store.create(tmp_path_factory.mktemp("atoms") / "series.zarr", "four atoms")
    store.declare_tilts(len(THETA_DEG))
    for index, pose in enumerate(TiltSeries.from_degrees(THETA_DEG)):
        counts = np.random.default_rng(index).poisson(simulated(THETA_DEG[index], 2e4, finer=2)).astype(np.uint16)
        store.create_tilt(index, (8, 8, 24, 24), np.uint16, OPTICS, SCAN, DETECTOR, pose)
        store.write_frames(index, 0, 0, counts.reshape(8, 8, 24, 24))
        store.record_frames(index, [0])
        store.complete_tilt(index, Provenance.start("ingest", {"tilt": index}))
    store.complete_tilts(Provenance.start("ingest", {}))
    joint(store, QUICK)
    return store


def copy_of(series, path):
    shutil.copytree(series.path, path, ignore=shutil.ignore_patterns("atoms", ".checkpoints"))
    return Store.open(path, "r+")


def positions(store):
    atoms = store.read("atoms")
    return np.stack([atoms[axis].values for axis in "xyz"], axis=1)


def rmsd(store):
    match = match_atoms(positions(store), ATOMS, 0.75)
    assert (match.recall, match.precision) == (1, 1)
    return match.rmsd_angstrom


def test_patterns_place_atoms_better_than_projections_of_the_volume(series):
    find_atoms(series, PROJECTIONS)
    before = rmsd(series)
    numbers = find_atoms(series, MULTISLICE)
    assert numbers["refinement"] == "done by multislice"
    assert numbers["pattern_loss"][1] < numbers["pattern_loss"][0]
    print("RMSD in Å:", before, rmsd(series))
    assert rmsd(series) < 0.8 * before
    atoms = series.read("atoms")
    # Drawn by the simulation with a width of 0.45 Å, in voxels of 0.4 Å.
    np.testing.assert_allclose(atoms["width_angstrom"].values, 0.45, rtol=0.03)
    sigma = series.read("joint").attrs["sigma_rad_per_volt_angstrom"]
    # The model folds waves back that the simulation loses beyond the detector, which costs a few per cent.
    np.testing.assert_allclose(atoms["intensity"].values * sigma, 0.4 * PHASE, rtol=0.04)
    # Along the tilt axis too: if pixels lay alike at every tilt, this were 2.8 in place of 1.2.
    match = match_atoms(positions(series), ATOMS, 0.75)
    away = (positions(series)[match.found] - ATOMS[match.truth])[:, 1]
    assert 0.5 < np.sqrt(np.mean((away / atoms["sigma_y"].values[match.found]) ** 2)) < 1.8


def test_derivatives_of_the_loss_of_all_patterns_are_those_of_finite_differences(series):
    start = Atoms(ATOMS + 0.07, np.array([0.8, 1.0, 0.9, 0.7]), np.array([0.4, 0.5, 0.45, 0.42]))
    work = _Work.prepare(series, start, np.zeros(4, int), ThreadExecutor(1), Silent())
    every = range(len(THETA_DEG))
    found = work.evaluated(start, every).gradient
    rng = np.random.default_rng(5)
    for name, gradient in zip(("positions", "intensity", "width_angstrom"), found, strict=True):
        change, step = rng.normal(size=gradient.shape), 1e-4
        ends = [
            work.evaluated(replace(start, **{name: getattr(start, name) + h * change}), every).loss
            for h in (step, -step)
        ]
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float((gradient * change).sum()), rel=1e-6)


@pytest.mark.parametrize("tilts", [slice(None), slice(0, None, 2), slice(1, None, 2)])
def test_pulls_that_vary_over_a_pixel_average_out_over_all_tilts_and_over_half_of_them(tilts):
    for count in (15, 31, 61):
        pull = np.exp(2j * np.pi * pixel_offsets(count)[tilts])
        assert np.abs(pull.mean(axis=0)).max() < 0.2


@pytest.mark.heavy
def test_two_worker_processes_give_the_bits_of_threads(series, tmp_path, client):
    few = MULTISLICE.model_copy(update={"multislice_iterations": 3})
    whole, other = copy_of(series, tmp_path / "threads.zarr"), copy_of(series, tmp_path / "cluster.zarr")
    find_atoms(whole, few, executor=ThreadExecutor(2))
    find_atoms(other, few, executor=executor(client))
    np.testing.assert_array_equal(positions(other), positions(whole))
    for name in ("intensity", "width_angstrom", "sigma_z"):
        np.testing.assert_array_equal(other.read("atoms")[name].values, whole.read("atoms")[name].values)


def test_without_a_joint_volume_it_says_what_is_missing(series):
    with pytest.raises(ConfigurationError, match="joint"):
        find_atoms(series, MULTISLICE.model_copy(update={"volume": "tomography"}))


def test_the_command_line_reaches_it(series, tmp_path):
    store = copy_of(series, tmp_path / "told.zarr")
    told = ["--set", "species=1", "--set", "refine_model=multislice", "--set", "multislice_iterations=2"]
    result = CliRunner().invoke(app, ["find-atoms", str(store.path), *told, "--json", str(tmp_path / "told.json")])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "told.json").read_text())["refinement"] == "done by multislice"
