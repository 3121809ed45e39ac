"""From a volume to atoms: smoothing, local maxima, a blind threshold, and a three-dimensional Gaussian fit of each.

The number of atoms is never given. Volumes are (z, y, x) with the rotation centre at index n // 2; positions are
columns x, y, z in Å from there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from stemtomo.algorithms.atoms.fitting import GaussianFits, ball_offsets, fit_gaussians, window_values
from stemtomo.errors import ConfigurationError, FormatError

#: Percentile of the integrated intensities of atoms that the threshold is a fraction of.
_BRIGHT_PERCENTILE = 95.0
#: Radius of the integrated sphere in half minimum distances: a smaller one sees less of the streaks that a missing
#: wedge draws beside atoms, a larger one less noise.
_INTEGRATED_PART = 0.75
#: Intensities relative to the bright level at which the histogram is looked at, and the width it is smoothed by.
_GRID = np.linspace(0.0, 1.0, 201)
_SMOOTHING = 0.02
#: The tail of the noise is fitted from where its density has fallen to the first of these shares of its peak, to the
#: second; atoms begin where it predicts between the first and second share of false ones among all that are brighter.
_TAIL = (0.5, 0.05)
_FALSE_SHARE = (0.1, 0.003)
#: A valley is lower than the first share of what lies below it; a rise is this many square roots above a minimum.
_DEEP, _RISE = 0.5, 2.5


@dataclass(frozen=True)
class TracedAtoms:
    """Atoms found in a volume.

    Parameters
    ----------
    positions
        (atom, 3), columns x, y, z in Å from the rotation centre.
    intensity
        Integral of the fitted Gaussian over space, in units of the volume times Å³ (V Å³ for a potential), (atom,).
    integrated
        Sum of the unsmoothed volume close to the atom (:data:`_INTEGRATED_PART`), times the voxel's volume, (atom,). It
        is what the threshold judged; it needs no model of the atom's shape, and tells species apart better than the
        fit.
    width_angstrom
        Standard deviation of the fitted Gaussian in Å, (atom,).
    residual
        Root mean square misfit of the fit over its amplitude, (atom,).
    """

    positions: np.ndarray
    intensity: np.ndarray
    integrated: np.ndarray
    width_angstrom: np.ndarray
    residual: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)


def trace_atoms(
    volume: np.ndarray,
    voxel_angstrom: float,
    *,
    smoothing_angstrom: float = 0.3,
    minimum_distance_angstrom: float = 1.5,
    threshold: float = 0.25,
) -> TracedAtoms:
    """Find the atoms of ``volume``.

    1. smooth by a Gaussian; 2. take positive maxima within a ball of half the minimum distance; 3. integrate the
    unsmoothed volume about each, and keep those above about ``threshold`` times the bright ones
    (:func:`faintest_level`); 4. of two atoms closer than the minimum distance keep the brighter; 5. fit a Gaussian on a
    level background to each.

    Parameters
    ----------
    volume
        (z, y, x), real.
    smoothing_angstrom
        Width (sigma) of the smoothing in Å; 0 for none. Fits are to the smoothed volume.
    minimum_distance_angstrom
        Smallest distance between two atoms in Å.
    threshold
        Faintest atom as a fraction of the bright ones.

    Raises
    ------
    FormatError
        If the volume is not three-dimensional or not finite.
    ConfigurationError
        If the minimum distance is below two voxels, so that neighbouring atoms cannot be told apart.
    """
    if volume.ndim != 3 or not np.isfinite(volume).all():
        raise FormatError(f"a volume of three axes (z, y, x) and finite values is needed; got shape {volume.shape}")
    if minimum_distance_angstrom < 2 * voxel_angstrom:
        raise ConfigurationError(
            f"minimum_distance_angstrom is {minimum_distance_angstrom:g}, below two voxels of {voxel_angstrom:g} Å: "
            "atoms so close are one maximum; raise it, or reconstruct with smaller voxels"
        )
    smoothed = smooth(volume, smoothing_angstrom / voxel_angstrom)
    radius = minimum_distance_angstrom / 2 / voxel_angstrom
    maxima = local_maxima(smoothed, radius)
    integrated = integrate(volume, maxima, _INTEGRATED_PART * radius) * voxel_angstrom**3
    strong = integrated > faintest_level(integrated, threshold)
    maxima, integrated = maxima[strong], integrated[strong]
    kept = separate(maxima * voxel_angstrom, integrated, minimum_distance_angstrom)
    fits = fit_gaussians(smoothed, maxima[kept], radius)
    # Two maxima may move together as they are fitted.
    apart = separate(fits.centres * voxel_angstrom, integrated[kept], minimum_distance_angstrom)
    return _table(fits, integrated[kept], apart, volume.shape, voxel_angstrom)


def measure_atoms(
    volume: np.ndarray,
    voxel_angstrom: float,
    positions: np.ndarray,
    *,
    smoothing_angstrom: float = 0.3,
    minimum_distance_angstrom: float = 1.5,
) -> TracedAtoms:
    """Return what :func:`trace_atoms` would say of atoms at known ``positions`` (atom, 3) in Å, which it does not move.

    Other arguments as there.
    """
    radius = minimum_distance_angstrom / 2 / voxel_angstrom
    centres = positions[:, ::-1] / voxel_angstrom + np.array([count // 2 for count in volume.shape])
    integrated = integrate(volume, centres, _INTEGRATED_PART * radius) * voxel_angstrom**3
    fits = fit_gaussians(smooth(volume, smoothing_angstrom / voxel_angstrom), centres, radius)
    measured = _table(fits, integrated, np.arange(len(positions)), volume.shape, voxel_angstrom)
    return replace(measured, positions=positions)


def smooth(volume: np.ndarray, sigma_voxels: float) -> np.ndarray:
    """Return ``volume`` (z, y, x), zero outside, blurred by a Gaussian of ``sigma_voxels``, in single precision."""
    volume = np.asarray(volume, dtype=np.float32)
    return ndimage.gaussian_filter(volume, sigma_voxels, mode="constant") if sigma_voxels > 0 else volume


def local_maxima(volume: np.ndarray, radius_voxels: float) -> np.ndarray:
    """Return the positive maxima of ``volume`` within a ball of ``radius_voxels``, (maximum, 3), columns z, y, x.

    Sub-voxel by a parabola through the neighbours along each axis; at the volume's faces the index itself.
    """
    radius = max(radius_voxels, 1.0)
    reach = int(radius)
    z, y, x = np.ogrid[-reach : reach + 1, -reach : reach + 1, -reach : reach + 1]
    ball = z * z + y * y + x * x <= radius * radius
    highest = ndimage.maximum_filter(volume, footprint=ball, mode="constant", cval=-np.inf)
    indices = np.argwhere((volume == highest) & (volume > 0))
    centres = indices.astype(np.float64)
    here = volume[tuple(indices.T)]
    for axis in range(3):
        inner = (indices[:, axis] > 0) & (indices[:, axis] < volume.shape[axis] - 1)
        below, above = indices[inner].copy(), indices[inner].copy()
        below[:, axis] -= 1
        above[:, axis] += 1
        low, high = volume[tuple(below.T)], volume[tuple(above.T)]
        curvature = 2 * here[inner] - low - high
        with np.errstate(divide="ignore", invalid="ignore"):
            offset = np.where(curvature > 0, (high - low) / (2 * curvature), 0)
        centres[inner, axis] += np.clip(offset, -0.5, 0.5)
    return centres


def integrate(volume: np.ndarray, centres: np.ndarray, radius_voxels: float) -> np.ndarray:
    """Return the sum of ``volume`` (z, y, x) within ``radius_voxels`` of each of ``centres`` (n, 3; z, y, x).

    A voxel counts by how much of it is inside, linearly over one voxel at the sphere's face, so that the sum does not
    jump as the centre moves.
    """
    offsets = ball_offsets(radius_voxels + 1)
    sums = np.empty(len(centres))
    for start in range(0, len(centres), 4096):
        chunk = slice(start, start + 4096)
        values, displacement, _ = window_values(volume, centres[chunk], offsets)
        distance = np.sqrt((displacement**2).sum(axis=-1))
        sums[chunk] = (values * np.clip(radius_voxels + 0.5 - distance, 0, 1)).sum(axis=1)
    return sums


def bright_level(integrated: np.ndarray, threshold: float) -> float:
    """Return the 95th percentile of the atoms among ``integrated`` intensities (n,) of maxima; 0 if there are none.

    Which maxima are atoms is what the level is for, so the two are found in turn: atoms are the maxima above
    ``threshold`` times the level. The search starts at the median weighted by squared intensity, which thousands of
    maxima of noise do not pull down. (Otsu's method or 3-means over all maxima split the species instead of atoms
    from noise.)
    """
    positive = np.sort(integrated[integrated > 0])
    if len(positive) == 0:
        return 0.0
    weight = np.cumsum(positive**2)
    level = float(positive[np.searchsorted(weight, weight[-1] / 2)])
    for _ in range(20):
        updated = float(np.percentile(positive[positive > threshold * level], _BRIGHT_PERCENTILE))
        if updated == level:
            break
        level = updated
    return level


def faintest_level(integrated: np.ndarray, threshold: float) -> float:
    """Return the intensity that separates atoms from other maxima among ``integrated`` (n,).

    Maxima of noise have a density that falls about exponentially with intensity; where its fitted tail predicts few
    false maxima among all that are brighter, atoms begin, and the level is the emptiest place there, or at any rate
    between half of ``threshold`` and ``threshold`` times the :func:`bright_level`; without a valley it is the latter.
    So a faint species next to the noise is kept, and a valley between two species is not the end of the atoms.
    """
    bright = bright_level(integrated, threshold)
    if bright <= 0:
        return 0.0
    relative = integrated[integrated > 0] / bright
    density = np.exp(-0.5 * ((_GRID[:, None] - relative) / _SMOOTHING) ** 2).sum(axis=1)
    low, high = _end_of_noise(relative, density, threshold)
    first = int(np.searchsorted(_GRID, max(low, threshold / 2)))
    last = int(np.searchsorted(_GRID, max(high, threshold), side="right"))
    lowest = first + int(np.argmin(density[first : min(last, first + _first_rise(density[first:]))]))
    if density[lowest] > _DEEP * density[: lowest + 1].max():
        return threshold * bright
    # Downhill from there, then the middle of the valley's floor: all that is as low as a count of one above its lowest.
    while lowest + 1 < len(density) and density[lowest + 1] <= density[lowest]:
        lowest += 1
    floor = density <= density[lowest] + 1
    start = lowest - int(np.argmin(np.append(floor[first : lowest + 1][::-1], False))) + 1
    stop = lowest + int(np.argmin(np.append(floor[lowest:], False)))
    return float(_GRID[start:stop].mean() * bright)


def _first_rise(density: np.ndarray) -> int:
    """Return where ``density`` first stands clearly, beyond counting noise, above what it was before; or its length."""
    lowest = np.minimum.accumulate(density)
    return int(np.argmax(np.append(density > lowest + _RISE * np.sqrt(lowest) + 1, True)))


def _end_of_noise(relative: np.ndarray, density: np.ndarray, threshold: float) -> tuple[float, float]:
    """Return the intensities above which noise makes a tenth and 0.3 % of the maxima; zeros without a tail to fit.

    A peak counts as noise if it lies below half of ``threshold``; the peak of a faint species does not.
    """
    faint = int(np.searchsorted(_GRID, threshold / 2))
    peak = int(np.argmax(density[:faint]))
    onwards = density[peak:]
    # Where the density rises again, something else than noise begins.
    rises = _first_rise(onwards)
    fallen = [int(np.argmax(np.append(onwards < share * density[peak], True))) for share in _TAIL]
    tail = slice(peak + fallen[0], peak + min(fallen[1], rises))
    if density[peak] < 1 or tail.stop - tail.start < 3 or _GRID[tail.start] > threshold:
        return 0.0, 0.0
    slope, offset = np.polyfit(_GRID[tail], np.log(density[tail]), 1)
    if slope >= 0:
        return 0.0, 0.0
    # A density of one on the grid stands for 1 / (sqrt(2 pi) width) maxima per unit of intensity.
    noise = np.exp(offset + slope * _GRID) / (math.sqrt(2 * math.pi) * _SMOOTHING) / -slope
    above = len(relative) - np.searchsorted(np.sort(relative), _GRID)
    ends = []
    for share in _FALSE_SHARE:
        clean = noise <= share * np.maximum(above, 1)
        ends.append(float(_GRID[int(np.argmax(clean))]) if clean.any() else 1.0)
    return ends[0], ends[1]


def separate(positions: np.ndarray, strength: np.ndarray, minimum_distance: float) -> np.ndarray:
    """Return the indices of the atoms that have no stronger kept atom within ``minimum_distance``, strongest first.

    ``positions`` is (n, 3); ``strength`` (n,).
    """
    order = np.argsort(-strength, kind="stable")
    if len(order) == 0:
        return order
    neighbours = cKDTree(positions).query_ball_point(positions, minimum_distance * (1 - 1e-9))
    suppressed = np.zeros(len(positions), dtype=bool)
    kept = []
    for index in order:
        if suppressed[index]:
            continue
        kept.append(index)
        suppressed[neighbours[index]] = True
    return np.array(kept)


def _table(
    fits: GaussianFits, integrated: np.ndarray, chosen: np.ndarray, shape: tuple[int, ...], voxel_angstrom: float
) -> TracedAtoms:
    """Return the ``chosen`` fits in Å from the rotation centre."""
    centre = np.array([count // 2 for count in shape])
    width = fits.width[chosen] * voxel_angstrom
    return TracedAtoms(
        positions=((fits.centres[chosen] - centre) * voxel_angstrom)[:, ::-1].copy(),
        intensity=fits.amplitude[chosen] * (2 * np.pi) ** 1.5 * width**3,
        integrated=integrated[chosen],
        width_angstrom=width,
        residual=fits.residual[chosen],
    )
