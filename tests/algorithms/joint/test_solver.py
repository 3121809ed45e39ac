"""Steps of the joint reconstruction: gradients by finite differences, constraints, and gauges that cannot be told."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from stemtomo.algorithms.joint import solver
from stemtomo.algorithms.joint.transfer import frequency_gain
from stemtomo.algorithms.joint.view import Box, View, slices_adjoint
from stemtomo.algorithms.ptychography.model import Model, State, patterns
from stemtomo.algorithms.ptychography.windows import object_grid
from stemtomo.geometry import Detector, Optics, Pose, Scan
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.physics.probe import probe_wave

DETECTOR = Detector((16, 16), 1 / 6.4)
OPTICS = Optics(energy_ev=300e3, semiangle_rad=25e-3, aberrations={"C10": 60.0})
BOX = Box((16, 16, 16), 0.4)
GRID = object_grid(Scan((3, 3), (1.7, 1.3)).positions(), (16, 16), (0.4, 0.4))
VIEW = View.whole(Pose(0.5, phi_rad=0.1), BOX, GRID.shape_yx, 4)
PROBE = probe_wave(OPTICS, (16, 16), (0.4, 0.4), intensity=500.0, dtype=np.complex128)[None]
WAVELENGTH = wavelength_angstrom(300e3)


def scene(loss="anscombe"):
    model = Model(GRID, VIEW.propagators((16, 16), WAVELENGTH, np.dtype(complex)), loss, "phase")
    rng = np.random.default_rng(0)
    truth = rng.random(BOX.shape_zyx) * 0.05
    slices = solver.start_slices(truth, VIEW, solver.Constraint())
    counts = rng.poisson(patterns(State(slices, PROBE), model, np.arange(9)))
    return truth, solver.Patterns(model, counts, np.arange(9))


def loss_at(volume, seen, view=VIEW, width=0.0):
    slices = solver.start_slices(volume, view, solver.Constraint(element_width_px=width))
    return solver.gradients(seen, slices, PROBE)


@pytest.mark.parametrize("loss", ["amplitude", "anscombe", "poisson"])
def test_the_gradient_in_the_volume_is_the_slope_of_the_loss(loss):
    truth, seen = scene(loss)
    volume = 0.7 * truth
    gradient = slices_adjoint(loss_at(volume, seen)["phase"], VIEW)
    direction = np.random.default_rng(5).normal(size=volume.shape)
    h = 1e-6
    slope = (loss_at(volume + h * direction, seen)["loss"] - loss_at(volume - h * direction, seen)["loss"]) / (2 * h)
    assert np.vdot(gradient, direction) == pytest.approx(slope, rel=1e-6)


def test_masked_pixels_add_nothing_to_loss_and_gradient():
    truth, seen = scene()
    mask = np.random.default_rng(3).random((16, 16)) > 0.3
    volume = 0.7 * truth
    masked = replace(seen, model=replace(seen.model, mask=mask))
    found = loss_at(volume, masked)
    gradient = slices_adjoint(found["phase"], VIEW)
    direction = np.random.default_rng(5).normal(size=volume.shape)
    h = 1e-6
    ends = [loss_at(volume + step * direction, masked)["loss"] for step in (h, -h)]
    assert np.vdot(gradient, direction) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6)
    means = patterns(State(solver.start_slices(volume, VIEW, solver.Constraint()), PROBE), seen.model, np.arange(9))
    each = (np.sqrt(means + 0.375) - np.sqrt(seen.counts + 0.375)) ** 2
    assert found["loss"] == pytest.approx(each[:, mask].sum(), rel=1e-9)


@pytest.mark.parametrize("single_slice", [False, True])
def test_the_gradient_behind_a_window_that_is_larger_than_the_detector_is_the_slope(single_slice):
    grid = object_grid(Scan((3, 3), (1.7, 1.3)).positions(), (20, 20), (0.32, 0.32))
    view = View.whole(Pose(0.5, phi_rad=0.1), Box((20, 20, 20), 0.32), grid.shape_yx, 20 if single_slice else 5)
    probe = probe_wave(OPTICS, (20, 20), (0.32, 0.32), intensity=500.0, dtype=np.complex128)[None]
    gaps = view.propagators((20, 20), WAVELENGTH, np.dtype(complex))
    model = Model(grid, gaps, "anscombe", "phase", detector_yx=(16, 16))
    truth = np.random.default_rng(0).random(view.box.shape_zyx) * 0.05
    slices = solver.start_slices(truth, view, solver.Constraint())
    counts = patterns(State(slices, probe), model, np.arange(9))
    assert counts.shape == (9, 16, 16)
    seen = solver.Patterns(model, counts, np.arange(9))

    def sums(volume):
        return solver.gradients(seen, solver.start_slices(volume, view, solver.Constraint()), probe)

    assert sums(truth)["loss"] == pytest.approx(0, abs=1e-9)
    gradient = slices_adjoint(sums(0.7 * truth)["phase"], view)
    direction, h = np.random.default_rng(5).normal(size=truth.shape), 1e-6
    slope = (sums(0.7 * truth + h * direction)["loss"] - sums(0.7 * truth - h * direction)["loss"]) / (2 * h)
    assert np.vdot(gradient, direction) == pytest.approx(slope, rel=1e-6)


def test_amplified_steps_lower_the_loss_and_find_low_frequencies_sooner():
    grid = object_grid(Scan((8, 8), (1.6, 1.6)).positions(), (16, 16), (0.4, 0.4))
    view = View.whole(Pose(0.0), Box((1, *grid.shape_yx), 0.4), grid.shape_yx, 1)
    model = Model(grid, (), "amplitude", "phase")
    y, x = np.indices(grid.shape_yx) - np.array(grid.shape_yx)[:, None, None] // 2
    hill = 0.3 * np.exp(-(y**2 + x**2) / (2 * 8.0**2))[None]
    every = np.arange(64)
    seen = solver.Patterns(model, patterns(State(hill, PROBE), model, every), every)
    left = []
    for gain in (None, frequency_gain(PROBE, grid.shape_yx, 10.0)):
        slices, losses = np.zeros_like(hill), []
        for _ in range(12):
            sums = solver.gradients(seen, slices, PROBE)
            losses.append(sums["loss"])
            slices = solver.descended(slices, sums, solver.SweepRule(), 1.0, None, gain)
        assert losses == sorted(losses, reverse=True)
        centre, rim = slices[0, view.object_yx[0] // 2, view.object_yx[1] // 2], slices[0, 10:-10, 10].mean()
        left.append(abs(1 - (centre - rim) / (hill[0].max() - hill[0, 10:-10, 10].mean())))
    assert left[1] < 0.5 * left[0]


def test_vacuum_around_a_specimen_has_no_phase():
    y, x = np.indices((40, 40)) - 20
    specimen = np.where(y**2 + x**2 < 64, 0.5, 0.0)
    light = np.where(np.maximum(abs(y), abs(x)) < 17, 10.0, 0.0)
    slices = np.stack([specimen, specimen]) + 0.1 * (light > 0)
    for empty in (None, y**2 + x**2 > 100):
        found, share = solver.without_level(slices, light, empty)
        np.testing.assert_allclose(found[:, abs(y)[:, 0] < 10][:, :, :6], 0, atol=0.01)
        np.testing.assert_allclose(found[:, 20, 20], 0.5, atol=0.02)
        assert not found[:, light == 0].any()
        assert share == 1 if empty is None else share == pytest.approx(1 - np.pi * 10**2 / 33**2, abs=0.02)


def test_a_strip_of_vacuum_beside_much_matter_has_no_phase_where_the_outline_tells_it():
    rng = np.random.default_rng(5)
    y, x = np.indices((40, 120))
    columns = 0.5 + 0.5 * np.cos(x) * np.cos(y) + 0.1 * rng.normal(size=(40, 120))
    inside = abs(y - 20) < 16
    slices = np.where(inside, columns, 0.0)[None] + 0.2
    light = np.full((40, 120), 10.0)
    found, share = solver.without_level(slices, light, ~inside)
    np.testing.assert_allclose(found[0][~inside], 0, atol=1e-12)
    assert share == pytest.approx(0.225)
    alone, _ = solver.without_level(slices, light)
    assert alone[0][~inside].mean() < -0.1  # what most of the dark part agrees on is matter here


def test_a_specimen_that_fills_the_field_keeps_its_phase():
    slices = np.random.default_rng(6).random((2, 30, 30))
    found, share = solver.without_level(slices, np.ones((30, 30)), np.arange(30)[:, None] + 0 * slices[0] < 1)
    np.testing.assert_array_equal(found, slices)
    assert share < solver.LEAST_VACUUM


def test_elements_are_their_own_adjoint_and_keep_the_total():
    a, b = np.random.default_rng(1).normal(size=(2, 12, 10, 8))
    assert np.vdot(solver.elements(a, 0.8), b) == pytest.approx(np.vdot(a, solver.elements(b, 0.8)), rel=1e-12)
    assert solver.elements(a, 0.8).sum() == pytest.approx(a.sum(), rel=1e-12)


def test_an_element_is_a_gaussian_of_the_stated_width():
    point = np.zeros((24, 24, 24))
    point[12, 12, 12] = 1
    blob = solver.elements(point, 1.5)
    x = np.arange(24) - 12
    np.testing.assert_allclose(blob.sum(axis=(0, 1)), np.exp(-(x**2) / 4.5) / np.sqrt(2 * np.pi) / 1.5, atol=1e-6)


def test_batches_of_a_scan_add_up_to_all_of_it():
    truth, seen = scene()
    slices = solver.start_slices(0.5 * truth, VIEW, solver.Constraint())
    whole = solver.gradients(seen, slices, PROBE)
    parts = [solver.gradients(seen, slices, PROBE, np.array(where)) for where in ([0, 3, 8], [1, 2, 4, 5, 6, 7])]
    assert solver.gradients(seen, slices, PROBE, np.array([99])) is None
    for key in ("phase", "probe", "illumination", "loss", "positions"):
        np.testing.assert_allclose(parts[0][key] + parts[1][key], whole[key], rtol=1e-10, atol=1e-10)


def test_steps_on_one_view_lower_the_loss_until_noise_is_left():
    truth, seen = scene()
    volume = np.zeros_like(truth)
    losses = []
    for _ in range(40):
        slices = solver.start_slices(volume, VIEW, solver.Constraint())
        sums = solver.gradients(seen, slices, PROBE)
        losses.append(sums["loss"])
        change = solver.descended(slices, sums, solver.SweepRule(batches=1), 1.0, None) - slices
        volume = solver.turned_back(volume, change, VIEW, solver.Constraint(), None, 1.0)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < loss_at(truth, seen)["loss"]


def test_what_a_constraint_leaves_obeys_it():
    values = np.random.default_rng(2).normal(size=(6, 6, 6))
    support = np.random.default_rng(3).random((6, 6, 6)) > 0.5
    kept = solver.constrained(values, solver.Constraint(True, 0.1), support)
    assert kept.min() == 0
    assert not kept[~support].any()
    np.testing.assert_array_equal(kept[support], np.maximum(values[support] - 0.1, 0))
    signed = solver.constrained(values, solver.Constraint(False, 0.1), None)
    np.testing.assert_allclose(signed, np.sign(values) * np.maximum(np.abs(values) - 0.1, 0))


def test_a_loss_that_rises_starts_the_momentum_anew_from_the_last_iterate():
    rng = np.random.default_rng(4)
    now = solver.Momentum(rng.random((4, 4, 4)), rng.random((4, 4, 4)), 3.0, 1.0, 4.0)
    back = solver.accelerated(now, np.ones((4, 4, 4)), 2.0, 10.0, solver.Constraint(), None)
    assert back.t == 1
    assert back.step == 2
    np.testing.assert_array_equal(back.ahead, now.coefficients)


def test_the_support_holds_the_specimen_and_leaves_most_of_the_box():
    z, y, x = np.indices((40, 40, 40)) - 20
    ball = (z**2 + y**2 + x**2 < 8**2).astype(float)
    support = solver.auto_support(ball, 0.4)
    assert support[ball > 0].all()
    assert support.mean() < 0.4


def test_the_outline_is_above_a_haze_of_noise_and_holds_a_faint_part():
    z, y, x = np.indices((60, 60, 60)) - 30
    rng = np.random.default_rng(7)
    ball = (z**2 + y**2 + x**2 < 12**2).astype(float)
    field = ndimage.gaussian_filter(rng.normal(size=ball.shape), 6)
    haze = np.minimum(0.08 * np.exp(0.9 * field / field.std()), 0.4) * (ball == 0)
    assert solver.auto_support(ball, 0.4).mean() < 0.2
    assert ndimage.binary_dilation(haze > 0.2, iterations=5).mean() > 0.3
    noisy = solver.auto_support(ball + haze, 0.4)
    assert noisy[ball > 0].all()
    assert noisy.mean() < 0.2
    shell = np.where(ball > 0, 1.0, 0.35 * (z**2 + y**2 + x**2 < 20**2))
    assert solver.auto_support(shell, 0.4)[shell > 0].all()
