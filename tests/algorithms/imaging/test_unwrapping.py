"""Phases beyond half a turn come back whole: exact where they are sampled, honest where they are not."""

import numpy as np
import pytest

from stemtomo.algorithms.imaging.unwrapping import count_residues, phase_sum, unwrap, wrap


def hills(shape=(96, 80)):
    """Return a smooth phase from -6 to 6 rad whose border, and most of it, is at zero."""
    y, x = np.indices(shape) / np.array(shape)[:, None, None]
    up = np.exp(-((y - 0.35) ** 2 + (x - 0.4) ** 2) / 0.018)
    down = np.exp(-((y - 0.65) ** 2 + (x - 0.6) ** 2) / 0.018)
    return 6.2 * (up - down) / np.abs(up - down).max() * 0.97


def test_wrapping_keeps_the_interval():
    phase = np.array([-np.pi, np.pi, 3.5, -3.5, 0.0, 7.0])
    np.testing.assert_allclose(wrap(phase), [np.pi, np.pi, 3.5 - 2 * np.pi, 2 * np.pi - 3.5, 0, 7 - 2 * np.pi])
    np.testing.assert_allclose(np.exp(1j * wrap(phase)), np.exp(1j * phase))


@pytest.mark.parametrize("weights", [None, "gaussian"])
def test_six_radians_are_exact(weights):
    phase = hills()
    assert phase.max() > 6
    assert phase.min() < -6
    y, x = np.indices(phase.shape)
    light = None if weights is None else 0.05 + np.exp(-((y - 48) ** 2 + (x - 40) ** 2) / 800)
    np.testing.assert_allclose(unwrap(np.angle(np.exp(1j * phase)), light), phase, atol=1e-10)


def test_a_ramp_of_many_turns_is_exact_up_to_one_constant_of_whole_turns():
    y, x = np.indices((33, 47))
    phase = 1.9 * y - 2.3 * x
    difference = unwrap(np.angle(np.exp(1j * phase))) - phase
    assert np.ptp(difference) < 1e-10
    assert difference.mean() / (2 * np.pi) == pytest.approx(round(difference.mean() / (2 * np.pi)), abs=1e-10)


def test_what_is_not_lit_does_not_spoil_what_is():
    """Noise of all phases around a lit field, as outside a scan, would tear it without weights."""
    phase = hills()
    lit = np.zeros(phase.shape, bool)
    lit[12:84, 10:70] = True
    dark = np.random.default_rng(0).uniform(-np.pi, np.pi, phase.shape)
    wrapped = np.where(lit, np.angle(np.exp(1j * phase)), dark)
    assert count_residues(wrapped) > 500
    assert count_residues(wrapped, lit) == 0
    np.testing.assert_allclose(unwrap(wrapped, lit.astype(float))[lit], phase[lit], atol=1e-10)


def test_a_vortex_is_a_residue():
    y, x = np.indices((20, 20)) - 9.5
    assert count_residues(np.arctan2(y, x)) == 1
    assert count_residues(hills()) == 0


def test_phases_of_slices_add_up_where_the_phase_of_the_product_wraps():
    slices = np.stack([hills() * share for share in (0.4, 0.35, 0.25)])
    found = phase_sum(np.exp(1j * slices) * np.array([0.9, 1.0, 0.7])[:, None, None])
    assert np.abs(np.angle(np.exp(1j * slices.sum(axis=0))) - slices.sum(axis=0)).max() > 6
    difference = found.phase - slices.sum(axis=0)
    np.testing.assert_allclose(difference, difference[0, 0], atol=1e-10)
    assert found.unwrapped_slices == (0, 1)
    assert found.residues == 0


def test_a_constant_phase_of_every_slice_is_a_gauge():
    slices = np.stack([hills() * 0.2, hills() * 0.3])
    turned = np.exp(1j * (slices + np.array([2.9, -1.7])[:, None, None]))
    np.testing.assert_allclose(phase_sum(turned).phase, phase_sum(np.exp(1j * slices)).phase, atol=1e-12)


def test_a_thick_slice_is_unwrapped_where_it_is_lit():
    phase = 1.4 * hills()
    light = np.zeros(phase.shape)
    light[5:-5, 5:-5] = 3.0
    wave = np.where(
        light > 0, np.exp(1j * phase), 1e-3 * np.exp(2j * np.random.default_rng(1).normal(size=phase.shape))
    )
    found = phase_sum(wave[None], light)
    difference = (found.phase - phase)[light > 0]
    assert np.ptp(difference) < 1e-9
