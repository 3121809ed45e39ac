"""Missing atoms come, false ones go, and the stated uncertainty is that of the errors; projections in plain NumPy."""

from dataclasses import replace

import numpy as np
import pytest

from stemtomo.algorithms.atoms.backprojection import density
from stemtomo.algorithms.atoms.classification import classify
from stemtomo.algorithms.atoms.completion import CompletionRules, _stands_apart, complete_atoms
from stemtomo.algorithms.atoms.projected import AtomModel, ProjectedImages, noise_weights
from stemtomo.algorithms.atoms.refinement import refine_atoms
from stemtomo.algorithms.atoms.scoring import match_atoms
from stemtomo.algorithms.atoms.uncertainty import position_covariance, position_uncertainty
from stemtomo.geometry import TiltSeries
from stemtomo.physics.projection import TiltGeometry

PIXEL, WIDTH, COUNT = 0.4, 0.5, 56
INTENSITIES = np.array([1.0, 2.2])


def drawn(positions, intensity, tilts=range(-70, 71, 10)):
    rotations = TiltSeries.from_degrees(list(tilts)).rotations
    axis = (np.arange(COUNT) - COUNT // 2) * PIXEL
    images = []
    for rotation in rotations:
        seen = positions @ rotation
        x, y = (np.exp(-0.5 * ((axis - seen[:, i, None]) / WIDTH) ** 2) for i in (0, 1))
        images.append((y * (intensity / (2 * np.pi * WIDTH**2))[:, None]).T @ x)
    return np.stack(images), rotations


def measured(images, rotations):
    shifts = np.zeros((len(images), 2))
    return ProjectedImages(images.astype(np.float32), np.ones(images.shape, bool), rotations, shifts, PIXEL)


@pytest.fixture(scope="module")
def glass():
    """Return positions and classes of atoms at random, none closer than 2 Å."""
    rng = np.random.default_rng(0)
    positions = np.empty((0, 3))
    for candidate in rng.uniform(-7, 7, (20000, 3)):
        far = np.linalg.norm(positions - candidate, axis=1) > 2.0
        if far.all() and np.linalg.norm(candidate) < 7:
            positions = np.append(positions, candidate[None], axis=0)
    return positions, rng.integers(0, 2, len(positions))


@pytest.fixture(scope="module")
def noisy(glass):
    positions, labels = glass
    images, rotations = drawn(positions, INTENSITIES[labels])
    return measured(images + np.random.default_rng(1).normal(0, 0.15, images.shape), rotations)


def test_missing_atoms_are_added_and_false_ones_dropped(glass, noisy):
    positions, labels = glass
    rng = np.random.default_rng(2)
    kept = rng.random(len(positions)) > 0.2
    false = rng.uniform(-5, 5, (6, 3))
    start = np.concatenate([positions[kept] + rng.normal(0, 0.15, (kept.sum(), 3)), false])
    before = match_atoms(start, positions, 0.75)
    found = complete_atoms(start, noisy, 2, width_angstrom=0.6, rules=CompletionRules(minimum_distance_angstrom=1.7))
    after = match_atoms(found.refined.positions, positions, 0.75)
    assert before.recall < 0.85
    assert (after.recall, after.precision) == (1, 1)
    assert after.rmsd_angstrom < 0.1 < before.rmsd_angstrom
    np.testing.assert_array_equal(found.labels[after.found], labels[after.truth])
    # A false atom may have moved to the place of a missing one.
    assert (found.origin < 0).sum() >= (~kept).sum() - len(false)
    assert sum(added for added, _ in found.history) >= (~kept).sum()


def test_a_lighter_element_that_tracing_missed_altogether_comes_back(glass, noisy):
    positions, labels = glass
    found = complete_atoms(
        positions[labels == 1], noisy, 2, width_angstrom=0.6, rules=CompletionRules(minimum_distance_angstrom=1.7)
    )
    after = match_atoms(found.refined.positions, positions, 0.75)
    assert min(after.recall, after.precision) > 0.98
    assert np.mean(found.labels[after.found] == labels[after.truth]) > 0.98


def test_without_rounds_atoms_only_go(glass, noisy):
    positions, _ = glass
    rules = CompletionRules(minimum_distance_angstrom=1.7, rounds=0)
    found = complete_atoms(positions[:-5], noisy, 2, width_angstrom=0.5, rules=rules)
    assert (found.origin >= 0).all()
    assert len(found.labels) <= len(positions) - 5


def test_two_thirds_of_the_errors_are_within_one_standard_deviation(glass, noisy):
    positions, labels = glass
    refined = refine_atoms(positions, labels, noisy, width_angstrom=WIDTH, iterations=100)
    sigma = position_uncertainty(refined, labels, noisy)
    share = (np.abs(refined.positions - positions) < sigma).mean()
    assert 0.6 < share < 0.76
    # The wedge of missing tilts is along z.
    assert sigma[:, 2].mean() > sigma[:, 1].mean() * 0.9


def test_the_covariance_of_one_atom_is_that_of_repeated_noise():
    position, label = np.array([[0.3, -0.2, 0.5]]), np.zeros(1, dtype=int)
    images, rotations = drawn(position, np.array([1.0]), range(-60, 61, 20))
    rng = np.random.default_rng(3)
    ends = []
    for _ in range(40):
        projected = measured(images + rng.normal(0, 0.05, images.shape), rotations)
        refined = refine_atoms(position, label, projected, width_angstrom=WIDTH, iterations=30)
        ends.append(refined.positions[0])
    predicted = np.sqrt(np.diag(position_covariance(refined.model, projected)[0]))
    np.testing.assert_allclose(np.std(ends, axis=0), predicted, rtol=0.3)


def test_an_atom_that_few_tilts_have_in_view_is_known_by_these_alone():
    position = np.array([[2.4, -0.2, 0.5], [-2.4, 0.2, -0.5]])
    images, rotations = drawn(position, np.ones(2), range(-60, 61, 12))
    noise = np.random.default_rng(3).normal(0, 0.05, images.shape)
    measurement = measured(images + noise, rotations)
    hidden = np.arange(len(images)) % 3 != 0
    valid = measurement.valid.copy()
    valid[hidden, :, images.shape[2] // 2 + 1 :] = False
    model = AtomModel(position, np.ones(2), np.full(2, WIDTH))
    partly = np.einsum("nii->ni", position_covariance(model, replace(measurement, valid=valid)))
    there = measured((images + noise)[~hidden], rotations[~hidden])
    few, all_ = (np.einsum("nii->ni", position_covariance(model, each)) for each in (there, measurement))
    np.testing.assert_allclose(partly[0], few[0], rtol=0.15)
    np.testing.assert_allclose(partly[1], all_[1], rtol=0.15)
    assert (few[0] > 1.5 * all_[0]).all()


def test_weights_are_the_inverse_of_a_variance_that_rises_with_brightness(glass):
    positions, labels = glass
    images, rotations = drawn(positions, INTENSITIES[labels])
    counts = np.random.default_rng(4).poisson(images * 20 + 4) / 20
    model = AtomModel(positions, INTENSITIES[labels], np.full(len(labels), WIDTH))
    weights = noise_weights(model, measured(counts, rotations))
    expected = 1 / (images + 0.2)
    np.testing.assert_allclose(weights, expected / expected.mean(), rtol=0.15)


def test_the_density_of_an_atom_has_its_place_and_integral():
    position = np.array([[1.2, -0.8, 0.4]])
    images, rotations = drawn(position, np.array([3.0]), range(-88, 91, 4))
    geometry = TiltGeometry(rotations, np.zeros((len(images), 2)), (32, 32, 32), images.shape[1:], 1)
    values = density(images, geometry, PIXEL, 0.0, 12.0)
    peak = np.array(np.unravel_index(np.argmax(values), values.shape))
    np.testing.assert_allclose((peak - 16)[::-1] * PIXEL, position[0], atol=PIXEL / 2)
    assert values.max() == pytest.approx(3 / (2 * np.pi * WIDTH**2) ** 1.5, rel=0.15)


@pytest.mark.parametrize(("rows", "columns", "every"), [(56, 56, 2), (55, 52, 2), (56, 51, 3)])
def test_averaged_pixels_leave_atoms_where_they_are(rows, columns, every):
    positions = np.array([[1.0, -2.1, 0.4], [-3.3, 0.7, 1.9]])
    images, rotations = drawn(positions, np.ones(2), range(-60, 61, 30))
    middle = COUNT // 2
    cut = images[:, middle - rows // 2 :, middle - columns // 2 :][:, :rows, :columns]
    coarse = measured(cut, rotations).binned(every)
    assert coarse.pixel_angstrom == pytest.approx(every * PIXEL)
    # The centre of the light is where the atoms are seen.
    row, column = np.indices(coarse.images.shape[1:])
    for image, seen in zip(coarse.images, coarse.seen(positions), strict=True):
        centre = np.array([(image * column).sum(), (image * row).sum()]) / image.sum()
        np.testing.assert_allclose(centre, seen.mean(axis=0), atol=0.01)


def test_noise_between_two_species_does_not_make_them_one_and_halves_of_one_are_not_two():
    rng = np.random.default_rng(0)
    noisy = np.concatenate([rng.normal(28, 5, 400), rng.normal(45, 5, 400)])
    apart = classify(noisy, 2).labels
    assert np.mean(np.abs(noisy - 36.5) < 1.7) > 0.06  # no gap
    assert _stands_apart(noisy, apart)
    alone = rng.normal(45, 7, 800)
    assert not _stands_apart(alone, classify(alone, 2).labels)
