"""From Bragg peaks to a lattice: orientation and strain of a known crystal, and where its origin lies.

A crystal point c lies in the sample at r = M c + t; its reflection g is then found at k = inv(M)^T g, with the phase
-2 pi k t added to that of its structure factor.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import fft, ndimage

from stemtomo.algorithms.atoms.crystals import Crystal, Reflections
from stemtomo.errors import ConfigurationError

_LENGTH_TOLERANCE = 0.05
_ANGLE_TOLERANCE = 0.06
_PEAKS = 80
_BASE_PEAKS = 24
#: Standard deviation of the Gaussian window as a part of the box: peaks then are Gaussians of about one pixel.
_WINDOW = 1 / 6
_TRANSLATION_GRID = 48


class Spectrum(NamedTuple):
    """Windowed Fourier transform of a density: ``values`` complex, zero frequency in the middle, axes kz, ky, kx."""

    values: np.ndarray
    amplitude: np.ndarray
    step_inv_angstrom: np.ndarray
    """Pixel along x, y, z in 1/Å, (3,)."""

    def at(self, k: np.ndarray) -> np.ndarray:
        """Return the (fractional) index z, y, x of frequencies ``k`` (n, 3) x, y, z in 1/Å."""
        return (k / self.step_inv_angstrom)[:, ::-1] + np.array(self.amplitude.shape) // 2

    def frequency(self, index: np.ndarray) -> np.ndarray:
        """Return the frequencies (n, 3) x, y, z at ``index`` (n, 3) z, y, x."""
        return (index - np.array(self.amplitude.shape) // 2)[:, ::-1] * self.step_inv_angstrom

    @property
    def highest_inv_angstrom(self) -> float:
        """Largest frequency that is sampled along every axis."""
        return float((np.array(self.amplitude.shape)[::-1] // 2 * self.step_inv_angstrom).min())


def spectrum(density: np.ndarray, spacing_angstrom: float) -> Spectrum:
    """Return the spectrum of ``density`` (z, y, x) under a Gaussian window; phases refer to the point at n // 2."""
    windows = [np.exp(-0.5 * ((np.arange(n) - n // 2) / (_WINDOW * n)) ** 2) for n in density.shape]
    window = np.einsum("z,y,x->zyx", *windows).astype(np.float32)
    mean = float((density * window).sum(dtype=np.float64) / window.sum(dtype=np.float64))
    values = fft.fftshift(fft.fftn(fft.ifftshift((density - mean) * window)))
    step = 1 / (np.array(density.shape)[::-1] * spacing_angstrom)
    return Spectrum(values, np.abs(values), step)


def atom_density(
    positions: np.ndarray, centre: np.ndarray, side_angstrom: float, spacing_angstrom: float
) -> np.ndarray:
    """Return atoms per voxel (z, y, x) of a cube of ``side_angstrom`` about ``centre`` (x, y, z)."""
    count = int(np.ceil(side_angstrom / spacing_angstrom))
    index = np.rint((positions - centre) / spacing_angstrom).astype(int) + count // 2
    inside = ((index >= 0) & (index < count)).all(axis=1)
    x, y, z = index[inside].T
    flat = np.bincount((z * count + y) * count + x, minlength=count**3)
    return flat.reshape(count, count, count).astype(np.float32)


def bragg_peaks(found: Spectrum, lowest: float, highest: float) -> tuple[np.ndarray, np.ndarray]:
    """Return frequencies (peak, 3) and amplitudes of the strongest maxima between two lengths, 1/Å."""
    shape = np.array(found.amplitude.shape)
    axes = [(np.arange(n) - n // 2) * s for n, s in zip(shape, found.step_inv_angstrom[::-1], strict=True)]
    length = np.sqrt(axes[0][:, None, None] ** 2 + axes[1][:, None] ** 2 + axes[2] ** 2)
    highest_here = ndimage.maximum_filter(found.amplitude, 3, mode="constant")
    index = np.argwhere((found.amplitude == highest_here) & (length >= lowest) & (length <= highest))
    strength = found.amplitude[tuple(index.T)]
    order = np.argsort(-strength)[:_PEAKS]
    return refine_peaks(found, index[order])[0], np.asarray(strength[order])


def refine_peaks(found: Spectrum, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the frequencies of maxima at ``index`` (n, 3), by a parabola through logarithms; and which are maxima."""
    shape = np.array(found.amplitude.shape)
    inner = ((index > 0) & (index < shape - 1)).all(axis=1)
    safe = np.clip(index, 1, shape - 2)
    exact, good = safe.astype(float), np.asarray(inner)
    for axis in range(3):
        step = np.zeros(3, dtype=int)
        step[axis] = 1
        low, here, high = (np.log(found.amplitude[tuple((safe + s * step).T)] + 1e-30) for s in (-1, 0, 1))
        curvature = 2 * here - low - high
        good = good & (here >= low) & (here >= high) & (curvature > 0)
        exact[:, axis] += np.clip(
            np.divide(high - low, 2 * curvature, where=curvature > 0, out=np.zeros_like(low)), -0.6, 0.6
        )
    return found.frequency(exact), good


def orientation(found: Spectrum, crystal: Crystal, highest_inv_angstrom: float) -> np.ndarray:
    """Return the rotation (3, 3) of ``crystal`` that explains the peaks of ``found`` best.

    Pairs of strong peaks whose lengths and angle are those of a pair of reflections propose rotations; the one under
    which the reflections meet most amplitude is taken. Lengths may be wrong by 5 %.

    Raises
    ------
    ConfigurationError
        If no pair of peaks fits the crystal.
    """
    highest = min(highest_inv_angstrom, found.highest_inv_angstrom)
    reflections = crystal.reflections(highest)
    if len(reflections.indices) < 3:
        raise ConfigurationError(f"{crystal.name}: has no reflections up to {highest:.3g} 1/Å; sample more finely")
    shortest = np.linalg.norm(reflections.vectors, axis=1).min()
    peaks, strength = bragg_peaks(found, 0.93 * shortest, 1.05 * highest)
    proposals = _proposed_rotations(peaks[:_BASE_PEAKS], reflections)
    if len(proposals) == 0:
        raise ConfigurationError(
            f"no Bragg peaks of {crystal.name} are found: check its edge, and that the specimen is crystalline"
        )
    reach = ndimage.maximum_filter(np.minimum(found.amplitude, strength[min(5, len(strength) - 1)]), 3, mode="constant")
    scores = np.zeros(len(proposals))
    for vector, factor in zip(reflections.vectors, np.abs(reflections.factors), strict=True):
        index = np.rint(found.at(proposals @ vector)).astype(int)
        index = np.clip(index, 0, np.array(reach.shape) - 1)
        scores += factor * reach[tuple(index.T)]
    return np.asarray(proposals[int(np.argmax(scores))])


def _proposed_rotations(peaks: np.ndarray, reflections: Reflections) -> np.ndarray:
    """Return rotations (n, 3, 3) that take a pair of reflections to a pair of ``peaks``."""
    vectors = reflections.vectors
    length = np.linalg.norm(vectors, axis=1)
    shells = _shells(length, np.abs(reflections.factors))
    lengths = np.linalg.norm(peaks, axis=1)
    rotations = []
    for i, first in enumerate(peaks):
        for shell in shells:
            # One member stands for a shell of equivalent reflections.
            if abs(lengths[i] / length[shell[0]] - 1) > _LENGTH_TOLERANCE:
                continue
            base = vectors[shell[0]]
            for j, second in enumerate(peaks):
                near = np.abs(lengths[j] / length - 1) < _LENGTH_TOLERANCE
                cosine = first @ second / lengths[i] / lengths[j]
                angle = np.arccos(np.clip(vectors @ base / length / np.linalg.norm(base), -1, 1))
                fits = near & (np.abs(angle - np.arccos(np.clip(cosine, -1, 1))) < _ANGLE_TOLERANCE)
                if abs(cosine) < 0.94:
                    rotations += [_from_pair(base, vectors[k], first, second) for k in np.flatnonzero(fits)]
    return np.array(rotations).reshape(-1, 3, 3)


def _shells(length: np.ndarray, strength: np.ndarray) -> list[np.ndarray]:
    """Return indices of reflections of one length and strength, the four shells with the strongest and shortest."""
    key = np.round(np.stack([length / length.min(), strength / strength.max()], axis=1), 3)
    _, inverse = np.unique(key, axis=0, return_inverse=True)
    shells = [np.flatnonzero(inverse.ravel() == number) for number in range(inverse.max() + 1)]
    return sorted(shells, key=lambda shell: -strength[shell[0]] / length[shell[0]])[:4]


def _from_pair(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Return the rotation that takes the plane of a, b to that of c, d, half-way between the two matches."""

    def frame(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        p, q = p / np.linalg.norm(p), q / np.linalg.norm(q)
        middle, across = (p + q) / np.linalg.norm(p + q), (p - q) / np.linalg.norm(p - q)
        return np.stack([middle, across, np.cross(middle, across)], axis=1)

    return frame(c, d) @ frame(a, b).T


def refine_matrix(
    found: Spectrum, crystal: Crystal, rotation: np.ndarray, highest_inv_angstrom: float
) -> tuple[np.ndarray, int]:
    """Return the matrix M (3, 3) of a crystal turned by about ``rotation``, and the number of reflections used.

    Reflections are followed outwards: those up to a growing length are sought within one and a half pixels of where the
    matrix so far predicts them, and fitted by least squares, strong ones more, outliers (Huber) less.
    """
    highest = min(highest_inv_angstrom, 0.98 * found.highest_inv_angstrom)
    reflections = crystal.reflections(highest)
    length = np.linalg.norm(reflections.vectors, axis=1)
    inverse = np.asarray(rotation, dtype=float)  # k = inverse @ g
    background = float(np.median(found.amplitude))
    used = 0
    for limit in (*np.linspace(1.2 * length.min(), highest, 6), highest):
        near = length <= limit
        predicted = reflections.vectors[near] @ inverse.T
        index = _climb(found.amplitude, np.rint(found.at(predicted)).astype(int))
        exact, good = refine_peaks(found, index)
        strength = found.amplitude[tuple(np.clip(index, 0, np.array(found.amplitude.shape) - 1).T)]
        off = np.linalg.norm((exact - predicted) / found.step_inv_angstrom, axis=1)
        good &= (strength > 8 * background) & (off < 2.5)
        if good.sum() < 6 or np.linalg.matrix_rank(reflections.vectors[near][good]) < 3:
            continue
        inverse = _huber(reflections.vectors[near][good], exact[good], strength[good])
        used = int(good.sum())
    return np.linalg.inv(inverse).T, used


def _climb(amplitude: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Return the position of the largest value within one pixel of each of ``index`` (n, 3)."""
    shape = np.array(amplitude.shape)
    offsets = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    around = np.clip(index[:, None] + offsets, 0, shape - 1)
    best = amplitude[tuple(np.moveaxis(around, -1, 0))].argmax(axis=1)
    return np.asarray(around[np.arange(len(index)), best])


def _huber(vectors: np.ndarray, peaks: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Return the matrix A with peaks = A vectors, by weighted least squares with Huber's weights."""
    weight = np.sqrt(strength / strength.max())
    factor = np.ones(len(vectors))
    for _ in range(10):
        w = (weight * factor)[:, None]
        solved = np.linalg.lstsq(vectors * w, peaks * w, rcond=None)[0]
        residual = np.linalg.norm(peaks - vectors @ solved, axis=1)
        scale = 1.5 * np.median(residual) + 1e-12
        factor = np.sqrt(np.minimum(1, scale / np.maximum(residual, 1e-12)))
    return np.asarray(solved.T)


def translation(found: Spectrum, crystal: Crystal, matrix: np.ndarray, highest_inv_angstrom: float) -> np.ndarray:
    """Return t (3,) in Å, from the point n // 2 of the density: where the crystal's origin lies, within one cell.

    The correlation of the density with the crystal is summed over reflections on a grid in the cell, then refined.
    """
    highest = min(highest_inv_angstrom, 0.98 * found.highest_inv_angstrom)
    reflections = crystal.reflections(highest)
    k = reflections.vectors @ np.linalg.inv(matrix)
    index = np.rint(found.at(k)).astype(int)
    inside = ((index >= 0) & (index < np.array(found.amplitude.shape))).all(axis=1)
    # Where the window's peak is wide, the nearest pixel has the phase of its top.
    coefficient = np.conj(reflections.factors[inside]) * found.values[tuple(index[inside].T)]
    hkl = reflections.indices[inside]
    grid = np.zeros((_TRANSLATION_GRID,) * 3, dtype=complex)
    np.add.at(grid, tuple((hkl % _TRANSLATION_GRID).T), coefficient)
    correlation = fft.ifftn(grid).real
    best = np.array(np.unravel_index(int(np.argmax(correlation)), correlation.shape)) / _TRANSLATION_GRID
    for _ in range(5):
        wave = coefficient * np.exp(2j * np.pi * (hkl @ best))
        slope = 2 * np.pi * hkl.T @ (-wave.imag)
        curvature = 4 * np.pi**2 * np.einsum("ni,nj,n->ij", hkl, hkl, wave.real)
        best = best + np.clip(np.linalg.solve(curvature, slope), -0.02, 0.02)
    return np.asarray(matrix @ (crystal.cell.T @ best))
