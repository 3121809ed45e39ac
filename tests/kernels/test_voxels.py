"""Voxels onto images and back: against B-splines written out voxel by voxel, and against each other."""

import numpy as np
import pytest

from stemtomo import backend
from stemtomo.geometry import rotation_about
from stemtomo.kernels import voxels
from tests.kernels import host_cuda

BLOCK = (7, 9, 8)
IMAGE = (10, 11)


def _placements(kind):
    """Placements of two tilts, (2, 2, 4): the block partly beyond the image."""
    out = []
    for angle in (0.4, -1.1):
        turn = rotation_about("y", angle)
        if kind == "general":
            turn = rotation_about("z", 0.3) @ turn @ rotation_about("x", -0.2)
        placement = np.zeros((2, 4))
        placement[:, :3] = turn.T[:2]
        centre = np.array([BLOCK[2] // 2, BLOCK[1] // 2, BLOCK[0] // 2])
        placement[:, 3] = np.array([6.37, 3.81]) - turn.T[:2] @ centre
        out.append(placement)
    return np.array(out)


def _b_spline(t, degree):
    t = np.abs(t)
    if degree == 1:
        return np.maximum(1 - t, 0)
    if degree == 3:
        return np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.where(t < 2, (2 - t) ** 3 / 6, 0))
    return np.where(t < 0.5, 0.75 - t**2, np.where(t < 1.5, 0.5 * (1.5 - t) ** 2, 0))


def _matrix(placements, degree):
    """The projector as a dense matrix (tilt, row, column, z, y, x), every entry from the B-spline itself."""
    z, y, x = np.meshgrid(*map(np.arange, BLOCK), indexing="ij")
    homogeneous = np.stack([x, y, z, np.ones_like(x)])
    u, v = np.einsum("kpi,izyx->pkzyx", placements, homogeneous)
    rows, columns = np.arange(IMAGE[0]), np.arange(IMAGE[1])
    across = _b_spline(columns[:, None, None, None] - u[:, None], degree)
    down = _b_spline(rows[:, None, None, None] - v[:, None], degree)
    return down[:, :, None] * across[:, None]


def _through(route, monkeypatch):
    """Send the calls to the CUDA source compiled for the host, where ``route`` says so."""
    if route == "cuda source":
        monkeypatch.setattr(voxels, "is_device_array", lambda array: True)
        monkeypatch.setattr(voxels.cuda, "launch", host_cuda.launch)


routes = pytest.mark.parametrize(
    "route",
    [
        "numba",
        pytest.param(
            "cuda source",
            marks=pytest.mark.skipif(
                host_cuda.COMPILER is None, reason="no C++ compiler to run the CUDA source on the host"
            ),
        ),
    ],
)
precisions = pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 3e-6), (np.float64, 1e-13)])
kinds = pytest.mark.parametrize("kind", ["about y", "general"])
degrees = pytest.mark.parametrize("degree", [1, 2, 3])


@routes
@kinds
@degrees
@precisions
def test_splat_shares_each_voxel_by_the_b_spline(route, kind, degree, dtype, tolerance, monkeypatch):
    _through(route, monkeypatch)
    block = np.random.default_rng(0).normal(size=BLOCK).astype(dtype)
    images = np.ones((2, *IMAGE), dtype)
    placements = _placements(kind)
    voxels.splat(block, placements, images, degree)
    expected = 1 + np.tensordot(_matrix(placements, degree), block.astype(float), axes=3)
    np.testing.assert_allclose(images, expected, atol=tolerance * np.abs(expected).max())


@routes
@kinds
@degrees
@precisions
def test_gather_is_the_transposed_matrix(route, kind, degree, dtype, tolerance, monkeypatch):
    _through(route, monkeypatch)
    images = np.random.default_rng(1).normal(size=(2, *IMAGE)).astype(dtype)
    block = np.ones(BLOCK, dtype)
    placements = _placements(kind)
    voxels.gather(images, placements, block, degree)
    expected = 1 + np.tensordot(images.astype(float), _matrix(placements, degree), axes=3)
    np.testing.assert_allclose(block, expected, atol=tolerance * np.abs(expected).max())


@routes
@kinds
@degrees
def test_voxels_outside_the_support_neither_give_nor_take(route, kind, degree, monkeypatch):
    _through(route, monkeypatch)
    rng = np.random.default_rng(2)
    support = rng.random(BLOCK) < 0.4
    block, placements = rng.normal(size=BLOCK), _placements(kind)
    masked, plain = np.zeros((2, 2, *IMAGE))
    voxels.splat(block, placements, masked, degree, support)
    voxels.splat(block * support, placements, plain, degree)
    np.testing.assert_allclose(masked, plain, atol=1e-13)
    back = np.zeros(BLOCK)
    voxels.gather(plain, placements, back, degree, support)
    full = np.zeros(BLOCK)
    voxels.gather(plain, placements, full, degree)
    np.testing.assert_allclose(back, full * support, atol=1e-12)


@degrees
def test_the_loop_along_y_agrees_with_the_general_one(degree):
    """A turn about z of 1e-9 rad takes the general route and moves nothing that matters."""
    block = np.random.default_rng(3).normal(size=BLOCK)
    axial = _placements("about y")
    nearly = axial.copy()
    nearly[:, 1, 0] = 1e-9
    along_y, general = np.zeros((2, 2, *IMAGE))
    voxels.splat(block, axial, along_y, degree)
    voxels.splat(block, nearly, general, degree)
    np.testing.assert_allclose(along_y, general, atol=1e-7)
    assert not np.array_equal(along_y, general)


@kinds
def test_a_block_far_from_the_image_leaves_no_trace(kind):
    placements = _placements(kind)
    for offset in ((200.0, 0.0), (0.0, -200.0)):
        moved = placements.copy()
        moved[:, :, 3] += offset
        images = np.zeros((2, *IMAGE))
        voxels.splat(np.ones(BLOCK), moved, images)
        assert not images.any()


@pytest.mark.gpu
@kinds
@precisions
def test_the_device_agrees(kind, dtype, tolerance):
    block = np.random.default_rng(4).normal(size=BLOCK).astype(dtype)
    placements = _placements(kind)
    images = np.zeros((2, *IMAGE), dtype)
    voxels.splat(block, placements, images)
    on_device = backend.to_device(np.zeros((2, *IMAGE), dtype))
    voxels.splat(backend.to_device(block), placements, on_device)
    np.testing.assert_allclose(backend.to_host(on_device), images, atol=10 * tolerance * np.abs(images).max())
    back, back_device = np.zeros(BLOCK, dtype), backend.to_device(np.zeros(BLOCK, dtype))
    voxels.gather(images, placements, back)
    voxels.gather(on_device, placements, back_device)
    np.testing.assert_allclose(backend.to_host(back_device), back, atol=10 * tolerance * np.abs(back).max())
