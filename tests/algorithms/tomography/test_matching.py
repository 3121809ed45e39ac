"""Where a projection may lie: overlaps, probabilities and averages against sums that are written down."""

import numpy as np
import pytest

from stemtomo.algorithms.tomography import matching


def _spot(x, y, edge=32, width=2.0):
    grid = np.arange(edge) - edge // 2
    return np.exp(-((grid[None, :] - x) ** 2 + (grid[:, None] - y) ** 2) / (2 * width**2)).astype(np.float32)


def test_the_overlap_of_two_gaussians_is_a_gaussian_of_their_distance():
    offsets = matching.offsets_px(3.0)
    overlap = matching.overlaps(_spot(1.5, -1.0)[None], _spot(0, 0)[None], offsets)[0]
    y, x = np.meshgrid(offsets, offsets, indexing="ij")
    expected = np.pi * 4 * np.exp(-((x - 1.5) ** 2 + (y + 1.0) ** 2) / (4 * 4))
    np.testing.assert_allclose(overlap, expected, rtol=2e-3)


def test_a_certain_offset_is_found_and_taken_back():
    offsets = matching.offsets_px(3.0)
    images = np.stack([_spot(1.5, -1.0), _spot(-0.75, 2.0)])
    overlap = matching.overlaps(images, np.stack([_spot(0, 0)] * 2), offsets)
    found = matching.probabilities(overlap, 1e-4, 1.0, offsets, np.array([50.0, 50.0]))
    np.testing.assert_allclose(found.sum(axis=(1, 2)), 1)
    mean, left = matching.expected(found, offsets)
    np.testing.assert_allclose(mean, [[1.5, -1.0], [-0.75, 2.0]], atol=0.01)
    assert left.max() < 0.05
    np.testing.assert_allclose(matching.averaged(images, found, offsets), [_spot(0, 0)] * 2, atol=0.01)


def test_what_is_not_known_is_averaged():
    offsets = np.array([-1.0, 0.0, 1.0])
    probability = np.zeros((1, 3, 3))
    probability[0, 1] = [0.25, 0.5, 0.25]  # along x alone
    image = _spot(0, 0)[None]
    expected = 0.5 * image[0] + 0.25 * (_spot(1, 0) + _spot(-1, 0))
    np.testing.assert_allclose(matching.averaged(image, probability, offsets)[0], expected, atol=1e-5)
    mean, left = matching.expected(probability, offsets)
    np.testing.assert_allclose(mean, 0, atol=1e-12)
    np.testing.assert_allclose(left, [[np.sqrt(0.5), 0]], atol=1e-12)


def test_the_width_known_beforehand_and_the_temperature_set_how_certain_an_offset_is():
    offsets, nothing = matching.offsets_px(7.0), np.zeros((1, 57, 57))
    for temperature in (1.0, 2.25):
        found = matching.probabilities(nothing, 1.0, temperature, offsets, np.array([0.5, 1.0]))
        left = matching.expected(found, offsets)[1][0]
        assert left == pytest.approx(np.sqrt(temperature) * np.array([1.0, 0.5]), rel=0.02)


def test_noise_is_measured_where_it_is_white():
    images = _spot(0, 0)[None] + 0.3 * np.random.default_rng(0).normal(size=(4, 32, 32))
    assert matching.noise_level(images, np.ones(images.shape, bool)) == pytest.approx(0.3, rel=0.06)
