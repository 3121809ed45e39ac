"""The Fourier-sparsity constraint is a projection, keeps the mean, and does not repair what is broken."""

import numpy as np
import pytest

from stemtomo.algorithms.imaging.denoising import denoise_lowrank
from stemtomo.algorithms.imaging.noise_spectrum import NoiseSpectrum
from stemtomo.algorithms.imaging.sparsity import crystal_frequencies, deviations, fourier_sparse, project_sparse
from tests.algorithms.imaging.lattices import DEFECT, coloured, filled, lattice, psnr

SIGMA = 25 / 255
SHAPE = (128, 120)
TOLD = {"threshold": 4.0, "keep_below": 0.03, "radius": 1.5 / 120, "column_width_px": 2.0}


def noisy_lattice(occupied=1.0, sigma=SIGMA, reach=np.inf):
    truth = lattice(SHAPE, occupied)
    noise, power = coloured(SHAPE, sigma, reach)
    return truth, truth + noise, NoiseSpectrum(power, "known")


def test_the_projection_can_be_repeated_and_keeps_the_mean():
    _, noisy, noise = noisy_lattice(0.0)
    found = fourier_sparse(noisy, noise, **TOLD, protect_above=4.5)
    assert 0.005 < found.protected.mean() < 0.4
    again = project_sparse(found.image, found.kept, found.protected)
    np.testing.assert_allclose(again, found.image, atol=1e-10)
    assert found.image.mean() == pytest.approx(noisy.mean(), abs=1e-12)
    np.testing.assert_array_equal(found.image[found.protected], noisy[found.protected])


def test_without_protection_the_whole_filter_can_be_repeated():
    _, noisy, noise = noisy_lattice()
    once = fourier_sparse(noisy, noise, **TOLD, protect_above=np.inf)
    twice = fourier_sparse(once.image, noise, **TOLD, protect_above=np.inf)
    assert twice.kept[once.kept].all()
    np.testing.assert_allclose(twice.image, once.image, atol=1e-12)
    assert once.image.mean() == pytest.approx(noisy.mean(), abs=1e-12)


def test_it_is_the_closest_image_of_the_model():
    """The residual is orthogonal to both subspaces: no kept frequency, no protected pixel."""
    _, noisy, noise = noisy_lattice(0.0)
    found = fourier_sparse(noisy, noise, **TOLD, protect_above=4.5)
    residual = noisy - found.image
    assert np.abs(np.fft.fft2(residual, norm="ortho")[found.kept]).max() < 1e-9
    assert not residual[found.protected].any()


def test_peaks_of_a_lattice_are_kept_and_noise_is_not():
    truth, noisy, noise = noisy_lattice()
    kept = crystal_frequencies(noisy, noise, 4.0, 0.03, 0.0)
    assert crystal_frequencies(noisy - truth, noise, 5.0, 0.0, 0.0).sum() <= 1
    assert kept.mean() < 0.02
    strongest = np.argsort(np.abs(np.fft.fft2(truth)).ravel())[-30:]
    assert kept.ravel()[strongest].all()
    np.testing.assert_array_equal(kept[1:, 1:], kept[1:, 1:][::-1, ::-1])


@pytest.mark.parametrize(
    ("occupied", "sigma", "reach"), [(0.0, SIGMA, np.inf), (0.5, SIGMA, np.inf), (0.0, SIGMA, 0.1)]
)
def test_a_vacancy_is_not_repaired(occupied, sigma, reach):
    """Sparsity alone fills half of it; protected, at most a fifth, and with the other filter before it too."""
    truth, noisy, noise = noisy_lattice(occupied, sigma, reach)
    alone = fourier_sparse(noisy, noise, **TOLD, protect_above=np.inf)
    guarded = fourier_sparse(noisy, noise, **TOLD, protect_above=4.0)
    both = fourier_sparse(noisy, noise, **TOLD, protect_above=4.0, cleaned=denoise_lowrank(noisy, noise))
    assert filled(alone.image, truth, 1 - occupied) > 0.4
    assert abs(filled(guarded.image, truth, 1 - occupied)) < 0.2
    assert abs(filled(both.image, truth, 1 - occupied)) < 0.2
    assert psnr(truth, both.image) > psnr(truth, noisy) + 3
    assert guarded.protected[tuple(np.round(DEFECT).astype(int))]


def test_what_was_not_observed_stays_as_it_is_and_does_not_leak():
    truth, noisy, noise = noisy_lattice()
    valid = np.zeros(SHAPE, bool)
    valid[14:-14, 12:-12] = True
    cut = np.where(valid, noisy, 0)
    found = fourier_sparse(cut, noise, **TOLD, protect_above=4.5, valid=valid)
    assert not found.image[~valid].any()
    assert psnr(truth[valid], found.image[valid]) > psnr(truth[valid], noisy[valid]) + 4


def test_noise_alone_does_not_deviate():
    noise, power = coloured((200, 200), 0.1, 0.1)
    assert deviations(noise, NoiseSpectrum(power, "known"), 2.0, 5.0).mean() < 0.002
    spot = noise.copy()
    spot[98:103, 97:104] += 0.6
    assert deviations(spot, NoiseSpectrum(power, "known"), 2.0, 5.0)[100, 100]
