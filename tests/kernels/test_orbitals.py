"""Gaussian atoms on a stack of slices: shares, drawing and derivatives against plain NumPy and finite differences."""

import numpy as np
import pytest

from stemtomo import backend
from stemtomo.kernels import orbitals
from tests.kernels import host_cuda

RADIUS, SHAPE = 6, (4, 40, 52)

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
precisions = pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 2e-5), (np.float64, 1e-12)])


def _through(route, monkeypatch):
    if route == "cuda source":
        monkeypatch.setattr(orbitals, "is_device_array", lambda array: True)
        monkeypatch.setattr(orbitals.cuda, "launch", host_cuda.launch)


def _table(dtype, count=30, inside=True):
    """Return u, v, depth, intensity, width; not ``inside``: some beyond the edges and before or behind the slices."""
    rng = np.random.default_rng(5)
    margin = RADIUS + 1 if inside else -12
    u = rng.uniform(margin, SHAPE[2] - 1 - margin, count)
    v = rng.uniform(margin, SHAPE[1] - 1 - margin, count)
    depth = rng.uniform(0.05, SHAPE[0] - 1.05, count) if inside else rng.uniform(-1, SHAPE[0], count)
    return tuple(a.astype(dtype) for a in (u, v, depth, rng.uniform(0.5, 2, count), rng.uniform(0.8, 1.4, count)))


def _reference(u, v, depth, intensity, width):
    slices, y, x = np.mgrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]].astype(np.float64)
    stack = np.zeros(SHAPE)
    for a in range(len(u)):
        near = (np.abs(x - np.floor(u[a] + 0.5)) <= RADIUS) & (np.abs(y - np.floor(v[a] + 0.5)) <= RADIUS)
        hat = np.maximum(0, 1 - np.abs(slices - np.clip(depth[a], 0, SHAPE[0] - 1)))
        squared = (x - u[a]) ** 2 + (y - v[a]) ** 2
        stack += near * hat * intensity[a] * np.exp(-squared / (2 * width[a] ** 2)) / (2 * np.pi * width[a] ** 2)
    return stack


@routes
@precisions
def test_an_atom_is_shared_by_the_slices_on_either_side(route, dtype, tolerance, monkeypatch):
    _through(route, monkeypatch)
    table = _table(dtype, inside=False)
    stack = np.zeros(SHAPE, dtype)
    orbitals.render(stack, *table, RADIUS)
    expected = _reference(*(a.astype(np.float64) for a in table))
    np.testing.assert_allclose(stack, expected, atol=tolerance * expected.max())


@routes
@precisions
def test_gather_is_the_adjoint_in_the_intensities(route, dtype, tolerance, monkeypatch):
    _through(route, monkeypatch)
    table = _table(dtype, inside=False)
    residual = np.random.default_rng(6).normal(size=SHAPE).astype(dtype)
    stack = np.zeros(SHAPE, dtype)
    orbitals.render(stack, *table, RADIUS)
    by_intensity = orbitals.gather(residual, *table, RADIUS)[0]
    left = np.vdot(stack.astype(np.float64), residual)
    assert left == pytest.approx(np.vdot(table[3].astype(np.float64), by_intensity), rel=100 * tolerance)


@routes
def test_gather_is_the_derivative_of_the_loss(route, monkeypatch):
    _through(route, monkeypatch)
    table = list(_table(np.float64, count=12))
    measured = np.random.default_rng(7).normal(size=SHAPE)

    def loss(values):
        stack = np.zeros(SHAPE)
        orbitals.render(stack, *values, RADIUS)
        return 0.5 * np.sum((stack - measured) ** 2)

    stack = np.zeros(SHAPE)
    orbitals.render(stack, *table, RADIUS)
    by_intensity, *places, by_width = orbitals.gather(stack - measured, *table, RADIUS)
    for index, derivative in enumerate((*places, by_intensity, by_width)):
        direction = np.random.default_rng(index).normal(size=12)
        step = 1e-5
        ends = []
        for sign in (1, -1):
            moved = list(table)
            moved[index] = table[index] + sign * step * direction
            ends.append(loss(moved))
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(
            derivative @ direction, abs=1e-6 * np.linalg.norm(derivative)
        )


def test_one_slice_holds_every_atom_whole():
    table = _table(np.float64, inside=False)
    stack = np.zeros((1, *SHAPE[1:]))
    orbitals.render(stack, *table, RADIUS)
    np.testing.assert_allclose(stack[0], _reference(*table).sum(axis=0), atol=1e-12)
    assert not orbitals.gather(stack, *table, RADIUS)[3].any()


@pytest.mark.gpu
@pytest.mark.skipif(not backend.gpu_available(), reason="no GPU with CuPy")
@precisions
def test_device_equals_host(dtype, tolerance):
    import cupy

    table = _table(dtype, inside=False)
    host, device = np.zeros(SHAPE, dtype), cupy.zeros(SHAPE, dtype)
    orbitals.render(host, *table, RADIUS)
    orbitals.render(device, *(cupy.asarray(a) for a in table), RADIUS)
    np.testing.assert_allclose(device.get(), host, atol=tolerance * host.max())
    ours = orbitals.gather(device, *(cupy.asarray(a) for a in table), RADIUS)
    for a, b in zip(ours, orbitals.gather(host, *table, RADIUS), strict=True):
        np.testing.assert_allclose(a.get(), b, atol=10 * tolerance * np.abs(b).max())
