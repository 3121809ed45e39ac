"""Species from intensities."""

import numpy as np
import pytest

from stemtomo.algorithms.atoms.classification import atoms_and_others, classify, order_by_atomic_number
from stemtomo.algorithms.atoms.reclassification import reclassify_locally
from stemtomo.errors import ConfigurationError


def test_separate_classes_are_found_and_ordered_by_intensity():
    rng = np.random.default_rng(0)
    truth = rng.permutation(np.repeat([0, 1, 2], [300, 100, 12]))
    values = np.array([100.0, 180.0, 400.0])[truth] + rng.normal(0, 8, len(truth))
    classes = classify(values, 3)
    np.testing.assert_array_equal(classes.labels, truth)
    np.testing.assert_allclose(classes.centres, [100, 180, 400], rtol=0.03)
    assert classes.confidence.min() > 0.98


def test_an_atom_between_two_classes_is_uncertain():
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.normal(100, 10, 200), rng.normal(200, 10, 200), [150.0]])
    confidence = classify(values, 2).confidence
    assert confidence.argmin() == 400
    assert np.median(confidence) > 0.999


def test_one_class_is_certain():
    classes = classify(np.array([1.0, 2.0, 3.0]), 1)
    assert set(classes.labels) == {0}
    np.testing.assert_allclose(classes.confidence, 1)


def test_equal_intensities_within_a_class_have_no_width_to_divide_by():
    classes = classify(np.array([1.0, 1.0, 5.0, 5.0]), 2)
    assert classes.labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(classes.confidence, 1)


def test_more_classes_than_intensities_are_refused():
    with pytest.raises(ConfigurationError, match="3 classes cannot be made of 4 atoms with 2 different intensities"):
        classify(np.array([1.0, 1.0, 2.0, 2.0]), 3)


def test_symbols_follow_their_atomic_numbers():
    assert order_by_atomic_number(("Au", "Cu"), (79, 29)) == ("Cu", "Au")


def drifting(drift):
    """Return positions, profiles and classes of atoms brighter by ``drift`` at one side than at the other."""
    rng = np.random.default_rng(5)
    positions = rng.uniform(-25, 25, (3000, 3))
    truth = rng.integers(0, 2, len(positions))
    brightness = np.array([1.0, 1.5])[truth] * (1 + drift * (positions[:, 0] / 50 + 0.5))
    shape = np.exp(-0.5 * np.linspace(0, 2, 20) ** 2)
    return positions, brightness[:, None] * shape + rng.normal(0, 0.1, (len(positions), 20)), truth


def test_profiles_tell_species_apart_where_brightness_drifts():
    positions, profiles, truth = drifting(0.5)
    start = classify(profiles.sum(axis=1), 2).labels
    found = reclassify_locally(positions, profiles, start, radius_angstrom=10)
    assert (start == truth).mean() < 0.94
    assert (found.labels == truth).mean() > 0.995
    assert found.flips[-1] == 0 or len(set(found.flips[-5:])) == 1


def test_the_confidence_is_the_share_that_is_right():
    positions, profiles, truth = drifting(0.0)
    profiles += np.random.default_rng(6).normal(0, 0.7, profiles.shape)
    found = reclassify_locally(positions, profiles, classify(profiles.sum(axis=1), 2).labels, radius_angstrom=15)
    assert found.confidence.mean() == pytest.approx((found.labels == truth).mean(), abs=0.04)
    doubtful = found.confidence < 0.8
    assert (found.labels == truth)[doubtful].mean() < 0.85


def test_arrays_of_different_atoms_are_refused():
    with pytest.raises(ConfigurationError, match="4 positions, 3 profiles and 4 labels"):
        reclassify_locally(np.zeros((4, 3)), np.zeros((3, 5)), np.zeros(4, int))


def test_a_fainter_class_is_no_atoms():
    rng = np.random.default_rng(2)
    values = np.concatenate([rng.normal(30, 5, 200), rng.normal(100, 6, 300), rng.normal(180, 6, 100)])
    found = atoms_and_others(values, 2)
    np.testing.assert_array_equal(found, np.arange(600) >= 200)
