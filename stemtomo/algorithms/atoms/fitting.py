"""Three-dimensional Gaussians on a level background, fitted to many small windows of a volume at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_ITERATIONS = 30
_CHUNK = 2048  # atoms fitted together: 2048 windows of 300 voxels x 6 derivatives are 30 MB
_SMALLEST_WIDTH, _LARGEST_WIDTH = 0.3, 4.0  # voxels


@dataclass(frozen=True)
class GaussianFits:
    """Fitted Gaussians: ``centres`` (n, 3; z, y, x) and ``width`` (n,) in voxels, ``amplitude`` and ``background`` (n,)
    in units of the volume, and ``residual`` (n,), the root mean square misfit over the amplitude.
    """

    centres: np.ndarray
    width: np.ndarray
    amplitude: np.ndarray
    background: np.ndarray
    residual: np.ndarray


def ball_offsets(radius_voxels: float) -> np.ndarray:
    """Return the integer offsets (m, 3; z, y, x) within ``radius_voxels`` of the origin."""
    reach = int(radius_voxels)
    grid = np.stack(np.meshgrid(*(np.arange(-reach, reach + 1),) * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    return grid[(grid**2).sum(axis=1) <= radius_voxels**2]


def window_values(
    volume: np.ndarray, centres: np.ndarray, offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the voxels about each of ``centres`` (n, 3; z, y, x).

    Returns
    -------
    values
        (n, m), float64; zero outside the volume.
    displacement
        Of each voxel from the centre, (n, m, 3), in voxels.
    inside
        Whether the voxel exists, (n, m).
    """
    indices = np.rint(centres).astype(np.int64)[:, None, :] + offsets[None]
    inside = ((indices >= 0) & (indices < np.array(volume.shape))).all(axis=-1)
    clipped = np.clip(indices, 0, np.array(volume.shape) - 1)
    values = volume[tuple(np.moveaxis(clipped, -1, 0))].astype(np.float64) * inside
    return values, indices - centres[:, None, :], inside


def fit_gaussians(volume: np.ndarray, centres: np.ndarray, radius_voxels: float) -> GaussianFits:
    """Fit amplitude, centre, width and background of a Gaussian about each of ``centres`` by Levenberg-Marquardt.

    Voxels are weighted by a Gaussian of sigma ``radius_voxels`` / 2 about the starting centre, so that neighbours
    matter little; voxels outside the volume do not count. A fit that moves its centre by more than ``radius_voxels``
    keeps the start.

    Parameters
    ----------
    volume
        (z, y, x).
    centres
        Starting centres, (n, 3), columns z, y, x in voxels.
    radius_voxels
        Radius of the windows.
    """
    parts = [
        _fit_chunk(volume, centres[start : start + _CHUNK], radius_voxels) for start in range(0, len(centres), _CHUNK)
    ]
    empty = np.empty(0)
    if not parts:
        return GaussianFits(np.empty((0, 3)), empty, empty, empty, empty)
    table = np.concatenate(parts)
    return GaussianFits(table[:, :3], np.exp(table[:, 3]), table[:, 4], table[:, 5], table[:, 6])


def _model(parameters: np.ndarray, displacement: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the model (n, m) and its derivatives (n, m, 6) in dz, dy, dx, log width, amplitude, background."""
    shift = displacement - parameters[:, None, :3]
    inverse = np.exp(-2 * parameters[:, 3])[:, None]
    squared = (shift**2).sum(axis=-1) * inverse
    bell = np.exp(-0.5 * squared)
    scaled = parameters[:, 4, None] * bell
    derivatives = np.empty((*bell.shape, 6))
    derivatives[..., :3] = (scaled * inverse)[..., None] * shift
    derivatives[..., 3] = scaled * squared
    derivatives[..., 4] = bell
    derivatives[..., 5] = 1
    return scaled + parameters[:, 5, None], derivatives


def _fit_chunk(volume: np.ndarray, centres: np.ndarray, radius_voxels: float) -> np.ndarray:
    """Return (n, 7): z, y, x, log width, amplitude, background, residual."""
    values, displacement, inside = window_values(volume, centres, ball_offsets(radius_voxels + 0.5))
    weight = inside * np.exp(-0.5 * (displacement**2).sum(axis=-1) / (radius_voxels / 2) ** 2)
    lowest = np.where(inside, values, np.inf).min(axis=1)
    start = np.zeros((len(centres), 6))
    start[:, 3] = np.log(np.clip(radius_voxels / 2, _SMALLEST_WIDTH, _LARGEST_WIDTH))
    start[:, 4] = values.max(axis=1) - lowest
    start[:, 5] = lowest
    parameters = _levenberg_marquardt(start, values, displacement, weight)
    strayed = (np.abs(parameters[:, :3]) > radius_voxels).any(axis=1) | (parameters[:, 4] <= 0)
    parameters[strayed] = start[strayed]
    model, _ = _model(parameters, displacement)
    misfit = np.sqrt((weight * (model - values) ** 2).sum(axis=1) / weight.sum(axis=1))
    residual = misfit / np.maximum(parameters[:, 4], np.finfo(np.float64).tiny)
    return np.concatenate([parameters[:, :3] + centres, parameters[:, 3:], residual[:, None]], axis=1)


def _levenberg_marquardt(
    start: np.ndarray, values: np.ndarray, displacement: np.ndarray, weight: np.ndarray
) -> np.ndarray:
    """Minimise sum weight (model - values)² over each row of ``start`` (n, 6), all rows together."""
    parameters = start.copy()
    damping = np.full(len(start), 1e-2)
    model, derivatives = _model(parameters, displacement)
    cost = (weight * (model - values) ** 2).sum(axis=1)
    for _ in range(_ITERATIONS):
        weighted = derivatives * weight[..., None]
        normal = np.einsum("nmi,nmj->nij", weighted, derivatives, optimize=True)
        gradient = np.einsum("nmi,nm->ni", weighted, values - model)
        diagonal = np.einsum("nii->ni", normal)
        # Marquardt's scaling: damped relative to each parameter's own curvature.
        ridge = damping[:, None] * diagonal + 1e-12 * diagonal.max(axis=1, keepdims=True) + np.finfo(np.float64).tiny
        step = np.linalg.solve(normal + ridge[:, :, None] * np.eye(6), gradient[..., None])[..., 0]
        trial = parameters + step
        trial[:, 3] = np.clip(trial[:, 3], np.log(_SMALLEST_WIDTH), np.log(_LARGEST_WIDTH))
        trial_model, trial_derivatives = _model(trial, displacement)
        trial_cost = (weight * (trial_model - values) ** 2).sum(axis=1)
        better = trial_cost <= cost
        settled = better & (cost - trial_cost <= 1e-10 * cost)
        parameters[better], cost[better], model[better] = trial[better], trial_cost[better], trial_model[better]
        derivatives[better] = trial_derivatives[better]
        damping = np.where(better, damping / 5, damping * 5).clip(1e-9, 1e9)
        if settled.all():
            break
    return parameters
