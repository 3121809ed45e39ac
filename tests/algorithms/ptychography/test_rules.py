"""Update rules: each finds the object of noisy patterns, and what it needs adds up over parts."""

from dataclasses import replace

import numpy as np
import pytest

from stemtomo.algorithms.ptychography import solver
from stemtomo.algorithms.ptychography.noise import expected_loss
from stemtomo.algorithms.ptychography.rules import Adam, LeastSquares, Nesterov, precondition
from stemtomo.algorithms.ptychography.search import settle
from tests.algorithms.ptychography.test_solver import DETECTOR, correlation, experiment, scanned

RULES = {"nesterov": Nesterov(), "lsqml": LeastSquares(), "adam": Adam(step=0.2)}


@pytest.fixture(scope="module")
def case():
    model, start, truth, expected = experiment(2)
    return model, start, truth, expected, np.random.default_rng(0).poisson(expected).astype(np.uint16)


def score(state, model, truth):
    return correlation(state.phase.sum(axis=0), truth.sum(axis=0), scanned(model))


@pytest.mark.parametrize("name", RULES)
def test_every_rule_ends_at_the_noise_floor_with_the_right_phase(case, name):
    model, start, truth, expected, counts = case
    rules, batches = zip(*solver.steps(24, RULES[name], 8, 8), strict=True)
    state, losses = solver.solve(start, model, counts, rules=rules, batches=batches, probe_start=99)
    assert score(state, model, truth) > 0.9
    assert losses[-1] / np.prod(DETECTOR.shape_yx) / expected_loss(expected, "anscombe") < 1.05


def test_lbfgs_goes_on_from_a_few_batched_epochs_and_never_up(case):
    model, start, truth, expected, counts = case
    rules, batches = zip(*solver.steps(4, Nesterov(), 8, 0), strict=True)
    state, before = solver.solve(start, model, counts, rules=rules, batches=batches, probe_start=99)
    found, losses = settle(state, model, counts, 12, width_slices=0.5, parts=3)
    assert losses[0] < before[-1]
    assert (np.diff(losses) < 0).all()
    assert score(found, model, truth) > max(0.9, score(state, model, truth))
    assert losses[-1] / np.prod(DETECTOR.shape_yx) / expected_loss(expected, "anscombe") < 1.02


def test_the_least_squares_length_is_where_the_linearised_loss_is_lowest():
    # One slice, small phases, exact data of a phase d: along the direction D the loss is a parabola whose lowest point
    # the rule must find, whatever scale D has (here through the damping).
    model, start, truth, _ = experiment(dtype=np.complex128, size=8, electrons=1e6)
    exact = solver.patterns(replace(start, phase=1e-3 * truth), model, np.arange(64))
    everything = np.arange(64)
    sums = solver.gradients(start, model, exact, everything)
    peak = float(sums.illumination.max())
    for damping in (0.1, 0.9):
        moved = LeastSquares(damping=damping).object_step(start, sums, peak, 1)
        direction = -precondition(sums, damping, peak, 1.0)
        length = float(np.vdot(direction, moved.phase).real / np.vdot(direction, direction).real)
        # Independent: |J D|² of the waves themselves, by a difference of forward runs.
        tiny = 1e-7
        probes = solver.probes_at(start.probe, model.grid, everything)[:, 0]
        change = 0.0
        for probe, (row, column) in zip(probes, model.grid.corners, strict=True):
            window = direction[0, row : row + 32, column : column + 32]
            change += np.sum(np.abs((np.exp(1j * tiny * window) - 1) * probe / tiny) ** 2)
        assert length == pytest.approx(-np.vdot(sums.phase, direction).real / (2 * change), rel=1e-6)


def test_adam_holds_back_what_no_probe_lights(case):
    model, start, _, _, counts = case
    sums = solver.gradients(start, model, counts, np.arange(len(counts)))
    moved = Adam().object_step(start, sums, float(sums.illumination.max()), 2)
    dark = sums.illumination < 1e-5 * sums.illumination.max()
    assert dark.any()
    assert np.abs(moved.phase[:, dark]).max() < 2e-3 * np.abs(moved.phase).max()
    assert moved.memory["object"]["rounds"] == 1
