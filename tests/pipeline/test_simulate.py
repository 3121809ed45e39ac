"""The simulated series: physics of its patterns, an independent simulator, and a store that survives a kill."""

import os
from pathlib import Path

import numpy as np
import pytest

from stemtomo.errors import StoreError
from stemtomo.geometry import Pose
from stemtomo.io.store import Store
from stemtomo.pipeline import simulate as module
from stemtomo.pipeline.simulate import SimulationSettings, diffraction_patterns, plan_simulate, simulate
from stemtomo.pipeline.specimen import Specimen, core_shell_nanoparticle, read_specimen, write_specimen

DATA = Path(os.environ.get("STEMTOMO_DATA", Path(__file__).parents[3] / "shared" / "data")) / "cuau_tilt"
needs_cuau = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data set {DATA}")

#: A series that takes a second: three tilts of a few atoms.
SMALL = {
    "tilt_deg": (-30.0, 0.0, 30.0),
    "scan_shape": (10, 9),
    "scan_step_angstrom": 1.3,
    "detector_px": 24,
    "oversampling": 2.0,
    "phonon_configurations": 1,
    "defocus_c1_angstrom": 50.0,
    "dose_per_square_angstrom": 2e4,
}


@pytest.fixture
def atoms():
    return Specimen(np.array([[0.3, -0.5, 1.0], [1.9, 1.2, -2.0], [-1.5, 0.8, 0.2]]), np.array([79, 29, 79]))


def small(**changes):
    return SimulationSettings(**{**SMALL, **changes})


def test_electrons_are_those_of_the_dose():
    settings = SimulationSettings()
    assert settings.electrons_per_pattern == pytest.approx(34133.3, abs=0.1)
    assert settings.detector.pixel_inv_angstrom == pytest.approx(0.0390625)
    assert settings.detector.object_pixel_angstrom_yx == pytest.approx((0.4, 0.4))
    assert settings.dtype == np.uint16
    assert SimulationSettings(dose_per_square_angstrom=1e7).dtype == np.uint32


def test_without_atoms_in_the_beam_the_pattern_is_the_aperture():
    far = Specimen(np.array([[500.0, 0.0, 0.0]]), np.array([1]))
    settings = SimulationSettings(**{**SMALL, "phonon_rms_angstrom": 0.0}, object_pixel_angstrom=0.4)
    far = Specimen(np.array([[0.0, 14.0, 0.0]]), np.array([1]))
    pattern = diffraction_patterns(far, Pose(0.0), np.array([[0.0, -12.0]]), settings)[0]
    k = np.fft.fftshift(np.fft.fftfreq(24, 0.4))
    radius = np.hypot(k[:, None], k[None, :])
    edge = 0.021 / 0.0196875
    assert pattern.sum() == pytest.approx(1, abs=2e-3)
    assert pattern[radius < edge - 0.06].std() < 0.02 * pattern.max()
    assert pattern[radius > edge + 0.06].max() < 1e-3 * pattern.max()


def test_an_atom_attracts_the_beam():
    # A potential well deflects electrons towards it: left of the atom, intensity moves to +kx.
    single = Specimen(np.zeros((1, 3)), np.array([79]))
    settings = small(defocus_c1_angstrom=0.0, phonon_rms_angstrom=0.0)
    k = np.arange(24) - 12
    left, right = diffraction_patterns(single, Pose(0.0), np.array([[-0.6, 0.0], [0.6, 0.0]]), settings)
    assert (left.sum(axis=0) * k).sum() > 0.2
    assert (right.sum(axis=0) * k).sum() == pytest.approx(-(left.sum(axis=0) * k).sum(), rel=0.05)


def test_tilting_the_sample_moves_the_atoms_as_the_pose_says(atoms):
    settings = small(phonon_rms_angstrom=0.0, tilt_deg=(0.0, 1.0))
    pose = Pose(np.radians(35.0))
    turned = Specimen(pose.to_laboratory(atoms.positions), atoms.atomic_numbers)
    positions = np.array([[0.0, 0.0], [1.0, -1.0]])
    np.testing.assert_allclose(
        diffraction_patterns(atoms, pose, positions, settings),
        diffraction_patterns(turned, Pose(0.0), positions, settings),
        atol=1e-6,
    )


def test_sub_pixel_positions_move_the_probe(atoms):
    settings = small(phonon_rms_angstrom=0.0)
    shift = np.array([0.137, -0.211])
    moved = Specimen(atoms.positions - np.array([*shift, 0.0]), atoms.atomic_numbers)
    np.testing.assert_allclose(
        diffraction_patterns(atoms, Pose(0.0), shift[None], settings),
        diffraction_patterns(moved, Pose(0.0), np.zeros((1, 2)), settings),
        atol=3e-6,
    )


def test_finer_grids_and_thinner_slices_change_little():
    specimen = core_shell_nanoparticle(2, 10.0)
    positions = np.array([[0.0, 0.0], [2.0, 1.0]])
    patterns = []
    for accuracy in ({"oversampling": 2.5}, {"oversampling": 4.0, "slice_thickness_angstrom": 0.8}):
        settings = small(detector_px=32, phonon_rms_angstrom=0.0, **accuracy)
        patterns.append(diffraction_patterns(specimen, Pose(0.0), positions, settings))
    coarse, fine = np.sqrt(patterns)
    assert np.abs(coarse - fine).sum() / fine.sum() < 0.02


@needs_cuau
def test_patterns_agree_with_an_independent_simulator():
    # abTEM's noise-free patterns of the same atoms; vibrations are drawn differently, which is most of the 3 %.
    truth = np.load(DATA / "truth.npz")
    specimen = read_specimen(DATA / "truth.npz")
    tilt = int(truth["noise_free_tilt_index"][0])
    settings = SimulationSettings(defocus_plane_z_angstrom=-15.5, slice_thickness_angstrom=1.0)
    choice = np.s_[7:17:3, 7:17:3]
    positions = settings.scan.positions().reshape(24, 24, 2)[choice].reshape(-1, 2)
    theirs = truth["noise_free_scaled"][0][choice].reshape(-1, 64, 64) / float(truth["noise_free_scale"])

    def misfit(pose, **changes):
        ours = diffraction_patterns(specimen, pose, positions, settings.model_copy(update=changes), tilt)
        return np.abs(np.sqrt(ours) - np.sqrt(theirs)).sum() / np.sqrt(theirs).sum()

    pose = settings.tilts[tilt]
    assert misfit(pose) < 0.035
    assert misfit(Pose(-pose.theta_rad), phonon_configurations=1) > 0.06
    assert misfit(pose, phonon_configurations=1, defocus_c1_angstrom=-200.0) > 0.1


def test_the_store_holds_counts_and_geometry_but_not_the_atoms(atoms, tmp_path):
    settings = small()
    numbers = simulate(tmp_path / "s.zarr", atoms, settings, name="three atoms")
    store = Store.open(tmp_path / "s.zarr")
    frames = store.frames(1)
    assert numbers["simulated_tilts"] == store.tilt_count == 3
    assert store.name == "three atoms"
    assert frames.shape == (10, 9, 24, 24)
    assert frames.dtype == np.uint16
    assert frames[:].sum() == pytest.approx(90 * settings.electrons_per_pattern, rel=0.02)
    assert store.pose(2).theta_rad == pytest.approx(np.radians(30))
    assert store.optics(0) == settings.optics
    assert store.detector(0).centre_yx == settings.detector.centre_yx == (12, 12)
    assert store.detector(0).pixel_inv_angstrom == settings.detector.pixel_inv_angstrom
    assert "-1.5" not in " ".join(p.read_text() for p in (tmp_path / "s.zarr").rglob("zarr.json"))


def test_counts_are_poisson(atoms, tmp_path):
    settings = small(tilt_deg=(0.0,), phonon_rms_angstrom=0.0)
    simulate(tmp_path / "s.zarr", atoms, settings)
    counts = Store.open(tmp_path / "s.zarr").frames(0)[:].reshape(90, 24, 24).astype(float)
    means = diffraction_patterns(atoms, Pose(0.0), settings.scan.positions(), settings) * settings.electrons_per_pattern
    bright = means > 10
    chi = ((counts - means)[bright] ** 2 / means[bright]).mean()
    assert chi == pytest.approx(1, abs=6 * np.sqrt(2 / bright.sum()))


def test_the_series_is_the_same_however_it_was_interrupted(atoms, tmp_path, monkeypatch):
    settings = small()
    simulate(tmp_path / "whole.zarr", atoms, settings)
    working = module._simulate_tilt

    def dying(index, *args):
        if index == 2:
            raise KeyboardInterrupt
        return working(index, *args)

    monkeypatch.setattr(module, "_simulate_tilt", dying)
    with pytest.raises(KeyboardInterrupt):
        simulate(tmp_path / "cut.zarr", atoms, settings)
    monkeypatch.setattr(module, "_simulate_tilt", working)
    resumed = simulate(tmp_path / "cut.zarr", atoms, settings)
    assert 1 <= resumed["simulated_tilts"] < 3
    assert simulate(tmp_path / "cut.zarr", atoms, settings)["simulated_tilts"] == 0
    whole, cut = Store.open(tmp_path / "whole.zarr"), Store.open(tmp_path / "cut.zarr")
    for index in range(3):
        np.testing.assert_array_equal(whole.frames(index)[:], cut.frames(index)[:])


def test_another_series_is_not_written_over(atoms, tmp_path):
    simulate(tmp_path / "s.zarr", atoms, small())
    mark = Store.open(tmp_path / "s.zarr").fingerprint("tilt")
    with pytest.raises(StoreError, match="simulate into another store"):
        simulate(tmp_path / "s.zarr", atoms, small(seed=2, tilt_deg=(0.0, 10.0)))
    store = Store.open(tmp_path / "s.zarr")
    assert store.tilt_count == 3
    assert store.fingerprint("tilt") == mark


def test_the_plan_knows_what_will_be_written():
    settings = SimulationSettings()
    row = plan_simulate(core_shell_nanoparticle(), settings)
    assert row.tasks == 15
    assert row.bytes_written == 15 * 24 * 24 * 64 * 64 * 2
    assert 0 < row.bytes_per_task < 200e6
    assert 20 < row.seconds < 200


def test_the_particle_is_its_seed_and_has_both_species():
    one, same, other = core_shell_nanoparticle(5), core_shell_nanoparticle(5), core_shell_nanoparticle(6)
    np.testing.assert_array_equal(one.positions, same.positions)
    assert len(one) != len(other) or not np.allclose(one.positions, other.positions)
    assert one.species == ("Cu", "Au")
    assert 150 < len(one) < 300
    distances = np.linalg.norm(one.positions[:, None] - one.positions[None], axis=-1)
    assert distances[np.triu_indices(len(one), 1)].min() > 1.8
    core = one.atomic_numbers == 29
    radius = np.linalg.norm(one.positions, axis=1)
    assert radius[core].mean() < radius[~core].mean()


def test_atoms_survive_a_file(tmp_path):
    specimen = core_shell_nanoparticle(3)
    write_specimen(tmp_path / "truth.xyz", specimen)
    back = read_specimen(tmp_path / "truth.xyz")
    np.testing.assert_allclose(back.positions, specimen.positions, atol=1e-6)
    np.testing.assert_array_equal(back.atomic_numbers, specimen.atomic_numbers)
