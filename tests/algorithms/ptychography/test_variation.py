"""A probe that varies along the scan: its gradients, its gauges, and a beam that flickers and wanders."""

import numpy as np
import pytest

from stemtomo.algorithms.ptychography import solver
from stemtomo.algorithms.ptychography.noise import expected_loss
from stemtomo.algorithms.ptychography.variation import Variation
from tests.algorithms.ptychography.test_solver import OPTICS, PIXEL, experiment


@pytest.mark.parametrize("step", [1.13, 1.2])
def test_gradients_of_modes_and_weights_agree_with_finite_differences(step):
    model, start, truth, expected = experiment(2, "phase", step, np.complex128, size=3)
    counts = np.random.default_rng(0).poisson(expected)
    parameter = Variation(2)
    rng = np.random.default_rng(1)
    value = parameter.start(start.probe, 9)
    value = {"modes": value["modes"], "weights": 0.1 * rng.normal(size=(9, 2))}
    turn_modes = rng.normal(size=value["modes"].shape) + 1j * rng.normal(size=value["modes"].shape)
    turn_weights = rng.normal(size=(9, 2))

    def sums(by):
        there = {"modes": value["modes"] + by * turn_modes, "weights": value["weights"] + by * 1e-2 * turn_weights}
        state = solver.State(0.8 * truth, start.probe, {"variation": there})
        return solver.gradients(state, model, counts, np.arange(9), [parameter])

    here, by = sums(0.0).extra["variation"], 1e-6
    numeric = (sums(by).loss - sums(-by).loss) / (2 * by)
    exact = np.vdot(here["modes"], turn_modes).real + 1e-2 * np.vdot(here["weights"], turn_weights)
    assert numeric == pytest.approx(exact, rel=1e-6)


def test_the_modes_stay_orthonormal_and_the_weights_without_mean():
    _, start, _, _ = experiment()
    value = Variation(3).start(start.probe, 50)
    flat = value["modes"].reshape(3, -1)
    gram = (flat.conj() @ flat.T).real / np.vdot(start.probe, start.probe).real
    np.testing.assert_allclose(gram, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(value["weights"].mean(axis=0), 0, atol=1e-9)


def test_flickering_current_and_a_wandering_aperture_are_taken_up():
    model, start, truth, _ = experiment(electrons=1e5, size=12)
    rng = np.random.default_rng(2)
    flicker, wander = 0.05 * rng.normal(size=144), 0.15 * np.sin(np.arange(144) / 11)
    kx = np.fft.fftfreq(32, PIXEL[1]) * OPTICS.semiangle_rad**-1 * 0.0197  # -1 to 1 across the aperture
    uneven = np.fft.ifft2(np.fft.fft2(start.probe[0]) * kx)
    expected = []
    for number in range(144):
        probe = start.probe[0] * (1 + flicker[number]) + wander[number] * uneven
        state = solver.State(truth, probe[None])
        expected.append(solver.patterns(state, model, np.array([number]))[0])
    counts = np.random.default_rng(0).poisson(expected)
    floor = expected_loss(np.array(expected), "anscombe") * 1024
    ends = {}
    for modes in (0, 2):
        parameters = [Variation(modes)] if modes else []
        extra = {"variation": parameters[0].start(start.probe, 144)} if modes else {}
        begin = solver.State.start(model, start.probe[0], extra=extra)
        rules = [solver.Nesterov(probe_step=0.5)] * 30
        state, losses = solver.solve(
            begin, model, counts, rules=rules, batches=[8] * 24 + [2] * 6, probe_start=3,
            parameters=parameters, parameters_start=4,
        )  # fmt: skip
        ends[modes] = losses[-1] / floor
    assert ends[0] > 1.5
    assert ends[2] < 1.02
    weights = state.extra["variation"]["weights"]
    for known in (flicker, wander):
        fitted = weights @ np.linalg.lstsq(weights, known - known.mean(), rcond=None)[0]
        assert np.corrcoef(fitted, known)[0, 1] > 0.98
