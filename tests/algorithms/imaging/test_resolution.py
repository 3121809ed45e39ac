"""Resolution against closed forms: correlations of known signal-to-noise, crystals of known blur and noise."""

import numpy as np
import pytest
from scipy.special import ive

from stemtomo.algorithms.imaging.resolution import (
    Correlation,
    axis_spectra,
    corrected,
    randomised_correlation,
    shell_correlation,
    soft_edge,
)

PIXEL = 0.5


def lengths(shape, pixel=PIXEL):
    return np.sqrt(sum(k**2 for k in np.meshgrid(*(np.fft.fftfreq(n, pixel) for n in shape), indexing="ij")))


def pair(shape, signal, seed=0, noise=1.0):
    """Return two arrays with a common signal of power ``signal(k)`` and own white noise of power one."""
    rng = np.random.default_rng(seed)
    common = np.fft.ifftn(np.fft.fftn(rng.normal(size=shape)) * np.sqrt(signal(lengths(shape)))).real
    return [common + noise * rng.normal(size=shape) for _ in range(2)]


@pytest.mark.parametrize("shape", [(128, 128), (40, 44, 48)])
def test_the_correlation_is_that_of_the_signal_to_noise_ratio(shape):
    def signal(k):
        return 8 * np.exp(-((k / 0.35) ** 2))

    found = shell_correlation(*pair(shape, signal), PIXEL)
    ratio = signal(found.frequency)
    expected = ratio / (1 + ratio)
    # The deviation of a correlation coefficient of n complex pairs, five times over.
    spread = (1 - expected**2) / np.sqrt(2 * np.maximum(found.independent, 1))
    assert np.all(np.abs(found.value - expected)[3:] < 5 * spread[3:] + 0.01)
    exact = 0.35 * np.sqrt(np.log(8 * (1 / 0.143 - 1)))
    assert found.limit(0.143) == pytest.approx(exact, abs=2.5 * found.frequency[1])


def test_thresholds_in_bits_are_the_published_ones():
    n = np.array([10.0, 100.0, 1e4])
    curve = Correlation(np.arange(3.0), np.ones(3), n)
    half = (0.2071 + 1.9102 / np.sqrt(n)) / (1.2071 + 0.9102 / np.sqrt(n))
    one = (0.5 + 2.4142 / np.sqrt(n)) / (1.5 + 1.4142 / np.sqrt(n))
    np.testing.assert_allclose(curve.bits(0.5), half, rtol=2e-4)
    np.testing.assert_allclose(curve.bits(1), one, rtol=2e-4)


def test_a_curve_that_does_not_fall_has_no_limit():
    image = np.random.default_rng(0).normal(size=(32, 32))
    same = shell_correlation(image, image, PIXEL)
    np.testing.assert_allclose(same.value, 1, atol=1e-12)
    assert same.limit(0.143) is None
    falling = Correlation(np.arange(5) * 0.1, np.array([1, 0.9, 0.5, 0.1, 0.0]), np.ones(5))
    assert falling.limit(0.3) == pytest.approx(0.25)


def test_counts_are_independent_coefficients():
    shape = (24, 20, 22)
    found = shell_correlation(*pair(shape, lambda k: 1 + k), PIXEL)
    shells = np.round(lengths(shape) * min(shape) * PIXEL).astype(int)
    np.testing.assert_allclose(found.independent, np.bincount(shells.ravel())[: len(found.independent)] / 2, atol=3)


def test_cones_see_the_direction_that_was_blurred():
    shape = (64, 64, 64)
    rng = np.random.default_rng(1)
    kz, ky, kx = np.meshgrid(*(np.fft.fftfreq(n, PIXEL) for n in shape), indexing="ij")
    common = np.fft.fftn(rng.normal(size=shape))
    blur = 5 * np.exp(-((kx**2 + ky**2) / 0.5**2 + kz**2 / 0.2**2) / 2)
    halves = [np.fft.ifftn(common * blur).real + rng.normal(size=shape) for _ in range(2)]
    limits = {}
    for name, direction in (("z", (1, 0, 0)), ("y", (0, 1, 0)), ("x", (0, 0, 1))):
        limits[name] = shell_correlation(*halves, PIXEL, direction=direction).limit(0.5)
    exact = np.sqrt(2 * np.log(5))  # where the amplitude of the signal is that of the noise, in widths
    assert limits["x"] == pytest.approx(0.5 * exact, rel=0.1)
    assert limits["y"] == pytest.approx(0.5 * exact, rel=0.1)
    assert limits["z"] == pytest.approx(0.2 * exact, rel=0.2)


def test_randomised_phases_unmask_a_correlation_made_by_the_mask():
    shape = (48, 48, 48)
    halves = pair(shape, lambda k: 3e4 * (k < 0.3), seed=2)
    grid = np.indices(shape) - 23.5
    tight = (np.sqrt((grid**2).sum(axis=0)) < 8).astype(float)  # a hard edge correlates neighbouring frequencies
    masked = shell_correlation(*halves, PIXEL, tight)
    chance = randomised_correlation(*halves, PIXEL, tight, beyond=0.3)
    true = corrected(masked, chance, 0.3)
    far = masked.frequency > 0.6
    # A mask alone makes no correlation of independent noise; what leaks beyond the signal does, in both alike.
    assert masked.value[far].mean() > 0.15
    assert abs(true.value[far].mean()) < 0.5 * masked.value[far].mean()
    assert np.all(true.value[true.frequency < 0.28] > 0.9)


def crystal(shape, cells, widths, pixel):
    """Return a volume of one blurred point per cell: amplitude 1 at every reflection times the transfer of the blur."""
    spectrum = np.zeros(shape)
    grids = np.meshgrid(*(np.fft.fftfreq(n, 1 / n) for n in shape), indexing="ij")
    on_lattice = np.all([np.round(g) % c == 0 for g, c in zip(grids, cells, strict=True)], axis=0)
    transfer = np.exp(
        -2 * np.pi**2 * sum((w * g / (n * pixel)) ** 2 for w, g, n in zip(widths, grids, shape, strict=True))
    )
    spectrum[on_lattice] = transfer[on_lattice]
    return np.fft.ifftn(spectrum).real * np.prod(shape)


def mean_of_rice(amplitude, sigma):
    """Return the mean modulus of ``amplitude`` plus complex noise of E|n|² = sigma²."""
    x = amplitude**2 / sigma**2
    return sigma * np.sqrt(np.pi) / 2 * ((1 + x) * ive(0, x / 2) + x * ive(1, x / 2))


def test_an_anisotropic_blur_is_given_back_as_resolutions():
    """Reflections of a crystal blurred by 0.7, 2.0 and 0.7 Å drown in noise just beyond 1/0.7 and 1/2.0 per Å.

    Axes of 28 and 32 Å hold four cells, so these are the reflections 10 and 4; which planes of reflections rise by five
    deviations of their sum is known in closed form.
    """
    pixel, shape, cells, sigma = 0.25, (112, 128, 112), (4, 4, 4), 3000.0
    widths = [np.sqrt(3.5 / (2 * np.pi**2)) * d for d in (0.7, 2.0, 0.7)]
    truth = crystal(shape, cells, widths, pixel)
    amplitude = np.abs(np.fft.fftn(truth))
    rng = np.random.default_rng(0)
    first, second = (truth + 2**0.5 * sigma / truth.size**0.5 * rng.normal(size=shape) for _ in range(2))
    for axis, expected in ((0, 0.7), (1, 2.0), (2, 0.7)):
        others = tuple(i for i in range(3) if i != axis)
        rise = (mean_of_rice(amplitude, sigma) - mean_of_rice(0, sigma)).sum(axis=others)[: shape[axis] // 2]
        deviation = sigma * np.sqrt((1 - np.pi / 4) * truth.size / shape[axis])
        step = 1 / (shape[axis] * pixel)
        assert np.flatnonzero(rise > 5 * deviation)[-1] * step == pytest.approx(1 / expected, abs=1e-9)
        for halves in ((), (first, second)):
            found = axis_spectra((first + second) / 2, pixel, taper=0, halves=halves)[axis]
            assert abs(1 / found.resolution_angstrom - 1 / expected) <= step * (1 + 1e-9)


def test_a_peak_that_only_one_half_has_is_not_believed():
    rng = np.random.default_rng(0)
    common = np.cos(2 * np.pi * 10 * np.arange(96) / 96)
    halves = [common + rng.normal(size=(8, 8, 96)) for _ in range(2)]
    halves[0] += 3 * np.cos(2 * np.pi * 30 * np.arange(96) / 96)
    volume = (halves[0] + halves[1]) / 2
    assert axis_spectra(volume, 1.0, taper=0)[2].resolution_angstrom == pytest.approx(96 / 30)
    assert axis_spectra(volume, 1.0, taper=0, halves=halves)[2].resolution_angstrom == pytest.approx(96 / 10)


def test_nothing_but_noise_has_no_peak():
    noise = np.random.default_rng(3).normal(size=(48, 48, 96))
    assert axis_spectra(noise, 0.3, significance=6)[2].resolution_angstrom is None


def test_the_soft_edge_fades_every_axis():
    window = soft_edge((40, 30), 0.4)
    assert window.max() == 1
    assert window[0].max() < 0.05
    np.testing.assert_allclose(window, window[::-1, ::-1], atol=1e-6)
    np.testing.assert_array_equal(soft_edge((5, 6), 0.0), 1)


def test_a_smooth_fall_of_the_spectrum_has_no_peak_and_thin_volumes_are_taken():
    shape = (9, 40, 96)
    rng = np.random.default_rng(5)
    fall = np.exp(-8 * lengths(shape) * PIXEL)
    volume = np.fft.ifftn(np.fft.fftn(rng.normal(size=shape)) * fall).real
    spectra = axis_spectra(volume, PIXEL, significance=6)
    assert [spectrum.peaks.size for spectrum in spectra] == [0, 0, 0]
    ratio = spectra[2].amplitude[3:-3] / spectra[2].background[3:-3]
    assert np.all((ratio > 0.6) & (ratio < 1.6))
