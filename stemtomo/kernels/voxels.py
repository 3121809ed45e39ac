"""Projecting voxels onto images (splat) and reading images back along the same rays (gather), exact adjoints.

A voxel at block indices (x, y, z) falls on column u and row v of the image of a tilt,

    u = U . (x, y, z, 1),   v = V . (x, y, z, 1),

with one *placement* (U, V), (2, 4), per tilt, and is shared among 3 x 3 pixels with the weights b(column - u)
b(row - v). The footprint b is the B-spline of degree 1 (linear) or 2 (quadratic), or 3 (cubic, on 4 x 4 pixels:
:mod:`stemtomo.kernels.cubic`); voxel and pixel have one size. What falls outside the image is lost. Where v is y plus a
constant and u does not depend on y (a turn about y), weights are computed once per (z, x) and the innermost loop runs
along y.
"""

from __future__ import annotations

import numba
import numpy as np

from stemtomo.backend import Array, array_namespace, is_device_array
from stemtomo.kernels import cubic, cuda

_MARGIN = cubic.MARGIN  # pixels around an image that take what falls off it: 2 for the taps, 1 for rounding at the edge
_EXACT = 1e-12  # placements this close to a turn about y are one: the error stays below 1e-8 pixels in any volume

_jit = numba.njit(nogil=True, cache=True, fastmath={"contract", "nsz", "arcp", "reassoc"}, error_model="numpy")


def splat(block: Array, placements: np.ndarray, images: Array, degree: int = 2, support: Array | None = None) -> None:
    """Add the projections of ``block`` to ``images``, in place.

    Parameters
    ----------
    block
        Voxels (z, y, x), float32 or float64.
    placements
        (tilt, 2, 4), float64, in host memory: columns and rows from the indices (x, y, z, 1) of the block.
    images
        (tilt, row, column), of the dtype of ``block``.
    degree
        1 (linear), 2 (quadratic) or 3 (cubic B-spline).
    support
        Boolean (z, y, x); voxels outside are skipped.
    """
    if is_device_array(block):
        _launch("splat_voxels", block, placements, images, degree, support)
        return
    axial, third = _axial(placements), degree == 3
    if support is not None and axial.any():
        block = block * support
    lines = np.flatnonzero(axial)
    if len(lines):
        views = (block, placements[lines][:, 0], images.shape[2])
        strips = cubic.splat_axial(*views) if third else _splat_axial(*views, degree)
        for strip, tilt in zip(strips, lines, strict=True):
            rows = (strip, placements[tilt, 1, 3], images[tilt])
            cubic.rows_from_strip(*rows) if third else _rows_from_strip(*rows, degree)
    for tilt in np.flatnonzero(~axial):
        padded = np.zeros([n + 2 * _MARGIN for n in images.shape[1:]], images.dtype)
        if third:
            cubic.splat(block, placements[tilt], padded, *_mask(support))
        else:
            _splat(block, placements[tilt], padded, degree, *_mask(support))
        images[tilt] += padded[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN]


def gather(images: Array, placements: np.ndarray, block: Array, degree: int = 2, support: Array | None = None) -> None:
    """Add the adjoint of :func:`splat` applied to ``images`` to ``block``, in place; arguments as there."""
    if is_device_array(block):
        _launch("gather_voxels", block, placements, images, degree, support)
        return
    axial, third = _axial(placements), degree == 3
    lines = np.flatnonzero(axial)
    if len(lines):
        strips = np.zeros((len(lines), images.shape[2] + 2 * _MARGIN, block.shape[1]), images.dtype)
        for strip, tilt in zip(strips, lines, strict=True):
            rows = (images[tilt], placements[tilt, 1, 3], strip)
            cubic.strip_from_rows(*rows) if third else _strip_from_rows(*rows, degree)
        if third:
            cubic.gather_axial(strips, placements[lines][:, 0], block, *_mask(support))
        else:
            _gather_axial(strips, placements[lines][:, 0], block, degree, *_mask(support))
    for tilt in np.flatnonzero(~axial):
        padded = np.pad(images[tilt], _MARGIN)
        if third:
            cubic.gather(padded, placements[tilt], block, *_mask(support))
        else:
            _gather(padded, placements[tilt], block, degree, *_mask(support))


def _launch(
    kernel: str, block: Array, placements: np.ndarray, images: Array, degree: int, support: Array | None
) -> None:
    xp = array_namespace(block)
    mask = xp.ones(1, bool) if support is None else xp.ascontiguousarray(support)
    cuda.launch(
        "voxels", kernel, block.size, block.dtype, *block.shape, *images.shape, degree, int(support is not None),
        xp.asarray(np.ascontiguousarray(placements, dtype=np.float64)), mask, block, images,
    )  # fmt: skip


def _axial(placements: np.ndarray) -> np.ndarray:
    """Return which placements are turns about y: v = y + constant, u without y."""
    turn = placements[:, 1, :3] - np.array([0.0, 1.0, 0.0])
    return (np.abs(turn).max(axis=1) < _EXACT) & (np.abs(placements[:, 0, 1]) < _EXACT)


def _mask(support: np.ndarray | None) -> tuple[np.ndarray, bool]:
    return (np.ones((1, 1, 1), bool), False) if support is None else (support, True)


@_jit
def _taps(offset, degree):  # type: ignore[no-untyped-def]
    """Return the weights of the pixels -1, 0, +1 of the nearest one; ``offset`` in [0, 1) is 1/2 at its centre."""
    rest = 1 - offset
    if degree == 2:
        square, other = 0.5 * offset * offset, 0.5 * rest * rest
        return other, 1 - square - other, square
    after = max(offset - 0.5, 0.0)
    before = max(0.5 - offset, 0.0)
    return before, 1 - before - after, after


@_jit
def _inside(origin, step, count, pixels):  # type: ignore[no-untyped-def]
    """Return the first and last + 1 index whose taps along one axis can reach one of ``pixels``."""
    low, high = -1.5 - origin, pixels + 0.5 - origin
    if abs(step) < 1e-9:
        # The whole line moves by less than the margin takes up.
        return (0, count) if low <= 0.0 < high else (0, 0)
    first, last = low / step, high / step
    if first > last:
        first, last = last, first
    return max(0, int(np.ceil(max(first, 0.0)))), min(count, int(np.floor(min(last, float(count)))) + 1)


@_jit
def _weigh(origin, step, count, degree, weights):  # type: ignore[no-untyped-def]
    """Fill ``weights`` (3, i) for pixels origin + step i; as :func:`_taps`, in loops that vectorise."""
    real = weights.dtype.type
    one, half, zero = real(1), real(0.5), real(0)
    if degree == 2:
        for i in range(count):
            at = origin + step * i
            offset = real(at - np.int32(at))
            rest = one - offset
            weights[0, i] = half * rest * rest
            weights[1, i] = half + offset * rest
            weights[2, i] = half * offset * offset
    else:
        for i in range(count):
            at = origin + step * i
            side = real(at - np.int32(at)) - half
            weights[0, i] = max(-side, zero)
            weights[1, i] = one - abs(side)
            weights[2, i] = max(side, zero)


@_jit
def _weigh_line(placement, z, y, width, height, degree, base, along_u, along_v):  # type: ignore[no-untyped-def]
    """Return the first voxel of a line along x that reaches the image and the number of those that do.

    For these, from index 0 on, it fills their first pixel and their weights. Indices counted from 0 in a loop spare
    numba the test for negative ones, and the loops become vector instructions.
    """
    u = placement[0, 3] + placement[0, 2] * z + placement[0, 1] * y
    v = placement[1, 3] + placement[1, 2] * z + placement[1, 1] * y
    step_u, step_v = placement[0, 0], placement[1, 0]
    first_u, last_u = _inside(u, step_u, base.shape[0], width)
    first_v, last_v = _inside(v, step_v, base.shape[0], height)
    first = max(first_u, first_v)
    count = max(0, min(last_u, last_v) - first)
    u += _MARGIN + 0.5 + step_u * first
    v += _MARGIN + 0.5 + step_v * first
    stride, one = np.int32(width + 2 * _MARGIN), np.int32(1)
    for i in range(count):
        column, row = np.int32(u + step_u * i), np.int32(v + step_v * i)  # positive: truncation is the floor
        base[i] = (row - one) * stride + (column - one)
    _weigh(u, step_u, count, degree, along_u)
    _weigh(v, step_v, count, degree, along_v)
    return first, count


@_jit
def _add(flat, i, value, a0, a1, a2):  # type: ignore[no-untyped-def]
    flat[i] += value * a0
    flat[i + 1] += value * a1
    flat[i + 2] += value * a2


@_jit
def _read(flat, i, a0, a1, a2):  # type: ignore[no-untyped-def]
    return a0 * flat[i] + a1 * flat[i + 1] + a2 * flat[i + 2]


@_jit
def _splat(block, placement, padded, degree, support, masked):  # type: ignore[no-untyped-def]
    height, width = padded.shape[0] - 2 * _MARGIN, padded.shape[1] - 2 * _MARGIN
    count = block.shape[2]
    base = np.empty(count, np.int32)
    a = np.empty((3, count), padded.dtype)
    b = np.empty((3, count), padded.dtype)
    flat = padded.reshape(-1)
    stride = np.intp(padded.shape[1])
    for z in range(block.shape[0]):
        for y in range(block.shape[1]):
            first, reached = _weigh_line(placement, z, y, width, height, degree, base, a, b)
            line = block[z, y, first : first + reached]
            for x in range(reached):
                if masked and not support[z, y, first + x]:
                    continue
                value = line[x]
                a0, a1, a2 = a[0, x], a[1, x], a[2, x]
                i = np.intp(base[x])
                _add(flat, i, value * b[0, x], a0, a1, a2)
                _add(flat, i + stride, value * b[1, x], a0, a1, a2)
                _add(flat, i + 2 * stride, value * b[2, x], a0, a1, a2)


@_jit
def _gather(padded, placement, block, degree, support, masked):  # type: ignore[no-untyped-def]
    height, width = padded.shape[0] - 2 * _MARGIN, padded.shape[1] - 2 * _MARGIN
    count = block.shape[2]
    base = np.empty(count, np.int32)
    a = np.empty((3, count), padded.dtype)
    b = np.empty((3, count), padded.dtype)
    flat = padded.reshape(-1)
    stride = np.intp(padded.shape[1])
    for z in range(block.shape[0]):
        for y in range(block.shape[1]):
            first, reached = _weigh_line(placement, z, y, width, height, degree, base, a, b)
            line = block[z, y, first : first + reached]
            for x in range(reached):
                if masked and not support[z, y, first + x]:
                    continue
                a0, a1, a2 = a[0, x], a[1, x], a[2, x]
                i = np.intp(base[x])
                total = b[0, x] * _read(flat, i, a0, a1, a2)
                total += b[1, x] * _read(flat, i + stride, a0, a1, a2)
                total += b[2, x] * _read(flat, i + 2 * stride, a0, a1, a2)
                line[x] += total


@_jit
def _splat_axial(block, lines, width, degree):  # type: ignore[no-untyped-def]
    """Return the strips (tilt, padded column, y) of ``block`` (z, y, x) for u = lines . (x, y, z, 1), y left alone."""
    depth, height, count = block.shape
    real = block.dtype.type
    strips = np.zeros((lines.shape[0], width + 2 * _MARGIN, height), block.dtype)
    plane = np.empty((count, height), block.dtype)
    for z in range(depth):
        for y in range(height):
            for x in range(count):
                plane[x, y] = block[z, y, x]
        for tilt in range(lines.shape[0]):
            u = lines[tilt, 3] + lines[tilt, 2] * z
            first, last = _inside(u, lines[tilt, 0], count, width)
            u += _MARGIN + 0.5
            strip = strips[tilt]
            for x in range(first, last):
                at = u + lines[tilt, 0] * x
                column = int(at)
                before, here, after = _taps(at - column, degree)
                w0, w1, w2 = real(before), real(here), real(after)
                for y in range(height):
                    value = plane[x, y]
                    strip[column - 1, y] += w0 * value
                    strip[column, y] += w1 * value
                    strip[column + 1, y] += w2 * value
    return strips


@_jit
def _gather_axial(strips, lines, block, degree, support, masked):  # type: ignore[no-untyped-def]
    depth, height, count = block.shape
    width = strips.shape[1] - 2 * _MARGIN
    real = block.dtype.type
    plane = np.empty((count, height), block.dtype)
    for z in range(depth):
        plane[:] = 0
        for tilt in range(lines.shape[0]):
            u = lines[tilt, 3] + lines[tilt, 2] * z
            first, last = _inside(u, lines[tilt, 0], count, width)
            u += _MARGIN + 0.5
            strip = strips[tilt]
            for x in range(first, last):
                at = u + lines[tilt, 0] * x
                column = int(at)
                before, here, after = _taps(at - column, degree)
                w0, w1, w2 = real(before), real(here), real(after)
                for y in range(height):
                    plane[x, y] += w0 * strip[column - 1, y] + w1 * strip[column, y] + w2 * strip[column + 1, y]
        for y in range(height):
            for x in range(count):
                if not masked or support[z, y, x]:
                    block[z, y, x] += plane[x, y]


@_jit
def _rows_from_strip(strip, origin, image, degree):  # type: ignore[no-untyped-def]
    """Add a strip (padded column, y) to ``image`` (row, column): y falls on row y + ``origin``."""
    real = image.dtype.type
    start = int(np.floor(origin + 0.5))
    weights = _taps(origin + 0.5 - start, degree)
    for y in range(strip.shape[1]):
        for tap in range(3):
            row = y + start + tap - 1
            if 0 <= row < image.shape[0]:
                weight = real(weights[tap])
                for column in range(image.shape[1]):
                    image[row, column] += weight * strip[column + _MARGIN, y]


@_jit
def _strip_from_rows(image, origin, strip, degree):  # type: ignore[no-untyped-def]
    """Adjoint of :func:`_rows_from_strip`."""
    real = image.dtype.type
    start = int(np.floor(origin + 0.5))
    weights = _taps(origin + 0.5 - start, degree)
    for y in range(strip.shape[1]):
        for tap in range(3):
            row = y + start + tap - 1
            if 0 <= row < image.shape[0]:
                weight = real(weights[tap])
                for column in range(image.shape[1]):
                    strip[column + _MARGIN, y] += weight * image[row, column]
