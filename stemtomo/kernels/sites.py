"""Reading a stack of slices between its pixels at many places of the specimen at once, as one image sees them."""

from __future__ import annotations

import math

import numba
import numpy as np

from stemtomo.backend import Array, is_device_array, real_dtype, to_device_of
from stemtomo.kernels import cuda

_jit = numba.njit(nogil=True, cache=True, fastmath={"contract", "nsz", "arcp", "reassoc"}, error_model="numpy")


def add_between(stack: Array, sites: Array, affine: np.ndarray, out: Array) -> None:
    """Add to ``out`` (site,) the values of ``stack`` (slice, y, x) at ``sites`` (site, 3), linear between its pixels.

    Nothing is added beyond an image's outermost pixels; before the first and behind the last slice these are read.

    Parameters
    ----------
    sites, out
        Of the dtype of ``stack``.
    affine
        (3, 4): column, row and slice of a site are affine[:, :3] @ site + affine[:, 3].
    """
    affine = np.ascontiguousarray(affine, dtype=real_dtype(stack))
    if is_device_array(stack):
        slices, rows, columns = stack.shape
        of = to_device_of(affine, stack)
        cuda.launch("sites", "add_between", len(sites), real_dtype(stack), slices, rows, columns, of, sites, stack, out)
    else:
        _add_between(stack, sites, affine, out)


@_jit
def _add_between(stack, sites, affine, out):  # type: ignore[no-untyped-def]
    slices, rows, columns = stack.shape
    real = stack.dtype.type
    for i in range(sites.shape[0]):
        x, y, z = sites[i, 0], sites[i, 1], sites[i, 2]
        u = affine[0, 0] * x + affine[0, 1] * y + affine[0, 2] * z + affine[0, 3]
        v = affine[1, 0] * x + affine[1, 1] * y + affine[1, 2] * z + affine[1, 3]
        if not (u >= 0 and v >= 0 and u <= columns - 1 and v <= rows - 1):
            continue
        w = affine[2, 0] * x + affine[2, 1] * y + affine[2, 2] * z + affine[2, 3]
        w = min(max(w, real(0)), real(slices - 1))
        left, top = min(int(math.floor(u)), columns - 2), min(int(math.floor(v)), rows - 2)
        first = max(min(int(math.floor(w)), slices - 2), 0)
        by_u, by_v, by_w = u - real(left), v - real(top), w - real(first)
        total = real(0)
        for behind in range(min(2, slices)):
            share = by_w if behind else 1 - by_w
            upper, lower = stack[first + behind, top], stack[first + behind, top + 1]
            above = upper[left] + by_u * (upper[left + 1] - upper[left])
            below = lower[left] + by_u * (lower[left + 1] - lower[left])
            total += share * (above + by_v * (below - above))
        out[i] += total
