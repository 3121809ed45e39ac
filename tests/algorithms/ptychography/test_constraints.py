"""Constraints on the object: each does what it says, and those that are gauges change no pattern."""

from dataclasses import replace

import numpy as np
import pytest

from stemtomo.algorithms.ptychography import solver
from stemtomo.algorithms.ptychography.constraints import (
    Constraints,
    flattened,
    kz_filtered,
    notched,
    vacuum_at_zero,
)
from tests.algorithms.ptychography.test_solver import experiment


def test_nothing_is_done_unless_asked_for():
    _, start, truth, _ = experiment(2)
    state = replace(start, phase=truth)
    assert Constraints().after_update(state) is state
    assert Constraints().after_epoch(state, truth[0]) is state


def test_phases_and_moduli_stay_within_their_bounds():
    rng = np.random.default_rng(0)
    phase = rng.normal(size=(2, 9, 9)) + 1j * rng.normal(size=(2, 9, 9))
    bound = Constraints(positive=True, amplitude_limits=(0.9, 1.02))
    moved = bound.after_update(solver.State(phase, np.ones((1, 4, 4), complex)))
    size = np.abs(np.exp(1j * moved.phase))
    assert moved.phase.real.min() >= 0
    assert size.min() == pytest.approx(0.9)
    assert size.max() == pytest.approx(1.02)
    inside = (np.abs(np.exp(1j * phase)) > 0.9) & (np.abs(np.exp(1j * phase)) < 1.02) & (phase.real > 0)
    np.testing.assert_allclose(moved.phase[inside], phase[inside], rtol=1e-12)


def test_the_vacuum_of_every_slice_is_a_gauge():
    model, start, truth, expected = experiment(3, "complex", dtype=np.complex128)
    counts = np.random.default_rng(0).poisson(expected)
    everything = np.arange(len(counts))
    lit = solver.illumination(start.probe, model.grid)
    shifted = truth + np.array([0.3, -0.2, 0.7])[:, None, None]
    pinned = vacuum_at_zero(shifted, lit, 10)
    losses = [solver.gradients(solver.State(p, start.probe), model, counts, everything).loss for p in (shifted, pinned)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    bright = lit > 0.5 * lit.max()
    for layer in pinned.real:
        assert np.percentile(layer[bright], 10) == pytest.approx(0, abs=1e-12)


def test_total_variation_takes_noise_and_leaves_a_step():
    step = np.zeros((1, 40, 40))
    step[:, :, 20:] = 1.0
    noisy = step + 0.1 * np.random.default_rng(0).normal(size=step.shape)
    smooth = flattened(noisy, 0.15)
    assert np.sqrt(((smooth - step) ** 2).mean()) < 0.5 * np.sqrt(((noisy - step) ** 2).mean())
    assert smooth[0, :, 19].mean() < 0.2
    assert smooth[0, :, 20].mean() > 0.8
    assert smooth.mean() == pytest.approx(noisy.mean(), abs=1e-12)
    # The minimiser lies lower than its neighbours: |x - image|² / 2 + weight TV(x), TV by its definition.

    def value(x):
        rows, columns = np.diff(x[0], axis=0, append=x[0, -1:]), np.diff(x[0], axis=1, append=x[0, :, -1:])
        return 0.5 * np.sum((x - noisy) ** 2) + 0.15 * np.sum(np.hypot(rows, columns))

    assert value(smooth) < value(noisy)
    assert value(smooth) < value(0.5 * (smooth + noisy))
    assert value(smooth) < value(0.9 * smooth + 0.1 * smooth.mean())


def test_the_kz_filter_keeps_what_slices_share_and_mixes_neither_end():
    rng = np.random.default_rng(0)
    layer = rng.normal(size=(1, 16, 16))
    same = np.repeat(layer, 5, axis=0)
    np.testing.assert_allclose(kz_filtered(same, 1.0), same, atol=1e-12)
    alternating = np.array([1.0, -1, 1, -1])[:, None, None] * np.ones((1, 16, 16))
    assert np.abs(kz_filtered(alternating, 1.0)).max() < 0.2  # all depth, nothing across: filtered out
    first = np.zeros((8, 16, 16))
    first[0] = 1.0
    filtered = kz_filtered(first, 0.1)
    assert abs(filtered[-1]).max() < 0.3 * abs(filtered[0]).max()


def test_the_notch_takes_the_raster_and_nothing_else():
    y, x = np.indices((1, 60, 60))[1:]
    raster = np.cos(2 * np.pi * x / 5) + np.cos(2 * np.pi * y / 5) + np.cos(4 * np.pi * x / 5)
    lattice = np.cos(2 * np.pi * (x + y) / 12) + 0.3
    found = notched(lattice + raster, (5.0, 5.0))
    np.testing.assert_allclose(found, lattice, atol=1e-10)
