"""A ball of Gaussian atoms whose projections are written down, not computed by the package."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

PIXEL_ANGSTROM = 0.4
WIDTH_ANGSTROM = 0.35


def ball(count: int, radius: float, spacing: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return positions (count, 3) in Å, at least ``spacing`` apart, and weights of two species."""
    rng = np.random.default_rng(seed)
    positions = rng.normal(size=(count, 3))
    positions *= radius * rng.random((count, 1)) ** (1 / 3) / np.linalg.norm(positions, axis=1, keepdims=True)
    for _ in range(3000):
        pairs = cKDTree(positions).query_pairs(spacing, output_type="ndarray")
        if not len(pairs):
            break
        apart = positions[pairs[:, 0]] - positions[pairs[:, 1]]
        length = np.linalg.norm(apart, axis=1, keepdims=True) + 1e-9
        push = 0.35 * (1.02 * spacing - length) * apart / length
        np.add.at(positions, pairs[:, 0], push)
        np.add.at(positions, pairs[:, 1], -push)
        distance = np.linalg.norm(positions, axis=1, keepdims=True)
        positions *= np.minimum(1, radius / distance)
    return positions, np.where(rng.random(count) < 0.5, 1.0, 2.0)


def images(
    positions: np.ndarray,
    weights: np.ndarray,
    rotations: np.ndarray,
    shifts_px: np.ndarray,
    shape_yx: tuple[int, int],
    width: float = WIDTH_ANGSTROM,
) -> np.ndarray:
    """Return line integrals (tilt, y, x) through Gaussian atoms seen at R^T r + shift."""
    y, x = ((np.arange(n) - n // 2) * PIXEL_ANGSTROM for n in shape_yx)
    out = []
    for rotation, shift in zip(rotations, shifts_px, strict=True):
        seen = (positions @ rotation)[:, :2] + np.asarray(shift) * PIXEL_ANGSTROM
        across, down = _gaussian(x, seen[:, 0], width), _gaussian(y, seen[:, 1], width)
        out.append(np.einsum("a,ay,ax->yx", weights, down, across))
    return np.array(out)


def volume(positions: np.ndarray, weights: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Return the density (z, y, x) of the atoms, integrated over one voxel along the beam."""
    z, y, x = ((np.arange(n) - n // 2) * PIXEL_ANGSTROM for n in shape)
    parts = (_gaussian(a, positions[:, i], WIDTH_ANGSTROM) for a, i in ((z, 2), (y, 1), (x, 0)))
    return PIXEL_ANGSTROM * np.einsum("n,nz,ny,nx->zyx", weights, *parts, optimize=True)


@dataclass(frozen=True)
class Found:
    """How maxima of a volume compare with the atoms."""

    recall: float
    precision: float
    rmsd_pm: float


def compare(density: np.ndarray, positions: np.ndarray, match_angstrom: float = 0.75) -> Found:
    """Match the maxima of the smoothed ``density`` with the atoms."""
    maxima = _maxima(ndimage.gaussian_filter(density, 0.3 / PIXEL_ANGSTROM))
    found = (maxima - np.array(density.shape[::-1]) // 2) * PIXEL_ANGSTROM
    distance, partner = cKDTree(found).query(positions)
    back = cKDTree(positions).query(found)[1]
    pairs = [(i, j) for i, j in enumerate(partner) if back[j] == i and distance[i] < match_angstrom]
    errors = np.array([found[j] - positions[i] for i, j in pairs])
    rmsd = math.sqrt(((errors - errors.mean(axis=0)) ** 2).sum(axis=1).mean())
    return Found(len(pairs) / len(positions), len(pairs) / len(found), 100 * rmsd)


def _gaussian(grid: np.ndarray, centres: np.ndarray, width: float) -> np.ndarray:
    return np.exp(-((grid - centres[:, None]) ** 2) / (2 * width**2)) / (math.sqrt(2 * math.pi) * width)


def _maxima(smooth: np.ndarray) -> np.ndarray:
    """Return maxima (n, 3), columns x, y, z in voxels, with a parabola through the logarithm along each axis."""
    peaks = (smooth == ndimage.maximum_filter(smooth, 3)) & (smooth > 0)
    peaks[[0, -1]] = peaks[:, [0, -1]] = peaks[:, :, [0, -1]] = False
    heights = smooth[peaks]
    threshold = 0.25 * np.percentile(np.sort(heights)[-400:], 95)
    where = np.argwhere(peaks & (smooth > threshold))
    log = np.log(np.maximum(smooth, 1e-12 * smooth.max()))
    out = where.astype(float)
    for axis in range(3):
        step = np.eye(3, dtype=int)[axis]
        before, here, after = (log[tuple((where + s * step).T)] for s in (-1, 0, 1))
        out[:, axis] += np.clip(0.5 * (before - after) / np.minimum(before - 2 * here + after, -1e-9), -1, 1)
    return out[:, ::-1]
