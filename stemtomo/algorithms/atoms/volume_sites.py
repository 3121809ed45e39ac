"""A crystal in a volume: which sites are occupied, and how far the maxima are from them.

The blur of the volume, which a missing wedge makes wide along the beam, is read off the fall of its Bragg peaks. The
occupation of all sites is then one linear least-squares problem, in which neighbours' tails take no part of a vacancy.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.sparse import coo_matrix, identity
from scipy.sparse.linalg import cg
from scipy.spatial import cKDTree

from stemtomo.algorithms.atoms.bragg import Spectrum, orientation, refine_matrix, refine_peaks, spectrum, translation
from stemtomo.algorithms.atoms.crystals import Crystal
from stemtomo.algorithms.atoms.lattice import Registration

_REACH = 3.5
_STEPS = 40
_MERGED_ANGSTROM = 0.5
_RIDGE = 0.02
_SEED_EDGE = 160


class Climb(NamedTuple):
    """Where sites' ascents ended: ``positions`` (site, 3) in Å, ``value`` of the volume there, ``arrived`` (site,)."""

    positions: np.ndarray
    value: np.ndarray
    arrived: np.ndarray


def register_volume(
    volume: np.ndarray, voxel_angstrom: float, crystal: Crystal, highest_inv_angstrom: float, edge: int = _SEED_EDGE
) -> tuple[Registration, Spectrum]:
    """Register ``crystal`` with ``volume`` (z, y, x), rotation centre at n // 2, by its Bragg peaks.

    The middle of the specimen, at most ``edge`` voxels wide, is used; its spectrum is returned as well.
    """
    weight = np.abs(volume)
    profile = [weight.sum(axis=tuple(k for k in range(3) if k != axis)) for axis in range(3)]
    middle = [int(round(float((p * np.arange(len(p))).sum() / p.sum()))) for p in profile]
    cut, at = [], []
    for size, centre in zip(volume.shape, middle, strict=True):
        count = min(edge, size)
        start = min(max(centre - count // 2, 0), size - count)
        cut.append(slice(start, start + count))
        at.append((start + count // 2 - size // 2) * voxel_angstrom)
    found = spectrum(volume[tuple(cut)], voxel_angstrom)
    turned = orientation(found, crystal, highest_inv_angstrom)
    matrix, used = refine_matrix(found, crystal, turned, highest_inv_angstrom)
    origin = translation(found, crystal, matrix, highest_inv_angstrom)
    return Registration(crystal, matrix, origin + np.array(at[::-1]), used), found


def bragg_widths(found: Spectrum, registration: Registration, highest_inv_angstrom: float) -> np.ndarray:
    """Return the standard deviations of the blur along x, y, z in Å, (3,), from the fall of the Bragg peaks.

    An atom that is a Gaussian of width s lowers a reflection at k by exp(-2 pi² s² k²): log amplitudes over structure
    factors are fitted by a plane in kx², ky², kz². Peaks that do not rise above the background are left out but for the
    three times as many that are near the strongest.
    """
    reflections = registration.crystal.reflections(min(highest_inv_angstrom, 0.98 * found.highest_inv_angstrom))
    k = reflections.vectors @ np.linalg.inv(registration.matrix)
    index = np.rint(found.at(k)).astype(int)
    inside = ((index > 0) & (index < np.array(found.amplitude.shape) - 1)).all(axis=1)
    k, index, factor = k[inside], index[inside], np.abs(reflections.factors[inside])
    amplitude = ndimage.maximum_filter(found.amplitude, 3)[tuple(index.T)]
    good = (amplitude > 10 * np.median(found.amplitude)) & (factor > 0.1 * factor.max())
    good &= refine_peaks(found, index)[1] | (amplitude > 30 * np.median(found.amplitude))
    if good.sum() < 6:
        return np.full(3, 0.5)
    weight = np.sqrt(amplitude[good] / amplitude[good].max())
    design = np.column_stack([np.ones(int(good.sum())), -2 * np.pi**2 * k[good] ** 2])
    logarithm = np.log(amplitude[good] / factor[good])
    solved = np.linalg.lstsq(design * weight[:, None], logarithm * weight, rcond=None)[0]
    return np.sqrt(np.clip(solved[1:], 0.15**2, 2.0**2))


class Sampler:
    """A volume (z, y, x) as a cubic spline, read at positions x, y, z in Å from the rotation centre."""

    def __init__(self, volume: np.ndarray, voxel_angstrom: float) -> None:
        self._coefficients = ndimage.spline_filter(np.asarray(volume, dtype=np.float32), order=3, mode="mirror")
        self._voxel = voxel_angstrom
        self._centre = np.array(volume.shape) // 2

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Return the values at ``positions`` (..., 3); 0 outside."""
        index = positions[..., ::-1] / self._voxel + self._centre
        return np.asarray(
            ndimage.map_coordinates(
                self._coefficients, np.moveaxis(index, -1, 0), order=3, prefilter=False, mode="constant"
            )
        )

    def slope(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the first and second derivatives along x, y, z at ``positions`` (n, 3), (n, 3) each, per Å."""
        step = 0.5 * self._voxel
        here = self(positions)[:, None]
        moves = step * np.eye(3)
        high, low = self(positions[:, None] + moves), self(positions[:, None] - moves)
        return (high - low) / (2 * step), (high + low - 2 * here) / step**2


def climb(sampler: Sampler, start: np.ndarray, furthest_angstrom: float) -> Climb:
    """Follow the gradient from ``start`` (n, 3) to the next maximum, at most ``furthest_angstrom`` away.

    Newton steps along each axis where the volume is concave, short ones uphill where it is not.
    """
    at = start.copy()
    moving = np.arange(len(start))
    arrived = np.zeros(len(start), dtype=bool)
    for _ in range(_STEPS):
        first, second = sampler.slope(at[moving])
        newton = np.divide(-first, second, out=np.sign(first) * 0.1, where=second < 0)
        step = np.clip(newton, -0.15, 0.15)
        at[moving] += step
        still = np.linalg.norm(step, axis=1) < 2e-3
        arrived[moving[still]] = True
        away = np.linalg.norm(at[moving] - start[moving], axis=1) > furthest_angstrom
        moving = moving[~still & ~away]
        if len(moving) == 0:
            break
    arrived &= np.linalg.norm(at - start, axis=1) <= furthest_angstrom
    return Climb(at, sampler(at), arrived)


def merged(climbed: Climb, start: np.ndarray) -> np.ndarray:
    """Return which sites end within 0.5 Å of one that came a shorter way, (n,) boolean."""
    way = np.linalg.norm(climbed.positions - start, axis=1)
    pairs = cKDTree(climbed.positions).query_pairs(_MERGED_ANGSTROM, output_type="ndarray")
    result = np.zeros(len(start), dtype=bool)
    longer = np.where(way[pairs[:, 0]] > way[pairs[:, 1]], pairs[:, 0], pairs[:, 1])
    result[longer] = True
    return result


def occupation(
    sampler: Sampler, positions: np.ndarray, weights: np.ndarray, widths_angstrom: np.ndarray
) -> tuple[np.ndarray, float]:
    """Return the occupation of sites at ``positions`` (site, 3), 1 for the usual one, and the value of weight one.

    The volume at the sites is the sum of all sites' Gaussians of ``widths_angstrom`` (3,), times ``weights`` (site,)
    and occupations, which are found by least squares with a slight pull to the mean.
    """
    value = sampler(positions)
    scaled = positions / widths_angstrom
    near = cKDTree(scaled).sparse_distance_matrix(cKDTree(scaled), _REACH, output_type="coo_matrix")
    kernel = coo_matrix((np.exp(-0.5 * near.data**2) * weights[near.col], (near.row, near.col)), near.shape).tocsr()
    model = np.asarray(kernel.sum(axis=1)).ravel()
    scale = float((model * value).sum() / (model**2).sum())
    for _ in range(3):
        normal = kernel.T @ kernel + _RIDGE * identity(len(value)) * float(np.median(weights)) ** 2
        right = kernel.T @ (value / scale) + _RIDGE * float(np.median(weights)) ** 2
        found = cg(normal, right, rtol=1e-6, maxiter=300)[0]
        scale *= float(np.median(found))
    return found / np.median(found), scale


def sites_within(
    registration: Registration, shape: tuple[int, ...], voxel_angstrom: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return cells (site, 3) and basis (site,) of the sites at least a voxel within a volume of ``shape`` (z, y, x)."""
    crystal = registration.crystal
    size = np.array(shape[::-1])
    low = (1 - size // 2) * voxel_angstrom
    high = (size - 2 - size // 2) * voxel_angstrom
    corners = np.stack(np.meshgrid(*zip(low, high, strict=True)), axis=-1).reshape(-1, 3)
    to_cell = np.linalg.inv(registration.matrix @ crystal.cell.T).T
    fractional = (corners - registration.translation) @ to_cell
    first, last = np.floor(fractional.min(axis=0)).astype(int) - 1, np.ceil(fractional.max(axis=0)).astype(int) + 1
    axes = [np.arange(a, b + 1) for a, b in zip(first, last, strict=True)]
    cells = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    kinds = len(crystal.fractional)
    cell, basis = np.repeat(cells, kinds, axis=0), np.tile(np.arange(kinds), len(cells))
    positions = registration.positions(cell, basis)
    inside = ((positions >= low) & (positions <= high)).all(axis=1)
    return cell[inside], basis[inside]
