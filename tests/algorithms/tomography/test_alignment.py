"""Shifts of projections: found to a fraction of a pixel from projections written down independently."""

import numpy as np
import pytest

from stemtomo.algorithms.tomography import alignment
from stemtomo.algorithms.tomography.alignment import without_translation
from stemtomo.geometry import TiltSeries
from tests.algorithms.tomography import phantom

SHAPE = (64, 64)
THETA = np.linspace(-70, 70, 15)
SINGLE = TiltSeries.from_degrees(THETA)
GENERAL = TiltSeries.from_degrees(THETA, np.linspace(-25, 20, 15), 12 * np.cos(np.arange(15)))


def rms(errors):
    return float(np.sqrt(np.mean(np.sum(np.square(errors), axis=1))))


def series_images(series, noise=0.0, seed=0, drift=3.0):
    """Return projections with shifts of up to ``drift`` px, the shifts, and a mask of all pixels."""
    rng = np.random.default_rng(seed)
    shifts = without_translation(rng.uniform(-drift, drift, (len(series), 2)), series.rotations)
    positions, weights = phantom.ball(120, 9.0, 2.4)
    images = phantom.images(positions + np.array([0.8, -0.5, 0.3]), weights, series.rotations, shifts, SHAPE)
    images = images + noise * images.max() * rng.normal(size=images.shape)
    return images, shifts, np.ones(images.shape, bool)


def test_a_translation_of_the_specimen_is_no_shift():
    seen = GENERAL.rotations.transpose(0, 2, 1)[:, :2] @ np.array([1.3, -2.0, 0.7])
    np.testing.assert_allclose(without_translation(seen, GENERAL.rotations), 0, atol=1e-12)
    other = np.random.default_rng(0).normal(size=(15, 2))
    rest = without_translation(other, GENERAL.rotations)
    np.testing.assert_allclose(without_translation(rest + seen, GENERAL.rotations), rest, atol=1e-12)


@pytest.mark.parametrize("series", [SINGLE, GENERAL], ids=["single axis", "general"])
@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 1e-3), (0.05, 0.35)])
def test_the_centre_of_mass_finds_the_shifts_of_any_poses(series, noise, tolerance):
    images, shifts, valid = series_images(series, noise)
    found = alignment.centre_of_mass(images, valid, series.rotations)
    assert rms(shifts) > 1
    assert rms(found.shifts_px - shifts) < tolerance


def test_vacuum_noise_far_from_the_specimen_does_not_move_the_centre():
    """The same noise in a field four times as large: without the mask its lever arm would double."""
    rng = np.random.default_rng(1)
    positions, weights = phantom.ball(120, 9.0, 2.4)
    images = phantom.images(positions, weights, SINGLE.rotations, np.zeros((15, 2)), (128, 128))
    images += 0.05 * images.max() * rng.normal(size=images.shape)
    found = alignment.centre_of_mass(images, np.ones(images.shape, bool), SINGLE.rotations)
    assert rms(found.shifts_px) < 0.3


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 5e-3), (0.05, 0.08)])
def test_the_common_line_finds_the_shifts_along_the_axis(noise, tolerance):
    images, shifts, valid = series_images(SINGLE, noise)
    found = alignment.common_line(images, valid, np.radians(THETA), np.zeros((15, 2)))
    assert np.sqrt(np.mean((found.shifts_px - shifts)[:, 1] ** 2)) < tolerance
    assert not found.shifts_px[:, 0].any()
    assert found.score.min() > 0.98


def test_the_common_line_does_not_mind_the_scale_of_a_projection_or_missing_columns():
    images, shifts, valid = series_images(SINGLE)
    images = images * np.linspace(0.5, 1.5, 15)[:, None, None]
    valid[:, :, :2] = False
    images[:, :, :2] = 9.0
    found = alignment.common_line(images, valid, np.radians(THETA), np.zeros((15, 2)))
    assert np.sqrt(np.mean((found.shifts_px - shifts)[:, 1] ** 2)) < 5e-3


def test_a_tilt_without_a_whole_row_has_no_common_line():
    images, _, valid = series_images(SINGLE)
    valid[3] = np.eye(64, dtype=bool)
    with pytest.raises(ValueError, match="no row that is measured over its full width"):
        alignment.common_line(images, valid, np.radians(THETA), np.zeros((15, 2)))


def test_the_border_tells_a_particle_from_a_film():
    images, _, valid = series_images(SINGLE, noise=0.02)
    assert alignment.border_fraction(images, valid).max() < 0.05
    film = 1 + 0.1 * np.random.default_rng(2).random((3, *SHAPE))
    assert alignment.border_fraction(film, valid[:3]).min() > 0.9
    cut = np.zeros((15, 64, 64), bool)
    cut[:, 20:44, 20:44] = True
    assert alignment.border_fraction(images, cut).min() > 0.2


def test_neighbours_of_a_film_are_chained_through_their_stretch():
    theta = np.arange(-40.0, 41.0, 5.0)
    series = TiltSeries.from_degrees(theta)
    rng = np.random.default_rng(3)
    film = rng.uniform([-45, -30, -1.5], [45, 30, 1.5], (2500, 3))
    shifts = without_translation(rng.uniform(-3, 3, (len(series), 2)), series.rotations)
    images = phantom.images(film, np.ones(len(film)), series.rotations, shifts, SHAPE, width=0.8)
    found = alignment.neighbour_correlation(images, np.ones(images.shape, bool), np.radians(theta))
    left = without_translation(found.shifts_px, series.rotations) - shifts
    assert rms(left) < 0.35 * rms(shifts)
    assert found.score.min() > 0.5


def test_the_centre_of_mass_survives_strong_noise():
    """Noise of a quarter of the maximum in every pixel: an average over the view would be wrong by 2 px and more."""
    images, shifts, valid = series_images(SINGLE)
    noisy = images + 0.25 * images.max() * np.random.default_rng(8).normal(size=images.shape)
    found = alignment.centre_of_mass(noisy, valid, SINGLE.rotations).shifts_px
    y, x = (np.arange(n) - n // 2 for n in images.shape[1:])
    plain = np.stack([(noisy * x).sum((1, 2)), (noisy * y[:, None]).sum((1, 2))], axis=1) / noisy.sum((1, 2))[:, None]
    assert rms(found - shifts) < 1.2
    assert rms(without_translation(plain, SINGLE.rotations) - shifts) > 1.5 * rms(found - shifts)
