"""C1, astigmatism and rotation of a simulated microscope come back from its bright-field images, or an honest no."""

import functools

import numpy as np
import pytest

from stemtomo.algorithms.imaging.parallax import Lens, fit_parallax, lens_of, matrix_of
from tests.algorithms.imaging import microscope

BLOCK = 3  # detector pixels of a superpixel, about 150 in the disc


@functools.cache
def clean(c1, scan=64, **kind):
    """Patterns of one electron, cut to the disc."""
    return microscope.frames(scan=scan, c1=c1, **kind)[..., 9:55, 9:55] / 1e6


def counted(patterns, electrons, seed=1):
    if np.isinf(electrons):
        return 1e6 * patterns
    return np.random.default_rng(seed).poisson(electrons * patterns)


def stack(frames):
    """Bin the disc into blocks, line by line."""
    centre = frames.shape[-1] // 2
    edges = range(centre - 7 * BLOCK - 1, centre + 7 * BLOCK, BLOCK)
    images, alpha = [], []
    for y in edges:
        for x in edges:
            k = (np.array([x, y]) + (BLOCK - 1) / 2 - centre) * microscope.PIXEL
            if np.hypot(*k) * microscope.WAVELENGTH < microscope.SEMIANGLE:
                images.append(frames[..., y : y + BLOCK, x : x + BLOCK].sum(axis=(-2, -1)))
                alpha.append(k * microscope.WAVELENGTH)
    return np.stack(images, axis=-1), np.array(alpha)


def fit(frames):
    images, alpha = stack(frames)
    steps = (microscope.STEP, microscope.STEP)
    return fit_parallax(images, alpha, microscope.SEMIANGLE, microscope.WAVELENGTH, steps)


@pytest.mark.parametrize("electrons", [1e3, 3e3, 1e4, np.inf])
@pytest.mark.parametrize("c1", [150.0, -150.0])
def test_c1_within_one_percent_and_rotation_within_half_a_degree(c1, electrons):
    # Of the 1 % about a half is the object's own lensing; at the lowest dose one exposure scatters by 0.3 % more.
    found = [fit(counted(clean(c1), electrons, seed)) for seed in (range(1, 4) if electrons == 1e3 else (1,))]
    assert not any(one.reason or one.lens.transposed for one in found)
    mean = np.mean([one.lens.c1_angstrom for one in found])
    assert mean == pytest.approx(c1, rel=0.01)  # the sign goes with the rotation in (-90, 90] deg
    for one in found:
        assert one.lens.c1_angstrom == pytest.approx(c1, rel=0.015)
        assert np.rad2deg(one.lens.rotation_rad) == pytest.approx(23.0, abs=0.5)
        assert one.lens.c12_angstrom < 2.0


def test_astigmatism_and_a_mirrored_detector():
    frames = clean(150.0, scan=48, c12=20.0, phi12=0.4, transposed=True)
    found = fit(counted(frames, 1e4))
    assert found.reason == ""
    assert found.lens.transposed
    assert found.lens.c1_angstrom == pytest.approx(150, rel=0.01)
    assert found.lens.c12_angstrom == pytest.approx(20, abs=1.5)
    assert found.lens.phi12_rad == pytest.approx(0.4, abs=0.05)


def test_the_stated_uncertainty_covers_the_scatter():
    found = [fit(counted(clean(150.0)[:40, :40], 3000, seed)) for seed in range(4)]
    scatter = np.std([f.lens.c1_angstrom for f in found], ddof=1)
    stated = np.mean([f.c1_sigma_angstrom for f in found])
    assert 0.3 < scatter / stated < 2.5


def test_noise_alone_and_the_focus_are_refused():
    images, alpha = stack(np.random.default_rng(0).poisson(2.0, size=(48, 48, 64, 64)))
    optics = (microscope.SEMIANGLE, microscope.WAVELENGTH, (0.6, 0.6))
    assert "no better than noise" in fit_parallax(images, alpha, *optics).reason
    assert fit(counted(microscope.frames(scan=48, c1=5.0) / 1e6, 1e4)).reason != ""
    few = fit_parallax(images[:6], alpha, *optics)
    assert "8 x 8 are needed" in few.reason


def test_a_field_of_which_nothing_is_shared_is_refused():
    images, alpha = stack(np.random.default_rng(0).poisson(2.0, size=(9, 9, 64, 64)))
    for step in (0.6, 1.6, 3.0):
        found = fit_parallax(images, alpha, microscope.SEMIANGLE, microscope.WAVELENGTH, (step, step))
        assert found.reason != ""


def test_too_little_dose_is_refused():
    found = fit(counted(clean(150.0), 3.0))
    assert found.reason != ""


@pytest.mark.parametrize("turn_deg", [-80, 10, 90])
@pytest.mark.parametrize("c1", [-120.0, 300.0])
@pytest.mark.parametrize("transposed", [False, True])
def test_lens_and_matrix_are_inverse(turn_deg, c1, transposed):
    lens = Lens(np.deg2rad(turn_deg), c1, 30.0, 0.3, transposed)
    back = lens_of(matrix_of(lens))
    if np.sign(back.c1_angstrom) == np.sign(c1):
        np.testing.assert_allclose(back[:4], lens[:4], atol=1e-9)
    else:  # 90 and -90 deg are the two ends of the range
        assert abs(turn_deg) == 90
    assert back.transposed == transposed


def test_half_a_turn_and_the_other_sign_shift_alike():
    one = matrix_of(Lens(0.4, 150.0, 12.0, 0.3, False))
    other = matrix_of(Lens(0.4 + np.pi, -150.0, 12.0, 0.3 + np.pi / 2, False))
    np.testing.assert_allclose(one, other, atol=1e-9)
