"""The verb joint: atoms out of patterns of an independent simulation, however it is cut, interrupted or started."""

import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from stemtomo.algorithms.total_variation import total_variation
from stemtomo.cli import app
from stemtomo.distributed import executor
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.errors import ConfigurationError, StoreError
from stemtomo.geometry import Detector, Optics, Scan, TiltSeries
from stemtomo.io.nodes import write_group
from stemtomo.io.provenance import Provenance
from stemtomo.io.store import Store
from stemtomo.pipeline.atoms import find_atoms
from stemtomo.pipeline.config import AtomSettings, JointSettings, StageSettings
from stemtomo.pipeline.joint import joint, plan_joint
from stemtomo.pipeline.joint_epochs import epochs_of
from stemtomo.pipeline.joint_hand import Hand
from stemtomo.pipeline.progress import Silent
from stemtomo.pipeline.run import skipped_stages

PIXEL = 0.4
DETECTOR = Detector((24, 24), 1 / 9.6)
SCAN = Scan((8, 8), (1.2, 1.2), periodic=True)
OPTICS = Optics(energy_ev=300e3, semiangle_rad=21e-3, aberrations={"C10": 100.0})
THETA_DEG = (-60.0, -35.0, -10.0, 15.0, 40.0, 62.0)
ATOMS = np.array([[0.0, 0.4, 0.2], [2.0, -1.0, 1.1], [-1.8, 1.7, -1.0], [0.8, -2.2, -1.9]])
WAVELENGTH = 0.0196875
PHASE = 0.9


def simulated(theta_deg, electrons, finer=1):
    """Multislice in plain NumPy: Gaussian atoms of width 0.45 Å in slices of 0.4 Å, placed by their coordinates.

    On pixels ``finer`` times as narrow waves reach beyond the detector and are lost there, instead of folding back.
    """
    angle = np.deg2rad(theta_deg)
    x = ATOMS[:, 0] * np.cos(angle) - ATOMS[:, 2] * np.sin(angle)
    z = ATOMS[:, 0] * np.sin(angle) + ATOMS[:, 2] * np.cos(angle)
    count, pixel = 24 * finer, PIXEL / finer
    axis, planes = (np.arange(count) - count // 2) * pixel, (np.arange(24) - 12) * PIXEL
    k = np.fft.fftfreq(count, pixel)
    k2 = k[:, None] ** 2 + k[None, :] ** 2

    def bell(at, places):
        return np.exp(-((places[:, None] - at) ** 2) / (2 * 0.45**2)) * PIXEL / (0.45 * np.sqrt(2 * np.pi))

    bells = bell(z, planes), bell(ATOMS[:, 1], axis), bell(x, axis)
    phase = PHASE / PIXEL**2 * 0.4 * np.einsum("za,ya,xa->zyx", *bells)
    edge = 21e-3 / WAVELENGTH
    amplitude = np.clip((edge - np.sqrt(k2)) * 9.6 + 0.5, 0, 1)
    spectrum = amplitude * np.exp(-1j * np.pi * WAVELENGTH * (100.0 - 12 * PIXEL) * k2)
    spectrum *= np.sqrt(electrons / (np.abs(spectrum) ** 2).sum())
    patterns, detector = [], slice(count // 2 - 12, count // 2 + 12)
    for py, px in SCAN.positions()[:, ::-1]:
        ramp = np.exp(-2j * np.pi * (k[:, None] * (py + 12 * PIXEL) + k[None, :] * (px + 12 * PIXEL)))
        wave = np.fft.ifft2(spectrum * ramp, norm="ortho")
        for plane in phase:
            wave = np.fft.ifft2(np.fft.fft2(wave * np.exp(1j * plane)) * np.exp(-1j * np.pi * WAVELENGTH * PIXEL * k2))
        patterns.append(np.fft.fftshift(np.abs(np.fft.fft2(wave, norm="ortho")) ** 2)[detector, detector])
    return np.array(patterns)


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    store = Store.create(tmp_path_factory.mktemp("joint") / "series.zarr", "four atoms")
    store.declare_tilts(len(THETA_DEG))
    for index, pose in enumerate(TiltSeries.from_degrees(THETA_DEG)):
        counts = np.random.default_rng(index).poisson(simulated(THETA_DEG[index], 2e4)).astype(np.uint16)
        store.create_tilt(index, (8, 8, 24, 24), np.uint16, OPTICS, SCAN, DETECTOR, pose)
        store.write_frames(index, 0, 0, counts.reshape(8, 8, 24, 24))
        store.record_frames(index, [0])
        store.complete_tilt(index, Provenance.start("ingest", {"tilt": index}))
    store.complete_tilts(Provenance.start("ingest", {}))
    return store


QUICK = JointSettings(
    single_slice_epochs=3,
    sweeps=2,
    settling_sweeps=2,
    accelerated_epochs=2,
    slice_thickness_angstrom=1.6,
    checkpoint_every=2,
    electrons_per_pattern=2e4,
)


def potential(store):
    return store.read("joint")["potential"].values


def test_the_atoms_of_an_independent_simulation_come_out_where_they_are(series):
    numbers = joint(series, QUICK, executor=ThreadExecutor(2))
    assert numbers["computed"]
    assert not joint(series, QUICK)["computed"]
    assert numbers["loss"][-1] < numbers["loss"][0]
    find_atoms(series, AtomSettings(species=1))
    atoms = series.read("atoms")
    found = np.stack([atoms[axis].values for axis in "xyz"], axis=1)
    assert len(found) == 4
    distance = np.linalg.norm(found[:, None] - ATOMS, axis=-1)
    assert sorted(distance.argmin(axis=1)) == [0, 1, 2, 3]
    assert distance.min(axis=1).max() < 0.15


def test_atoms_are_not_looked_for_in_a_joint_volume_of_other_tilts(series):
    joint(series, QUICK, executor=ThreadExecutor(2))
    attrs = series.tilt_attrs(1)
    series.complete_tilt(1, Provenance.start("ingest", {"told": "otherwise"}))
    with pytest.raises(StoreError, match=r"joint was made from another tilt/001 .* run the stage 'joint' again"):
        find_atoms(series, AtomSettings(species=1))
    write_group(series.path / "tilt" / "001", attrs)
    find_atoms(series, AtomSettings(species=1))


def test_the_loss_ends_at_what_counting_noise_leaves(series):
    numbers = joint(series, QUICK)
    rng = np.random.default_rng(9)
    truth = np.concatenate([simulated(theta, 2e4) for theta in THETA_DEG])
    noise = (np.sqrt(rng.poisson(truth) + 0.375) - np.sqrt(truth + 0.375)) ** 2
    assert numbers["loss"][-1] == pytest.approx(noise.mean(), rel=0.1)


def test_a_wrong_sign_of_defocus_ends_clearly_worse(series, tmp_path):
    wrong = Store.create(tmp_path / "wrong.zarr", "wrong")
    wrong.declare_tilts(len(THETA_DEG))
    optics = Optics(energy_ev=300e3, semiangle_rad=21e-3, aberrations={"C10": -100.0})
    for index in range(len(THETA_DEG)):
        wrong.create_tilt(index, (8, 8, 24, 24), np.uint16, optics, SCAN, DETECTOR, series.pose(index))
        wrong.write_frames(index, 0, 0, series.frames(index)[:])
        wrong.record_frames(index, [0])
        wrong.complete_tilt(index, Provenance.start("ingest", {"wrong": index}))
    wrong.complete_tilts(Provenance.start("ingest", {}))
    right = joint(series, QUICK)["loss"][-1]
    # Most of the loss is counting noise, whose mean over 221,184 pixels is known to 0.5 %: five percent is ten sigma.
    assert joint(wrong, QUICK)["loss"][-1] > 1.05 * right


def copy_of(series, path):
    shutil.copytree(series.path, path, ignore=shutil.ignore_patterns("joint", "atoms", ".checkpoints"))
    return Store.open(path, "r+")


@pytest.mark.parametrize("tiles", [2, 4])
def test_tiles_of_a_tilt_give_what_the_whole_gives(series, tmp_path, tiles):
    exact = QUICK.model_copy(update={"precision": "double", "probe": "shared"})
    whole, cut = copy_of(series, tmp_path / "whole.zarr"), copy_of(series, tmp_path / "cut.zarr")
    joint(whole, exact)
    joint(cut, exact.model_copy(update={"tiles": tiles, "resident": False}))
    np.testing.assert_allclose(potential(cut), potential(whole), rtol=1e-5, atol=1e-5 * potential(whole).max())
    losses = [store.read("joint")["loss"].values for store in (cut, whole)]
    np.testing.assert_allclose(*losses, rtol=1e-12)


@pytest.mark.heavy
def test_two_worker_processes_give_the_bits_of_threads(series, tmp_path, client):
    other = copy_of(series, tmp_path / "cluster.zarr")
    joint(series, QUICK)
    joint(other, QUICK, executor=executor(client))
    np.testing.assert_array_equal(potential(other), potential(series))


class Interrupt(Silent):
    def __init__(self, after):
        self.left = after

    def advance(self, n=1, **numbers):
        self.left -= n
        if self.left < 0:
            raise KeyboardInterrupt


class Epochs(Silent):
    def __init__(self):
        self.done = []

    def advance(self, n=1, **numbers):
        self.done.append(n)


@pytest.mark.parametrize("after", [3, 8])
def test_an_interrupted_run_goes_on_to_the_same_bits(series, tmp_path, after):
    other = copy_of(series, tmp_path / "interrupted.zarr")
    joint(series, QUICK)
    with pytest.raises(KeyboardInterrupt):
        joint(other, QUICK, progress=Interrupt(after))
    assert not other.members("joint")
    joint(other, QUICK)
    np.testing.assert_array_equal(potential(other), potential(series))


def test_an_interrupted_run_goes_on_with_less_memory(series, tmp_path):
    """Where the patterns are and how a tilt is cut changes nothing, so what was done is not lost."""
    other = copy_of(series, tmp_path / "short_of_memory.zarr")
    joint(series, QUICK)
    with pytest.raises(KeyboardInterrupt):
        joint(other, QUICK, progress=Interrupt(4))
    less = QUICK.model_copy(update={"resident": False, "tiles": 3, "checkpoint_every": 1})
    epochs = Epochs()
    joint(other, less, progress=epochs)
    assert epochs.done == [4, 1, 1, 1, 1, 1]  # the checkpoint's, and those after it
    np.testing.assert_allclose(potential(other), potential(series), rtol=0, atol=1e-5 * potential(series).max())
    assert not joint(other, QUICK)["computed"]


def test_total_variation_makes_the_volume_flatter(series, tmp_path):
    other = copy_of(series, tmp_path / "flat.zarr")
    joint(series, QUICK)
    joint(other, QUICK.model_copy(update={"tv_weight_rad": 1e-3}))
    assert total_variation(potential(other)) < 0.8 * total_variation(potential(series))
    assert potential(other).max() > 0.5 * potential(series).max()


def test_the_plan_counts_every_visit_and_resident_patterns(series):
    row = plan_joint(series, QUICK)
    assert row.tasks == 6 * 9
    assert row.resident_bytes == 6 * 64 * 24 * 24 * 2
    assert len(epochs_of(QUICK)) == 9


def test_tilts_with_different_pixels_are_refused(series, tmp_path):
    other = Store.create(tmp_path / "mixed.zarr", "mixed")
    other.declare_tilts(2)
    for index, pixel in enumerate((1 / 9.6, 1 / 9.0)):
        other.create_tilt(index, (8, 8, 24, 24), np.uint16, OPTICS, SCAN, Detector((24, 24), pixel), series.pose(index))
        other.write_frames(index, 0, 0, series.frames(index)[:])
        other.record_frames(index, [0])
        other.complete_tilt(index, Provenance.start("ingest", {"mixed": index}))
    other.complete_tilts(Provenance.start("ingest", {}))
    with pytest.raises(ConfigurationError, match="same square pixel at every tilt"):
        joint(other, QUICK)


def test_a_run_takes_one_way_or_both():
    assert skipped_stages(StageSettings()) == {"joint"}
    alone = StageSettings(joint=JointSettings(enabled=True))
    assert {"ptychography", "tomography"} <= skipped_stages(alone)
    assert not skipped_stages(StageSettings(joint=JointSettings(enabled=True, start="sequential")))


def exact_store(path, right_deg, said_deg, said_c10):
    """Make a store of patterns without counting noise at angles ``right_deg``, whose metadata say other things."""
    store = Store.create(path, "exact")
    store.declare_tilts(len(said_deg))
    for index, pose in enumerate(TiltSeries.from_degrees(list(said_deg))):
        optics = Optics(energy_ev=300e3, semiangle_rad=21e-3, aberrations={"C10": said_c10[index]})
        store.create_tilt(index, (8, 8, 24, 24), np.uint32, optics, SCAN, DETECTOR, pose)
        exact = np.rint(1e3 * simulated(right_deg[index], 2e4)).astype(np.uint32)
        store.write_frames(index, 0, 0, exact.reshape(8, 8, 24, 24))
        store.record_frames(index, [0])
        store.complete_tilt(index, Provenance.start("ingest", {"exact": index}))
    store.complete_tilts(Provenance.start("ingest", {}))
    return store


def test_tilts_of_the_wrong_sign_are_found_out(tmp_path):
    store = exact_store(tmp_path / "turned.zarr", THETA_DEG, [-theta for theta in THETA_DEG], [100.0] * 6)
    told = joint(store, QUICK.model_copy(update={"check_tilt_sign": True, "electrons_per_pattern": 2e7}))["tilt_sign"]
    assert told["verdict"] == "wrong"
    assert "mirrored in z" in told["sentence"]
    assert told["mirrored_loss"] < told["loss"]


@pytest.mark.parametrize(("rise", "verdict"), [(0.02, "right"), (-0.02, "wrong"), (0.001, "undecided")])
def test_a_hand_needs_three_standard_errors_over_the_tilts(rise, verdict):
    losses = np.array([1.0, 1.2, 0.9, 1.1])
    scatter = 0.005 * np.array([1, -1, 1, -1])  # standard error 0.0029
    assert Hand(losses, losses + rise + scatter).verdict == verdict


def test_one_slice_cannot_tell_the_hand():
    with pytest.raises(ValueError, match="single_slice has none"):
        JointSettings(check_tilt_sign=True, single_slice=True)


def test_a_wrong_focus_of_one_tilt_is_found(tmp_path):
    said = [100.0] * 4 + [112.0, 100.0]
    store = exact_store(tmp_path / "focus.zarr", THETA_DEG, THETA_DEG, said)
    exact = QUICK.model_copy(update={"electrons_per_pattern": 2e7, "accelerated_epochs": 0})
    plain = joint(store, exact)
    refined = joint(store, exact.model_copy(update={"refine_focus": True}))
    assert refined["final_loss"] < 0.5 * plain["final_loss"]
    found = store.read("joint")["focus_change_angstrom"].values
    np.testing.assert_allclose(found, [0, 0, 0, 0, -12, 0], atol=1)


@pytest.mark.heavy
def test_a_wrong_angle_of_one_tilt_is_mostly_found(tmp_path):
    right = np.arange(-60.0, 61, 12)
    said = right + 3 * (right == -12)
    store = exact_store(tmp_path / "angle.zarr", right, said, [100.0] * 11)
    more = {"electrons_per_pattern": 2e7, "accelerated_epochs": 0, "sweeps": 12, "batches": 1, "refine_angles": True}
    joint(store, QUICK.model_copy(update=more))
    error = store.read("joint")["theta_deg"].values - right
    # A turn of all tilts is a turn of the specimen, and four atoms hold the angle of a tilt to its neighbours' loosely.
    assert abs(error[4] - error[[3, 5]].mean()) < 0.8


def test_the_command_says_what_the_check_of_the_sign_found(series, tmp_path):
    other = copy_of(series, tmp_path / "command.zarr")
    arguments = ["joint", str(other.path), "--json", str(tmp_path / "numbers.json")]
    short = ("single_slice_epochs=1", "sweeps=1", "settling_sweeps=0", "slice_thickness_angstrom=2.4")
    for told in (*short, "check_tilt_sign=true"):
        arguments += ["--set", told]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "Note: the sign of the tilt" in result.output
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["tilt_sign"]["verdict"] in ("right", "wrong", "undecided")
    assert numbers["note"] == numbers["tilt_sign"]["sentence"]
