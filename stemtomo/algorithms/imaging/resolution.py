"""How fine the detail of images and volumes is: Fourier ring and shell correlation, and the last peak of a spectrum.

Sources: M. van Heel and M. Schatz, J. Struct. Biol. 151, 250 (2005) (thresholds in bits per frequency); P. B. Rosenthal
and R. Henderson, J. Mol. Biol. 333, 721 (2003) (0.143); S. Chen et al., Ultramicroscopy 135, 24 (2013) (randomised
phases); A. Romanov et al., J. Phys. Mater. 8, 015005 (2025) (spectral amplitude along the axes).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stemtomo.backend import Array, array_namespace, to_host

#: Correlations at which a curve is said to end, for two half sets: 0.143 is 0.5 for a full set against the truth.
FIXED_THRESHOLDS = (0.143, 0.5)
_MAD_OF_NORMAL = 0.6745
#: Below this frequency step a maximum is the shape of the specimen.
_FIRST_BIN = 3
_PEAK_ROUNDS = 4


class Correlation(NamedTuple):
    """Correlation of two images or volumes by frequency.

    ``frequency`` (shell) in 1/Å, ``value`` (shell) from -1 to 1, ``independent`` (shell): coefficients in each.
    """

    frequency: np.ndarray
    value: np.ndarray
    independent: np.ndarray

    def bits(self, bits: float) -> np.ndarray:
        """Return the correlation of two half sets that together hold ``bits`` of information per coefficient."""
        snr = (2**bits - 1) / 2  # of a half set
        root = np.sqrt(np.maximum(self.independent, 1))
        above = snr + (2 * np.sqrt(snr) + 1) / root
        return np.minimum(above / (1 + snr + 2 * np.sqrt(snr) / root), 1.0)

    def limit(self, threshold: float | np.ndarray) -> float | None:
        """Return the frequency in 1/Å where the curve first falls below ``threshold``; ``None`` if it does not."""
        gap = self.value - threshold
        below = np.flatnonzero(gap[1:] < 0)
        if not below.size:
            return None
        index = int(below[0]) + 1
        before, after = max(float(gap[index - 1]), 0.0), float(gap[index])
        share = before / (before - after)
        return float(self.frequency[index - 1] + share * (self.frequency[index] - self.frequency[index - 1]))


class Spectrum(NamedTuple):
    """Amplitude of a volume by frequency along one axis: ``frequency`` (k) in 1/Å, ``amplitude`` and ``background``."""

    frequency: np.ndarray
    amplitude: np.ndarray
    background: np.ndarray
    peaks: np.ndarray
    """Indices of the significant peaks."""

    @property
    def resolution_angstrom(self) -> float | None:
        """One over the frequency of the last significant peak; ``None`` without one."""
        return float(1 / self.frequency[self.peaks[-1]]) if self.peaks.size else None


def shell_correlation(
    first: Array,
    second: Array,
    pixel_angstrom: float,
    mask: Array | None = None,
    direction: Sequence[float] | None = None,
    half_angle_rad: float = np.radians(20),
) -> Correlation:
    """Return the correlation of two images (y, x) or volumes (z, y, x) on rings or shells of one frequency step.

    Parameters
    ----------
    first, second
        Of two independent halves of the data, on one grid.
    mask
        Weights of the pixels, soft at the rim; multiplies both.
    direction
        Along the axes of the arrays; only coefficients within ``half_angle_rad`` of it (or of its opposite) count.
    """
    xp = array_namespace(first)
    spectra = [xp.fft.rfftn(_windowed(array, mask)) for array in (first, second)]
    return _correlated(spectra[0], spectra[1], first.shape, pixel_angstrom, direction, half_angle_rad)


def randomised_correlation(
    first: Array, second: Array, pixel_angstrom: float, mask: Array, beyond: float, seed: int = 0
) -> Correlation:
    """Return the correlation that ``mask`` alone gives: phases of both are random beyond ``beyond`` (1/Å).

    What it has there above zero does not come from the specimen; see :func:`corrected`.
    """
    xp = array_namespace(first)
    generator = np.random.default_rng(seed)
    scrambled = []
    for array in (first, second):
        spectrum = xp.fft.rfftn(array - array.mean())
        frequency = _lengths(array.shape, pixel_angstrom, spectrum)
        # Phases of real noise have the symmetry of a real array at every frequency.
        noise = xp.fft.rfftn(xp.asarray(generator.normal(size=array.shape)))
        phases = noise / xp.maximum(xp.abs(noise), 1e-30)
        spectrum = xp.where(frequency > beyond, xp.abs(spectrum) * phases, spectrum)
        scrambled.append(xp.fft.irfftn(spectrum, array.shape, axes=tuple(range(array.ndim))))
    return shell_correlation(scrambled[0], scrambled[1], pixel_angstrom, mask)


def corrected(masked: Correlation, randomised: Correlation, beyond: float) -> Correlation:
    """Return ``masked`` without the part that the mask made: (t - n) / (1 - n) beyond the randomised frequency."""
    noise = np.minimum(randomised.value, 0.999)
    value = np.where(masked.frequency > beyond * 1.05, (masked.value - noise) / (1 - noise), masked.value)
    return masked._replace(value=value)


def axis_spectra(
    volume: Array,
    pixel_angstrom: float,
    significance: float = 5.0,
    halves: Sequence[Array] = (),
    taper: float = 0.2,
) -> tuple[Spectrum, ...]:
    """Return, for every axis of ``volume``, the spectral amplitude along it, summed over the other axes, and its peaks.

    A peak is a local maximum above the background (running median) by ``significance`` times the scatter around it;
    with ``halves`` given, only if it is also one of theirs.

    Parameters
    ----------
    taper
        Part of every axis over which the volume is faded out (Tukey window); 0 for a periodic volume.
    """
    others = [_amplitudes(half, taper) for half in halves]
    spectra = []
    for axis, amplitude in enumerate(_amplitudes(volume, taper)):
        plane = math.prod(volume.shape) // volume.shape[axis]
        background, scatter = _background(amplitude, plane)
        peaks = _peaks(amplitude, background, scatter, significance)
        for other in others:
            # Half the data has less to tell: its maximum at the same place need not be as significant.
            seen = _peaks(other[axis], *_background(other[axis], plane), significance / 2)
            peaks = peaks[np.array([bool(np.any(np.abs(seen - peak) <= 1)) for peak in peaks], bool)]
        frequency = np.arange(len(amplitude)) / (volume.shape[axis] * pixel_angstrom)
        spectra.append(Spectrum(frequency, amplitude, background, peaks))
    return tuple(spectra)


def soft_edge(shape: Sequence[int], taper: float = 0.2) -> np.ndarray:
    """Return a Tukey window that fades to zero over ``taper`` of every axis, half of it at either end."""
    window = np.ones(tuple(shape), np.float32)
    for axis, length in enumerate(shape):
        place = (np.arange(length) + 0.5) / length
        ramp = np.clip(np.minimum(place, 1 - place) / max(taper / 2, 1e-9), 0, 1)
        profile = (0.5 - 0.5 * np.cos(np.pi * ramp)).astype(np.float32)
        window *= profile.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return window


def _windowed(array: Array, mask: Array | None) -> Array:
    """Return ``array`` without its mean, times ``mask``."""
    if mask is None:
        return array - array.mean()
    return (array - (array * mask).sum() / mask.sum()) * mask


def _lengths(shape: Sequence[int], pixel_angstrom: float, like: Array) -> Array:
    """Return |k| in 1/Å on the grid of ``rfftn``."""
    xp = array_namespace(like)
    squares = xp.zeros((), np.float32)
    for axis, k in enumerate(_axes(shape, pixel_angstrom, like)):
        squares = squares + (k**2).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return xp.sqrt(squares)


def _axes(shape: Sequence[int], pixel_angstrom: float, like: Array) -> list[Array]:
    xp = array_namespace(like)
    axes = [xp.fft.fftfreq(length, pixel_angstrom).astype(np.float32) for length in shape[:-1]]
    return [*axes, xp.fft.rfftfreq(shape[-1], pixel_angstrom).astype(np.float32)]


def _correlated(
    first: Array,
    second: Array,
    shape: Sequence[int],
    pixel_angstrom: float,
    direction: Sequence[float] | None,
    half_angle_rad: float,
) -> Correlation:
    xp = array_namespace(first)
    length = _lengths(shape, pixel_angstrom, first)
    step = 1 / (min(shape) * pixel_angstrom)
    count = int(0.5 / pixel_angstrom / step + 1e-6) + 1
    shell = xp.round(length / step).astype(np.int32)
    weight = xp.broadcast_to(_conjugates(shape[-1], first), first.shape)
    chosen = shell < count
    if direction is not None:
        unit = np.asarray(direction, float) / np.linalg.norm(direction)
        along = xp.zeros((), np.float32)
        for axis, k in enumerate(_axes(shape, pixel_angstrom, first)):
            along = along + float(unit[axis]) * k.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        chosen &= xp.abs(along) >= np.cos(half_angle_rad) * length * (1 - 1e-6)
    index, weight, first, second = shell[chosen], weight[chosen], first[chosen], second[chosen]

    def total(values: Array) -> np.ndarray:
        return to_host(xp.bincount(index, values * weight, count))

    norm = np.sqrt(total(xp.abs(first) ** 2) * total(xp.abs(second) ** 2))
    value = total((first * xp.conj(second)).real) / np.maximum(norm, 1e-300)
    value[norm == 0] = 0
    value[0] = 1
    return Correlation(np.arange(count) * step, value, to_host(xp.bincount(index, weight, count)) / 2)


def _amplitudes(volume: Array, taper: float) -> list[np.ndarray]:
    """Return, for every axis, |FFT| of the faded volume summed over the other axes, zero frequency to Nyquist."""
    xp = array_namespace(volume)
    window = xp.asarray(soft_edge(volume.shape, taper)) if taper > 0 else None
    amplitude = xp.abs(xp.fft.rfftn(_windowed(volume, window)))
    weight = _conjugates(volume.shape[-1], amplitude)
    last = tuple(range(volume.ndim - 1))
    sums = [(amplitude.sum(axis=tuple(a for a in last if a != axis)) @ weight) for axis in last]
    kept = [to_host(total)[: length // 2 + 1] for total, length in zip(sums, volume.shape, strict=False)]
    return [*kept, to_host(amplitude.sum(axis=last, dtype=np.float64))]


def _conjugates(length: int, like: Array) -> Array:
    """Return for how many coefficients each one of the last axis of ``rfftn`` stands: itself, and its conjugate."""
    xp = array_namespace(like)
    weight = xp.full(length // 2 + 1, 2.0)
    weight[0] = 1
    if length % 2 == 0:
        weight[-1] = 1
    return weight


def _background(amplitude: np.ndarray, plane: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a running median of sums over ``plane`` moduli, and the scatter of the sums around it.

    Peaks are left out of both, round by round. The scatter is at least that of noise: moduli of complex noise deviate
    by sqrt(4 / pi - 1) of their mean.
    """
    width = min(max(13, len(amplitude) // 7) | 1, 2 * len(amplitude) - 1)
    least = math.sqrt((4 / np.pi - 1) / plane)
    # Amplitudes fall over decades; the median of a slope is its middle if the slope is straight, as logarithms are.
    level = np.log(np.maximum(amplitude, 1e-30 * amplitude.max() + 1e-300))
    kept = level.copy()
    for _ in range(_PEAK_ROUNDS):
        around = np.lib.stride_tricks.sliding_window_view(_mirrored(kept, width // 2), width)
        # Where a whole window is peaks, they are all there is to compare with.
        around = np.where(np.all(np.isnan(around), axis=1, keepdims=True), level[:, None], around)
        background = np.exp(np.nanmedian(around, axis=1))
        relative = amplitude / background - 1
        calm = np.abs(relative[_FIRST_BIN:][~np.isnan(kept[_FIRST_BIN:])])
        scatter = max(float(np.median(calm)) / _MAD_OF_NORMAL if calm.size else 0.0, least)
        peaks = _peaks(amplitude, background, background * scatter, 3.0)
        kept = level.copy()
        kept[np.unique(np.clip(peaks[:, None] + np.array([-1, 0, 1]), 0, len(level) - 1))] = np.nan
    return background, background * scatter


def _mirrored(values: np.ndarray, reach: int) -> np.ndarray:
    """Return ``values`` continued at both ends by their point mirror, which keeps a slope straight."""
    inside = np.where(np.isnan(values), np.interp(np.arange(len(values)), *_known(values)), values)
    before = 2 * inside[0] - inside[reach:0:-1]
    after = 2 * inside[-1] - inside[-2 : -2 - reach : -1]
    return np.concatenate([before, values, after])


def _known(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    known = np.flatnonzero(~np.isnan(values))
    return known, values[known]


def _peaks(amplitude: np.ndarray, background: np.ndarray, scatter: np.ndarray, significance: float) -> np.ndarray:
    inner = amplitude[1:-1]
    top = (inner >= amplitude[:-2]) & (inner > amplitude[2:]) & (inner > (background + significance * scatter)[1:-1])
    found = np.flatnonzero(top) + 1
    return found[found >= _FIRST_BIN]
