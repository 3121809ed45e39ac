"""Small turns of the poses, their gauges, and angles in degrees."""

import numpy as np
import pytest

from stemtomo.algorithms.tomography import poses
from stemtomo.geometry import Pose, TiltSeries, rotation_about
from stemtomo.physics.projection import TiltGeometry

SERIES = TiltSeries.from_degrees(np.linspace(-70, 70, 9), np.linspace(-20, 10, 9), np.linspace(3, -4, 9))


def test_a_feature_moves_by_the_turn_in_the_laboratory():
    vector = np.radians([[1.0, -2.0, 0.5]] * 9)
    feature = np.array([3.0, -2.0, 5.0])
    later = poses.turned(SERIES.rotations, vector)
    before, after = (np.einsum("kji,j->ki", rotations, feature) for rotations in (SERIES.rotations, later))
    np.testing.assert_allclose(after - before, np.cross(vector, before), atol=0.01)
    np.testing.assert_allclose(poses.turns_between(SERIES.rotations, later), vector)


def test_a_turn_of_the_specimen_is_taken_out_of_the_turns_of_the_tilts():
    common = np.radians([0.3, -0.2, 0.4])
    turned = np.stack([rotation_about("x", common[0]) @ r for r in SERIES.rotations])
    turned = np.stack([rotation_about("y", common[1]) @ r for r in turned])
    vectors = poses.turns_between(SERIES.rotations, turned)
    left = poses.without_rotation(vectors, SERIES.rotations)
    assert np.abs(left).max() < 0.01 * np.abs(vectors).max()
    assert np.abs(poses.error_deg(SERIES.rotations, turned)).max() < 1e-6


def test_steps_leave_translation_turn_and_magnification_of_the_specimen_alone():
    geometry = TiltGeometry(SERIES.rotations, np.zeros((9, 2)), (8, 8, 8), (8, 8))
    seen = SERIES.rotations.transpose(0, 2, 1)
    steps = np.zeros((9, 6))
    steps[:, :2] = seen[:, :2] @ [0.5, -1.0, 2.0]
    steps[:, 2:5] = seen @ [0.01, -0.02, 0.005]
    steps[:, 5] = 0.03
    after = poses.stepped(geometry, steps)
    np.testing.assert_allclose(after.rotations, geometry.rotations, atol=1e-12)
    np.testing.assert_allclose(after.shifts_px, 0, atol=1e-12)
    np.testing.assert_allclose(after.scales, 1, atol=1e-12)


def test_shifts_alone_keep_angles_and_magnifications_to_the_bit():
    geometry = TiltGeometry(SERIES.rotations, np.zeros((9, 2)), (8, 8, 8), (8, 8))
    steps = np.zeros((9, 6))
    steps[3, 0] = 1.0
    after = poses.stepped(geometry, steps)
    assert after.rotations is geometry.rotations
    assert after.magnifications is None


@pytest.mark.parametrize("angles", [(30.0, 2.0, -3.0), (-89.0, 0.0, 0.0), (0.0, -45.0, 10.0)])
def test_degrees_are_those_of_the_pose(angles):
    pose = Pose(*np.radians(angles))
    theta, phi, psi = poses.euler_deg(pose.rotation[None])
    np.testing.assert_allclose([theta[0], phi[0], psi[0]], angles, atol=1e-9)
