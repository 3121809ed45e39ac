"""Gauss-Newton steps of shifts and when they are taken."""

import numpy as np
import pytest

from stemtomo.algorithms.tomography import refinement
from stemtomo.algorithms.tomography.alignment import without_translation
from stemtomo.geometry import TiltSeries
from stemtomo.physics.projection import TiltGeometry
from tests.algorithms.tomography import phantom

SERIES = TiltSeries.from_degrees(np.linspace(-70, 70, 9), np.linspace(-20, 10, 9))


def _step(seen, residual, valid, blur_px=0.0):
    geometry = TiltGeometry(SERIES.rotations, np.zeros((9, 2)), (56, 56, 56), seen.shape[1:])
    steps = refinement.gauss_newton_poses(geometry, seen, None, residual, valid, blur_px=blur_px)
    assert not steps[:, 2:].any()
    return steps[:, :2]


def _views(shifts):
    positions, weights = phantom.ball(40, 7.0, 2.6)
    return phantom.images(positions, weights, SERIES.rotations, shifts, (56, 56))


@pytest.mark.parametrize("blur_px", [0.0, 1.0, 3.0])
def test_one_step_finds_small_shifts(blur_px):
    shifts = without_translation(np.random.default_rng(0).normal(scale=0.1, size=(9, 2)), SERIES.rotations)
    seen = _views(np.zeros((9, 2)))
    valid = np.ones(seen.shape, bool)
    steps = _step(seen, seen - _views(shifts), valid, blur_px)
    np.testing.assert_allclose(steps, shifts, atol=0.15 * np.abs(shifts).max())


def test_a_wide_blur_reaches_further():
    """Shifts of more than the distance between atoms put atoms onto wrong ones, unless both are blurred."""
    shifts = without_translation(np.random.default_rng(1).uniform(-6, 6, (9, 2)), SERIES.rotations)
    target, valid = _views(shifts), np.ones((9, 56, 56), bool)
    errors = {}
    for blur_px in (0.0, 4.0):
        at = np.zeros((9, 2))
        for _ in range(20):
            seen = _views(at)
            at = at + _step(seen, seen - target, valid, blur_px)
        errors[blur_px] = np.sqrt(np.mean((at - shifts) ** 2))
    assert errors[4.0] < 0.02
    assert errors[0.0] > 0.5


def test_steps_hold_no_translation_of_the_specimen_and_are_limited():
    seen = _views(np.zeros((9, 2)))
    common = SERIES.rotations.transpose(0, 2, 1)[:, :2] @ np.array([0.2, -0.1, 0.15])
    valid = np.ones(seen.shape, bool)
    steps = _step(seen, seen - _views(common), valid)
    assert np.abs(steps).max() < 0.02
    far = _step(seen, 1e3 * seen[:, ::-1], valid)
    np.testing.assert_allclose(far, without_translation(far, SERIES.rotations), atol=1e-12)
    assert np.abs(far).max() < 2.0


def test_pixels_that_were_not_measured_do_not_pull():
    shifts = without_translation(np.random.default_rng(2).normal(scale=0.1, size=(9, 2)), SERIES.rotations)
    seen = _views(np.zeros((9, 2)))
    measured, valid = _views(shifts), np.ones(seen.shape, bool)
    valid[:, :20] = False
    measured[:, :20] = 5.0
    steps = _step(seen, seen - measured, valid, 1.0)
    np.testing.assert_allclose(steps, shifts, atol=0.03)


def test_an_empty_volume_leaves_the_shifts_alone():
    nothing = np.zeros((9, 12, 12))
    steps = _step(nothing, nothing - 1, np.ones((9, 12, 12), bool))
    np.testing.assert_allclose(steps, 0, atol=1e-12)


def test_the_schedule_goes_from_coarse_to_fine():
    schedule = refinement.PoseSchedule(100)
    due = [iteration for iteration in range(1, 201) if schedule.due(iteration)]
    assert due[0] == 5
    assert due[-1] == 100
    blurs = [schedule.blur_px(iteration) for iteration in due]
    assert blurs == sorted(blurs, reverse=True)
    assert 3 < blurs[0] < 4
    assert blurs[-1] == 1
