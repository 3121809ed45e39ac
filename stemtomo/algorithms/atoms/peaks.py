"""Maxima of a volume: where they are to a part of a voxel, what is around them, and which are too close."""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from stemtomo.algorithms.atoms.fitting import ball_offsets, window_values


def smooth(volume: np.ndarray, sigma_voxels: float) -> np.ndarray:
    """Return ``volume`` (z, y, x), zero outside, blurred by a Gaussian of ``sigma_voxels``, in single precision."""
    volume = np.asarray(volume, dtype=np.float32)
    return ndimage.gaussian_filter(volume, sigma_voxels, mode="constant") if sigma_voxels > 0 else volume


def local_maxima(volume: np.ndarray, radius_voxels: float) -> np.ndarray:
    """Return the positive maxima of ``volume`` within a ball of ``radius_voxels``, (maximum, 3), columns z, y, x.

    Sub-voxel, see :func:`parabolic`.
    """
    return parabolic(volume, maxima(volume, radius_voxels))


def maxima(volume: np.ndarray, radius_voxels: float) -> np.ndarray:
    """Return the indices (maximum, 3; z, y, x) of positive voxels that none within ``radius_voxels`` exceeds."""
    radius = max(radius_voxels, 1.0)
    # Few voxels exceed their six neighbours: only those are compared with the whole ball.
    above = volume > 0
    for axis in range(3):
        line = np.moveaxis(volume, axis, 0)
        chosen = np.moveaxis(above, axis, 0)
        chosen[1:] &= line[1:] >= line[:-1]
        chosen[:-1] &= line[:-1] >= line[1:]
    indices = np.argwhere(above)
    offsets = ball_offsets(radius)
    order = np.argsort((offsets**2).sum(axis=1), kind="stable")
    here = volume[tuple(indices.T)]
    end = np.array(volume.shape) - 1
    for offset in offsets[order][1:]:
        beside = indices + offset
        inside = ((beside >= 0) & (beside <= end)).all(axis=1)
        values = volume[tuple(np.clip(beside, 0, end).T)]
        highest = ~(inside & (values > here))
        indices, here = indices[highest], here[highest]
    return indices


def parabolic(volume: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Return the maxima at ``indices`` (n, 3; z, y, x) of ``volume`` to a part of a voxel.

    By a parabola through the neighbours along each axis; at the volume's faces the index itself.
    """
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


def separate(positions: np.ndarray, strength: np.ndarray, minimum_distance: float) -> np.ndarray:
    """Return the indices of the atoms that have no stronger kept atom within ``minimum_distance``, strongest first.

    ``positions`` is (n, 3); ``strength`` (n,).
    """
    order = np.argsort(-strength, kind="stable")
    if len(order) == 0:
        return order
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    pairs = cKDTree(positions).query_pairs(minimum_distance * (1 - 1e-9), output_type="ndarray")
    swap = rank[pairs[:, 0]] > rank[pairs[:, 1]]
    strong, weak = np.where(swap, pairs[:, 1], pairs[:, 0]), np.where(swap, pairs[:, 0], pairs[:, 1])
    gone = np.zeros(len(order), dtype=bool)
    # An atom without a stronger neighbour that is still in question stays, and what is near it goes, till all is clear.
    while len(strong):
        doubted = np.zeros(len(order), dtype=bool)
        doubted[weak] = True
        gone[weak[~doubted[strong]]] = True
        open_ = ~gone[strong] & ~gone[weak]
        strong, weak = strong[open_], weak[open_]
    return order[~gone[order]]
