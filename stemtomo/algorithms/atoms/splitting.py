"""Two atoms taken for one: where the projections show more on both sides of an atom than the model, and less in it.

An atom of intensity I split into halves at +-d e changes its image by I d²/2 (e.grad)² g, g the Gaussian. The residual
therefore says by one tensor T = sum_k <residual_k, I grad grad g>, in three dimensions, along which axis e an atom
would gain most by being split, and by how much in units of the noise.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stemtomo.algorithms.atoms.projected import AtomModel, ProjectedImages, residuals
from stemtomo.backend import array_namespace, to_host
from stemtomo.kernels.atoms import gather

#: Step of the finite differences, in widths of an atom.
_STEP_WIDTHS = 0.05


class Elongation(NamedTuple):
    """How each atom is elongated.

    Parameters
    ----------
    axis
        Unit vector along which the atom would gain most by being split, (atom, 3).
    half_distance_angstrom
        Distance of the halves from the atom that explains it, to second order, (atom,); 0 where it is not elongated.
    significance
        The elongation in standard deviations, (atom,); negative where the atom is too wide in the model.
    """

    axis: np.ndarray
    half_distance_angstrom: np.ndarray
    significance: np.ndarray


def elongation(model: AtomModel, projected: ProjectedImages) -> Elongation:
    """Return along which axis, and how surely, each atom of ``model`` is more than one."""
    pixel = projected.pixel_angstrom
    tensor, noise = _tensor(model, projected)
    axis = _axes(tensor, projected.rotations[:, :, :2])
    slope = np.einsum("ni,nij,nj->n", axis, tensor, axis)
    in_plane = np.einsum("ni,kij->nkj", axis, projected.rotations[:, :, :2])
    # Squared norm of I (e.grad)² g, less what a change of the intensity explains of it.
    width = model.width_angstrom / pixel
    norm = (in_plane**2).sum(axis=2) ** 2
    squared = norm.sum(axis=1) * (model.intensity / pixel**2) ** 2 / (8 * np.pi * width**6) / pixel**4
    squared = np.maximum(squared, np.finfo(np.float64).tiny)
    half = np.sqrt(np.maximum(-2 * slope / squared, 0))
    return Elongation(axis, half, -slope / np.sqrt(squared) / np.maximum(noise, 1e-30))


def _axes(tensor: np.ndarray, planes: np.ndarray) -> np.ndarray:
    """Return the unit vector (atom, 3) along which -T is largest by how much of it the images (tilt, 3, 2) see."""
    seen = np.einsum("kij,klj->il", planes, planes) / len(planes)
    values, vectors = np.linalg.eigh(seen)
    # An axis that no image sees is left out rather than divided by.
    root = vectors / np.sqrt(np.maximum(values, 1e-3 * values[-1])) @ vectors.T
    axis = np.linalg.eigh(root @ tensor @ root)[1][:, :, 0] @ root
    return axis / np.linalg.norm(axis, axis=1, keepdims=True)


def _tensor(model: AtomModel, projected: ProjectedImages) -> tuple[np.ndarray, np.ndarray]:
    """Return T of every atom, (atom, 3, 3) per Å², and the standard deviation of a pixel's residual there, (atom,)."""
    xp = array_namespace(projected.images)
    dtype, pixel = projected.images.dtype, projected.pixel_angstrom
    radius = model.radius_px(pixel) + 1
    intensity = xp.asarray(model.intensity / pixel**2, dtype=dtype)
    width = xp.asarray(model.width_angstrom / pixel, dtype=dtype)
    step = _STEP_WIDTHS * float(np.median(model.width_angstrom)) / pixel
    seen = projected.seen(model.positions)
    tensor, squares, counted = np.zeros((len(model), 3, 3)), np.zeros(len(model)), np.zeros(len(model))
    for tilt, residual in enumerate(residuals(model, projected)):
        weight = projected.weight(tilt).astype(dtype)
        weighted = residual * weight
        u, v = (xp.asarray(seen[tilt, :, i], dtype=dtype) for i in (0, 1))
        squares += to_host(gather(weighted * residual, u, v, intensity, width, radius)[0])
        counted += to_host(gather(weight, u, v, intensity, width, radius)[0])
        slopes = []
        for du, dv in ((step, 0.0), (-step, 0.0), (0.0, step), (0.0, -step)):
            u, v = (xp.asarray(seen[tilt, :, i] + d, dtype=dtype) for i, d in enumerate((du, dv)))
            found = gather(weighted, u, v, intensity, width, radius)
            slopes.append(np.stack([to_host(found[1]), to_host(found[2])], axis=-1).astype(np.float64))
        second = np.stack([slopes[0] - slopes[1], slopes[2] - slopes[3]], axis=1) / (2 * step)
        second = (second + np.swapaxes(second, 1, 2)) / 2 / pixel**2
        plane = projected.rotations[tilt][:, :2]
        tensor += plane @ second @ plane.T
    return tensor, np.sqrt(np.maximum(squares, 0) / np.maximum(counted, 1e-3))
