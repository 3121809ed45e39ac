"""A wave through one slice, fused with the transform behind it: what multislice spends its time in.

The product with the slice's window is taken while the transform reads its input, so that no wave goes through memory
twice. What :mod:`stemtomo.kernels.fourier` does not transform itself (double precision, a GPU, odd edges), and windows
that wrap around a periodic object, go through the separate kernels of :mod:`stemtomo.kernels.patches`, to the same
numbers within rounding.
"""

from __future__ import annotations

import math

import numpy as np

from stemtomo import backend
from stemtomo.backend import Array
from stemtomo.kernels import fourier, patches
from stemtomo.kernels.lanes import WIDTH, add_complex, load_complex, store


def fused(waves: Array, transmission: Array, corners: Array) -> bool:
    """Whether products of ``waves`` and their windows of ``transmission`` (Y, X) are fused with transforms."""
    if not fourier.is_ours(waves) or not transmission.flags.c_contiguous or transmission.dtype != np.complex64:
        return False
    (top, left), (bottom, right) = corners.min(axis=0), corners.max(axis=0)
    height, width = transmission.shape[-2:]
    return bool(min(top, left) >= 0 and bottom + waves.shape[-2] <= height and right + waves.shape[-1] <= width)


def transmit_fft2(waves: Array, transmission: Array, corners: Array, fits: bool | None = None) -> Array:
    """Return the spectra of ``waves`` (position, y, x) behind their windows of ``transmission`` (Y, X).

    ``fits`` is what :func:`fused` says, where the caller knows, here and below.
    """
    if not _known(fits, waves, transmission, corners):
        return fourier.fft2(patches.transmit(waves, transmission, corners), overwrite=True)
    out = backend.aligned_empty(waves.shape, np.complex64)
    height, width = waves.shape[-2:]
    scale = np.float32(1 / math.sqrt(height * width))
    layout = (*fourier.scratch(height, width), height, width, *fourier.plan(height), *fourier.plan(width))
    _transmit_fft2(fourier.pairs(waves), fourier.pairs(out), _numbers(transmission), corners, scale, *layout)
    return out


def transmit_convolve(
    waves: Array,
    transmission: Array,
    corners: Array,
    transfer: fourier.Transfer | Array,
    fits: bool | None = None,
) -> Array:
    """Return ``waves`` (position, y, x) behind their windows of ``transmission`` (Y, X) and ``transfer`` H (ky, kx)."""
    if not _known(fits, waves, transmission, corners):
        return fourier.convolve(patches.transmit(waves, transmission, corners), transfer)
    out = backend.aligned_empty(waves.shape, np.complex64)
    height, width = waves.shape[-2:]
    planes = fourier.Transfer.of(transfer).planes
    layout = (*fourier.scratch(height, width), height, width, *fourier.plan(height), *fourier.plan(width))
    _transmit_convolve(fourier.pairs(waves), fourier.pairs(out), _numbers(transmission), corners, planes, *layout)
    return out


def transmit_adjoint_convolve(
    gradient: Array,
    incident: Array,
    transmission: Array,
    corners: Array,
    object_gradient: Array,
    transfer: fourier.Transfer | Array,
    fits: bool | None = None,
) -> Array:
    """Adjoint of a slice, then that of the gap in front of it.

    As :func:`stemtomo.kernels.patches.transmit_adjoint`, then the convolution with the conjugate of ``transfer``;
    consumes ``gradient`` and returns the gradient of the waves behind the slice before.
    """
    if not _known(fits, gradient, transmission, corners) or not object_gradient.flags.c_contiguous:
        patches.transmit_adjoint(gradient, incident, transmission, corners, object_gradient)
        return fourier.convolve(gradient, transfer, adjoint=True)
    height, width = gradient.shape[-2:]
    planes = fourier.Transfer.of(transfer).planes
    layout = (*fourier.scratch(height, width), height, width, *fourier.plan(height), *fourier.plan(width))
    _adjoint_convolve(
        fourier.pairs(gradient),
        fourier.pairs(incident),
        _numbers(transmission),
        _numbers(object_gradient),
        corners,
        planes,
        *layout,
    )
    return gradient


def _known(fits: bool | None, waves: Array, transmission: Array, corners: Array) -> bool:
    return fused(waves, transmission, corners) if fits is None else fits


def _numbers(slice_array: np.ndarray) -> np.ndarray:
    """Return a complex slice (Y, X) as (Y, 2 X) numbers."""
    return slice_array.view(np.float32)


@fourier.jit
def _transmitted_columns(  # type: ignore[no-untyped-def]
    flat, layer, row, column, real, imaginary, height, width, a, b, c, d, radices, turns
):
    """Transform a wave times its window along y into two planes."""
    for first in range(0, width, WIDTH):
        x = min(first, width - WIDTH)
        for y in range(height):
            pr, pi = load_complex(flat, 2 * (y * width + x))
            tr, ti = load_complex(layer[row + y], 2 * (column + x))
            store(a, y * WIDTH, pr * tr - pi * ti)
            store(b, y * WIDTH, pr * ti + pi * tr)
        e, f = fourier.passes(a, b, c, d, height, radices, turns, np.float32(1))
        fourier.strip_to_planes(e, f, real, imaginary, x, height, width)


@fourier.jit
def _transmit_fft2(  # type: ignore[no-untyped-def]
    pairs, out, layer, corners, scale, strips, middle, height, width, radices_y, turns_y, radices_x, turns_x
):
    a, b, c, d = strips[0], strips[1], strips[2], strips[3]
    for j in range(len(pairs)):
        row, column = corners[j, 0], corners[j, 1]
        _transmitted_columns(
            pairs[j], layer, row, column, middle[0], middle[1], height, width, a, b, c, d, radices_y, turns_y
        )
        fourier.rows_to_pairs(out[j], scale, np.float32(1), strips, middle, height, width, radices_x, turns_x)


@fourier.jit
def _transmit_convolve(  # type: ignore[no-untyped-def]
    pairs, out, layer, corners, planes, strips, middle, height, width, radices_y, turns_y, radices_x, turns_x
):
    a, b, c, d = strips[0], strips[1], strips[2], strips[3]
    for j in range(len(pairs)):
        row, column = corners[j, 0], corners[j, 1]
        _transmitted_columns(
            pairs[j], layer, row, column, middle[0], middle[1], height, width, a, b, c, d, radices_y, turns_y
        )
        fourier.filter_rows(planes, np.float32(1), strips, middle, height, width, radices_x, turns_x)
        fourier.columns_to_pairs(out[j], strips, middle, height, width, radices_y, turns_y)


@fourier.jit
def _adjoint_convolve(  # type: ignore[no-untyped-def]
    pairs, incident, layer, pull, corners, planes, strips, middle, height, width, radices_y, turns_y, radices_x, turns_x
):
    a, b, c, d = strips[0], strips[1], strips[2], strips[3]
    for j in range(len(pairs)):
        flat, wave = pairs[j], incident[j]
        row, column = corners[j, 0], corners[j, 1]
        done = 0
        for first in range(0, width, WIDTH):
            x = min(first, width - WIDTH)
            for y in range(height):
                at = 2 * (y * width + x)
                gr, gi = load_complex(flat, at)
                pr, pi = load_complex(wave, at)
                tr, ti = load_complex(layer[row + y], 2 * (column + x))
                # A last strip that overlaps the one before adds only what is new.
                add_complex(pull[row + y], 2 * (column + x), pr * gr + pi * gi, pr * gi - pi * gr, done - x)
                store(a, y * WIDTH, gr * tr + gi * ti)
                store(b, y * WIDTH, gi * tr - gr * ti)
            done = x + WIDTH
            e, f = fourier.passes(a, b, c, d, height, radices_y, turns_y, np.float32(1))
            fourier.strip_to_planes(e, f, middle[0], middle[1], x, height, width)
        fourier.filter_rows(planes, np.float32(-1), strips, middle, height, width, radices_x, turns_x)
        fourier.columns_to_pairs(flat, strips, middle, height, width, radices_y, turns_y)
