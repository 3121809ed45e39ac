"""Gaussian atoms: drawing and derivatives against plain NumPy, finite differences and each other."""

import numpy as np
import pytest

from stemtomo import backend
from stemtomo.kernels import atoms
from tests.kernels import host_cuda

RADIUS = 6
SHAPE = (40, 52)


def _table(dtype, count=30, inside=True):
    """Return u, v, intensity, width of random atoms; not ``inside``: some cut by the edges, some beyond them."""
    rng = np.random.default_rng(5)
    margin = RADIUS + 1 if inside else -12
    u = rng.uniform(margin, SHAPE[1] - 1 - margin, count)
    v = rng.uniform(margin, SHAPE[0] - 1 - margin, count)
    return tuple(a.astype(dtype) for a in (u, v, rng.uniform(0.5, 2, count), rng.uniform(0.8, 1.4, count)))


def _reference(u, v, intensity, width):
    """Every atom on every pixel of its window, one by one, in double precision."""
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]].astype(np.float64)
    image = np.zeros(SHAPE)
    for a in range(len(u)):
        near = (np.abs(x - np.floor(u[a] + 0.5)) <= RADIUS) & (np.abs(y - np.floor(v[a] + 0.5)) <= RADIUS)
        squared = (x - u[a]) ** 2 + (y - v[a]) ** 2
        image += near * intensity[a] * np.exp(-squared / (2 * width[a] ** 2)) / (2 * np.pi * width[a] ** 2)
    return image


def _through(route, monkeypatch):
    """Send the calls to the CUDA source compiled for the host, where ``route`` says so."""
    if route == "cuda source":
        monkeypatch.setattr(atoms, "is_device_array", lambda array: True)
        monkeypatch.setattr(atoms.cuda, "launch", host_cuda.launch)


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


@routes
@precisions
def test_render_draws_every_atom_in_its_window(route, dtype, tolerance, monkeypatch):
    _through(route, monkeypatch)
    table = _table(dtype, inside=False)
    image = np.ones(SHAPE, dtype)
    atoms.render(image, *table, RADIUS)
    expected = 1 + _reference(*(a.astype(np.float64) for a in table))
    np.testing.assert_allclose(image, expected, atol=tolerance * expected.max())


def test_an_atom_integrates_to_its_intensity():
    image = np.zeros(SHAPE)
    atoms.render(image, np.array([25.3]), np.array([18.8]), np.array([3.0]), np.array([1.1]), RADIUS)
    assert image.sum() == pytest.approx(3.0, rel=1e-6)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    assert (image * x).sum() / 3 == pytest.approx(25.3, abs=1e-5)
    assert (image * y).sum() / 3 == pytest.approx(18.8, abs=1e-5)


@routes
@precisions
def test_gather_is_the_adjoint_in_the_intensities(route, dtype, tolerance, monkeypatch):
    _through(route, monkeypatch)
    u, v, intensity, width = _table(dtype, inside=False)
    residual = np.random.default_rng(6).normal(size=SHAPE).astype(dtype)
    image = np.zeros(SHAPE, dtype)
    atoms.render(image, u, v, intensity, width, RADIUS)
    by_intensity = atoms.gather(residual, u, v, intensity, width, RADIUS)[0]
    left = np.vdot(image.astype(np.float64), residual)
    assert left == pytest.approx(np.vdot(intensity.astype(np.float64), by_intensity), rel=100 * tolerance)


@routes
def test_gather_is_the_derivative_of_the_loss(route, monkeypatch):
    _through(route, monkeypatch)
    table = list(_table(np.float64, count=12))
    measured = np.random.default_rng(7).normal(size=SHAPE)

    def loss(values):
        image = np.zeros(SHAPE)
        atoms.render(image, *values, RADIUS)
        return 0.5 * np.sum((image - measured) ** 2)

    image = np.zeros(SHAPE)
    atoms.render(image, *table, RADIUS)
    by_intensity, by_u, by_v, by_width = atoms.gather(image - measured, *table, RADIUS)
    for index, derivative in enumerate((by_u, by_v, by_intensity, by_width)):
        direction = np.random.default_rng(index).normal(size=12)
        step = 1e-5
        ends = []
        for sign in (1, -1):
            moved = list(table)
            moved[index] = table[index] + sign * step * direction
            ends.append(loss(moved))
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(derivative @ direction, rel=1e-6)


@routes
@precisions
def test_both_precisions_agree_on_all_derivatives(route, dtype, tolerance, monkeypatch):
    table = _table(dtype, inside=False)
    residual = np.random.default_rng(8).normal(size=SHAPE).astype(dtype)
    expected = atoms.gather(residual.astype(np.float64), *(a.astype(np.float64) for a in table), RADIUS)
    _through(route, monkeypatch)
    for ours, reference in zip(atoms.gather(residual, *table, RADIUS), expected, strict=True):
        np.testing.assert_allclose(ours, reference, atol=10 * tolerance * np.abs(reference).max())


@pytest.mark.gpu
@pytest.mark.skipif(not backend.gpu_available(), reason="no GPU with CuPy")
@precisions
def test_device_equals_host(dtype, tolerance):
    import cupy

    table = _table(dtype, inside=False)
    residual = np.random.default_rng(9).normal(size=SHAPE).astype(dtype)
    host, device = np.zeros(SHAPE, dtype), cupy.zeros(SHAPE, dtype)
    atoms.render(host, *table, RADIUS)
    atoms.render(device, *(cupy.asarray(a) for a in table), RADIUS)
    np.testing.assert_allclose(device.get(), host, atol=tolerance * host.max())
    ours = atoms.gather(cupy.asarray(residual), *(cupy.asarray(a) for a in table), RADIUS)
    for a, b in zip(ours, atoms.gather(residual, *table, RADIUS), strict=True):
        np.testing.assert_allclose(a.get(), b, atol=10 * tolerance * np.abs(b).max())
