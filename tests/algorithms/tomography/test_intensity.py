"""Projections in one scale: the factors that were put in come out."""

import numpy as np
import pytest

from stemtomo.algorithms.tomography.intensity import gains
from stemtomo.geometry import TiltSeries
from tests.algorithms.tomography import phantom

ROTATIONS = TiltSeries.from_degrees(np.linspace(-65, 65, 15)).rotations
SHIFTS = np.random.default_rng(0).uniform(-2, 2, (15, 2))
IMAGES = phantom.images(*phantom.ball(80, 6.0, 2.4), ROTATIONS, SHIFTS, (44, 40))
VALID = np.ones(IMAGES.shape, bool)


def _true(kind):
    rng = np.random.default_rng(5)
    factors = np.repeat(rng.uniform(0.8, 1.25, 15)[:, None], 44, axis=1)
    if kind == "rows":
        phase = rng.uniform(0, 2 * np.pi, 15)[:, None]
        factors = factors * (1 + 0.15 * np.sin(np.arange(44) * 2 * np.pi / 60 + phase))
    return factors


@pytest.mark.parametrize(("kind", "tolerance"), [("tilt", 1e-6), ("rows", 0.03)])
def test_factors_are_found_where_the_specimen_is(kind, tolerance):
    true = _true(kind)
    found = gains(IMAGES / true[:, :, None], VALID, SHIFTS[:, 1], kind)
    inside = IMAGES.sum(axis=2) > 0.3 * IMAGES.sum(axis=2).max()
    ratio = np.where(inside, found / true, np.nan)
    spread = ratio / np.nanmean(ratio) - 1
    assert np.sqrt(np.nanmean(spread**2)) < tolerance
    assert np.std(np.log(true[inside])) > 4 * tolerance


@pytest.mark.parametrize("kind", ["tilt", "rows"])
def test_projections_that_agree_are_left_alone(kind):
    noisy = IMAGES + 0.02 * IMAGES.max() * np.random.default_rng(1).normal(size=IMAGES.shape)
    found = gains(noisy, VALID, SHIFTS[:, 1], kind)
    assert np.abs(found[:, 14:30] - 1).max() < 0.06
    assert found.min() > 0.5


def test_rows_that_were_not_measured_do_not_count():
    valid = VALID.copy()
    valid[3, 20:24, :5] = False
    spoiled = np.where(valid, IMAGES, 1e3)
    np.testing.assert_allclose(gains(spoiled, valid, SHIFTS[:, 1], "tilt")[3], 1, atol=0.1)
