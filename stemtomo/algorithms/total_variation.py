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
BYTES_PER_VOXEL = 48
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
    # Three fields and two images are all that is ever held: new arrays of this size would cost more than the sums.
    dual, following, point = (xp.zeros((3, *values.shape), values.dtype) for _ in range(3))
    primal, length = xp.empty_like(values), xp.empty_like(values)
    momentum = 1.0
    for _ in range(INNER_ITERATIONS):
        _primal(values, weight, point, positive, primal)
        _gradient(primal, following)
        following *= real(_STEP / weight)
        following += point
        _shorten(following, length, primal)
        after = (1 + math.sqrt(1 + 4 * momentum * momentum)) / 2
        xp.subtract(following, dual, out=dual)
        dual *= real((momentum - 1) / after)
        dual += following
        dual, following, point, momentum = following, point, dual, after
    _primal(values, weight, dual, positive, primal)
    return primal


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
    gradient = xp.empty((3, *values.shape), values.dtype)
    _gradient(values, gradient)
    return float(xp.sum(xp.sqrt(xp.sum(gradient * gradient, axis=0)), dtype=float))


def _kept(values: Array, positive: bool) -> Array:
    return array_namespace(values).maximum(values, 0) if positive else values


def _primal(values: Array, weight: float, field: Array, positive: bool, out: Array) -> None:
    """Write the volume that belongs to the dual ``field`` to ``out``."""
    _divergence(field, out)
    out *= values.dtype.type(weight)
    out += values
    if positive:
        array_namespace(values).maximum(out, 0, out=out)


def _shorten(field: Array, length: Array, scratch: Array) -> None:
    """Make the vectors of ``field`` no longer than one."""
    xp = array_namespace(field)
    xp.multiply(field[0], field[0], out=length)
    for component in field[1:]:
        xp.multiply(component, component, out=scratch)
        length += scratch
    xp.sqrt(length, out=length)
    xp.maximum(length, 1, out=length)
    field /= length


def _gradient(values: Array, out: Array) -> None:
    """Write forward differences along each axis, zero at the far end, to ``out``."""
    xp = array_namespace(values)
    for axis in range(3):
        before, after, last = ([slice(None)] * 3 for _ in range(3))
        before[axis], after[axis], last[axis] = slice(None, -1), slice(1, None), slice(-1, None)
        xp.subtract(values[tuple(after)], values[tuple(before)], out=out[axis][tuple(before)])
        out[axis][tuple(last)] = 0


def _divergence(field: Array, out: Array) -> None:
    """Write minus the adjoint of :func:`_gradient` to ``out``."""
    out[...] = 0
    for axis in range(3):
        before, after = [slice(None)] * 3, [slice(None)] * 3
        before[axis], after[axis] = slice(None, -1), slice(1, None)
        inner = field[axis][tuple(before)]
        out[tuple(before)] += inner
        out[tuple(after)] -= inner
