"""From a volume to atoms: smoothing, local maxima, a blind threshold, and a three-dimensional Gaussian fit of each.

The number of atoms is never given. Volumes are (z, y, x) with the rotation centre at index n // 2; positions are
columns x, y, z in Å from there.
"""

from __future__ import annotations

from dataclasses import dataclass

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
#: The faintest level is looked for within these factors of the nominal one, in a histogram smoothed by this share of
#: the bright level, and where counts rise again to this factor and number above their minimum.
_VALLEY_FROM, _VALLEY_TO, _VALLEY_WIDTH, _VALLEY_RISE = 1 / 1.5, 3.0, 0.02, (2.0, 3.0)


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

    It is the first valley of the smoothed histogram of intensities near ``threshold`` times the :func:`bright_level`,
    between the falling tail of noise and streaks and the rise of the faintest atoms; where there is no valley, it is
    ``threshold`` times the bright level itself.
    """
    bright = bright_level(integrated, threshold)
    if bright <= 0:
        return 0.0
    grid = np.linspace(_VALLEY_FROM * threshold, _VALLEY_TO * threshold, 101)
    near = integrated[(integrated > 0) & (integrated < (_VALLEY_TO + 1) * threshold * bright)] / bright
    density = np.exp(-0.5 * ((grid[:, None] - near) / _VALLEY_WIDTH) ** 2).sum(axis=1)
    lowest = np.minimum.accumulate(density)
    risen = density > _VALLEY_RISE[0] * lowest + _VALLEY_RISE[1]
    if not risen.any():
        return threshold * bright
    # The middle of the valley's floor: all that is as low as a count of one above the minimum before the rise.
    before = density[: int(np.argmax(risen))]
    floor = np.flatnonzero(before <= before.min() + 1)
    return float(grid[floor].mean() * bright)


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
