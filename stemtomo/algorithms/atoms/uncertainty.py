"""How well each refined position is known: from the curvature of the loss, calibrated by two halves of the tilts.

The curvature of an isolated Gaussian atom is known in closed form, and the noise that meets it is the residual's
variance where the atom is seen. What this leaves out (neighbours that overlap, errors of a tilt as a whole) is the
same for both halves of the tilts: how much further apart than predicted the halves place the atoms of a class is the
factor that all its uncertainties are multiplied by. Errors that all tilts share are not seen.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from stemtomo.algorithms.atoms.projected import AtomModel, ProjectedImages, residuals
from stemtomo.algorithms.atoms.refinement import RefinedAtoms, refine_atoms
from stemtomo.backend import array_namespace, to_host
from stemtomo.kernels.atoms import gather

#: Fewest atoms of a class that have a factor of their own.
_FEWEST = 20
#: Deviations between halves beyond this many predicted ones, after a first scaling, are taken as that many.
_CLIPPED = 4.0


def position_covariance(model: AtomModel, projected: ProjectedImages) -> np.ndarray:
    """Return the covariance (atom, 3, 3) in Å² of the positions by the curvature of the loss, atoms taken as isolated.

    With per-image curvature I² / (8 pi b⁴), times the share of the atom that was measured there, and the local variance
    s² of the residual, the covariance of a plain least-squares fit is H^-1 (sum_k s_k² H_k) H^-1, H = sum_k H_k.
    """
    pixel = projected.pixel_angstrom
    b = model.width_angstrom / pixel
    strength = (model.intensity / pixel**2) ** 2 / (8 * np.pi * b**4) / pixel**2
    planes = np.einsum("kij,klj->kil", projected.rotations[:, :, :2], projected.rotations[:, :, :2])
    variance, share = _local_variance(model, projected)
    inverse = np.linalg.pinv(np.einsum("kn,kij->nij", share, planes), hermitian=True)
    met = np.einsum("kn,kij->nij", variance * share, planes)
    return inverse @ met @ inverse / np.maximum(strength, np.finfo(np.float64).tiny)[:, None, None]


def position_uncertainty(
    refined: RefinedAtoms, labels: np.ndarray, projected: ProjectedImages, *, iterations: int = 30
) -> np.ndarray:
    """Return the standard deviation (atom, 3) in Å of the refined positions along x, y and z.

    Parameters
    ----------
    refined
        Atoms refined against all tilts of ``projected``.
    labels
        Class of each atom, (atom,).
    iterations
        Of the refinement of each half.
    """
    projected = replace(
        projected, shifts_angstrom=refined.shifts_angstrom, background_angstrom=refined.background_angstrom
    )
    sigma = np.sqrt(np.einsum("nii->ni", position_covariance(refined.model, projected)))
    if len(projected) < 4:
        return sigma
    halves, variance = [], np.zeros_like(sigma)
    for first in (0, 1):
        half = projected.tilts(slice(first, None, 2))
        model = refine_atoms(
            refined.positions,
            labels,
            half,
            width_angstrom=refined.model.width_angstrom,
            intensity=refined.intensity,
            iterations=iterations,
        ).model
        halves.append(model.positions)
        variance += np.einsum("nii->ni", position_covariance(replace(model, positions=refined.positions), half))
    return calibrated(sigma, halves[0] - halves[1], np.sqrt(variance), labels)


def calibrated(sigma: np.ndarray, difference: np.ndarray, expected: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return ``sigma`` (atom, 3) times how much more two halves of the tilts disagree than expected.

    Parameters
    ----------
    difference
        Of the positions that each half of the tilts gives, (atom, 3).
    expected
        Its standard deviation by the same prediction as ``sigma``, (atom, 3).
    labels
        Class of each atom, (atom,): every class and axis has a factor of its own.
    """
    ratio = (difference - np.median(difference, axis=0)) / expected
    return sigma * _factors(ratio, labels)[labels]


def _factors(ratio: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return by how much deviations exceed prediction in each class, (class, 3), from ``ratio`` (atom, 3)."""
    classes = int(labels.max()) + 1
    factors = np.empty((classes, 3))
    for label in range(classes):
        members = labels == label
        chosen = ratio[members] if members.sum() >= _FEWEST else ratio
        rough = 1.4826 * np.median(np.abs(chosen), axis=0)
        limit = _CLIPPED * np.maximum(rough, np.finfo(np.float64).tiny)
        factors[label] = np.sqrt(np.mean(np.clip(chosen, -limit, limit) ** 2, axis=0))
    return factors


def _local_variance(model: AtomModel, projected: ProjectedImages) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean square of the residual where each atom is seen, and the share of it that is, (tilt, atom)."""
    xp = array_namespace(projected.images)
    dtype, pixel = projected.images.dtype, projected.pixel_angstrom
    radius = model.radius_px(pixel)
    width = xp.asarray(model.width_angstrom / pixel, dtype=dtype)
    seen = projected.seen(model.positions)
    variance, share = np.empty(seen.shape[:2]), np.empty(seen.shape[:2])
    for tilt, residual in enumerate(residuals(model, projected)):
        u, v = (xp.asarray(seen[tilt, :, axis], dtype=dtype) for axis in (0, 1))
        valid = projected.valid[tilt].astype(dtype)
        squares = to_host(gather(residual**2, u, v, width, width, radius)[0])
        share[tilt] = np.minimum(to_host(gather(valid, u, v, width, width, radius)[0]), 1)
        variance[tilt] = squares / np.maximum(share[tilt], 1e-3)
    return variance, share
