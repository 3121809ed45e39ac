import numpy as np
import pytest

from stemtomo.algorithms.ptychography.phase import centred, observed, vacuum_background
from stemtomo.errors import CalibrationError


def particle_in_vacuum(noise=0.02, radius=20):
    rng = np.random.default_rng(0)
    y, x = np.indices((64, 72)) - np.array([32, 36])[:, None, None]
    particle = np.where(np.hypot(y, x) < radius, 0.4 + 0.3 * rng.random((64, 72)), 0.0)
    ramp = 0.7 + 0.004 * y - 0.006 * x
    return particle, ramp, particle + ramp + noise * rng.normal(size=(64, 72))


def test_the_plane_under_a_particle_is_found_although_the_particle_is_bright():
    particle, ramp, phase = particle_in_vacuum()
    fitted = vacuum_background(phase, np.ones(phase.shape, bool), "plane")
    # One-sided rejection at two sigma biases the level by 0.055 sigma: 1 mrad here.
    assert np.abs(fitted - ramp).max() < 0.004
    assert abs(np.mean((phase - fitted)[particle == 0])) < 0.003


def test_a_level_is_a_constant_and_none_is_zero():
    _, _, phase = particle_in_vacuum()
    valid = np.ones(phase.shape, bool)
    assert np.ptp(vacuum_background(phase, valid, "level")) == 0
    assert not vacuum_background(phase, valid, "none").any()


def test_pixels_that_were_not_observed_do_not_count():
    _, ramp, phase = particle_in_vacuum()
    valid = np.ones(phase.shape, bool)
    valid[:, :10] = False
    spoilt = phase.copy()
    spoilt[:, :10] = -50
    np.testing.assert_allclose(vacuum_background(spoilt, valid, "plane"), ramp, atol=0.005)
    with pytest.raises(CalibrationError, match="observed pixels"):
        vacuum_background(phase, np.zeros(phase.shape, bool), "plane")


def test_observed_is_where_the_scan_went():
    illumination = np.zeros((40, 40))
    illumination[10:30, 5:35] = 7.0
    illumination[9, 5:35] = 1.0
    mask = observed(illumination, 0.2)
    assert mask[10:30, 5:35].all()
    assert mask.sum() == 20 * 30


@pytest.mark.parametrize("shape", [(7, 8), (12, 5), (9, 9), (4, 4)])
def test_the_centre_stays_the_centre_whatever_the_parity(shape):
    image = np.zeros((9, 8))
    image[4, 4] = 1
    out = centred(image, shape)
    assert out.shape == shape
    assert out[shape[0] // 2, shape[1] // 2] == 1
    assert out.sum() == 1
