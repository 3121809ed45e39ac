"""Projections of volumes: adjoints, blocks, exact turns, and a blob whose projection is known."""

import math
from dataclasses import replace

import numpy as np
import pytest

from stemtomo.errors import ConfigurationError
from stemtomo.geometry import Pose, TiltSeries, rotation_about
from stemtomo.physics import projection
from stemtomo.physics.projection import TiltGeometry, backproject, footprint, project, slabs

SHAPE = (18, 22, 20)
SINGLE = TiltSeries.from_degrees([-63.0, 0.0, 41.0])
GENERAL = TiltSeries.from_degrees([-63.0, 12.0, 41.0], [10.0, -80.0, 5.0], [0.0, 33.0, -7.0])
kinds = pytest.mark.parametrize("series", [SINGLE, GENERAL], ids=["single axis", "general"])


def _geometry(series, degree=2, image_shape=SHAPE[1:], volume_shape=SHAPE):
    shifts = np.array([[0.3, -1.7], [2.0, 0.0], [-0.4, 0.25]])[: len(series)]
    return TiltGeometry(series.rotations, shifts, volume_shape, image_shape, degree)


def _gaussian(shape, centre_xyz, width):
    z, y, x = (np.arange(n) - n // 2 for n in shape)
    cx, cy, cz = centre_xyz
    parts = (np.exp(-((a - c) ** 2) / (2 * width**2)) for a, c in ((z, cz), (y, cy), (x, cx)))
    a, b, c = parts
    return a[:, None, None] * b[:, None] * c / (2 * math.pi * width**2) ** 1.5


@kinds
@pytest.mark.parametrize("degree", [1, 2, 3])
def test_backprojection_is_the_adjoint(series, degree):
    rng = np.random.default_rng(0)
    geometry = _geometry(series, degree)
    block, image = ((3, 11), (5, 17), (0, 13)), ((4, 15), (2, 20))
    volume = rng.normal(size=[b - a for a, b in block])
    images = rng.normal(size=(3, *[b - a for a, b in image]))
    forward = np.vdot(project(geometry, volume, block, image), images)
    backward = np.vdot(volume, backproject(geometry, images, image, block))
    assert forward == pytest.approx(backward, rel=1e-12)


@kinds
def test_projections_of_blocks_add_up_however_the_volume_is_cut(series):
    volume = np.random.default_rng(1).normal(size=SHAPE)
    geometry = _geometry(series)
    whole = project(geometry, volume, geometry.whole_volume, geometry.whole_image)
    cubes = [
        ((0, 7), (0, 22), (0, 20)),
        ((7, 18), (0, 9), (0, 20)),
        ((7, 18), (9, 22), (0, 3)),
        ((7, 18), (9, 22), (3, 20)),
    ]
    for cut in (slabs(SHAPE, 1), slabs(SHAPE, 5), slabs(SHAPE, 100), cubes):
        total = np.zeros_like(whole)
        for block in cut:
            window = footprint(geometry, block)
            part = project(geometry, volume[tuple(slice(*edge) for edge in block)], block, window)
            total[:, slice(*window[0]), slice(*window[1])] += part
        np.testing.assert_allclose(total, whole, atol=1e-13 * np.abs(whole).max() * len(cut) + 1e-13)


def test_slabs_of_a_single_axis_series_are_seen_in_their_own_rows():
    geometry = TiltGeometry(SINGLE.rotations, np.zeros((3, 2)), SHAPE, SHAPE[1:])
    for block in slabs(SHAPE, 4):
        rows = footprint(geometry, block)[0]
        assert rows[0] >= block[1][0] - 2
        assert rows[1] <= block[1][1] + 2


def test_a_block_beyond_the_image_has_an_empty_footprint():
    geometry = TiltGeometry(np.eye(3)[None], np.array([[100.0, 0.0]]), SHAPE, SHAPE[1:])
    window = footprint(geometry, geometry.whole_volume)
    assert window[1][0] == window[1][1]
    assert project(geometry, np.ones(SHAPE), geometry.whole_volume, window).shape[2] == 0


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize(
    ("pose", "seen"),
    [
        (Pose(0.0), lambda v: v.sum(axis=0)),
        # R^T of a quarter turn about y takes +z to -x and +x to +z.
        (Pose(math.pi / 2), lambda v: v.sum(axis=2).T[:, ::-1]),
        # About x, +y goes to -z and +z to +y.
        (Pose(0.0, psi_rad=math.pi / 2), lambda v: v.sum(axis=1)),
        # About z, +x goes to -y and +y to +x.
        (Pose(0.0, phi_rad=math.pi / 2), lambda v: v.sum(axis=0).T[::-1]),
    ],
)
def test_quarter_turns_are_sums_along_an_axis(pose, seen, degree):
    """An odd cube, whose centre is a voxel: every ray runs along voxels, blurred by the spline's samples alone."""
    volume = np.random.default_rng(2).random((9, 9, 9))
    geometry = TiltGeometry(pose.rotation[None], np.zeros((1, 2)), (9, 9, 9), (9, 9), degree)
    found = project(geometry, volume, geometry.whole_volume, geometry.whole_image)[0]
    expected = seen(volume) if degree == 1 else _sampled(seen(volume), {2: 6, 3: 4}[degree])
    np.testing.assert_allclose(found, expected, atol=1e-12)


def _sampled(image, middle):
    """The B-spline at whole numbers: 1, 6, 1 over 8 (quadratic), 1, 4, 1 over 6 (cubic)."""
    padded = np.pad(image, 1)
    rows = (padded[:-2] + middle * padded[1:-1] + padded[2:]) / (middle + 2)
    return (rows[:, :-2] + middle * rows[:, 1:-1] + rows[:, 2:]) / (middle + 2)


@pytest.mark.parametrize("series", [SINGLE, GENERAL], ids=["single axis", "general"])
def test_a_gaussian_blob_is_seen_where_the_pose_puts_it_and_as_wide_as_the_spline_makes_it(series):
    """Its variance grows by that of the quadratic B-spline, 1/4, and its centre is exact."""
    shape, width, centre = (48, 48, 48), 2.5, np.array([3.3, -2.1, 4.7])
    geometry = _geometry(series, image_shape=shape[1:], volume_shape=shape)
    images = project(geometry, _gaussian(shape, centre, width), geometry.whole_volume, geometry.whole_image)
    y, x = (np.arange(48) - 24 for _ in range(2))
    for image, rotation, shift in zip(images, series.rotations, geometry.shifts_px, strict=True):
        u, v = (centre @ rotation)[:2] + shift
        assert image.sum() == pytest.approx(1, abs=1e-9)
        assert image.sum(axis=0) @ x == pytest.approx(u, abs=1e-7)
        assert image.sum(axis=1) @ y == pytest.approx(v, abs=1e-7)
        variance = width**2 + 1 / 4
        expected = np.exp(-((x - u) ** 2 + (y[:, None] - v) ** 2) / (2 * variance)) / (2 * math.pi * variance)
        np.testing.assert_allclose(image, expected, atol=1e-2 * expected.max())  # the ripple of the grid


def test_rendering_undoes_nothing_of_a_linear_spline_and_samples_a_quadratic_one():
    volume = np.zeros((5, 5, 5))
    volume[2, 2, 2] = 1
    np.testing.assert_array_equal(projection.render(volume, 1), volume)
    rendered = projection.render(volume, 2)
    assert rendered[2, 2, 2] == pytest.approx((3 / 4) ** 3)
    assert rendered[2, 1, 3] == pytest.approx(3 / 4 / 64)
    assert rendered.sum() == pytest.approx(1)


def test_blur_is_its_own_adjoint_and_keeps_the_total():
    a, b = np.random.default_rng(3).normal(size=(2, 2, 15, 17))
    assert np.vdot(projection.blur(a, 0.8), b) == pytest.approx(np.vdot(a, projection.blur(b, 0.8)), rel=1e-12)
    point = np.zeros((1, 15, 15))
    point[0, 7, 7] = 1
    assert projection.blur(point, 0.8).sum() == pytest.approx(1)


def test_wider_elements_are_seen_as_wider_images():
    """Projecting a volume widened by a Gaussian is widening its projections."""
    shape = (40, 40, 40)
    geometry = _geometry(GENERAL, image_shape=shape[1:], volume_shape=shape)
    volume = _gaussian(shape, (2.2, -1.4, 0.3), 1.2)
    wide = projection.render(volume, 1, 1.5)  # the linear spline leaves the Gaussian alone
    direct = project(geometry, wide, geometry.whole_volume, geometry.whole_image)
    seen = projection.blur(project(geometry, volume, geometry.whole_volume, geometry.whole_image), 1.5)
    np.testing.assert_allclose(direct, seen, atol=1e-2 * seen.max())


def test_shift_derivatives_are_what_a_shift_of_half_a_pixel_makes():
    shape = (32, 32, 32)
    geometry = _geometry(GENERAL, image_shape=shape[1:], volume_shape=shape)
    volume = _gaussian(shape, (1.0, 2.0, -1.0), 2.2)

    def at(shift):
        moved = geometry.shifted_to(geometry.shifts_px + shift)
        return project(moved, volume, geometry.whole_volume, geometry.whole_image)

    along_x, along_y = projection.shift_derivatives(at([0.0, 0.0]))
    step = 0.5  # smaller ones see the kinks of the spline at aligned voxels
    for found, shift in ((along_x, [step, 0.0]), (along_y, [0.0, step])):
        expected = (at(shift) - at(np.negative(shift))) / (2 * step)
        np.testing.assert_allclose(found, expected, atol=0.08 * np.abs(expected).max())


def _turned_by(geometry, column, amount):
    """Return the geometry after a change of one parameter of every pose, written down without the package's algebra."""
    rotations, shifts, scales = geometry.rotations, geometry.shifts_px.copy(), geometry.scales
    if column.startswith("shift"):
        shifts[:, "xy".index(column[-1])] += amount
    elif column.startswith("turn"):
        rotations = rotations @ rotation_about(column[-1], -amount)  # seen at (R A^T)^T r = A R^T r
    else:
        scales = scales * math.exp(amount)
    return TiltGeometry(rotations, shifts, geometry.volume_shape, geometry.image_shape, geometry.degree, scales)


@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("column", projection.POSE_COLUMNS)
def test_pose_derivatives_are_what_a_small_change_of_the_pose_makes(column, degree):
    shape = (40, 40, 40)
    plain = _geometry(GENERAL, degree, image_shape=shape[1:], volume_shape=shape)
    geometry = replace(plain, magnifications=[1.02, 1.0, 0.99])
    volume = sum(_gaussian(shape, centre, 2.6) for centre in ([6.0, 3.0, -5.0], [-4.0, 2.0, 7.0]))
    whole, image = geometry.whole_volume, geometry.whole_image
    seen = project(geometry, volume, whole, image)
    moments = projection.depth_moments(geometry, volume, whole, image)
    step = 0.5 if column.startswith("shift") else 0.04  # about half a pixel; smaller ones see the kinks of the spline
    ahead, behind = (project(_turned_by(geometry, column, sign * step), volume, whole, image) for sign in (1, -1))
    expected = projection.blur((ahead - behind) / (2 * step), 1.0)  # the ripple of the grid is not alike in both
    for tilt in range(3):
        found = projection.pose_derivatives(geometry, tilt, seen[tilt], moments[tilt], [column])
        found = projection.blur(found, 1.0)[0]
        assert np.linalg.norm(found - expected[tilt]) < 0.08 * np.linalg.norm(expected[tilt])
        assert np.vdot(found, expected[tilt]) == pytest.approx(np.vdot(expected[tilt], expected[tilt]), rel=0.05)


def test_depth_moments_of_blocks_add_up_and_are_the_depth_of_a_voxel():
    geometry = _geometry(GENERAL)
    volume = np.zeros(SHAPE)
    volume[4, 15, 6] = 2.0
    whole = projection.depth_moments(geometry, volume, geometry.whole_volume, geometry.whole_image)
    depth = np.array([6 - 10, 15 - 11, 4 - 9]) @ geometry.rotations[:, :, 2].T
    seen = project(geometry, volume, geometry.whole_volume, geometry.whole_image)
    np.testing.assert_allclose(whole, depth[:, None, None] * seen, atol=1e-12)
    full = np.random.default_rng(5).normal(size=SHAPE)
    whole = projection.depth_moments(geometry, full, geometry.whole_volume, geometry.whole_image)
    parts = [
        projection.depth_moments(geometry, full[tuple(slice(*e) for e in block)], block, geometry.whole_image)
        for block in slabs(SHAPE, 4)
    ]
    np.testing.assert_allclose(sum(parts), whole, atol=1e-11)


def test_a_magnified_image_is_larger_with_the_same_line_integrals_and_has_an_adjoint():
    shape = (48, 48, 48)
    plain = TiltGeometry(GENERAL.rotations, np.zeros((3, 2)), shape, shape[1:])
    large = replace(plain, magnifications=np.array([1.1, 1.0, 0.9]))
    volume = _gaussian(shape, (5.0, -4.0, 3.0), 3.0)
    seen = [project(g, volume, g.whole_volume, g.whole_image) for g in (plain, large)]
    np.testing.assert_allclose([i.max() for i in seen[1]], [i.max() for i in seen[0]], rtol=0.02)
    x = np.arange(48) - 24
    centres = [[i.sum(axis=0) @ x / i.sum() for i in images] for images in seen]
    np.testing.assert_allclose(centres[1], np.multiply(centres[0], [1.1, 1.0, 0.9]), atol=1e-6)
    images = np.random.default_rng(0).normal(size=(3, 48, 48))
    back = backproject(large, images, large.whole_image, large.whole_volume)
    assert np.vdot(seen[1], images) == pytest.approx(np.vdot(volume, back), rel=1e-12)


def test_a_layer_needs_as_much_width_as_its_steepest_tilt_sees_of_it():
    rotations = TiltSeries.from_degrees([0.0, 60.0]).rotations
    # At 60 degrees a ray at u = 50 crosses a layer of 40 between x = (50 +- 20 sin 60) / cos 60.
    expected = 2 * math.ceil((50 + 20 * math.sin(math.pi / 3)) / 0.5)
    assert projection.seen_extent(rotations, (30, 100), 40) == (30, expected)
    assert projection.seen_extent(rotations[:1], (30, 100), 40) == (30, 100)


@pytest.mark.parametrize("magnification", [None, 0.95, 1.04])
def test_voxels_seen_by_every_tilt_are_the_cylinder_about_the_axis(magnification):
    series = TiltSeries.from_degrees(np.arange(-75.0, 90.0, 15.0))
    larger = None if magnification is None else np.full(len(series), magnification)
    geometry = TiltGeometry(series.rotations, np.zeros((len(series), 2)), (21, 9, 21), (9, 21), 1, larger)
    valid = np.ones((len(series), 9, 21), bool)
    seen = projection.seen_everywhere(geometry, valid, geometry.whole_volume)
    z, x = np.mgrid[-10:11, -10:11]
    assert seen[:, 4][np.hypot(z, x) < 9.5].all()
    assert not seen[:, 4][np.hypot(z, x) > 12].any()


def test_mismatched_poses_and_unknown_splines_are_refused():
    with pytest.raises(ConfigurationError, match=r"rotations are \(3, 3, 3\) and shifts \(2, 2\)"):
        TiltGeometry(SINGLE.rotations, np.zeros((2, 2)), SHAPE, SHAPE[1:])
    with pytest.raises(ConfigurationError, match="degree is 4"):
        TiltGeometry(SINGLE.rotations, np.zeros((3, 2)), SHAPE, SHAPE[1:], 4)
