import numpy as np
import pytest

from stemtomo.backend import fft2
from stemtomo.errors import ConfigurationError
from stemtomo.geometry import Optics
from stemtomo.physics.aberrations import aberration_phase
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.physics.probe import aperture, probe_wave, shifted_probes, shifted_probes_adjoint
from stemtomo.physics.propagation import fresnel_propagator, propagate

OPTICS = Optics(energy_ev=300e3, semiangle_rad=21e-3, aberrations={"C10": 200.0})
SHAPE, PIXEL = (64, 64), (0.4, 0.4)
rng = np.random.default_rng(0)


def test_the_probe_holds_its_electrons_and_fills_the_aperture():
    probe = probe_wave(OPTICS, SHAPE, PIXEL, intensity=34133.0, dtype=np.complex128)
    pattern = np.abs(fft2(probe)) ** 2
    assert np.sum(np.abs(probe) ** 2) == pytest.approx(34133.0, rel=1e-12)
    assert pattern.sum() == pytest.approx(34133.0, rel=1e-12)
    # 21 mrad on pixels of lambda / 25.6 Å = 0.769 mrad: the disk's area is pi (21 / 0.769)² pixels.
    assert aperture(OPTICS, SHAPE, PIXEL).sum() == pytest.approx(
        np.pi * (21e-3 * 25.6 / wavelength_angstrom(300e3)) ** 2, rel=2e-3
    )
    assert pattern[0, 0] == pytest.approx(pattern[:20, 0].max(), rel=1e-9)


def test_an_overfocused_probe_is_a_disk_of_radius_c1_alpha_and_grows_down_the_beam():
    y, x = np.meshgrid((np.arange(256) - 128) * 0.2, (np.arange(256) - 128) * 0.2, indexing="ij")

    def mean_square_radius(plane_z):
        intensity = np.abs(probe_wave(OPTICS, (256, 256), (0.2, 0.2), plane_z_angstrom=plane_z, soft_edge=True)) ** 2
        intensity[np.hypot(y, x) > 10] = 0  # the aperture's diffraction tail has no second moment
        return float((intensity * (x**2 + y**2)).sum() / intensity.sum())

    # A uniform disk of radius C1 alpha = 4.2 Å has <r²> = R² / 2.
    assert mean_square_radius(0.0) == pytest.approx(4.2**2 / 2, rel=0.1)
    assert mean_square_radius(100.0) == pytest.approx(6.3**2 / 2, rel=0.1)


def test_propagating_the_probe_equals_stating_it_at_the_later_plane():
    here = probe_wave(OPTICS, SHAPE, PIXEL, plane_z_angstrom=0.0, dtype=np.complex128)
    there = probe_wave(OPTICS, SHAPE, PIXEL, plane_z_angstrom=50.0, dtype=np.complex128)
    propagator = fresnel_propagator(SHAPE, PIXEL, wavelength_angstrom(300e3), 50.0, dtype=np.complex128)
    np.testing.assert_allclose(propagate(here.copy(), propagator), there, atol=1e-12)


def test_aberrations_are_the_textbook_polynomial():
    wavelength = wavelength_angstrom(300e3)
    k = np.array([0.5])
    chi = aberration_phase(k, np.zeros(1), wavelength, {"C10": -150.0, "C30": 1e7})
    textbook = np.pi * wavelength * -150.0 * 0.25 + np.pi / 2 * 1e7 * wavelength**3 * 0.5**4
    assert chi[0] == pytest.approx(textbook, rel=1e-12)
    # Twofold astigmatism is opposite along and across its azimuth.
    along = aberration_phase(k, np.zeros(1), wavelength, {"C12": 40.0, "phi12": 0.0})
    across = aberration_phase(np.zeros(1), k, wavelength, {"C12": 40.0, "phi12": 0.0})
    assert along[0] == pytest.approx(-across[0])


@pytest.mark.parametrize("name", ["C11", "defocus", "C35", "phi30"])
def test_an_unknown_aberration_is_named(name):
    with pytest.raises(ConfigurationError, match=name):
        aberration_phase(np.zeros(1), np.zeros(1), 0.02, {name: 1.0})


def test_subpixel_shifts_move_the_probe_and_have_their_adjoint():
    probe = probe_wave(OPTICS, SHAPE, PIXEL, dtype=np.complex128)
    shifts = np.array([[3.0, 0.0], [0.0, -2.0], [0.3, 0.7], [0.0, 0.0]])
    moved = shifted_probes(probe, shifts)
    band_limited = np.abs(fft2(probe)) < 1e-3 * np.abs(fft2(probe)).max()
    assert band_limited[32].all()  # nothing on the Nyquist lines, so whole-pixel shifts are exact
    np.testing.assert_allclose(moved[0], np.roll(probe, 3, axis=1), atol=1e-12)
    np.testing.assert_allclose(moved[1], np.roll(probe, -2, axis=0), atol=1e-12)
    np.testing.assert_allclose(moved[3], probe, atol=1e-12)
    other = rng.normal(size=(4, *SHAPE)) + 1j * rng.normal(size=(4, *SHAPE))
    back = shifted_probes_adjoint(other.copy(), shifts)
    assert np.vdot(moved, other) == pytest.approx(np.vdot(probe, back), rel=1e-12)
