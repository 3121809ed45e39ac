"""Seam metrics: blind to noise, sensitive to tiles that are offset against each other."""

import numpy as np
import pytest

from stemtomo.algorithms.ptychography.seams import seam_lines, seams

ROWS = COLUMNS = [64, 128, 192]


def picture(offset=0.0):
    rng = np.random.default_rng(0)
    noise = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(256, 256))) * np.exp(-np.indices((256, 129)).sum(0) / 60))
    noise /= noise.std()
    tiles = np.kron(np.indices((4, 4)).sum(0) % 2, np.ones((64, 64)))
    return noise + offset * tiles


def test_a_picture_without_seams_shows_none():
    found = seams(picture(), ROWS, COLUMNS)
    assert found.step_ratio == pytest.approx(1, abs=0.05)
    assert found.period_peak < 10
    assert found.difference_ratio is None


def test_tiles_that_are_offset_show_at_their_seams():
    quiet, loud = seams(picture(), ROWS, COLUMNS), seams(picture(2.0), ROWS, COLUMNS)
    assert loud.step_ratio > 1.3 * quiet.step_ratio


def test_ramps_in_every_tile_have_a_peak_at_their_period():
    lines, ramps = list(range(32, 256, 32)), np.arange(256)[:, None] % 32 / 32
    shown = seams(picture() + ramps, lines, []).period_peak
    assert shown > 3 * seams(picture(), lines, []).period_peak


def test_a_difference_in_the_band_is_told_from_one_everywhere():
    truth = picture()
    noise = 0.1 * np.random.default_rng(1).normal(size=truth.shape)
    assert seams(truth + noise, ROWS, COLUMNS, truth).difference_ratio == pytest.approx(1, abs=0.05)
    noise[60:68] *= 5
    worse = seams(truth + noise, ROWS, COLUMNS, truth)
    assert worse.difference_ratio > 1.5
    assert worse.difference_rms > 0.15


def test_a_reconstruction_that_is_the_reference_has_no_difference():
    assert seams(picture(), ROWS, COLUMNS, picture()).difference_rms == 0


def test_tiles_meet_in_the_middle_of_their_overlaps():
    windows = [((0, 60), (0, 50)), ((0, 60), (30, 90)), ((40, 100), (0, 50)), ((40, 100), (30, 90))]
    assert seam_lines(windows) == ([50], [40])


def test_a_seam_outside_the_picture_is_refused():
    with pytest.raises(ValueError, match="seams at rows"):
        seams(picture(), [256], [])


def test_a_ramp_of_the_whole_picture_is_no_difference_where_that_is_asked():
    picture = np.random.default_rng(4).normal(size=(40, 50))
    y, x = np.indices(picture.shape)
    leaning = picture + 3 + 0.02 * y - 0.05 * x
    assert seams(leaning, [20], [25], picture, without_ramp=True).difference_rms < 1e-12
    assert seams(leaning, [20], [25], picture).difference_rms > 0.1
