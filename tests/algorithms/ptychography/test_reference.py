"""Ptychography of an independent simulation with a known phase: the figures that a user may count on."""

from dataclasses import replace

import numpy as np
import pytest

from stemtomo.algorithms.ptychography import solver
from stemtomo.algorithms.ptychography.model import start_modes
from stemtomo.algorithms.ptychography.noise import expected_loss
from tests.algorithms.ptychography.test_solver import PIXEL, experiment
from tests.benchmarks import ptychography
from tests.data import needs


@pytest.mark.heavy
@needs("sto_zone")
def test_strontium_titanate_after_five_and_twenty_epochs():
    five = [row.figure for row in ptychography.strontium_titanate(5)]
    twenty = [row.figure for row in ptychography.strontium_titanate(20)]
    assert five[0] >= 0.995
    assert five[1] >= 0.998
    assert twenty[0] >= five[0]
    assert twenty[1] >= five[1]


def test_an_incoherent_source_is_found_with_four_modes():
    model, start, truth, _ = experiment(electrons=1e6, size=14)
    # A source of 0.12 Å rms: each pattern is a sum over a 5 x 5 grid of shifted probes, which no mode was told.
    steps = np.linspace(-2, 2, 5)
    expected, total = np.zeros(()), 0.0
    for dy, dx in np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2):
        shifts = model.grid.shifts_px + 0.12 / PIXEL[0] * np.array([dx, dy])
        moved = replace(model, grid=replace(model.grid, shifts_px=shifts))
        weight = np.exp(-0.5 * (dx**2 + dy**2))
        expected = expected + weight * solver.patterns(replace(start, phase=truth), moved, np.arange(196))
        total += weight
    expected /= total
    counts = np.random.default_rng(0).poisson(expected)
    floor = expected_loss(expected, "anscombe") * expected[0].size
    rules = [solver.Nesterov(probe_step=1.0)] * 40
    schedule = {"rules": rules, "batches": [8] * 25 + [1] * 15, "probe_start": 1}
    ends = {}
    for modes in (1, 4):
        begin = solver.State.start(model, start_modes(start.probe[0], modes, 0.05))
        state, losses = solver.solve(begin, model, counts, **schedule)
        ends[modes] = losses[-1] / floor
    assert ends[1] > 1.03
    assert ends[4] == pytest.approx(1, abs=0.03)
    powers = np.sum(np.abs(state.probe) ** 2, axis=(1, 2))
    assert (np.diff(powers) < 0).all()
