"""The cubic B-spline as the footprint of a voxel, on the host: 4 x 4 pixels, for :mod:`stemtomo.kernels.voxels`.

Its samples stand for band-limited functions better than those of lower degree. Where v is y plus a constant and u does
not depend on y (a turn about y), weights are computed once per (z, x) and the innermost loop runs along y.
"""

from __future__ import annotations

import numba
import numpy as np

MARGIN = 3
"""Pixels around an image that take what falls off it."""

_jit = numba.njit(nogil=True, cache=True, fastmath={"contract", "nsz", "arcp", "reassoc"}, error_model="numpy")


@_jit
def taps(offset):  # type: ignore[no-untyped-def]
    """Return the weights of the pixels -1, 0, 1, 2 of the one below; ``offset`` in [0, 1) is how far above it."""
    rest = 1 - offset
    first, last = rest * rest * rest / 6, offset * offset * offset / 6
    second = 2 / 3 - offset * offset * (2 - offset) / 2
    return first, second, 1 - first - second - last, last


@_jit
def splat(block, placement, padded, support, masked):  # type: ignore[no-untyped-def]
    """Add the projection of ``block`` (z, y, x) to ``padded``, an image with :data:`MARGIN` pixels around it."""
    height, width = padded.shape[0] - 2 * MARGIN, padded.shape[1] - 2 * MARGIN
    real = block.dtype.type
    for z in range(block.shape[0]):
        for y in range(block.shape[1]):
            u0 = placement[0, 3] + placement[0, 2] * z + placement[0, 1] * y
            v0 = placement[1, 3] + placement[1, 2] * z + placement[1, 1] * y
            for x in range(block.shape[2]):
                u, v = u0 + placement[0, 0] * x, v0 + placement[1, 0] * x
                if not (-2 < u < width + 1 and -2 < v < height + 1) or (masked and not support[z, y, x]):
                    continue
                column, row = int(u + MARGIN), int(v + MARGIN)
                a = taps(u + MARGIN - column)
                b = taps(v + MARGIN - row)
                value = block[z, y, x]
                for j in range(4):
                    line = padded[row - 1 + j]
                    part = value * real(b[j])
                    for i in range(4):
                        line[column - 1 + i] += part * real(a[i])


@_jit
def gather(padded, placement, block, support, masked):  # type: ignore[no-untyped-def]
    """Add the adjoint of :func:`splat` to ``block``."""
    height, width = padded.shape[0] - 2 * MARGIN, padded.shape[1] - 2 * MARGIN
    real = block.dtype.type
    for z in range(block.shape[0]):
        for y in range(block.shape[1]):
            u0 = placement[0, 3] + placement[0, 2] * z + placement[0, 1] * y
            v0 = placement[1, 3] + placement[1, 2] * z + placement[1, 1] * y
            for x in range(block.shape[2]):
                u, v = u0 + placement[0, 0] * x, v0 + placement[1, 0] * x
                if not (-2 < u < width + 1 and -2 < v < height + 1) or (masked and not support[z, y, x]):
                    continue
                column, row = int(u + MARGIN), int(v + MARGIN)
                a = taps(u + MARGIN - column)
                b = taps(v + MARGIN - row)
                total = real(0)
                for j in range(4):
                    line = padded[row - 1 + j]
                    part = real(0)
                    for i in range(4):
                        part += line[column - 1 + i] * real(a[i])
                    total += part * real(b[j])
                block[z, y, x] += total


@_jit
def splat_axial(block, lines, width):  # type: ignore[no-untyped-def]
    """Return the strips (tilt, padded column, y) of ``block`` (z, y, x) for u = lines . (x, y, z, 1), y left alone."""
    depth, height, count = block.shape
    real = block.dtype.type
    strips = np.zeros((lines.shape[0], width + 2 * MARGIN, height), block.dtype)
    plane = np.empty((count, height), block.dtype)
    for z in range(depth):
        for y in range(height):
            for x in range(count):
                plane[x, y] = block[z, y, x]
        for tilt in range(lines.shape[0]):
            strip = strips[tilt]
            for x in range(count):
                u = lines[tilt, 3] + lines[tilt, 2] * z + lines[tilt, 0] * x
                if not -2 < u < width + 1:
                    continue
                column = int(u + MARGIN)
                first, second, third, last = taps(u + MARGIN - column)
                w0, w1, w2, w3 = real(first), real(second), real(third), real(last)
                for y in range(height):
                    value = plane[x, y]
                    strip[column - 1, y] += w0 * value
                    strip[column, y] += w1 * value
                    strip[column + 1, y] += w2 * value
                    strip[column + 2, y] += w3 * value
    return strips


@_jit
def gather_axial(strips, lines, block, support, masked):  # type: ignore[no-untyped-def]
    """Add the adjoint of :func:`splat_axial` to ``block``."""
    depth, height, count = block.shape
    width = strips.shape[1] - 2 * MARGIN
    real = block.dtype.type
    plane = np.empty((count, height), block.dtype)
    for z in range(depth):
        plane[:] = 0
        for tilt in range(lines.shape[0]):
            strip = strips[tilt]
            for x in range(count):
                u = lines[tilt, 3] + lines[tilt, 2] * z + lines[tilt, 0] * x
                if not -2 < u < width + 1:
                    continue
                column = int(u + MARGIN)
                first, second, third, last = taps(u + MARGIN - column)
                w0, w1, w2, w3 = real(first), real(second), real(third), real(last)
                for y in range(height):
                    near = w1 * strip[column, y] + w2 * strip[column + 1, y]
                    plane[x, y] += near + w0 * strip[column - 1, y] + w3 * strip[column + 2, y]
        for y in range(height):
            for x in range(count):
                if not masked or support[z, y, x]:
                    block[z, y, x] += plane[x, y]


@_jit
def rows_from_strip(strip, origin, image):  # type: ignore[no-untyped-def]
    """Add a strip (padded column, y) to ``image`` (row, column): y falls on row y + ``origin``."""
    real = image.dtype.type
    start = int(np.floor(origin))
    weights = taps(origin - start)
    for y in range(strip.shape[1]):
        for tap in range(4):
            row = y + start + tap - 1
            if 0 <= row < image.shape[0]:
                weight = real(weights[tap])
                for column in range(image.shape[1]):
                    image[row, column] += weight * strip[column + MARGIN, y]


@_jit
def strip_from_rows(image, origin, strip):  # type: ignore[no-untyped-def]
    """Adjoint of :func:`rows_from_strip`."""
    real = image.dtype.type
    start = int(np.floor(origin))
    weights = taps(origin - start)
    for y in range(strip.shape[1]):
        for tap in range(4):
            row = y + start + tap - 1
            if 0 <= row < image.shape[0]:
                weight = real(weights[tap])
                for column in range(image.shape[1]):
                    strip[column + MARGIN, y] += weight * image[row, column]
