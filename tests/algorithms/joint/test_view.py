"""A view of the volume: slices are sums of planes of the turned volume, and every step has its adjoint."""

import numpy as np
import pytest

from stemtomo.algorithms.joint.view import Box, View, slices_adjoint, slices_of
from stemtomo.geometry import Pose

BOX = Box((24, 20, 24), 0.4)
TURNED = Pose(0.7)


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("per_slice", [1, 5, 8, 24])
@pytest.mark.parametrize("shift", [(0.0, 0.0), (1.3, -0.6)])
@pytest.mark.parametrize("object_yx", [(30, 28), (16, 24)])
def test_spreading_slices_is_the_adjoint_of_summing_planes(per_slice, shift, object_yx):
    view = View.whole(TURNED, BOX, object_yx, per_slice)
    view = View(view.pose, view.box, view.object_yx, per_slice, view.first, view.slices, shift)
    volume = random(BOX.shape_zyx)
    seen = slices_of(volume, view)
    slices = random(seen.shape, 1)
    assert np.vdot(seen, slices) == pytest.approx(np.vdot(volume, slices_adjoint(slices, view)), rel=1e-12)


def test_slices_of_an_untilted_volume_are_sums_of_its_planes():
    volume = random(BOX.shape_zyx)
    seen = slices_of(volume, View.whole(Pose(0.0), BOX, (20, 24), 5))
    assert seen.shape == (5, 20, 24)
    np.testing.assert_allclose(seen[1], volume[5:10].sum(axis=0), atol=1e-12)
    np.testing.assert_allclose(seen[4], volume[20:].sum(axis=0), atol=1e-12)


def test_an_atom_is_seen_at_the_transposed_rotation_and_moved_by_the_shift():
    pose = Pose(np.deg2rad(40.0))
    x, y, z = 1.2, 1.0, -0.8
    axes = [(np.arange(n) - n // 2) * 0.4 for n in BOX.shape_zyx]
    squares = [(axis - centre) ** 2 for axis, centre in zip(axes, (z, y, x), strict=True)]
    distance = squares[0][:, None, None] + squares[1][None, :, None] + squares[2][None, None, :]
    view = View(pose, BOX, (20, 24), 1, 0, 24, (2.0, -1.0))
    seen = slices_of(np.exp(-distance / (2 * 0.6**2)), view)
    where = pose.rotation.T @ [x, y, z]
    weight = seen / seen.sum()
    found = [float((weight * grid).sum()) for grid in np.meshgrid(*axes, indexing="ij")]
    assert found[2] == pytest.approx(where[0] + 2 * 0.4, abs=0.02)
    assert found[1] == pytest.approx(where[1] - 0.4, abs=0.02)
    assert found[0] == pytest.approx(where[2], abs=0.02)


def test_slices_stand_at_the_mean_height_of_their_planes():
    assert View.whole(TURNED, BOX, (20, 24), 1).first_slice_z_angstrom == pytest.approx(-12 * 0.4)
    assert View.whole(TURNED, BOX, (20, 24), 24).first_slice_z_angstrom == pytest.approx(-0.5 * 0.4)
    assert View.whole(TURNED, BOX, (20, 24), 8).slice_thickness_angstrom == pytest.approx(3.2)


def test_slices_that_the_support_leaves_empty_are_dropped_and_the_others_keep_their_places():
    support = np.zeros(BOX.shape_zyx, bool)
    support[9:14, 6:14, 8:16] = True
    whole = View.whole(Pose(0.0), BOX, (20, 24), 4)
    view = whole.within(support)
    assert (view.first, view.slices) == (8, 2)
    volume = random(BOX.shape_zyx) * support
    np.testing.assert_array_equal(slices_of(volume, view), slices_of(volume, whole)[2:4])
