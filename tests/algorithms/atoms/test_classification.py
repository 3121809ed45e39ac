"""Species from intensities."""

import numpy as np
import pytest

from stemtomo.algorithms.atoms.classification import classify, order_by_atomic_number
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
