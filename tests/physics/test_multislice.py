import numpy as np
import pytest

from stemtomo.backend import fft2, ifft2
from stemtomo.geometry import Optics
from stemtomo.kernels import patches
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.physics.multislice import adjoint, forward, intensities
from stemtomo.physics.probe import probe_wave, shifted_probes
from stemtomo.physics.propagation import fresnel_propagator, propagate, propagate_adjoint

PIXEL, WAVELENGTH = (0.4, 0.4), wavelength_angstrom(300e3)
OPTICS = Optics(energy_ev=300e3, semiangle_rad=21e-3, aberrations={"C10": 80.0})


def complex_normal(rng, *shape):
    return rng.normal(size=shape) + 1j * rng.normal(size=shape)


@pytest.fixture
def experiment():
    rng = np.random.default_rng(3)
    shape = (24, 20)
    probe = probe_wave(OPTICS, shape, PIXEL, intensity=500.0, dtype=np.complex128)
    phases = 0.3 * rng.random((3, 40, 44))
    corners = rng.integers(-5, 45, size=(5, 2))  # some windows wrap
    propagator = fresnel_propagator(shape, PIXEL, WAVELENGTH, 20.0, (4e-3, -2e-3), dtype=np.complex128)
    return shifted_probes(probe, rng.random((5, 2)) - 0.5), np.exp(1j * phases), corners, [propagator, propagator]


def test_electrons_are_conserved_by_a_pure_phase_object(experiment):
    patterns = intensities(*experiment)
    np.testing.assert_allclose(patterns.sum(axis=(1, 2)), 500.0, rtol=1e-12)


def test_the_propagator_is_unitary_and_its_adjoint_its_inverse():
    rng = np.random.default_rng(0)
    propagator = fresnel_propagator((16, 24), PIXEL, WAVELENGTH, 35.0, (5e-3, 0), dtype=np.complex128)
    a, b = complex_normal(rng, 2, 16, 24), complex_normal(rng, 2, 16, 24)
    assert np.vdot(propagate(a.copy(), propagator), b) == pytest.approx(
        np.vdot(a, propagate_adjoint(b.copy(), propagator)), rel=1e-12
    )
    np.testing.assert_allclose(propagate_adjoint(propagate(a.copy(), propagator), propagator), a, atol=1e-12)


def test_a_positive_tilt_carries_later_slices_to_positive_x():
    # 40 Å at 10 mrad is 0.4 Å: one pixel along +x.
    wave = probe_wave(OPTICS, (64, 64), PIXEL, dtype=np.complex128)
    upright = propagate(wave.copy(), fresnel_propagator((64, 64), PIXEL, WAVELENGTH, 40.0, dtype=np.complex128))
    tilted = propagate(
        wave.copy(), fresnel_propagator((64, 64), PIXEL, WAVELENGTH, 40.0, (np.arctan(0.01), 0), dtype=np.complex128)
    )
    # H carries the wave by -dz tan(theta) relative to the slices, which is the slices drifting by +dz tan(theta).
    np.testing.assert_allclose(tilted, np.roll(upright, -1, axis=1), atol=1e-10)


def test_the_forward_model_is_the_textbook_recursion(experiment):
    probes, transmission, corners, propagators = experiment
    spectra, _ = forward(*experiment)
    for j in range(len(probes)):
        rows = (corners[j, 0] + np.arange(24)) % 40
        columns = (corners[j, 1] + np.arange(20)) % 44
        wave = probes[j]
        for s in range(3):
            wave = wave * transmission[s][np.ix_(rows, columns)]
            if s < 2:
                wave = np.fft.ifft2(np.fft.fft2(wave) * propagators[s])
        np.testing.assert_allclose(spectra[j], np.fft.fft2(wave) / np.sqrt(24 * 20), atol=1e-10)


def test_linearised_forward_and_adjoint_pass_the_dot_test(experiment):
    probes, transmission, corners, propagators = experiment
    rng = np.random.default_rng(1)
    d_probes, d_object = complex_normal(rng, *probes.shape), complex_normal(rng, *transmission.shape)
    step = 1e-6
    spectra_plus, _ = forward(probes + step * d_probes, transmission + step * d_object, corners, propagators)
    spectra_minus, _ = forward(probes - step * d_probes, transmission - step * d_object, corners, propagators)
    directional = (spectra_plus - spectra_minus) / (2 * step)
    _, incident = forward(*experiment)
    y = complex_normal(rng, *probes.shape)
    object_gradient = np.zeros_like(transmission)
    probe_gradient = adjoint(y.copy(), incident, transmission, corners, propagators, object_gradient)
    left = np.vdot(y, directional)
    right = np.vdot(probe_gradient, d_probes) + np.vdot(object_gradient, d_object)
    assert left == pytest.approx(right, rel=1e-8)


@pytest.mark.parametrize("loss", ["amplitude", "anscombe", "poisson"])
def test_gradients_agree_with_finite_differences(experiment, loss):
    probes, transmission, corners, propagators = experiment
    rng = np.random.default_rng(2)
    counts = rng.poisson(intensities(*experiment) * (1 + 0.3 * rng.random((5, 24, 20)))).astype(np.float64)
    counts[:, 3, 4] = -1  # a dead pixel

    def value(p, t):
        spectra, _ = forward(p, t, corners, propagators)
        return patches.residual(spectra, counts, loss).sum()

    spectra, incident = forward(*experiment)
    patches.residual(spectra, counts, loss)
    object_gradient = np.zeros_like(transmission)
    probe_gradient = adjoint(spectra, incident, transmission, corners, propagators, object_gradient)
    step = 1e-6
    d_probes, d_object = complex_normal(rng, *probes.shape), complex_normal(rng, *transmission.shape)
    numeric = (value(probes + step * d_probes, transmission) - value(probes - step * d_probes, transmission)) / (
        2 * step
    )
    assert numeric == pytest.approx(np.vdot(probe_gradient, d_probes).real, rel=1e-6)
    numeric = (value(probes, transmission + step * d_object) - value(probes, transmission - step * d_object)) / (
        2 * step
    )
    assert numeric == pytest.approx(np.vdot(object_gradient, d_object).real, rel=1e-6)


def test_exact_data_give_zero_gradient(experiment):
    spectra, _ = forward(*experiment)
    losses = patches.residual(spectra, intensities(*experiment), "amplitude")
    assert losses.max() < 1e-20
    assert np.abs(spectra).max() < 1e-6


def test_a_global_phase_per_slice_is_invisible(experiment):
    probes, transmission, corners, propagators = experiment
    phases = np.exp(1j * np.array([0.3, -1.2, 2.0]))[:, None, None]
    np.testing.assert_allclose(
        intensities(probes, transmission * phases, corners, propagators),
        intensities(*experiment),
        rtol=1e-11,
        atol=1e-12,
    )


def test_parseval_of_the_orthonormal_transform():
    wave = complex_normal(np.random.default_rng(0), 2, 10, 14)
    assert np.linalg.norm(fft2(wave)) == pytest.approx(np.linalg.norm(wave), rel=1e-13)
    np.testing.assert_allclose(ifft2(fft2(wave)), wave, atol=1e-13)
