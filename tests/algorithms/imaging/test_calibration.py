"""Disc, descan, rotation from the centre of mass, integrated phase, bad pixels and trends, against known answers."""

import numpy as np
import pytest

from stemtomo.algorithms.imaging.calibration import (
    bad_pixels,
    field_rotation,
    fit_descan,
    fit_disc,
    integrated_phase,
    without_descan,
)
from stemtomo.algorithms.imaging.trends import robust_trend
from stemtomo.errors import CalibrationError


def disc(shape=(80, 96), centre=(37.3, 50.8), radius=18.4, seed=None):
    y, x = np.indices(shape)
    pattern = 50.0 * np.clip(radius - np.hypot(y - centre[0], x - centre[1]) + 0.5, 0, 1) + 0.2
    if seed is not None:
        pattern *= 1 + 0.4 * np.sin(x / 3.0) * np.cos(y / 2.0)  # interference inside the disc
        pattern = np.random.default_rng(seed).poisson(pattern)
    return pattern


def field(rotation_deg, count=48, step=0.5, seed=0, noise=0.0, transposed=False):
    """Gradient / 2 pi of a smooth random phase, seen by a detector from which the scan is turned; and the phase."""
    rng = np.random.default_rng(seed)
    y, x = (np.indices((count, count)) - (count - 1) / 2) * step
    phase, g_y, g_x = np.zeros_like(y), np.zeros_like(y), np.zeros_like(y)
    for a, b in rng.uniform(-9, 9, size=(25, 2)):
        bump = np.exp(-((y - a) ** 2 + (x - b) ** 2) / 2.88)
        phase, g_y, g_x = phase + bump, g_y - bump * (y - a) / 1.44, g_x - bump * (x - b) / 1.44
    turn = np.deg2rad(rotation_deg)
    com_x = (np.cos(turn) * g_x - np.sin(turn) * g_y) / (2 * np.pi)
    com_y = (np.sin(turn) * g_x + np.cos(turn) * g_y) / (2 * np.pi)
    com_x, com_y = (c + noise * rng.normal(size=c.shape) for c in (com_x, com_y))
    return (com_x, com_y, phase) if transposed else (com_y, com_x, phase)


@pytest.mark.parametrize("seed", [None, 3])
def test_the_disc_is_found_to_a_fraction_of_a_pixel(seed):
    found = fit_disc(disc(seed=seed))
    assert found.centre_px_yx == pytest.approx((37.3, 50.8), abs=0.1)
    assert found.radius_px == pytest.approx(18.4, abs=0.15)


def test_a_disc_that_leaves_the_detector_and_an_empty_pattern_are_refused():
    with pytest.raises(CalibrationError, match="edge of the disc"):
        fit_disc(disc(radius=90.0))
    with pytest.raises(CalibrationError, match="empty"):
        fit_disc(np.zeros((32, 32)))


def test_descan_is_a_plane_whatever_the_specimen_does():
    com_y, com_x, _ = (0.1 * v for v in field(10))
    y, x = (np.indices(com_y.shape).T - 23.5).T
    found = fit_descan(com_y + 0.01 + 2e-3 * y - 1e-3 * x, com_x - 0.02 + 5e-4 * x)
    assert found.slope_ky_yx == pytest.approx((2e-3, -1e-3), abs=2e-4)
    assert found.slope_kx_yx == pytest.approx((0, 5e-4), abs=2e-4)
    flat = without_descan(0.01 + 2e-3 * y, -0.02 + 5e-4 * x, fit_descan(0.01 + 2e-3 * y, -0.02 + 5e-4 * x))
    np.testing.assert_allclose(flat, 0, atol=1e-9)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rotation_deg", [-70, 0, 23, 88])
def test_the_closed_form_is_the_best_of_all_angles(rotation_deg, transposed):
    com_y, com_x, _ = field(rotation_deg, transposed=transposed)
    found = field_rotation(com_y, com_x, (0.5, 0.5), 2.0)
    assert found.determined
    assert found.residual < 0.02
    assert np.rad2deg(found.rotation_rad) == pytest.approx(rotation_deg, abs=0.3)
    assert found.transposed == transposed


def test_noise_has_no_rotation():
    com_y, com_x, _ = field(23, noise=3.0)
    found = field_rotation(com_y, com_x, (0.5, 0.5), 2.0)
    assert not found.determined
    assert found.residual > 0.7


def test_the_integrated_phase_is_the_phase_up_to_a_constant():
    com_y, com_x, phase = field(23)
    found = integrated_phase(com_y, com_x, (0.5, 0.5), np.deg2rad(23))
    inner = np.s_[4:-4, 4:-4]
    assert np.corrcoef(found[inner].ravel(), phase[inner].ravel())[0, 1] > 0.995
    assert np.ptp(found) == pytest.approx(np.ptp(phase), rel=0.1)
    inverted = integrated_phase(com_y, com_x, (0.5, 0.5), np.deg2rad(203))
    np.testing.assert_allclose(inverted, -found, atol=1e-9)


def test_dead_and_hot_pixels_are_found_and_nothing_else():
    frames = np.random.default_rng(0).poisson(disc(seed=None) / 20, size=(64, 80, 96))
    frames[:, 40, 50] = 0
    frames[:, 10, 10] = 9
    frames[:, 36, 55] = 90
    found = bad_pixels(frames.mean(axis=0), frames.max(axis=0), len(frames))
    assert {tuple(map(int, p)): int(found[tuple(p)]) for p in np.argwhere(found)} == {
        (40, 50): 1,
        (10, 10): 2,
        (36, 55): 2,
    }


def test_a_trend_follows_the_height_and_names_the_tilt_that_does_not():
    theta = np.deg2rad(np.linspace(-60, 60, 13))
    values = 200 + 30 * np.sin(theta) + 12 * np.cos(theta) + np.random.default_rng(0).normal(size=13)
    values[4] += 60
    trend, outliers = robust_trend(theta, values, np.ones(13, bool), smooth=True)
    assert np.flatnonzero(outliers).tolist() == [4]
    assert trend[4] == pytest.approx(values[4] - 60, abs=4)
    unknown, none = robust_trend(theta, values, np.arange(13) < 2, smooth=True)
    assert unknown is None
    assert not none.any()
