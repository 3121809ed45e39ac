"""Joint refinement of poses and volume: what was wrong by 3 px and 1.5 degrees comes back, also in blocks."""

import os
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from stemtomo.algorithms.tomography.alignment import centre_of_mass, common_line, without_translation
from stemtomo.algorithms.tomography.poses import error_deg
from stemtomo.algorithms.tomography.solver import Measurement
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.errors import ConfigurationError
from stemtomo.geometry import TiltSeries
from stemtomo.io.provenance import Provenance
from stemtomo.physics.projection import TiltGeometry, render
from stemtomo.pipeline.alignment import align, aligned_geometry, plan_align
from stemtomo.pipeline.atoms import find_atoms
from stemtomo.pipeline.config import AlignmentSettings, AtomSettings, TomographySettings
from stemtomo.pipeline.descent import Problem
from stemtomo.pipeline.joint_alignment import binned, refine_poses, scales_of
from stemtomo.pipeline.progress import Silent
from stemtomo.pipeline.projection_matching import match_atoms, match_projections
from stemtomo.pipeline.reconstruction import reconstruct
from stemtomo.pipeline.tomography import tomography
from tests.algorithms.tomography import phantom
from tests.pipeline.projected import projected_store

DATA = Path(os.environ.get("STEMTOMO_DATA", Path(__file__).parents[3] / "shared" / "data")) / "fept_workshop"
EDGE, TILTS = 36, 21
NOMINAL = TiltSeries.from_degrees(np.linspace(-70, 70, TILTS))


def _series(pixels=3.0, degrees=1.5, seed=1):
    """Return atoms, true rotations and shifts, wrong by up to ``pixels`` and ``degrees``, evenly drawn."""
    rng = np.random.default_rng(seed)
    turns = Rotation.from_rotvec(np.radians(rng.uniform(-degrees, degrees, (TILTS, 3)))).as_matrix()
    return phantom.ball(60, 5.5, 2.4), NOMINAL.rotations @ turns, rng.uniform(-pixels, pixels, (TILTS, 2))


def _errors(geometry, rotations, shifts):
    """Return root mean square errors: in px; in degrees out of the plane about x and y, and in the plane."""
    wrong = without_translation(geometry.shifts_px - shifts, rotations)
    return np.sqrt(np.mean(wrong**2)), np.sqrt(np.mean(error_deg(geometry.rotations, rotations) ** 2, axis=0))


def _solved(images, geometry):
    measured = Measurement(images, np.ones(images.shape, bool), np.ones(len(images), np.float32), 0.5)
    settings = TomographySettings(iterations=40, refine_shifts=False)
    found = reconstruct(Problem(measured, geometry, 1.0, 1.0), settings, ThreadExecutor(1))
    return render(found.coefficients, 2, 0.5)


def test_three_pixels_and_one_and_a_half_degrees_come_back():
    atoms, rotations, shifts = _series()
    images = phantom.images(*atoms, rotations, shifts, (EDGE, EDGE)).astype(np.float32)
    start = TiltGeometry(NOMINAL.rotations, np.zeros((TILTS, 2)), (EDGE,) * 3, (EDGE, EDGE))
    assert _errors(start, rotations, shifts)[0] > 1.4
    found = refine_poses(images, np.ones(images.shape, bool), start, AlignmentSettings(), ThreadExecutor(1))
    pixels, degrees = _errors(found.geometry, rotations, shifts)
    assert pixels < 0.1
    assert degrees[0] < 0.05
    assert degrees[1] < 0.05
    assert degrees[2] < 0.1
    # The volume with the poses found, turned and moved as a whole onto the true ones, beside that of the true poses.
    common = Rotation.from_matrix(rotations @ found.geometry.rotations.transpose(0, 2, 1)).mean().as_matrix()
    turned = common @ found.geometry.rotations
    seen = rotations.transpose(0, 2, 1)[:, :2]
    offset = np.linalg.lstsq(seen.reshape(-1, 3), (shifts - found.geometry.shifts_px).ravel(), rcond=None)[0]
    there = TiltGeometry(turned, found.geometry.shifts_px + seen @ offset, (EDGE,) * 3, (EDGE, EDGE))
    truth = TiltGeometry(rotations, shifts, (EDGE,) * 3, (EDGE, EDGE))
    assert np.corrcoef(_solved(images, there).ravel(), _solved(images, truth).ravel())[0, 1] > 0.99


def test_nothing_is_turned_where_the_angles_are_right():
    atoms, _, shifts = _series(degrees=0.0)
    images = phantom.images(*atoms, NOMINAL.rotations, shifts, (EDGE, EDGE)).astype(np.float32)
    start = TiltGeometry(NOMINAL.rotations, np.zeros((TILTS, 2)), (EDGE,) * 3, (EDGE, EDGE))
    settings = AlignmentSettings(joint_iterations=60, refine_in_plane=False)
    found = refine_poses(images, np.ones(images.shape, bool), start, settings, ThreadExecutor(1))
    assert np.abs(_errors(found.geometry, NOMINAL.rotations, shifts)[1]).max() < 0.12


def test_magnifications_are_found_where_asked_for():
    atoms, rotations, shifts = _series(pixels=0.5, degrees=0.0)
    scales = np.exp(np.random.default_rng(4).uniform(-0.02, 0.02, TILTS))
    scales /= np.exp(np.log(scales).mean())
    views = []
    for k, s in enumerate(scales):
        one = slice(k, k + 1)
        views.append(
            phantom.images(atoms[0] * s, atoms[1] * s * s, rotations[one], shifts[one], (EDGE, EDGE), 0.35 * s)
        )
    images = np.concatenate(views).astype(np.float32)
    start = TiltGeometry(NOMINAL.rotations, np.zeros((TILTS, 2)), (EDGE,) * 3, (EDGE, EDGE))
    settings = AlignmentSettings(refine_magnification=True, joint_iterations=80)
    found = refine_poses(images, np.ones(images.shape, bool), start, settings, ThreadExecutor(1)).geometry
    assert np.std(scales) > 0.01
    assert np.abs(found.scales - scales).max() < 2.5e-3


def test_blocks_do_not_change_the_poses():
    atoms, rotations, shifts = _series()
    images = phantom.images(*atoms, rotations, shifts, (EDGE, EDGE)).astype(np.float32)
    start = TiltGeometry(NOMINAL.rotations, np.zeros((TILTS, 2)), (EDGE,) * 3, (EDGE, EDGE))
    settings = AlignmentSettings(joint_iterations=30, joint_bins=(2,))
    found = []
    for blocks in (1, 3):
        joint = refine_poses(images, np.ones(images.shape, bool), start, settings, ThreadExecutor(1), blocks=blocks)
        found.append(joint.geometry)
    np.testing.assert_allclose(found[1].shifts_px, found[0].shifts_px, atol=1e-3)
    np.testing.assert_allclose(found[1].rotations, found[0].rotations, atol=1e-5)


def test_align_stores_the_poses_and_tomography_and_atoms_use_them(tmp_path):
    atoms, rotations, shifts = _series(seed=3)
    series = TiltSeries.from_degrees(np.linspace(-70, 70, TILTS))
    store = projected_store(tmp_path / "s.zarr", series, atoms, shifts, (EDGE, EDGE))
    phase = store.read("projections").load()
    images = phantom.images(*atoms, rotations, shifts, (EDGE, EDGE))
    scale = float(phase["phase"].values.sum() / phantom.images(*atoms, series.rotations, shifts, (EDGE, EDGE)).sum())
    phase["phase"].values[:] = scale * images
    store.write("projections", phase, Provenance.start("projections", {"turned": True}))
    numbers = align(store, AlignmentSettings(refine_angles=True, joint_iterations=60))
    assert numbers["method"].endswith("+joint")
    assert 0.5 < numbers["angle_change_rms_deg"] < 3
    geometry = aligned_geometry(store.read("projections"), store.read("alignment"))
    assert _errors(geometry, rotations, shifts)[1].max() < 0.15
    assert np.sqrt(np.mean(error_deg(series.rotations, rotations) ** 2)) > 0.7
    told = tomography(store, TomographySettings(iterations=30, refine_shifts=False))
    assert told["r1"] < 0.2
    found = find_atoms(store, AtomSettings(species=("Cu", "Au")))
    assert found["refinement"] == "done"
    assert found["explained_variance"] > 0.99


class Stopped(Exception):
    pass


class Stop(Silent):
    """Interrupt after some iterations; count what was done."""

    def __init__(self, after):
        self.left, self.done, self.total = after, 0, 0

    def start(self, stage, total, unit=""):
        self.total = total

    def advance(self, n=1, **numbers):
        self.done += n
        self.left -= n
        if self.left <= 0:
            raise Stopped


def test_an_interrupted_refinement_goes_on_to_the_same_poses(tmp_path):
    atoms, _, shifts = _series(seed=5)
    settings = AlignmentSettings(refine_angles=True, joint_iterations=60, joint_bins=(2, 1))
    stores = [projected_store(tmp_path / f"{k}.zarr", NOMINAL, atoms, shifts, (EDGE, EDGE)) for k in "ab"]
    whole, count = align(stores[0], settings), Stop(10**6)
    with pytest.raises(Stopped):
        align(stores[1], settings, progress=Stop(60 + 28))  # in the second scale, after its first checkpoint
    assert stores[1].fingerprint("alignment") is None
    again = align(stores[1], settings, progress=count)
    for name in ("theta_deg", "phi_deg", "psi_deg", "shift_x_angstrom", "shift_y_angstrom"):
        found, expected = (store.read("alignment")[name].values for store in stores[::-1])
        np.testing.assert_array_equal(found, expected)
    assert again["angle_change_rms_deg"] == whole["angle_change_rms_deg"]
    assert count.done == count.total == 1 + 60 + 30
    assert not stores[1].checkpoint_path("alignment").exists()


def test_the_plan_knows_of_the_joint_refinement(tmp_path):
    atoms, _, shifts = _series(seed=5)
    store = projected_store(tmp_path / "s.zarr", NOMINAL, atoms, shifts, (EDGE, EDGE))
    plain, joint = (plan_align(store, AlignmentSettings(refine_angles=refine)) for refine in (False, True))
    assert joint.bytes_per_task >= plain.bytes_per_task + 4 * EDGE**3
    assert joint.bytes_written >= 4 * 8 * EDGE**3  # a checkpoint every 25 of 120 iterations


def test_scales_leave_48_to_128_pixels_and_coarse_pixels_know_where_they_are():
    assert scales_of((48, 48), AlignmentSettings()) == (1,)
    assert scales_of((256, 200), AlignmentSettings()) == (4, 2)
    assert scales_of((800, 800), AlignmentSettings()) == (16, 8)
    assert scales_of((300, 20), AlignmentSettings(joint_bins=(3, 1))) == (3, 1)
    with pytest.raises(ConfigurationError, match="begin with 10 at most"):
        scales_of((300, 20), AlignmentSettings(joint_bins=(16, 1)))
    position = np.array([[2.0, -1.2, 0.0]])
    image = phantom.images(position, np.ones(1), np.eye(3)[None], np.zeros((1, 2)), (51, 50), 1.0)
    valid = np.ones(image.shape, bool)
    valid[0, 0, 0] = False
    coarse, seen, offset = binned(image, valid, 3)
    assert coarse.shape == (1, 17, 16)
    assert not seen[0, 0, 0]
    assert seen[0].sum() == 17 * 16 - 1
    x = np.arange(16) - 8
    at = coarse[0].sum(axis=0) @ x / coarse.sum()
    assert at == pytest.approx((2.0 / phantom.PIXEL_ANGSTROM - offset[0]) / 3, abs=0.01)


def _fept(noise, seed=0):
    """Return multislice images moved by whole pixels, with noise; the series; the shifts, found beside clean images."""
    with np.load(DATA / "data.npz") as data:
        clean, moved = (data[key].transpose(2, 1, 0)[:-1].astype(np.float32) for key in ("proj", "proj_misaligned"))
        phi, theta, psi = data["tilt_euler_zyx_deg"][:-1].T
    spectra = np.fft.fft2(moved) * np.conj(np.fft.fft2(clean))
    peaks = [np.unravel_index(np.argmax(image), image.shape) for image in np.fft.ifft2(spectra).real]
    shifts = np.array([[(x + 34) % 68 - 34, (y + 34) % 68 - 34] for y, x in peaks], float)
    moved = moved + noise * moved.max() * np.random.default_rng(seed).normal(size=moved.shape).astype(np.float32)
    return moved, TiltSeries.from_degrees(theta, phi, psi), shifts


def _from_masses(moved, series):
    valid = np.ones(moved.shape, bool)
    start = centre_of_mass(moved, valid, series.rotations)
    start = common_line(moved, valid, np.array([pose.theta_rad for pose in series]), start.shifts_px)
    return TiltGeometry(series.rotations, start.shifts_px, (68, 68, 68), (68, 68))


@pytest.mark.heavy
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the FePt series of the GENFIRE workshop (set STEMTOMO_DATA)")
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_misaligned_series_of_fept_comes_back(noise):
    moved, series, shifts = _fept(noise)
    geometry, valid = _from_masses(moved, series), np.ones(moved.shape, bool)
    problem = Problem(Measurement(moved, valid, np.ones(len(moved), np.float32), 0.5), geometry, 1.0, 1.0)
    found = reconstruct(problem, TomographySettings(iterations=100), ThreadExecutor(1)).shifts_px
    wrong = without_translation(found - shifts, series.rotations)
    assert np.sqrt(np.mean(shifts**2)) > 1
    assert np.sqrt(np.mean(wrong**2)) < 0.2


@pytest.mark.heavy
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the FePt series of the GENFIRE workshop (set STEMTOMO_DATA)")
def test_projection_matching_finds_shifts_of_fept_under_noise_that_hides_its_columns():
    """Noise of 20 % of the brightest pixel, two and a half times the specimen's own variation."""
    moved, series, shifts = _fept(0.2)
    geometry = _from_masses(moved, series)
    found = match_projections(moved, np.ones(moved.shape, bool), geometry, AlignmentSettings(), ThreadExecutor(1))
    before, after = (
        np.sqrt(np.mean(without_translation(each - shifts, series.rotations) ** 2, axis=0))
        for each in (geometry.shifts_px, found.shifts_px)
    )
    assert before[0] > 1.1
    assert after[0] < 0.8
    assert after[1] < 0.12


@pytest.mark.heavy
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the FePt series of the GENFIRE workshop (set STEMTOMO_DATA)")
@pytest.mark.parametrize(("noise", "seed", "rms"), [(0.1, 0, 0.15), (0.2, 1, 0.25), (0.2, 2, 0.25)])
def test_atoms_place_projections_of_fept_that_noise_hides(noise, seed, rms):
    """The distance of the atoms, 7.2 px, is taken for 2.7 angstrom. Voxels leave 0.20, 0.35 and 0.50 px."""
    moved, series, shifts = _fept(noise, seed)
    start = _from_masses(moved, series)
    found = match_atoms(moved, np.ones(moved.shape, bool), start, AlignmentSettings(), ThreadExecutor(1), 0.375)
    before, after = (
        np.sqrt(np.mean(without_translation(each.shifts_px - shifts, series.rotations) ** 2)) for each in (start, found)
    )
    print(noise, seed, before, after)
    assert before > 0.5
    assert after < rms


@pytest.mark.heavy
def test_align_places_noisy_atoms_by_atoms(tmp_path):
    """A ball of 60 atoms under noise of 30 % of the brightest pixel: the store's shifts are better with atoms."""
    atoms, _, shifts = _series(seed=5)
    shifts *= 0.5
    errors = []
    for methods in (("centre_of_mass", "common_line"), ("centre_of_mass", "common_line", "atom_matching")):
        store = projected_store(tmp_path / f"{len(methods)}.zarr", NOMINAL, atoms, shifts, (EDGE, EDGE), noise=0.3)
        numbers = align(store, AlignmentSettings(methods=methods, largest_border_fraction=1.0))
        assert numbers["method"] == "+".join(methods)
        geometry = aligned_geometry(store.read("projections"), store.read("alignment"))
        errors.append(np.sqrt(np.mean(without_translation(geometry.shifts_px - shifts, NOMINAL.rotations) ** 2)))
    print(errors)
    assert errors[1] < 0.5 * errors[0]


def test_atoms_that_the_pixels_do_not_resolve_are_not_matched(tmp_path):
    atoms, _, shifts = _series(seed=5)
    store = projected_store(tmp_path / "s.zarr", NOMINAL, atoms, shifts, (EDGE, EDGE))
    settings = AlignmentSettings(methods=("centre_of_mass", "atom_matching"), joint_bins=(2,))
    with pytest.raises(ConfigurationError, match=r"are 2.1 pixels apart after binning by 2: bin less"):
        align(store, settings)
