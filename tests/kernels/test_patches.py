"""The fused loops against plain array arithmetic: numba, the CUDA source run on the host, and a GPU."""

import numpy as np
import pytest

from stemtomo.backend import real_dtype, to_host
from stemtomo.kernels import cuda, patches
from tests.kernels import host_cuda

SHAPE, OBJECT = (7, 6), (11, 13)


def make(dtype, seed=0):
    rng = np.random.default_rng(seed)

    def complex_array(*shape):
        return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(dtype)

    corners = np.array([[0, 0], [9, 12], [-3, -2], [4, 30]], dtype=np.int64)
    return complex_array(4, *SHAPE), complex_array(*OBJECT), corners, complex_array(4, *SHAPE)


def windows(corner):
    return np.ix_((corner[0] + np.arange(SHAPE[0])) % OBJECT[0], (corner[1] + np.arange(SHAPE[1])) % OBJECT[1])


def reference_adjoint(gradient, incident, transmission, corners):
    object_gradient, wave_gradient = np.zeros_like(transmission), np.empty_like(gradient)
    for j, corner in enumerate(corners):
        object_gradient[windows(corner)] += incident[j].conj() * gradient[j]
        wave_gradient[j] = transmission[windows(corner)].conj() * gradient[j]
    return object_gradient, wave_gradient


def reference_residual(spectra, counts, loss):
    model, seen = np.abs(spectra) ** 2, counts >= 0
    if loss == "poisson":
        seen_counts = np.maximum(counts, 0) + 0.1
        value = model + 0.1 - seen_counts + seen_counts * np.log(seen_counts / (model + 0.1))
        factor = 1 - seen_counts / (model + 0.1)
    else:
        c = {"amplitude": 0.0, "anscombe": 0.375}[loss]
        value = (np.sqrt(model + c) - np.sqrt(np.maximum(counts, 0) + c)) ** 2
        factor = 1 - np.sqrt(np.maximum(counts, 0) + c) / np.sqrt(model + c)
    return (value * seen).sum(axis=(1, 2)), 2 * factor * seen * spectra


def backends():
    yield pytest.param("numba", id="numba")
    yield pytest.param(
        "host",
        id="cuda-source",
        marks=pytest.mark.skipif(
            host_cuda.COMPILER is None, reason="no C++ compiler to run the CUDA source on the host"
        ),
    )
    yield pytest.param("cupy", id="cupy", marks=pytest.mark.gpu)


@pytest.fixture(params=list(backends()))
def on(request, monkeypatch):
    """Return the function that puts an array where the backend under test wants it."""
    if request.param == "numba":
        return np.array
    if request.param == "host":
        monkeypatch.setattr(cuda, "launch", host_cuda.launch)
        monkeypatch.setattr(patches, "is_device_array", lambda array: True)
        return np.array
    import cupy

    return cupy.array


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_transmission_and_its_adjoint(on, dtype):
    waves, transmission, corners, gradient = make(dtype)
    tolerance = 1e-5 if dtype == np.complex64 else 1e-13
    out = patches.transmit(on(waves), on(transmission), on(corners))
    expected = np.stack([waves[j] * transmission[windows(c)] for j, c in enumerate(corners)])
    np.testing.assert_allclose(to_host(out), expected, rtol=tolerance, atol=tolerance)

    object_gradient, wave_gradient = on(np.zeros_like(transmission)), on(gradient)
    patches.transmit_adjoint(wave_gradient, on(waves), on(transmission), on(corners), object_gradient)
    expected_object, expected_wave = reference_adjoint(gradient, waves, transmission, corners)
    np.testing.assert_allclose(to_host(object_gradient), expected_object, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(to_host(wave_gradient), expected_wave, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_illumination(on, dtype):
    waves, _, corners, _ = make(dtype)
    illumination = on(np.zeros(OBJECT, dtype=real_dtype(waves)))
    patches.illuminate(on(waves), on(corners), illumination)
    expected = np.zeros(OBJECT)
    for j, corner in enumerate(corners):
        expected[windows(corner)] += np.abs(waves[j]) ** 2
    np.testing.assert_allclose(to_host(illumination), expected, rtol=1e-5)


@pytest.mark.parametrize("loss", ["amplitude", "anscombe", "poisson"])
@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_residual_and_loss(on, loss, dtype):
    spectra, *_ = make(dtype)
    counts = np.random.default_rng(1).poisson(2.0, size=spectra.shape).astype(real_dtype(spectra))
    counts[0, 0, 0] = -1
    at = on(spectra)
    losses = patches.residual(at, on(counts), loss)
    expected_losses, expected = reference_residual(spectra.astype(np.complex128), counts, loss)
    np.testing.assert_allclose(to_host(losses), expected_losses, rtol=1e-5)
    np.testing.assert_allclose(to_host(at), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["amplitude", "anscombe", "poisson"])
def test_a_floor_so_many_times_higher_is_the_misfit_of_so_many_times_fewer_electrons(on, loss):
    spectra, *_ = make(np.complex128)
    counts = np.random.default_rng(1).poisson(200.0, size=spectra.shape).astype(np.float64)
    spectra, factor = 10 * spectra, 16.0
    at, fewer = on(spectra), on(spectra / np.sqrt(factor))
    losses = patches.residual(at, on(counts), loss, floor_factor=factor)
    expected = patches.residual(fewer, on(counts / factor), loss)
    np.testing.assert_allclose(to_host(losses), factor * to_host(expected), rtol=1e-9)
    # 2 dL/d conj(spectrum) of a loss and of electrons that are both so many times larger: larger by the root.
    # (What guards against a division by zero, 1e-9, does not grow with them.)
    np.testing.assert_allclose(to_host(at), np.sqrt(factor) * to_host(fewer), rtol=1e-6, atol=1e-9)
