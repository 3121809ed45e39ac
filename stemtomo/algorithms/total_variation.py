"""The proximal step of the total variation of a volume, non-negative where asked for.

min_x 1/2 |x - v|² + w TV(x), isotropic, by the fast gradient projection of the dual (Beck and Teboulle, IEEE Trans.
Image Process. 18, 2419 (2009)). Every inner iteration reaches one voxel further, so a block with a margin of
:data:`REACH` voxels of its neighbours gives the values of the whole volume.
"""

from __future__ import annotations

import math

from stemtomo.backend import Array, array_namespace

INNER_ITERATIONS = 12
REACH = INNER_ITERATIONS + 1
BYTES_PER_VOXEL = 64
"""What :func:`smoothed` holds, of float32."""
PIECE_VOXELS = 1 << 22
"""Voxels that :func:`smoothed_in_pieces` works on at once, margins included."""
_STEP = 1 / 12  # one over the norm of the divergence times the gradient in three dimensions


def smoothed(values: Array, weight: float, positive: bool = True) -> Array:
    """Return the proximal point of ``values`` (z, y, x) for ``weight`` times the total variation."""
    if weight <= 0:
        return _kept(values, positive)
    xp = array_namespace(values)
    real = values.dtype.type
    dual = xp.zeros((3, *values.shape), values.dtype)
    point, momentum = dual, 1.0
    for _ in range(INNER_ITERATIONS):
        primal = _kept(values + real(weight) * _divergence(point), positive)
        following = point + real(_STEP / weight) * _gradient(primal)
        following /= xp.maximum(1, xp.sqrt(xp.sum(following * following, axis=0)))
        after = (1 + math.sqrt(1 + 4 * momentum * momentum)) / 2
        point = following + real((momentum - 1) / after) * (following - dual)
        dual, momentum = following, after
    return _kept(values + real(weight) * _divergence(dual), positive)


def smoothed_in_pieces(values: Array, weight: float, positive: bool = True, piece_voxels: int = PIECE_VOXELS) -> Array:
    """Return what :func:`smoothed` returns, to the same bits, from pieces along z with their margins: less memory.

    Parameters
    ----------
    piece_voxels
        Voxels of a piece; more where margins alone are as many.
    """
    depth = values.shape[0]
    planes = max(piece_voxels // math.prod(values.shape[1:]) - 2 * REACH, REACH)
    if planes >= depth:
        return smoothed(values, weight, positive)
    out = array_namespace(values).empty_like(values)
    for start in range(0, depth, planes):
        stop, first = min(start + planes, depth), max(0, start - REACH)
        piece = smoothed(values[first : min(depth, stop + REACH)], weight, positive)
        out[start:stop] = piece[start - first : stop - first]
    return out


def total_variation(values: Array) -> float:
    """Return the isotropic total variation of ``values`` (z, y, x)."""
    xp = array_namespace(values)
    gradient = _gradient(values)
    return float(xp.sum(xp.sqrt(xp.sum(gradient * gradient, axis=0)), dtype=float))


def _kept(values: Array, positive: bool) -> Array:
    return array_namespace(values).maximum(values, 0) if positive else values


def _gradient(values: Array) -> Array:
    """Return forward differences along each axis, zero at the far end."""
    xp = array_namespace(values)
    out = xp.zeros((3, *values.shape), values.dtype)
    for axis in range(3):
        inner = [slice(None)] * 3
        inner[axis] = slice(None, -1)
        out[axis][tuple(inner)] = xp.diff(values, axis=axis)
    return out


def _divergence(field: Array) -> Array:
    """Return minus the adjoint of :func:`_gradient`."""
    xp = array_namespace(field)
    out = xp.zeros(field.shape[1:], field.dtype)
    for axis in range(3):
        before, after = [slice(None)] * 3, [slice(None)] * 3
        before[axis], after[axis] = slice(None, -1), slice(1, None)
        inner = field[axis][tuple(before)]
        out[tuple(before)] += inner
        out[tuple(after)] -= inner
    return out
