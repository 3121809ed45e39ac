"""The solver's steps, one block at a time: gradients, restarts, blocks, masks and constraints."""

import numpy as np
import pytest

from stemtomo.algorithms.tomography import solver
from stemtomo.geometry import TiltSeries
from stemtomo.physics.projection import TiltGeometry, footprint, project, slabs

SHAPE = (16, 14, 16)
SERIES = TiltSeries.from_degrees(np.arange(-60.0, 61.0, 15.0))


def _problem(noise=0.0, width=0.5, dtype=np.float64):
    rng = np.random.default_rng(0)
    truth = np.zeros(SHAPE, dtype)
    truth[4:12, 3:11, 4:12] = rng.random((8, 8, 8)) * (rng.random((8, 8, 8)) < 0.1)
    geometry = TiltGeometry(SERIES.rotations, rng.normal(size=(9, 2)), SHAPE, SHAPE[1:])
    clean = solver.Measurement(np.zeros((9, *SHAPE[1:])), np.ones((9, *SHAPE[1:]), bool), np.ones(9), width)
    images = clean.seen(project(geometry, truth, geometry.whole_volume, geometry.whole_image))
    images = (images + noise * rng.normal(size=images.shape)).astype(dtype)
    valid = np.ones(images.shape, bool)
    valid[2, :, :3] = False
    images[2, :, :3] = 77.0  # what was not measured may hold anything
    measured = solver.Measurement(images, valid, np.linspace(0.5, 1.5, 9), width)
    return truth, geometry, measured


def _lipschitz(geometry, measured):
    whole, view = geometry.whole_volume, geometry.whole_image
    images = solver.power_start(measured)
    for _ in range(solver.POWER_ITERATIONS):
        images, norm = solver.power_step(solver.project_backprojection(images, geometry, whole, view), measured)
    return norm


def _run(geometry, measured, iterations, blocks=1, constraint=solver.Constraint(), supports=None):
    """Drive the steps block by block; return the volume and the losses."""
    step = solver.step_length(_lipschitz(geometry, measured))
    windows = slabs(geometry.volume_shape, blocks)
    views = [footprint(geometry, window) for window in windows]
    supports = supports or [None] * len(windows)
    volumes = [np.zeros([b - a for a, b in window], measured.images.dtype) for window in windows]
    states = [{"volume": volume, "previous": volume} for volume in volumes]
    control, losses = None, []
    for _ in range(iterations):
        images = np.zeros_like(measured.images)
        for state, window, view, support in zip(states, windows, views, supports, strict=True):
            part = solver.project_block(state, geometry, window, view, support)
            images[:, slice(*view[0]), slice(*view[1])] += part
        control = solver.steer(images, control, measured)
        losses.append(control["loss"])
        states = [
            solver.descend(
                state, geometry, constraint, control["beta"], step, window, view,
                control["residual"][:, slice(*view[0]), slice(*view[1])], support,
            )
            for state, window, view, support in zip(states, windows, views, supports, strict=True)
        ]  # fmt: skip
    return np.concatenate([state["volume"] for state in states], axis=1), losses


def test_the_first_step_goes_down_the_gradient_of_the_loss():
    """Against finite differences of the loss written out, through widths, masks and weights."""
    _, geometry, measured = _problem()
    rng = np.random.default_rng(1)
    at, along = rng.random(SHAPE), rng.normal(size=SHAPE)

    def loss(volume):
        seen = measured.seen(project(geometry, volume, geometry.whole_volume, geometry.whole_image))
        per_tilt = (((seen - measured.images) ** 2) * measured.valid).sum(axis=(1, 2))
        return 0.5 * measured.weights @ per_tilt

    images = project(geometry, at, geometry.whole_volume, geometry.whole_image)
    residual = solver.steer(images, None, measured)["residual"]
    free = solver.Constraint(positive=False)
    state = {"volume": at, "previous": at}
    whole, view = geometry.whole_volume, geometry.whole_image
    moved = solver.descend(state, geometry, free, 0.0, 1.0, whole, view, residual)["volume"]
    epsilon = 1e-4
    expected = (loss(at + epsilon * along) - loss(at - epsilon * along)) / (2 * epsilon)
    assert np.vdot(at - moved, along) == pytest.approx(expected, rel=1e-8)


def test_the_power_iteration_finds_the_largest_curvature():
    """Against the singular values of the projector written out as a matrix, one voxel after the other."""
    shape = (8, 7, 8)
    _, geometry, measured = _problem()
    geometry = TiltGeometry(geometry.rotations, geometry.shifts_px, shape, SHAPE[1:])
    columns = []
    for unit in np.eye(int(np.prod(shape))):
        seen = project(geometry, unit.reshape(shape), geometry.whole_volume, geometry.whole_image)
        seen = measured.seen(seen) * measured.valid * np.sqrt(measured.weights)[:, None, None]
        columns.append(seen.ravel())
    largest = np.linalg.norm(np.array(columns) @ np.array(columns).T, 2)
    found = _lipschitz(geometry, measured)
    assert 0.97 * largest < found <= largest * (1 + 1e-9)
    assert 1 / solver.step_length(found) >= largest


def test_the_truth_is_recovered_where_projections_determine_it():
    truth, geometry, measured = _problem()
    volume, losses = _run(geometry, measured, 300)
    assert losses[-1] < 2e-3
    assert np.corrcoef(volume.ravel(), truth.ravel())[0, 1] > 0.97
    assert volume.min() >= 0


@pytest.mark.parametrize("blocks", [2, 5, 14])
def test_blocks_give_the_volume_of_one_block(blocks):
    _, geometry, measured = _problem(noise=0.05)
    one, losses_one = _run(geometry, measured, 40)
    many, losses_many = _run(geometry, measured, 40, blocks)
    np.testing.assert_allclose(many, one, atol=1e-11 * one.max())
    np.testing.assert_allclose(losses_many, losses_one, rtol=1e-11)


def test_what_was_not_measured_changes_nothing():
    _, geometry, measured = _problem()
    other = measured.images.copy()
    other[~measured.valid] = -3.0
    changed = solver.Measurement(other, measured.valid, measured.weights, measured.element_width_px)
    np.testing.assert_array_equal(_run(geometry, measured, 10)[0], _run(geometry, changed, 10)[0])


def test_momentum_needs_far_fewer_iterations_than_plain_descent():
    _, geometry, measured = _problem()
    step = solver.step_length(_lipschitz(geometry, measured))
    volume = np.zeros(SHAPE)
    whole, view = geometry.whole_volume, geometry.whole_image
    for _ in range(60):
        state = {"volume": volume, "previous": volume}
        control = solver.steer(solver.project_block(state, geometry, whole, view), None, measured)
        state = solver.descend(state, geometry, solver.Constraint(), 0.0, step, whole, view, control["residual"])
        volume = state["volume"]
    assert _run(geometry, measured, 60)[1][-1] < 0.5 * control["loss"]


def test_going_uphill_restarts_the_momentum():
    measured = _problem()[2]
    images = np.zeros_like(measured.images)
    control = solver.steer(images, None, measured)
    downhill = solver.steer(images - 0.01 * control["residual"], {**control, "momentum": 9.0}, measured)
    uphill = solver.steer(images + 0.01 * control["residual"], {**control, "momentum": 9.0}, measured)
    assert downhill["beta"] > 0.8
    assert uphill["beta"] == 0
    assert uphill["momentum"] < 2


def test_a_changed_geometry_keeps_the_momentum():
    _, geometry, measured = _problem()
    state = {"volume": np.random.default_rng(2).random(SHAPE), "previous": np.zeros(SHAPE)}
    whole, view = geometry.whole_volume, geometry.whole_image
    before = solver.project_block(state, geometry, whole, view)
    control = solver.steer(0.9 * before, None, measured)
    elsewhere = geometry.shifted_to(geometry.shifts_px + 0.1)
    after = solver.project_block(state, elsewhere, whole, view)
    moved = solver.moved(control, before, after)
    np.testing.assert_allclose(after - moved["images"], 0.1 * before, atol=1e-12)


def test_voxels_outside_the_support_stay_empty():
    _, geometry, measured = _problem()
    support = np.zeros(SHAPE, bool)
    support[4:12, :, 4:12] = True
    volume, _ = _run(geometry, measured, 20, supports=[support])
    assert not volume[~support].any()
    assert volume[support].any()


def test_constraints_are_proximal_points():
    values = np.array([-2.0, -0.1, 0.1, 2.0])
    np.testing.assert_allclose(solver.Constraint().apply(values, 0.5), [0, 0, 0.1, 2])
    np.testing.assert_allclose(solver.Constraint(threshold=0.4).apply(values, 0.5), [0, 0, 0, 1.8])
    np.testing.assert_allclose(solver.Constraint(False, 0.4).apply(values, 0.5), [-1.8, 0, 0, 1.8])
    np.testing.assert_allclose(solver.Constraint(False).apply(values, 0.5), values)


def test_single_precision_stays_single():
    _, geometry, measured = _problem(dtype=np.float32)
    measured = solver.Measurement(measured.images, measured.valid, measured.weights.astype(np.float32), 0.5)
    volume, _ = _run(geometry, measured, 5)
    assert volume.dtype == np.float32
