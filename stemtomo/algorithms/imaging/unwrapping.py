"""Phases beyond ±π: least-squares unwrapping with weights, and the phase of a stack of transmission functions.

Source: D. C. Ghiglia and L. A. Romero, J. Opt. Soc. Am. A 11, 107 (1994): the wrapped differences of neighbours are
fitted in the least-squares sense, a Poisson equation with mirror boundaries, which a cosine transform solves; with
weights it preconditions conjugate gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stemtomo.backend import Array, array_namespace, dct2, idct2

_TURN = 2 * np.pi
_MOST_ITERATIONS = 200
_TOLERANCE = 1e-9
#: A slice whose phases stay within this many rad of their mean is not unwrapped: no neighbours can differ by π.
_SAFE_RAD = 2.0


class PhaseSum(NamedTuple):
    """The phase of all slices together, (y, x) in rad; phases of the slices; what unwrapping met."""

    phase: Array
    slices: Array
    unwrapped_slices: tuple[int, ...]
    residues: int


def wrap(phase: Array) -> Array:
    """Return ``phase`` in rad, taken into (-π, π]."""
    xp = array_namespace(phase)
    return phase - _TURN * xp.ceil(phase / _TURN - 0.5)


def count_residues(phase: Array, valid: Array | None = None) -> int:
    """Return around how many 2 x 2 squares of ``valid`` pixels the wrapped differences do not add up to zero.

    Without residues the unwrapped phase does not depend on the way it is found; each is a point where the phase is
    undersampled or the amplitude vanishes.
    """
    xp = array_namespace(phase)
    down, across = wrap(xp.diff(phase, axis=-2)), wrap(xp.diff(phase, axis=-1))
    circulation = across[..., :-1, :] + down[..., :, 1:] - across[..., 1:, :] - down[..., :, :-1]
    found = xp.abs(circulation) > np.pi
    if valid is not None:
        found &= valid[..., :-1, :-1] & valid[..., 1:, :-1] & valid[..., :-1, 1:] & valid[..., 1:, 1:]
    return int(found.sum())


def unwrap(phase: Array, weights: Array | None = None) -> Array:
    """Return ``phase`` plus whole turns so that neighbours agree, (y, x) in rad, float64.

    The least-squares solution only decides how many turns every pixel gets, so the result is exact wherever neighbours
    of the true phase differ by less than π (and there are no residues). Most of the weight keeps its turn.

    Parameters
    ----------
    phase
        (y, x) in rad, of any branch.
    weights
        (y, x), not negative: how far a pixel is to be believed, such as the illumination. Pixels of weight zero get a
        continuation that means nothing. ``None`` for equal weights.
    """
    xp = array_namespace(phase)
    phase = phase.astype(np.float64)
    down, across = wrap(xp.diff(phase, axis=0)), wrap(xp.diff(phase, axis=1))
    if weights is None:
        smooth = _poisson(_divergence(down, across))
        weights = xp.ones_like(phase)
    else:
        weights = weights.astype(np.float64) / float(weights.max())
        pairs = xp.minimum(weights[1:], weights[:-1]), xp.minimum(weights[:, 1:], weights[:, :-1])
        smooth = _weighted(down * pairs[0], across * pairs[1], pairs)
    turns = (smooth - phase) / _TURN
    # The solution has an arbitrary constant; where it is right, turns are whole numbers but for that constant.
    constant = xp.angle((weights * xp.exp(1j * _TURN * turns)).sum()) / _TURN
    whole = xp.round(turns - constant)
    return phase + _TURN * (whole - _commonest(whole, weights))


def phase_sum(transmission: Array, weights: Array | None = None, safe_rad: float = _SAFE_RAD) -> PhaseSum:
    """Return the sum of the phases of the slices of ``transmission``: of angles, never the angle of a product.

    Every slice has an unobservable constant phase, which is taken off first (the weighted circular mean); slices with
    phases beyond ``safe_rad`` around it are unwrapped with the weights |t|² times ``weights``.

    Parameters
    ----------
    transmission
        (slice, y, x), complex.
    weights
        (y, x), such as the illumination; pixels of weight zero are not observed.
    """
    xp = array_namespace(transmission)
    observed = xp.ones(transmission.shape[1:], bool) if weights is None else weights > 0
    trust = xp.abs(transmission) ** 2 * (observed if weights is None else weights)
    phases, unwrapped, residues = xp.empty(transmission.shape, np.float64), [], 0
    for index, (wave, trusted) in enumerate(zip(transmission, trust, strict=True)):
        unit = wave / xp.maximum(xp.abs(wave), 1e-30)
        constant = (unit * trusted).sum()
        angles = xp.angle(unit * xp.conj(constant / max(float(xp.abs(constant)), 1e-30)))
        if float(xp.abs(xp.where(observed, angles, 0)).max()) > safe_rad:
            residues += count_residues(angles, observed)
            angles = unwrap(angles, trusted)
            unwrapped.append(index)
        phases[index] = angles
    return PhaseSum(phases.sum(axis=0), phases, tuple(unwrapped), residues)


def _divergence(down: Array, across: Array) -> Array:
    """Return the negative adjoint of the differences: the right-hand side of the Poisson equation."""
    xp = array_namespace(down)
    out = xp.zeros((down.shape[0] + 1, down.shape[1]))
    out[:-1] += down
    out[1:] -= down
    out[:, :-1] += across
    out[:, 1:] -= across
    return out


def _poisson(source: Array) -> Array:
    """Solve the Poisson equation with mirror boundaries; the mean of the solution is zero."""
    xp = array_namespace(source)
    height, width = source.shape
    eigenvalues = (
        2 * xp.cos(np.pi * xp.arange(height) / height)[:, None] + 2 * xp.cos(np.pi * xp.arange(width) / width) - 4
    )
    eigenvalues[0, 0] = 1
    spectrum = dct2(source) / eigenvalues
    spectrum[0, 0] = 0
    return idct2(spectrum)


def _weighted(down: Array, across: Array, pairs: tuple[Array, Array]) -> Array:
    """Solve the weighted Poisson equation by conjugate gradients, preconditioned with the unweighted one."""
    xp = array_namespace(down)
    residual = _divergence(down, across)
    solution = xp.zeros_like(residual)
    start = float(xp.linalg.norm(residual))
    direction, energy = xp.zeros_like(residual), 1.0
    for _ in range(_MOST_ITERATIONS):
        if float(xp.linalg.norm(residual)) <= _TOLERANCE * start:
            break
        improved = _poisson(residual)
        before, energy = energy, float((residual * improved).sum())
        direction = improved + (energy / before) * direction
        response = _divergence(xp.diff(direction, axis=0) * pairs[0], xp.diff(direction, axis=1) * pairs[1])
        step = energy / float((direction * response).sum())
        solution += step * direction
        residual -= step * response
    return solution


def _commonest(whole: Array, weights: Array) -> float:
    """Return the whole number that has most of the weight."""
    xp = array_namespace(whole)
    first = float(whole.min())
    return first + float(xp.argmax(xp.bincount((whole - first).astype(np.int64).ravel(), weights.ravel())))
