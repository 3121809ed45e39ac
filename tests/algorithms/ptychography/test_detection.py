"""Detector blur: what it does to a pattern, and the gradients of the loss behind it."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from stemtomo.algorithms.ptychography import solver
from stemtomo.algorithms.ptychography.detection import blurred
from stemtomo.algorithms.ptychography.parameters import Background
from tests.algorithms.ptychography.test_solver import correlation, experiment, recover, scanned


def test_the_blur_is_a_gaussian_that_keeps_the_electrons_and_is_its_own_adjoint():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 3, 32, 30))
    np.testing.assert_allclose(blurred(a, 1.3), ndimage.gaussian_filter(a, (0, 1.3, 1.3), mode="wrap"), atol=2e-4)
    np.testing.assert_allclose(blurred(a, 1.3).sum(axis=(1, 2)), a.sum(axis=(1, 2)), rtol=1e-12)
    assert np.vdot(blurred(a, 1.3), b) == pytest.approx(np.vdot(a, blurred(b, 1.3)), rel=1e-12)


@pytest.mark.parametrize("loss", ["amplitude", "anscombe", "poisson"])
def test_gradients_behind_the_blur_agree_with_finite_differences(loss):
    model, start, truth, expected = experiment(2, "complex", 1.13, np.complex128, size=3, loss=loss)
    model = replace(model, blur_px=0.8, mask=np.arange(1024).reshape(32, 32) % 17 != 3)
    counts = np.random.default_rng(0).poisson(expected)
    rng = np.random.default_rng(1)
    parameter = Background()
    extra = {"background": np.full((32, 32), 0.2)}
    at = solver.State(0.8 * truth + 0.02 * rng.normal(size=truth.shape), start.probe, extra)
    turn_phase = rng.normal(size=truth.shape) + 1j * rng.normal(size=truth.shape)
    turn_probe = rng.normal(size=start.probe.shape) + 1j * rng.normal(size=start.probe.shape)
    turn_light = rng.normal(size=(32, 32))

    def sums(step):
        there = solver.State(
            at.phase + step * turn_phase, at.probe + step * turn_probe, {"background": 0.2 + 0.1 * step * turn_light}
        )
        return solver.gradients(there, model, counts, np.arange(9), [parameter])

    here, step = sums(0.0), 1e-6
    numeric = (sums(step).loss - sums(-step).loss) / (2 * step)
    exact = np.vdot(here.phase, turn_phase).real + np.vdot(here.probe, turn_probe).real
    exact += 0.1 * np.vdot(here.extra["background"]["gradient"], turn_light)
    assert numeric == pytest.approx(exact, rel=1e-6)


def test_a_blurred_detector_costs_the_phase_nothing_once_it_is_in_the_model():
    model, start, truth, expected = experiment(electrons=1e6)
    seen = blurred(expected, 1.0)
    with_blur, losses = recover(replace(model, blur_px=1.0), start, seen)
    without, worse = recover(model, start, seen)
    mask = scanned(model)
    assert correlation(with_blur.phase[0], truth[0], mask) > 0.99
    assert losses[-1] < 0.1 * worse[-1]
    assert correlation(with_blur.phase[0], truth[0], mask) > correlation(without.phase[0], truth[0], mask)
