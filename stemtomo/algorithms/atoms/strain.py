"""Strain from displacements: at each atom the affine map that its surroundings follow, weighted by a Gaussian."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix
from scipy.spatial import cKDTree

#: The Gaussian is cut off at this many of its standard deviations.
REACH = 2.5
_CHUNK = 5_000
_FEWEST = 12
_MOMENTS = [(i, j) for i in range(4) for j in range(i, 4)]


class LocalStrain(NamedTuple):
    """Strain at atoms.

    Parameters
    ----------
    displacement
        Smoothed displacement in Å, (atom, 3).
    gradient
        du_i / dX_j, (atom, 3, 3): symmetric part strain, antisymmetric part rotation in rad.
    error
        Standard error of a component of strain, from how far the atoms around are from the map, (atom,).
    """

    displacement: np.ndarray
    gradient: np.ndarray
    error: np.ndarray

    @property
    def strain(self) -> np.ndarray:
        """Symmetric part of the gradient, (atom, 3, 3)."""
        return (self.gradient + np.swapaxes(self.gradient, 1, 2)) / 2

    @property
    def rotation(self) -> np.ndarray:
        """Rotation vector x, y, z of the antisymmetric part in rad, (atom, 3)."""
        g = self.gradient
        return np.stack([g[:, 2, 1] - g[:, 1, 2], g[:, 0, 2] - g[:, 2, 0], g[:, 1, 0] - g[:, 0, 1]], axis=1) / 2


def local_strain(reference: np.ndarray, displacement: np.ndarray, own: int, smoothing_angstrom: float) -> LocalStrain:
    """Return the strain at the first ``own`` of the sites ``reference`` (atom, 3), displaced by ``displacement``.

    About each site the displacement is fitted by u + G (X - X_0), with weights exp(-d² / 2 s²) of standard deviation s
    = ``smoothing_angstrom`` cut off at 2.5 s. A linear displacement is reproduced exactly, at the surface too. Details
    finer than the width at half maximum, 2.35 s, are averaged. Where fewer than 12 sites, or sites in a plane, are
    around, the result is nan.
    """
    tree = cKDTree(reference)
    parts = [
        _fitted(tree, reference, displacement, slice(start, min(start + _CHUNK, own)), smoothing_angstrom)
        for start in range(0, own, _CHUNK)
    ]
    return LocalStrain(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _fitted(
    tree: cKDTree, reference: np.ndarray, displacement: np.ndarray, part: slice, smoothing: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    here = reference[part]
    near = cKDTree(here).sparse_distance_matrix(tree, REACH * smoothing, output_type="coo_matrix")
    weight = csr_matrix((np.exp(-0.5 * (near.data / smoothing) ** 2), (near.row, near.col)), shape=near.shape)
    used = np.unique(near.col)
    weight = weight[:, used]
    # Moments about the middle of the part, then shifted to each site: sums of products become sparse products.
    middle = here.mean(axis=0)
    point = np.column_stack([np.ones(len(used)), reference[used] - middle])
    moving = displacement[used]
    normal, squared = _moments(weight, point), _moments(weight.multiply(weight).tocsr(), point)
    right = np.stack([weight @ (point * moving[:, [k]]) for k in range(3)], axis=2)
    shift = np.broadcast_to(np.eye(4), normal.shape).copy()
    shift[:, 1:, 0] = -(here - middle)
    back = np.swapaxes(shift, 1, 2)
    normal, squared, right = shift @ normal @ back, shift @ squared @ back, shift @ right
    count = np.diff(weight.indptr)
    good = count >= _FEWEST
    good[good] = np.linalg.cond(normal[good] / _scale(normal[good])) < 1e4
    solved = np.full((len(here), 4, 3), np.nan)
    inverse = np.full(normal.shape, np.nan)
    inverse[good] = np.linalg.inv(normal[good])
    solved[good] = inverse[good] @ right[good]
    squares = weight @ (moving**2).sum(axis=1)
    misfit = np.maximum(squares - np.einsum("nij,nij->n", right, np.nan_to_num(solved)), 0)
    total = normal[:, 0, 0]
    # Errors of the sites are independent: their number counts as (sum w)^2 / sum w^2, and 4 parameters take their part.
    effective = total**2 / squared[:, 0, 0]
    variance = misfit / total / 3 * effective / np.maximum(effective - 4, 1)
    spread = np.einsum("nii->n", (inverse @ squared @ inverse)[:, 1:, 1:]) / 3
    return solved[:, 0], np.swapaxes(solved[:, 1:], 1, 2), np.sqrt(variance * spread)


def _moments(weight: csr_matrix, point: np.ndarray) -> np.ndarray:
    """Return sums of ``weight`` (n, m) times products of the columns of ``point`` (m, 4), (n, 4, 4)."""
    result = np.empty((weight.shape[0], 4, 4))
    for i, j in _MOMENTS:
        result[:, i, j] = result[:, j, i] = weight @ (point[:, i] * point[:, j])
    return result


def _scale(normal: np.ndarray) -> np.ndarray:
    size = np.sqrt(np.einsum("nii->ni", normal))
    return size[:, :, None] * size[:, None, :]
