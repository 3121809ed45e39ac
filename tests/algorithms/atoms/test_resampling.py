"""Wider pixels: what lies within their band stays, what lies beyond it does not come back as something else."""

import numpy as np
import pytest

from stemtomo.algorithms.atoms.resampling import within_band


def waves(centres, frequency):
    """Return a wave along x at ``centres`` of pixels, the same in all rows."""
    return np.cos(2 * np.pi * frequency * centres + 0.7)


@pytest.mark.parametrize("every", [2, 3])
def test_waves_within_the_band_are_kept_and_those_beyond_are_left_out(every):
    columns = np.arange(60 * every)
    wide = every * np.arange(60) + (every - 1) / 2
    valid = np.ones((1, 40, 60 * every), bool)
    inner = slice(6, -6)
    for of_limit, kept in ((0.2, 1.0), (0.6, 1.0), (1.4, 0.0)):
        frequency = of_limit * 0.5 / every
        image = np.broadcast_to(waves(columns, frequency), valid.shape)
        found = within_band(image, valid, every)
        assert found.shape == (1, 40 // every, 60)
        expected = kept * waves(wide, frequency)
        np.testing.assert_allclose(found[0, 8][inner], expected[inner], atol=0.005)


def test_a_level_stays_a_level_at_the_edges_and_beside_pixels_that_were_not_measured():
    valid = np.ones((1, 40, 40), bool)
    valid[0, 11:17, 20:31] = False
    image = np.where(valid, 3.0, 1e6)
    found = within_band(image, valid, 2)
    measured = valid[0].reshape(20, 2, 20, 2).all(axis=(1, 3))
    np.testing.assert_allclose(found[0][measured], 3.0, rtol=1e-12)


def test_white_noise_of_single_pixels_keeps_its_power_per_frequency():
    noise = np.random.default_rng(0).normal(size=(1, 400, 400))
    found = within_band(noise, np.ones(noise.shape, bool), 2)
    # A quarter of the frequencies, less some of those next to the limit.
    assert 0.2 < found.var() < 0.26
