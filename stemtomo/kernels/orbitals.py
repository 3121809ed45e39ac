"""Gaussian atoms on a stack of slices: drawing them, and the derivatives of a stack's loss in their parameters.

An atom at depth w, counted in slices, adds the share 1 - (w - s) of itself to slice s = floor(w) and the share w - s to
the slice behind it: hat functions, so that losses have a derivative in depth. Atoms before the first slice or behind
the last one are whole in it. Within a slice they are as in :mod:`stemtomo.kernels.atoms`.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from stemtomo.backend import Array, array_namespace, is_device_array, real_dtype
from stemtomo.kernels import cuda
from stemtomo.kernels.atoms import _factors

_jit = numba.njit(nogil=True, cache=True, fastmath={"contract", "nsz", "arcp", "reassoc"}, error_model="numpy")


def render(stack: Array, u: Array, v: Array, depth: Array, intensity: Array, width: Array, radius: int) -> None:
    """Add Gaussian atoms to ``stack`` (slice, y, x), in place.

    Parameters
    ----------
    u, v
        Columns and rows of the atoms' centres in pixels, (atom,), of the dtype of ``stack`` like all that follow.
    depth
        In slices; slice s is at depth s.
    intensity
        Integral of each atom over the stack.
    width
        Standard deviation of each atom in pixels.
    radius
        Half of the window in pixels; 4 to 5 times the largest width.
    """
    if is_device_array(stack):
        _launch("render_orbitals", stack, u, v, depth, intensity, width, radius)
    else:
        _render(stack, u, v, depth, intensity, width, radius)


def gather(
    residual: Array, u: Array, v: Array, depth: Array, intensity: Array, width: Array, radius: int
) -> tuple[Array, Array, Array, Array, Array]:
    """Return the derivatives of <``residual``, stack of the atoms> in (intensity, u, v, depth, width), each (atom,).

    The first is the exact adjoint of :func:`render` as a linear map of intensities to a stack. Arguments as there.
    """
    xp = array_namespace(residual)
    out = tuple(xp.empty_like(u) for _ in range(5))
    if is_device_array(residual):
        _launch("gather_orbitals", residual, u, v, depth, intensity, width, radius, *out)
    else:
        _gather(residual, u, v, depth, intensity, width, radius, *out)
    return out[0], out[1], out[2], out[3], out[4]


def _launch(
    kernel: str,
    stack: Array,
    u: Array,
    v: Array,
    depth: Array,
    intensity: Array,
    width: Array,
    radius: int,
    *out: Array,
) -> None:
    slices, rows, columns = stack.shape
    dtype = real_dtype(stack)
    cuda.launch(
        "orbitals", kernel, len(u), dtype, slices, rows, columns, radius, u, v, depth, intensity, width, stack, *out
    )


@_jit
def _place(depth, slices):  # type: ignore[no-untyped-def]
    """Return the first of the two slices of an atom, its share in the second, and the derivative of that share."""
    if slices == 1 or depth <= 0:
        return 0, 0.0, 0.0
    if depth >= slices - 1:
        return slices - 2, 1.0, 0.0
    first = int(math.floor(depth))
    return first, depth - first, 1.0


@_jit
def _render(stack, u, v, depth, intensity, width, radius):  # type: ignore[no-untyped-def]
    slices, rows, columns = stack.shape
    real = stack.dtype.type
    along_x = np.empty(2 * radius + 1, stack.dtype)
    along_y = np.empty(2 * radius + 1, stack.dtype)
    for atom in range(u.shape[0]):
        left = int(math.floor(u[atom] + 0.5)) - radius
        top = int(math.floor(v[atom] + 0.5)) - radius
        if left >= columns or top >= rows or left + 2 * radius < 0 or top + 2 * radius < 0:
            continue
        _factors(u[atom], width[atom], left, along_x)
        _factors(v[atom], width[atom], top, along_y)
        start, stop = max(left, 0), min(left + 2 * radius + 1, columns)
        factors = along_x[start - left : stop - left]
        first, behind, _ = _place(depth[atom], slices)
        for offset in range(2):
            share = intensity[atom] * real(behind if offset else 1 - behind)
            if share == 0:
                continue
            for y in range(max(top, 0), min(top + 2 * radius + 1, rows)):
                weight = share * along_y[y - top]
                line = stack[first + offset, y, start:stop]
                for x in range(factors.shape[0]):
                    line[x] += weight * factors[x]


@_jit
def _gather(  # type: ignore[no-untyped-def]
    residual, u, v, depth, intensity, width, radius, by_intensity, by_u, by_v, by_depth, by_width
):
    slices, rows, columns = residual.shape
    real = residual.dtype.type
    along_x = np.empty(2 * radius + 1, residual.dtype)
    along_y = np.empty(2 * radius + 1, residual.dtype)
    columns_0 = np.empty(2 * radius + 1, residual.dtype)
    columns_1 = np.empty(2 * radius + 1, residual.dtype)
    columns_2 = np.empty(2 * radius + 1, residual.dtype)
    for atom in range(u.shape[0]):
        left = int(math.floor(u[atom] + 0.5)) - radius
        top = int(math.floor(v[atom] + 0.5)) - radius
        total_0 = total_x = total_y = total_rr = difference = real(0)
        if left < columns and top < rows and left + 2 * radius >= 0 and top + 2 * radius >= 0:
            _factors(u[atom], width[atom], left, along_x)
            _factors(v[atom], width[atom], top, along_y)
            start, stop = max(left, 0), min(left + 2 * radius + 1, columns)
            first, behind, slope = _place(depth[atom], slices)
            sums_0, sums_1, sums_2 = columns_0[: stop - start], columns_1[: stop - start], columns_2[: stop - start]
            for offset in range(2):
                share = real(behind if offset else 1 - behind)
                if share == 0 and slope == 0:
                    continue
                sums_0[:] = 0
                sums_1[:] = 0
                sums_2[:] = 0
                for y in range(max(top, 0), min(top + 2 * radius + 1, rows)):
                    dy = real(y - v[atom])
                    weight_0 = along_y[y - top]
                    weight_1 = weight_0 * dy
                    weight_2 = weight_1 * dy
                    line = residual[first + offset, y, start:stop]
                    for x in range(sums_0.shape[0]):
                        sums_0[x] += weight_0 * line[x]
                        sums_1[x] += weight_1 * line[x]
                        sums_2[x] += weight_2 * line[x]
                moment_0 = moment_x = moment_y = moment_rr = real(0)
                for x in range(sums_0.shape[0]):
                    dx = real(start + x - u[atom])
                    factor = along_x[start - left + x]
                    moment_0 += factor * sums_0[x]
                    moment_x += factor * dx * sums_0[x]
                    moment_y += factor * sums_1[x]
                    moment_rr += factor * (dx * dx * sums_0[x] + sums_2[x])
                total_0 += share * moment_0
                total_x += share * moment_x
                total_y += share * moment_y
                total_rr += share * moment_rr
                difference += real(slope if offset else -slope) * moment_0
        b = width[atom]
        by_intensity[atom] = total_0
        by_u[atom] = intensity[atom] * total_x / (b * b)
        by_v[atom] = intensity[atom] * total_y / (b * b)
        by_depth[atom] = intensity[atom] * difference
        by_width[atom] = intensity[atom] * (total_rr / (b * b) - 2 * total_0) / b
