"""Tracing: atoms drawn as Gaussians come back where they were drawn, through blur, noise and a missing wedge."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from stemtomo.algorithms.atoms import fitting, peaks, thresholds, tracing
from stemtomo.algorithms.atoms.scoring import match_atoms
from stemtomo.errors import ConfigurationError, FormatError

VOXEL = 0.4


def particle(seed=0, spacing=2.6, radius=8.0):
    """Return positions (n, 3) in Å of a disordered, tilted lattice in a sphere, and intensities of 1 or 2.5."""
    rng = np.random.default_rng(seed)
    axis = np.arange(-4, 5) * spacing
    sites = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    sites = sites[np.linalg.norm(sites, axis=1) < radius]
    sites = sites @ Rotation.from_euler("zyx", [20, 30, 40], degrees=True).as_matrix()
    return sites + rng.uniform(-0.25, 0.25, sites.shape), rng.choice([1.0, 2.5], len(sites))


def gaussians(positions, intensity, sigma, count=54, wedge_deg=90.0, noise=0.0):
    """Return the volume (z, y, x) of Gaussians, without the spatial frequencies that tilts to +-wedge never see."""
    k = np.fft.fftfreq(count, VOXEL)
    waves = [np.exp(-2j * np.pi * np.outer(positions[:, i], k)) for i in range(3)]
    spectrum = np.einsum("az,ay,ax->zyx", waves[2] * intensity[:, None], waves[1], waves[0], optimize=True)
    kz, _, kx = np.meshgrid(k, k, k, indexing="ij")
    spectrum *= np.exp(-2 * (np.pi * sigma) ** 2 * (kz**2 + kx**2 + k[None, :, None] ** 2))
    seen = np.abs(np.arctan2(kz, np.abs(kx) + 1e-12)) <= np.radians(wedge_deg)
    volume = np.fft.ifftn(spectrum * seen).real / VOXEL**3
    grain = np.random.default_rng(1).normal(0, noise * volume.max(), volume.shape)
    return np.fft.fftshift(np.maximum(volume + np.fft.ifftn(np.fft.fftn(grain) * seen).real, 0))


def test_isolated_atoms_are_found_exactly():
    positions = np.array([[1.23, -3.31, 2.02], [-4.4, 4.1, -3.33], [0.1, 0.2, -6.0]])
    intensity = np.array([100.0, 200.0, 150.0])
    atoms = tracing.trace_atoms(gaussians(positions, intensity, 0.5), VOXEL, smoothing_angstrom=0)
    match = match_atoms(atoms.positions, positions, 0.5)
    assert len(atoms) == 3
    assert match.recall == 1
    np.testing.assert_allclose(atoms.positions[match.found], positions[match.truth], atol=2e-3)
    np.testing.assert_allclose(atoms.intensity[match.found], intensity[match.truth], rtol=0.01)
    np.testing.assert_allclose(atoms.width_angstrom, 0.5, rtol=0.01)


def test_smoothing_adds_in_quadrature_to_the_width():
    atoms = tracing.trace_atoms(gaussians(np.zeros((1, 3)), np.ones(1), 0.5), VOXEL, smoothing_angstrom=0.4)
    assert atoms.width_angstrom[0] == pytest.approx(np.hypot(0.5, 0.4), rel=0.01)


@pytest.mark.parametrize(
    ("wedge_deg", "noise", "rmsd_angstrom"), [(90, 0.0, 0.02), (70, 0.0, 0.06), (70, 0.03, 0.07), (60, 0.0, 0.1)]
)
def test_all_atoms_and_no_others_are_found_without_their_number(wedge_deg, noise, rmsd_angstrom):
    positions, intensity = particle()
    atoms = tracing.trace_atoms(gaussians(positions, intensity, 0.4, wedge_deg=wedge_deg, noise=noise), VOXEL)
    match = match_atoms(atoms.positions, positions, 0.75)
    assert (match.recall, match.precision) == (1, 1)
    assert match.rmsd_angstrom < rmsd_angstrom


def test_intensities_tell_two_species_apart():
    positions, intensity = particle()
    atoms = tracing.trace_atoms(gaussians(positions, intensity, 0.4, wedge_deg=70, noise=0.03), VOXEL)
    match = match_atoms(atoms.positions, positions, 0.75)
    found, true = atoms.integrated[match.found], intensity[match.truth]
    assert found[true == 1].max() < found[true == 2.5].min()


def test_the_threshold_is_blind_to_thousands_of_maxima_of_noise():
    rng = np.random.default_rng(2)
    noise, light, heavy = rng.exponential(1.0, 20_000), rng.normal(60, 4, 80), rng.normal(150, 8, 200)
    level = thresholds.bright_level(np.concatenate([noise, light, heavy]), 0.25)
    assert level == pytest.approx(np.percentile(np.concatenate([light, heavy]), 95))
    assert thresholds.bright_level(np.zeros(5), 0.25) == 0


def test_the_threshold_falls_into_the_gap_between_streaks_and_light_atoms():
    rng = np.random.default_rng(3)
    streaks, light, heavy = rng.uniform(1, 30, 500), rng.uniform(40, 50, 80), rng.uniform(150, 190, 200)
    everything = np.concatenate([streaks, light, heavy])
    assert 0.25 * thresholds.bright_level(everything, 0.25) > 45
    assert streaks.max() < thresholds.faintest_level(everything, 0.25) < light.min()


def test_noise_that_overlaps_the_atoms_is_cut_in_the_valley():
    rng = np.random.default_rng(4)
    noise, atoms = rng.exponential(0.08, 2000), rng.normal(0.75, 0.12, 200)
    level = thresholds.faintest_level(np.concatenate([noise, atoms]), 0.25)
    assert (atoms > level).mean() > 0.97
    assert (noise > level).sum() < 0.08 * len(atoms)


def test_the_valley_is_that_below_the_lightest_species():
    rng = np.random.default_rng(5)
    noise, light, heavy = rng.exponential(1.5, 2000), rng.normal(40, 3, 80), rng.normal(100, 4, 200)
    everything = np.concatenate([noise, light, heavy])
    assert noise.max() < thresholds.faintest_level(everything, 0.25) < light.min()


def test_a_light_species_that_touches_the_noise_is_kept():
    rng = np.random.default_rng(6)
    noise, light, heavy = rng.exponential(4.5, 3300), rng.normal(66, 16, 79), rng.normal(232, 18, 218)
    level = thresholds.faintest_level(np.concatenate([noise, light, heavy]), 0.25)
    assert (light > level).mean() > 0.9
    assert (noise > level).sum() < 0.02 * 297


def test_noise_that_fills_the_valley_below_a_known_light_species_does_not_take_it_along():
    rng = np.random.default_rng(7)
    noise, light, heavy = rng.exponential(5, 2000), rng.normal(33, 7, 80), rng.normal(85, 13, 217)
    everything = np.concatenate([noise, light, heavy])
    assert thresholds.faintest_level(everything, 0.25) > light.mean()  # the emptiest place is between the species
    level = thresholds.faintest_level(everything, 0.25, 0.6 * 29 / 79)
    assert (light > level).mean() > 0.8
    assert level == pytest.approx(0.25 * thresholds.bright_level(everything, 0.25))


def test_the_threshold_stays_where_intensities_leave_no_gap():
    everything = np.concatenate([np.linspace(1, 150, 3000), np.full(3000, 200.0)])
    assert thresholds.faintest_level(everything, 0.25) == pytest.approx(50)


def test_of_two_maxima_too_close_the_stronger_stays():
    positions = np.array([[0.0, 0, 0], [1.0, 0, 0], [2.0, 0, 0], [9.0, 0, 0]])
    kept = peaks.separate(positions, np.array([1.0, 3.0, 2.0, 0.5]), 1.5)
    assert kept.tolist() == [1, 3]
    # The middle one is gone, so the two outer ones no longer disturb each other.
    assert peaks.separate(positions, np.array([3.0, 1.0, 2.0, 0.5]), 1.5).tolist() == [0, 2, 3]


def test_an_atom_cut_by_the_face_of_the_volume_does_not_disturb_the_rest():
    positions = np.array([[0.0, 0.0, -10.6], [0.0, 0.0, -7.5], [3.0, 3.0, 0.0]])
    wide = gaussians(positions, np.full(3, 100.0), 0.45, count=64)
    volume = wide[5:-5, 5:-5, 5:-5]
    atoms = tracing.trace_atoms(volume, VOXEL, smoothing_angstrom=0)
    match = match_atoms(atoms.positions, positions, 0.5)
    assert match.recall == 1
    np.testing.assert_allclose(atoms.positions[match.found], positions[match.truth], atol=0.05)


def test_an_integral_does_not_jump_as_the_atom_moves():
    shifts = np.linspace(0, 1, 21)
    sums = []
    for shift in shifts:
        volume = gaussians(np.array([[shift * VOXEL, 0, 0]]), np.ones(1), 0.4, count=24)
        sums.append(peaks.integrate(volume, np.array([[12.0, 12.0, 12.0 + shift]]), 2.0)[0])
    assert np.ptp(sums) < 0.02 * np.mean(sums)


def test_fits_do_not_depend_on_how_many_are_made_together(monkeypatch):
    positions, intensity = particle()
    volume = gaussians(positions, intensity, 0.4, noise=0.02).astype(np.float32)
    centres = peaks.local_maxima(volume, 2.0)[:30]
    together = fitting.fit_gaussians(volume, centres, 2.0)
    monkeypatch.setattr(fitting, "_CHUNK", 7)
    np.testing.assert_allclose(fitting.fit_gaussians(volume, centres, 2.0).centres, together.centres, atol=1e-5)


def test_nothing_in_the_volume_is_no_atom():
    assert len(tracing.trace_atoms(np.zeros((20, 20, 20)), VOXEL)) == 0


def test_unusable_input_is_refused():
    with pytest.raises(FormatError, match=r"three axes.*\(20, 20\)"):
        tracing.trace_atoms(np.zeros((20, 20)), VOXEL)
    with pytest.raises(FormatError, match="finite"):
        tracing.trace_atoms(np.full((8, 8, 8), np.nan), VOXEL)
    with pytest.raises(ConfigurationError, match="below two voxels"):
        tracing.trace_atoms(np.zeros((8, 8, 8)), 1.0, minimum_distance_angstrom=1.5)


def test_noise_around_a_specimen_is_left_out_and_light_atoms_among_heavy_ones_are_not():
    rng = np.random.default_rng(0)
    atoms = np.stack(np.meshgrid(*[np.arange(-3.0, 4.0)] * 3), axis=-1).reshape(-1, 3) * 2.5
    heavy = rng.random(len(atoms)) > 0.3
    around = rng.uniform(-60, 60, (3000, 3))
    around = around[np.abs(around).max(axis=1) > 12]
    brightness = np.concatenate([np.where(heavy, 1.0, 0.45), rng.uniform(0.25, 0.5, len(around))])
    kept = thresholds.near_bright(np.concatenate([atoms, around]), brightness, 0.25, 3.0)
    assert kept[: len(atoms)].mean() > 0.99
    assert kept[len(atoms) :].mean() < 0.02
