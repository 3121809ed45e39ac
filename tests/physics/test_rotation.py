"""Turning a volume by shears: unitary to rounding, and blobs go where the rotation matrix says."""

import math

import numpy as np
import pytest

from stemtomo.errors import ConfigurationError
from stemtomo.geometry import Pose, rotation_about
from stemtomo.physics import rotation

N = 40
POSE = Pose(math.radians(63), math.radians(20), math.radians(-130))


def _blobs(positions, width=1.6):
    """Gaussians at ``positions`` (n, 3), columns x, y, z in voxels from the centre; band-limited to rounding."""
    grid = np.arange(N) - N // 2
    x, y, z = (np.exp(-((grid - positions[:, [axis]]) ** 2) / (2 * width**2)) for axis in range(3))
    return np.einsum("az,ay,ax->zyx", z, y, x)


@pytest.fixture(scope="module")
def positions():
    return np.random.default_rng(0).uniform(-6, 6, (5, 3))


@pytest.mark.parametrize("axis", ["x", "y", "z"])
@pytest.mark.parametrize("angle_deg", [-160, -70, -45, 5, 30, 90, 110, 180])
def test_blobs_turn_right_handed_about_the_axis(axis, angle_deg, positions):
    angle = math.radians(angle_deg)
    found = rotation.turn(_blobs(positions), axis, angle)
    np.testing.assert_allclose(found, _blobs(positions @ rotation_about(axis, angle).T), atol=2e-4)


def test_a_feature_at_r_is_seen_at_r_transposed(positions):
    found = rotation.to_laboratory(_blobs(positions), POSE)
    np.testing.assert_allclose(found, _blobs(POSE.to_laboratory(positions)), atol=2e-4)


@pytest.mark.parametrize("size", [12, 13])
def test_the_inverse_is_the_adjoint_and_norms_are_kept(size):
    a, b = np.random.default_rng(1).normal(size=(2, size, size, size))
    turned = rotation.to_laboratory(a, POSE)
    np.testing.assert_allclose(rotation.to_sample(turned, POSE), a, atol=1e-12)
    assert np.linalg.norm(turned) == pytest.approx(np.linalg.norm(a), rel=1e-12)
    assert np.vdot(turned, b) == pytest.approx(np.vdot(a, rotation.to_sample(b, POSE)), rel=1e-12, abs=1e-11)


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("axis", ["x", "y", "z"])
def test_quarter_turns_only_move_voxels(size, axis):
    volume = np.random.default_rng(2).normal(size=(size, size, size))
    for quarters in (1, 2, 3, -1):
        turned = rotation.turn(volume, axis, quarters * math.pi / 2)
        np.testing.assert_array_equal(np.sort(turned, axis=None), np.sort(volume, axis=None))
    full = volume
    for _ in range(4):
        full = rotation.turn(full, axis, math.pi / 2)
    np.testing.assert_array_equal(full, volume)


def test_precision_and_kind_of_the_volume_are_kept(positions):
    volume = _blobs(positions).astype(np.float32)
    found = rotation.turn(volume, "y", 0.7)
    assert found.dtype == np.float32
    complex_volume = (volume + 2j * volume[::-1]).astype(np.complex64)
    both = rotation.turn(complex_volume, "y", 0.7)
    assert both.dtype == np.complex64
    np.testing.assert_allclose(both.real, found, atol=1e-5)


def test_no_turn_changes_nothing():
    volume = np.random.default_rng(3).normal(size=(6, 7, 8))
    np.testing.assert_array_equal(rotation.to_laboratory(volume, Pose(0.0)), volume)


def test_axes_of_different_length_are_named():
    volume = np.zeros((6, 7, 8))
    with pytest.raises(ConfigurationError, match="about y: axes z and x must be equally long"):
        rotation.to_laboratory(volume, Pose(0.2))
    rotation.turn(np.zeros((6, 9, 6)), "y", 0.2)
