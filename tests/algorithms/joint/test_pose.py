"""Shifts, turns and focus of a view: changes by finite differences, and steps that find what was wrong."""

from dataclasses import replace

import numpy as np
import pytest

from stemtomo.algorithms.joint import pose, solver
from stemtomo.algorithms.joint.view import Box, View
from stemtomo.algorithms.ptychography.model import Model, State, patterns
from stemtomo.algorithms.ptychography.windows import object_grid
from stemtomo.algorithms.tomography.poses import euler_deg, turned
from stemtomo.geometry import Optics, Pose, Scan
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.physics.probe import probe_wave, reciprocal_grid
from stemtomo.physics.propagation import fresnel_propagator, propagate

SHAPE, PIXEL = (24, 24), (0.4, 0.4)
OPTICS = Optics(energy_ev=300e3, semiangle_rad=25e-3, aberrations={"C10": 60.0})
BOX = Box((32, 32, 32), 0.4)
GRID = object_grid(Scan((5, 5), (1.1, 1.1)).positions(), SHAPE, PIXEL)
VIEW = View.whole(Pose(0.5, phi_rad=0.1), BOX, GRID.shape_yx, 4)
WAVELENGTH = wavelength_angstrom(300e3)
PROBE = probe_wave(OPTICS, SHAPE, PIXEL, intensity=500.0, dtype=np.complex128)[None]
MODEL = Model(GRID, VIEW.propagators(SHAPE, WAVELENGTH, np.dtype(complex)), "amplitude", "phase")
EVERY = np.arange(25)


def specimen():
    """Smooth blobs, off the centre: turning them is exact to many digits."""
    z, y, x = np.indices(BOX.shape_zyx) - 16
    places = ((3, -2, 4, 0.25), (-4, 3, -3, 0.2), (1, 5, 1, 0.3), (-2, -4, 2, 0.2))
    return sum(h * np.exp(-((z - a) ** 2 + (y - b) ** 2 + (x - c) ** 2) / 5.0) for a, b, c, h in places)


def turned_by(vector):
    theta, phi, psi = np.radians(euler_deg(turned(VIEW.pose.rotation[None], np.array(vector)[None])))[:, 0]
    return replace(VIEW, pose=Pose(theta, phi, psi))


def focused(angstrom):
    return propagate(PROBE.copy(), fresnel_propagator(SHAPE, PIXEL, WAVELENGTH, angstrom, dtype=complex))


def slices_in(view):
    return solver.start_slices(specimen(), view, solver.Constraint())


def counts_in(view, probe=PROBE):
    return patterns(State(slices_in(view), probe), MODEL, EVERY)


def sums_in(view, counts, probe=PROBE):
    return solver.gradients(solver.Patterns(MODEL, counts, EVERY), slices_in(view), probe)


@pytest.mark.parametrize("column", range(3))
def test_turns_change_the_slices_as_they_do_when_the_volume_is_turned(column):
    h = 1e-4 * np.eye(3)[column]
    expected = (slices_in(turned_by(h)) - slices_in(turned_by(-h))) / 2e-4
    found = pose.turn_changes(specimen(), VIEW)[column]
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("column", range(2))
def test_shifts_change_the_slices_as_they_do_when_the_view_is_shifted(column):
    h = 1e-4 * np.eye(2)[column]
    moved = [slices_in(replace(VIEW, shift_px=tuple(sign * h))) for sign in (1, -1)]
    expected = (moved[0] - moved[1]) / 2e-4
    found = pose.shift_changes(slices_in(VIEW))[column]
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def test_the_slope_of_the_loss_in_the_turns_is_that_of_finite_differences():
    counts = counts_in(turned_by((0.03, -0.02, 0.04)))
    gradient = sums_in(VIEW, counts)["phase"]
    changes = pose.turn_changes(specimen(), VIEW)
    for column in range(3):
        h = 1e-4 * np.eye(3)[column]
        slope = (sums_in(turned_by(h), counts)["loss"] - sums_in(turned_by(-h), counts)["loss"]) / 2e-4
        assert np.vdot(changes[column], gradient) == pytest.approx(slope, rel=5e-3)


def per_focus(probe):
    """Return the derivative of a probe per Å of focus."""
    ky, kx = reciprocal_grid(SHAPE, PIXEL)
    return propagate(probe.copy(), -1j * np.pi * WAVELENGTH * (ky**2 + kx**2))


def test_the_slope_of_the_loss_in_the_focus_is_that_of_finite_differences():
    counts = counts_in(VIEW, focused(8.0))
    gradient = sums_in(VIEW, counts)["probe"]
    slope = (sums_in(VIEW, counts, focused(1e-3))["loss"] - sums_in(VIEW, counts, focused(-1e-3))["loss"]) / 2e-3
    assert pose.focus_slope(per_focus(PROBE), gradient) == pytest.approx(slope, rel=1e-4)


def test_steps_of_shift_and_turns_together_find_the_pose():
    truth_shift, truth_turn = np.array([0.3, -0.2]), np.array([0.02, -0.03, 0.025])
    counts = counts_in(replace(turned_by(truth_turn), shift_px=tuple(truth_shift)))
    shift, turn = np.zeros(2), np.zeros(3)
    for _ in range(12):
        view = replace(turned_by(turn), shift_px=tuple(shift))
        sums = sums_in(view, counts)
        changes = np.concatenate([pose.shift_changes(slices_in(view)), pose.turn_changes(specimen(), view)])
        step = pose.pose_step(changes, sums["phase"], sums["illumination"], 1.0)
        shift, turn = shift + step[:2], turn + step[2:]
    np.testing.assert_allclose(shift, truth_shift, atol=0.01)
    np.testing.assert_allclose(turn, truth_turn, atol=1e-3)


def test_steps_of_the_focus_find_it_and_stay_short():
    counts, focus = counts_in(VIEW, focused(8.0)), 0.0
    for _ in range(5):
        probes = [focused(focus + ahead) for ahead in (0.0, pose.FOCUS_AHEAD_ANGSTROM)]
        slopes = [pose.focus_slope(per_focus(probe), sums_in(VIEW, counts, probe)["probe"]) for probe in probes]
        focus += pose.focus_step(*slopes)
    assert focus == pytest.approx(8.0, abs=0.01)
    assert pose.focus_step(1.0, 1.001) == -20
    assert pose.focus_step(1.0, 0.5) == -pose.FOCUS_AHEAD_ANGSTROM
