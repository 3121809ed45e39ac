"""Filters on lattices: gains in dB, coloured noise, and vacancies that stay empty."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from stemtomo.algorithms.imaging.denoising import (
    PatchGroups,
    bm3d_installed,
    denoise_bm3d,
    denoise_lowrank,
)
from stemtomo.algorithms.imaging.noise_spectrum import NoiseSpectrum, noise_of_halves, noise_of_region, white_noise
from stemtomo.errors import ConfigurationError
from tests.algorithms.imaging.lattices import coloured, filled, lattice, psnr

SIGMA = 25 / 255
needs_bm3d = pytest.mark.skipif(not bm3d_installed(), reason="the package bm3d (non-commercial use) is not installed")
FILTERS = [pytest.param(denoise_lowrank, id="lowrank"), pytest.param(denoise_bm3d, id="bm3d", marks=needs_bm3d)]


def white(shape, sigma=SIGMA):
    return NoiseSpectrum(np.full(shape, sigma**2), "known")


@pytest.mark.parametrize(
    ("method", "gain"), [(FILTERS[0].values[0], 11.5), pytest.param(denoise_bm3d, 10.0, marks=needs_bm3d)]
)
def test_gain_on_a_lattice_with_white_noise(method, gain):
    truth = lattice()
    noisy = truth + coloured(truth.shape, SIGMA, np.inf)[0]
    assert psnr(truth, method(noisy, white(truth.shape))) - psnr(truth, noisy) > gain


@needs_bm3d
def test_bm3d_is_called_as_its_authors_would():
    """Given as a flat spectrum with explicit thresholds, white noise is filtered as by the package's plain call."""
    import bm3d

    truth = lattice((96, 96))
    noisy = truth + coloured(truth.shape, SIGMA, np.inf)[0]
    plain = psnr(truth, bm3d.bm3d(noisy, SIGMA))
    assert psnr(truth, denoise_bm3d(noisy, white(truth.shape))) == pytest.approx(plain, abs=0.3)


@needs_bm3d
def test_bm3d_from_several_threads_at_once():
    noise = white((48, 48))
    images = [coloured((48, 48), SIGMA, np.inf)[0] * scale for scale in range(1, 9)]
    alone = [denoise_bm3d(image, noise) for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda image: denoise_bm3d(image, noise), images))
    np.testing.assert_allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("method", FILTERS)
def test_a_vacancy_stays_empty(method):
    """Of a column that is missing in white noise, or half missing in coloured, at most a fifth may be filled."""
    for sigma, occupied, reach in ((2 * SIGMA, 0.0, np.inf), (SIGMA, 0.5, 0.1)):
        truth = lattice((96, 96), occupied=occupied)
        noise, power = coloured(truth.shape, sigma, reach)
        cleaned = method(truth + noise, NoiseSpectrum(power, "known"))
        assert filled(cleaned, truth, 1 - occupied) < 0.2


def test_knowing_the_colour_of_the_noise_is_worth_decibels():
    truth = lattice(radius=45)
    noise, power = coloured(truth.shape, SIGMA, 0.1)
    vacuum = np.hypot(*(np.indices(truth.shape) - 64)) > 55
    noisy = truth + noise
    found = noise_of_region(noisy, vacuum)
    known = psnr(truth, denoise_lowrank(noisy, NoiseSpectrum(power, "known")))
    guessed = psnr(truth, denoise_lowrank(noisy, white_noise(noisy)))
    assert known > psnr(truth, denoise_lowrank(noisy, white(truth.shape))) + 1
    assert known > guessed + 3
    assert psnr(truth, denoise_lowrank(noisy, found)) > known - 0.5


def test_the_spectrum_of_vacuum_is_that_of_the_noise():
    noise, power = coloured((160, 140), 0.03, 0.1)
    vacuum = np.ones(noise.shape, bool)
    vacuum[40:60, 50:70] = False
    found = noise_of_region(noise + 0.5, vacuum)
    assert found.sigma == pytest.approx(0.03, rel=0.05)
    low, high = power > np.quantile(power, 0.9), power < np.quantile(power, 0.1)
    assert found.power[low].mean() == pytest.approx(power[low].mean(), rel=0.15)
    assert found.power[high].mean() == pytest.approx(power[high].mean(), rel=0.15)
    assert noise_of_region(noise, np.zeros(noise.shape, bool)) is None


def test_half_sets_tell_the_noise_under_a_specimen():
    truth = lattice()
    halves = [truth + coloured(truth.shape, 0.04 * 2**0.5, 0.1, seed)[0] for seed in (1, 2)]
    found = noise_of_halves(*halves)
    power = coloured(truth.shape, 0.04, 0.1)[1]
    assert found.sigma == pytest.approx(0.04, rel=0.03)
    assert np.median(found.power / power) == pytest.approx(1, rel=0.05)
    lit = np.zeros(truth.shape, bool)
    lit[20:-20, 20:-20] = True
    assert noise_of_halves(*halves, valid=lit).sigma == pytest.approx(0.04, rel=0.05)


def test_white_noise_is_told_from_the_finest_detail():
    truth = lattice()
    noisy = truth + coloured(truth.shape, 0.05, np.inf)[0]
    assert white_noise(noisy).sigma == pytest.approx(0.05, rel=0.06)
    assert white_noise(np.where(truth > 0.5, 9, noisy), truth <= 0.5).sigma == pytest.approx(0.05, rel=0.1)


def test_what_has_no_noise_is_not_touched():
    truth = lattice((40, 50)).astype(np.float32)
    np.testing.assert_array_equal(denoise_lowrank(truth, white(truth.shape, 0)), truth)
    np.testing.assert_allclose(denoise_lowrank(truth, white(truth.shape, 1e-5)), truth, atol=2e-4)


def test_cutting_the_search_into_bands_changes_nothing(monkeypatch):
    truth = lattice((60, 64))
    noisy = truth + coloured(truth.shape, SIGMA, np.inf)[0]
    groups = PatchGroups(reach_px=8, similar=60)
    whole = denoise_lowrank(noisy, white(truth.shape), groups)
    monkeypatch.setattr("stemtomo.algorithms.imaging.denoising._BATCH", 17)
    np.testing.assert_allclose(denoise_lowrank(noisy, white(truth.shape), groups), whole, atol=1e-5)


@pytest.mark.parametrize("shape", [(14, 90), (90, 15)])
def test_a_patch_in_the_corner_of_a_narrow_image_finds_all_its_like_inside(shape):
    image = np.random.default_rng(0).normal(size=shape)
    noise = NoiseSpectrum(np.ones(shape), "white")
    cleaned = denoise_lowrank(image, noise, PatchGroups(similar=200))
    assert np.isfinite(cleaned).all()
    assert cleaned.std() < 0.5 * image.std()


def test_an_image_smaller_than_its_patches():
    with pytest.raises(ConfigurationError, match="too small for patches"):
        denoise_lowrank(np.zeros((10, 40)), white((10, 40)))


def test_bm3d_that_is_absent_is_explained(monkeypatch):
    monkeypatch.setattr("stemtomo.algorithms.imaging.denoising.bm3d_installed", lambda: False)
    with pytest.raises(ConfigurationError, match=r"non-commercial use only; denoise = 'lowrank'"):
        denoise_bm3d(np.zeros((40, 40)), white((40, 40)))
