"""Positions: their gradient in the solver, the jitter they recover, and the affine map they tell."""

from dataclasses import replace

import numpy as np
import pytest

from stemtomo.algorithms.ptychography import solver
from stemtomo.algorithms.ptychography.positions import Positions, affine_fit, moved_grid, seen_curvature, without_gauges
from stemtomo.algorithms.ptychography.windows import object_grid
from stemtomo.geometry import Optics, Scan
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.physics.probe import probe_wave
from stemtomo.physics.propagation import fresnel_propagator

WINDOW, PIXEL = (32, 32), (0.4, 0.4)
OPTICS = Optics(energy_ev=300e3, semiangle_rad=21e-3, aberrations={"C10": 120.0})


def experiment(size, step, dtype, jitter_angstrom, slices=2, electrons=1e5):
    """A specimen whose probes were off by a random jitter, and the model that does not know it."""
    told = Scan((size, size), (step, step)).positions()
    grid = object_grid(told, WINDOW, PIXEL)
    rng = np.random.default_rng(0)
    jitter = without_gauges(jitter_angstrom * rng.normal(size=told.shape), told, affine=True)
    y, x = np.indices(grid.shape_yx)
    phase = np.zeros((slices, *grid.shape_yx))
    for layer in phase:
        for centre in rng.uniform(0.2, 0.8, size=(60, 2)) * np.array(grid.shape_yx):
            layer += 0.7 * np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / (2 * 1.2**2))
    propagator = fresnel_propagator(WINDOW, PIXEL, wavelength_angstrom(300e3), 30.0, dtype=dtype)
    model = solver.Model(grid, (propagator,) * (slices - 1), "anscombe", "phase")
    probe = probe_wave(OPTICS, WINDOW, PIXEL, intensity=electrons, dtype=dtype)
    truth = solver.State(phase.astype(np.zeros(0, dtype).real.dtype), probe[None])
    true_model = solver.Model(moved_grid(grid, jitter), model.propagators, "anscombe", "phase")
    expected = solver.patterns(truth, true_model, np.arange(len(told)))
    return model, truth, told, jitter, rng.poisson(expected).astype(np.uint16)


def test_the_gradient_of_positions_agrees_with_finite_differences():
    model, truth, told, _, counts = experiment(3, 1.13, np.complex128, 0.1)
    parameter = Positions(told, np.tile(np.eye(2), (9, 1, 1)))
    rng = np.random.default_rng(1)
    at, turn = 0.05 * rng.normal(size=told.shape), rng.normal(size=told.shape)

    def sums(value):
        state = solver.State(truth.phase, truth.probe, {"positions": value})
        return solver.gradients(state, model, counts, np.arange(9), [parameter])

    step = 1e-6
    numeric = (sums(at + step * turn).loss - sums(at - step * turn).loss) / (2 * step)
    assert numeric == pytest.approx(np.sum(sums(at).extra["positions"]["gradient"] * turn), rel=1e-6)


def test_pixels_that_tell_nothing_are_no_part_of_the_curvature():
    model, truth, *_ = experiment(3, 1.13, np.complex128, 0.1)
    mask = np.random.default_rng(1).uniform(size=WINDOW) > 0.4
    whole, one, other = (seen_curvature(truth, replace(model, mask=each)) for each in (None, mask, ~mask))
    np.testing.assert_allclose(one + other, whole, rtol=1e-9)
    assert (np.linalg.eigvalsh(whole - one) > 0).all()


def test_a_jitter_of_40_pm_is_recovered_to_5_pm():
    model, truth, told, jitter, counts = experiment(14, 0.8, np.complex64, 0.04)
    assert np.sqrt((jitter**2).mean()) == pytest.approx(0.04, abs=0.004)
    rules, batches = zip(*solver.steps(60, solver.Nesterov(), 4, 10), strict=True)
    fixed, _ = solver.solve(
        solver.State.start(model, truth.probe[0]), model, counts, rules=rules[:8], batches=batches[:8], probe_start=99
    )
    parameter = Positions(told, seen_curvature(fixed, model))
    start = solver.State(fixed.phase, fixed.probe, {"positions": parameter.start(fixed.probe)})
    state, _ = solver.solve(
        start, model, counts, rules=rules[8:], batches=batches[8:], probe_start=99, parameters=[parameter]
    )
    left = without_gauges(state.extra["positions"] - jitter, told, affine=True)
    assert np.sqrt((left**2).mean()) < 0.005


def test_the_affine_map_of_a_scan_is_told_in_scale_rotation_and_shear():
    told = Scan((8, 9), (0.5, 0.4)).positions()
    turn = np.array([[np.cos(0.02), -np.sin(0.02)], [np.sin(0.02), np.cos(0.02)]])
    stretch = np.array([[1.02, 0.003], [0.003, 0.99]])
    found = affine_fit(told, told @ (turn @ stretch).T + [0.3, -0.1])
    assert found.rotation_rad == pytest.approx(0.02, abs=1e-10)
    assert found.scale_xy == pytest.approx((1.02, 0.99), abs=1e-10)
    assert found.shear == pytest.approx(0.003, abs=1e-10)
    np.testing.assert_allclose(found.shift_angstrom, [0.3, -0.1], atol=1e-10)


def test_gauges_are_taken_out():
    told = Scan((6, 6), (1.0, 1.0)).positions()
    jitter = without_gauges(np.random.default_rng(0).normal(size=told.shape), told, affine=True)
    stretched = 0.02 * told + [1.0, 2.0]
    np.testing.assert_allclose(without_gauges(jitter + stretched, told, affine=True), jitter, atol=1e-12)
    np.testing.assert_allclose(without_gauges(stretched, told, affine=False), 0.02 * told, atol=1e-12)
