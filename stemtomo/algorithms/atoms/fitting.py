"""Three-dimensional Gaussians on a level background, or polynomials, fitted to many small windows at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_ITERATIONS = 30
_CHUNK = 2048  # atoms fitted together: 2048 windows of 300 voxels x 6 derivatives are 30 MB
_SETTLED = 1e-10  # relative change of the misfit at which a fit has come to rest
_ORDER, _LEAST_BALL = 4, 2.5  # of polynomials; a ball of 2.5 voxels and a half more has 123 for 35 coefficients
_NEWTON_STEPS, _LONGEST_STEP = 14, 0.5
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
    """Minimise sum weight (model - values)² over each row of ``start`` (n, 6), all rows that still move together."""
    settled_rows = start.copy()
    moving = np.arange(len(start))
    parameters, damping = start.copy(), np.full(len(start), 1e-2)
    model, derivatives = _model(parameters, displacement)
    cost = (weight * (model - values) ** 2).sum(axis=1)
    for _ in range(_ITERATIONS):
        step = _damped_step(derivatives, weight, values - model, damping)
        trial = parameters + step
        trial[:, 3] = np.clip(trial[:, 3], np.log(_SMALLEST_WIDTH), np.log(_LARGEST_WIDTH))
        trial_model, trial_derivatives = _model(trial, displacement)
        trial_cost = (weight * (trial_model - values) ** 2).sum(axis=1)
        better = trial_cost <= cost
        settled = better & (cost - trial_cost <= _SETTLED * cost)
        parameters[better], cost[better], model[better] = trial[better], trial_cost[better], trial_model[better]
        derivatives[better] = trial_derivatives[better]
        damping = np.where(better, damping / 5, damping * 5).clip(1e-9, 1e9)
        settled_rows[moving] = parameters
        # A row that has come to rest is left alone, so that its end does not depend on the other rows.
        on = ~settled
        if not on.any():
            break
        moving, parameters, damping, cost = moving[on], parameters[on], damping[on], cost[on]
        values, displacement, weight = values[on], displacement[on], weight[on]
        model, derivatives = model[on], derivatives[on]
    return settled_rows


def _damped_step(derivatives: np.ndarray, weight: np.ndarray, misfit: np.ndarray, damping: np.ndarray) -> np.ndarray:
    """Return the step (n, 6) of Levenberg and Marquardt."""
    weighted = derivatives * weight[..., None]
    normal = np.swapaxes(weighted, 1, 2) @ derivatives
    gradient = np.swapaxes(weighted, 1, 2) @ misfit[..., None]
    diagonal = np.einsum("nii->ni", normal)
    # Marquardt's scaling: damped relative to each parameter's own curvature.
    ridge = damping[:, None] * diagonal + 1e-12 * diagonal.max(axis=1, keepdims=True) + np.finfo(np.float64).tiny
    step: np.ndarray = np.linalg.solve(normal + ridge[:, :, None] * np.eye(6), gradient)[..., 0]
    return step


def fit_polynomials(volume: np.ndarray, centres: np.ndarray, radius_voxels: float) -> GaussianFits:
    """Find the maximum near each of ``centres`` of a polynomial of fourth order fitted about it.

    After the tracing of Yang et al., Nature 592, 60 (2021): 35 coefficients by least squares within a ball, weighted by
    a Gaussian, then Newton steps to where the gradient vanishes. The ball has room for the coefficients, so its radius
    is at least 2.5 voxels; its weights fall off with ``radius_voxels``. A maximum further than ``radius_voxels`` from
    the start, or none, keeps the start. The width is that of the Gaussian with the same height and curvature.

    Parameters
    ----------
    volume, centres, radius_voxels
        As in :func:`fit_gaussians`.
    """
    offsets = ball_offsets(max(radius_voxels, _LEAST_BALL) + 0.5)
    powers = _powers(_ORDER)
    weight = np.exp(-0.5 * (offsets**2).sum(axis=1) / max(radius_voxels, _LEAST_BALL) ** 2)
    terms = _terms(offsets.astype(np.float64), powers)
    solver = np.linalg.pinv(terms * weight[:, None]) * weight
    tables = [
        _polynomial_chunk(volume, centres[start : start + _CHUNK], offsets, solver, powers, radius_voxels)
        for start in range(0, len(centres), _CHUNK)
    ]
    empty = np.empty(0)
    if not tables:
        return GaussianFits(np.empty((0, 3)), empty, empty, empty, empty)
    table = np.concatenate(tables)
    return GaussianFits(table[:, :3], table[:, 3], table[:, 4], np.zeros(len(table)), table[:, 5])


def _powers(order: int) -> np.ndarray:
    """Return the exponents (term, 3) of all monomials up to ``order``."""
    grid = np.indices((order + 1,) * 3).reshape(3, -1).T
    return grid[grid.sum(axis=1) <= order]


def _terms(points: np.ndarray, powers: np.ndarray, derivative: tuple[int, ...] = ()) -> np.ndarray:
    """Return monomials (..., term) at ``points`` (..., 3), or their derivatives along the axes of ``derivative``."""
    factor, exponents = np.ones(len(powers)), powers.copy()
    for axis in derivative:
        factor = factor * exponents[:, axis]
        exponents[:, axis] = np.maximum(exponents[:, axis] - 1, 0)
    values: np.ndarray = np.prod(points[..., None, :] ** exponents, axis=-1) * factor
    return values


def _polynomial_chunk(
    volume: np.ndarray,
    centres: np.ndarray,
    offsets: np.ndarray,
    solver: np.ndarray,
    powers: np.ndarray,
    radius_voxels: float,
) -> np.ndarray:
    """Return (n, 6): z, y, x, width, height, residual."""
    values, _, _ = window_values(volume, centres, offsets)
    coefficients = values @ solver.T
    whole = np.rint(centres)
    point = centres - whole
    for _ in range(_NEWTON_STEPS):
        slope = np.stack([(_terms(point, powers, (i,)) * coefficients).sum(axis=1) for i in range(3)], axis=-1)
        curvature = _curvature(point, powers, coefficients)
        # Uphill along each principal axis, also where the polynomial curves the other way.
        values_, axes = np.linalg.eigh(curvature)
        along = np.einsum("nij,ni->nj", axes, slope) / np.maximum(np.abs(values_), 1e-12 + 1e-6 * np.abs(values_).max())
        step = np.einsum("nij,nj->ni", axes, along)
        length = np.linalg.norm(step, axis=1, keepdims=True)
        point = point + step * np.minimum(1, _LONGEST_STEP / np.maximum(length, 1e-12))
    bending = -np.trace(_curvature(point, powers, coefficients), axis1=1, axis2=2) / 3
    height = (_terms(point, powers) * coefficients).sum(axis=1)
    lost = (np.linalg.norm(point + whole - centres, axis=1) > radius_voxels) | (bending <= 0) | (height <= 0)
    point[lost] = (centres - whole)[lost]
    height[lost] = np.maximum(values.max(axis=1), np.finfo(np.float64).tiny)[lost]
    width = np.sqrt(height / np.where(lost, height, np.maximum(bending, 1e-30)))
    width = np.clip(width, _SMALLEST_WIDTH, _LARGEST_WIDTH)
    fitted = coefficients @ _terms(offsets.astype(np.float64), powers).T
    residual = np.sqrt(((fitted - values) ** 2).mean(axis=1)) / height
    return np.column_stack([point + whole, width, height, residual])


def _curvature(point: np.ndarray, powers: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """Return the second derivatives (n, 3, 3) of the polynomials at ``point`` (n, 3)."""
    matrix = np.empty((len(point), 3, 3))
    for i in range(3):
        for j in range(i, 3):
            matrix[:, i, j] = matrix[:, j, i] = (_terms(point, powers, (i, j)) * coefficients).sum(axis=1)
    return matrix
