"""Two-dimensional FFTs of batches of waves, and the convolution F^-1 H F without a detour through memory.

Single-precision waves in host memory, with edges of 16 and more that are products of 2, 3 and 5, are transformed here:
sixteen columns at a time, side by side in vector registers, by Stockham's self-sorting passes (Van Loan, Computational
Frameworks for the Fast Fourier Transform, 1992, ch. 1.7). Everything else goes to the FFTs of
:mod:`stemtomo.backend`. All transforms are orthonormal.
"""

from __future__ import annotations

import functools
import math
import threading

import numba
import numpy as np

from stemtomo import backend
from stemtomo.backend import Array
from stemtomo.kernels.lanes import WIDTH, load, load_complex, spread, store, store_complex, transpose

_OF_THREAD = threading.local()

jit = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "nsz"})


def fft2(waves: Array, overwrite: bool = False) -> Array:
    """Orthonormal 2D FFT over the last two axes."""
    return _transformed(waves, overwrite, inverse=False)


def ifft2(waves: Array, overwrite: bool = False) -> Array:
    """Inverse (and adjoint) of :func:`fft2`."""
    return _transformed(waves, overwrite, inverse=True)


class Transfer:
    """H (ky, kx), zero frequency first, laid out once for many calls of :func:`convolve`."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self._planes: np.ndarray | None = None

    @classmethod
    def of(cls, transfer: Array | Transfer) -> Transfer:
        """Return ``transfer`` itself, or laid out."""
        return transfer if isinstance(transfer, Transfer) else cls(transfer)

    @property
    def planes(self) -> np.ndarray:
        """Real and imaginary part, (2, kx x ky), over the number of pixels: two transforms leave that factor."""
        if self._planes is None:
            height, width = self.array.shape
            planes = backend.aligned_empty((2, width, height), np.float32)
            planes[0], planes[1] = self.array.real.T, self.array.imag.T
            planes *= np.float32(1 / (height * width))
            self._planes = planes.reshape(2, -1)
        return self._planes


def convolve(waves: Array, transfer: Array | Transfer, adjoint: bool = False) -> Array:
    """Return F^-1 H F of ``waves`` (..., y, x) with ``transfer`` H, or with its conjugate; consumes ``waves``."""
    if not is_ours(waves):
        array = transfer.array if isinstance(transfer, Transfer) else transfer
        spectra = backend.fft2(waves, overwrite=True)
        spectra *= array.conj() if adjoint else array
        return backend.ifft2(spectra, overwrite=True)
    height, width = waves.shape[-2:]
    conjugate = np.float32(-1 if adjoint else 1)
    layout = (*scratch(height, width), height, width, *plan(height), *plan(width))
    _convolve(pairs(waves), Transfer.of(transfer).planes, conjugate, *layout)
    return waves


def _transformed(waves: Array, overwrite: bool, inverse: bool) -> Array:
    if not is_ours(waves):
        return (backend.ifft2 if inverse else backend.fft2)(waves, overwrite=overwrite)
    out = waves if overwrite else waves.copy()
    height, width = out.shape[-2:]
    scale = np.float32(1 / math.sqrt(height * width))
    sign = np.float32(-1 if inverse else 1)
    _transform(pairs(out), scale, sign, *scratch(height, width), height, width, *plan(height), *plan(width))
    return out


def is_ours(waves: Array) -> bool:
    """Whether ``waves`` are transformed here."""
    return (
        type(waves) is np.ndarray
        and waves.dtype == np.complex64
        and waves.ndim >= 2
        and waves.flags.c_contiguous
        and all(length >= WIDTH and _radices(length) is not None for length in waves.shape[-2:])
    )


def pairs(waves: np.ndarray) -> np.ndarray:
    """Return complex ``waves`` as (wave, numbers), real and imaginary parts in turn."""
    return waves.reshape(-1, waves.shape[-2] * waves.shape[-1]).view(np.float32)


@functools.cache
def _radices(length: int) -> tuple[int, ...] | None:
    found = []
    for radix in (4, 2, 3, 5):
        while length % radix == 0:
            found.append(radix)
            length //= radix
    return tuple(found) if length == 1 else None


@functools.cache
def plan(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the radices of the passes and the twiddle factors (length, 2), cosine and -sine."""
    angle = 2 * np.pi * np.arange(length) / length
    return np.array(_radices(length)), np.stack([np.cos(angle), -np.sin(angle)], axis=1).astype(np.float32)


def scratch(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return this thread's four strips, and four planes whose rows are set apart so that columns share no cache lines.

    They are kept from call to call, because fresh memory would cost as much as the transform.
    """
    kept = getattr(_OF_THREAD, "scratch", None)
    if kept is None or kept[0] != (height, width):
        strips = backend.aligned_empty((4, max(height, width) * WIDTH), np.float32)
        planes = backend.aligned_empty((4, height * (width + WIDTH)), np.float32)
        kept = _OF_THREAD.scratch = ((height, width), strips, planes)
    return kept[1], kept[2]


@jit
def _transform(  # type: ignore[no-untyped-def]
    waves, scale, sign, strips, middle, height, width, radices_y, turns_y, radices_x, turns_x
):
    for wave in range(len(waves)):
        _columns_to_planes(waves[wave], strips, middle, height, width, radices_y, turns_y, sign)
        rows_to_pairs(waves[wave], scale, sign, strips, middle, height, width, radices_x, turns_x)


@jit
def _convolve(  # type: ignore[no-untyped-def]
    waves, planes, conjugate, strips, middle, height, width, radices_y, turns_y, radices_x, turns_x
):
    for wave in range(len(waves)):
        _columns_to_planes(waves[wave], strips, middle, height, width, radices_y, turns_y, np.float32(1))
        filter_rows(planes, conjugate, strips, middle, height, width, radices_x, turns_x)
        columns_to_pairs(waves[wave], strips, middle, height, width, radices_y, turns_y)


@jit
def _columns_to_planes(flat, strips, middle, height, width, radices, turns, sign):  # type: ignore[no-untyped-def]
    """Transform a wave of pairs along y into the first two planes."""
    a, b = strips[0], strips[1]
    for first in range(0, width, WIDTH):
        x = min(first, width - WIDTH)
        for y in range(height):
            re, im = load_complex(flat, 2 * (y * width + x))
            store(a, y * WIDTH, re)
            store(b, y * WIDTH, im)
        e, f = passes(a, b, strips[2], strips[3], height, radices, turns, sign)
        strip_to_planes(e, f, middle[0], middle[1], x, height, width)


@jit
def strip_to_planes(a, b, real, imaginary, x, height, width):  # type: ignore[no-untyped-def]
    """Put a strip of columns from ``x`` on into two planes."""
    step = width + WIDTH
    for y in range(height):
        store(real, y * step + x, load(a, y * WIDTH))
        store(imaginary, y * step + x, load(b, y * WIDTH))


@jit
def filter_rows(planes, conjugate, strips, middle, height, width, radices, turns):  # type: ignore[no-untyped-def]
    """Transform the first two planes along x, multiply with H or its conjugate, transform back into the other two."""
    a, b, c, d = strips[0], strips[1], strips[2], strips[3]
    turn = spread(conjugate)
    for first in range(0, height, WIDTH):
        row = min(first, height - WIDTH)
        _rows_in(middle[0], middle[1], row, width, a, b)
        e, f = passes(a, b, c, d, width, radices, turns, np.float32(1))
        for k in range(width):
            re, im = load(e, k * WIDTH), load(f, k * WIDTH)
            hr, hi = load(planes[0], k * height + row), load(planes[1], k * height + row) * turn
            store(e, k * WIDTH, re * hr - im * hi)
            store(f, k * WIDTH, re * hi + im * hr)
        g, h = (c, d) if len(radices) % 2 == 0 else (a, b)
        e, f = passes(e, f, g, h, width, radices, turns, np.float32(-1))
        _rows_out(e, f, middle[2], middle[3], row, width)


@jit
def columns_to_pairs(flat, strips, middle, height, width, radices, turns):  # type: ignore[no-untyped-def]
    """Transform the other two planes back along y into a wave of pairs."""
    a, b, step = strips[0], strips[1], width + WIDTH
    for first in range(0, width, WIDTH):
        x = min(first, width - WIDTH)
        for y in range(height):
            store(a, y * WIDTH, load(middle[2], y * step + x))
            store(b, y * WIDTH, load(middle[3], y * step + x))
        e, f = passes(a, b, strips[2], strips[3], height, radices, turns, np.float32(-1))
        for y in range(height):
            store_complex(flat, 2 * (y * width + x), load(e, y * WIDTH), load(f, y * WIDTH))


@jit
def rows_to_pairs(flat, scale, sign, strips, middle, height, width, radices, turns):  # type: ignore[no-untyped-def]
    """Transform the first two planes along x into a wave of pairs, times ``scale``."""
    a, b, step = strips[0], strips[1], width + WIDTH
    factor = spread(scale)
    for first in range(0, height, WIDTH):
        row = min(first, height - WIDTH)
        _rows_in(middle[0], middle[1], row, width, a, b)
        e, f = passes(a, b, strips[2], strips[3], width, radices, turns, sign)
        # The strip goes through the first rows of the other planes, to be paired up.
        _rows_out(e, f, middle[2], middle[3], 0, width)
        for y in range(WIDTH):
            for x0 in range(0, width, WIDTH):
                x = min(x0, width - WIDTH)
                re, im = load(middle[2], y * step + x), load(middle[3], y * step + x)
                store_complex(flat, 2 * ((row + y) * width + x), re * factor, im * factor)


@jit
def _rows_in(real, imaginary, row, width, a, b):  # type: ignore[no-untyped-def]
    step = width + WIDTH
    for first in range(0, width, WIDTH):
        x = min(first, width - WIDTH)
        transpose(real, row * step + x, step, a, x * WIDTH, WIDTH)
        transpose(imaginary, row * step + x, step, b, x * WIDTH, WIDTH)


@jit
def _rows_out(a, b, real, imaginary, row, width):  # type: ignore[no-untyped-def]
    step = width + WIDTH
    for first in range(0, width, WIDTH):
        x = min(first, width - WIDTH)
        transpose(a, x * WIDTH, WIDTH, real, row * step + x, step)
        transpose(b, x * WIDTH, WIDTH, imaginary, row * step + x, step)


@jit
def passes(a, b, c, d, length, radices, turns, sign):  # type: ignore[no-untyped-def]
    """Transform a strip in ``a`` + i ``b`` with ``c``, ``d`` to work in; return where the result is."""
    stride, rest = 1, length
    for radix in radices:
        rest //= radix
        if radix == 4:
            _pass4(a, b, c, d, rest, stride, turns, sign)
        elif radix == 2:
            _pass2(a, b, c, d, rest, stride, turns, sign)
        elif radix == 3:
            _pass3(a, b, c, d, rest, stride, turns, sign)
        else:
            _pass5(a, b, c, d, rest, stride, turns, sign)
        stride *= radix
        a, b, c, d = c, d, a, b
    return a, b


@jit
def _pass2(xr, xi, yr, yi, rest, stride, turns, sign):  # type: ignore[no-untyped-def]
    step = stride * WIDTH
    for p in range(rest):
        wr, wi = spread(turns[p * stride, 0]), spread(turns[p * stride, 1] * sign)
        for q in range(0, step, WIDTH):
            i, o = p * step + q, 2 * p * step + q
            ar, ai, br, bi = load(xr, i), load(xi, i), load(xr, i + rest * step), load(xi, i + rest * step)
            store(yr, o, ar + br)
            store(yi, o, ai + bi)
            tr, ti = ar - br, ai - bi
            store(yr, o + step, tr * wr - ti * wi)
            store(yi, o + step, tr * wi + ti * wr)


@jit
def _pass3(xr, xi, yr, yi, rest, stride, turns, sign):  # type: ignore[no-untyped-def]
    step = stride * WIDTH
    half, sine = spread(np.float32(0.5)), spread(np.float32(math.sqrt(0.75)) * sign)
    for p in range(rest):
        w1r, w1i = spread(turns[p * stride, 0]), spread(turns[p * stride, 1] * sign)
        w2r, w2i = spread(turns[2 * p * stride, 0]), spread(turns[2 * p * stride, 1] * sign)
        for q in range(0, step, WIDTH):
            i, o = p * step + q, 3 * p * step + q
            ar, ai = load(xr, i), load(xi, i)
            br, bi = load(xr, i + rest * step), load(xi, i + rest * step)
            cr, ci = load(xr, i + 2 * rest * step), load(xi, i + 2 * rest * step)
            sr, si = br + cr, bi + ci
            dr, di = (bi - ci) * sine, (cr - br) * sine
            mr, mi = ar - sr * half, ai - si * half
            store(yr, o, ar + sr)
            store(yi, o, ai + si)
            tr, ti = mr + dr, mi + di
            store(yr, o + step, tr * w1r - ti * w1i)
            store(yi, o + step, tr * w1i + ti * w1r)
            tr, ti = mr - dr, mi - di
            store(yr, o + 2 * step, tr * w2r - ti * w2i)
            store(yi, o + 2 * step, tr * w2i + ti * w2r)


@jit
def _pass4(xr, xi, yr, yi, rest, stride, turns, sign):  # type: ignore[no-untyped-def]
    step = stride * WIDTH
    way = spread(sign)
    for p in range(rest):
        w1r, w1i = spread(turns[p * stride, 0]), spread(turns[p * stride, 1] * sign)
        w2r, w2i = spread(turns[2 * p * stride, 0]), spread(turns[2 * p * stride, 1] * sign)
        w3r, w3i = spread(turns[3 * p * stride, 0]), spread(turns[3 * p * stride, 1] * sign)
        for q in range(0, step, WIDTH):
            i, o = p * step + q, 4 * p * step + q
            ar, ai = load(xr, i), load(xi, i)
            br, bi = load(xr, i + rest * step), load(xi, i + rest * step)
            cr, ci = load(xr, i + 2 * rest * step), load(xi, i + 2 * rest * step)
            dr, di = load(xr, i + 3 * rest * step), load(xi, i + 3 * rest * step)
            er, ei, fr, fi = ar + cr, ai + ci, ar - cr, ai - ci
            gr, gi, hr, hi = br + dr, bi + di, (bi - di) * way, (dr - br) * way
            store(yr, o, er + gr)
            store(yi, o, ei + gi)
            tr, ti = fr + hr, fi + hi
            store(yr, o + step, tr * w1r - ti * w1i)
            store(yi, o + step, tr * w1i + ti * w1r)
            tr, ti = er - gr, ei - gi
            store(yr, o + 2 * step, tr * w2r - ti * w2i)
            store(yi, o + 2 * step, tr * w2i + ti * w2r)
            tr, ti = fr - hr, fi - hi
            store(yr, o + 3 * step, tr * w3r - ti * w3i)
            store(yi, o + 3 * step, tr * w3i + ti * w3r)


@jit
def _pass5(xr, xi, yr, yi, rest, stride, turns, sign):  # type: ignore[no-untyped-def]
    step = stride * WIDTH
    c1, c2 = spread(np.float32(math.cos(0.4 * math.pi))), spread(np.float32(math.cos(0.8 * math.pi)))
    s1 = spread(np.float32(math.sin(0.4 * math.pi)) * sign)
    s2 = spread(np.float32(math.sin(0.8 * math.pi)) * sign)
    for p in range(rest):
        for q in range(0, step, WIDTH):
            i, o = p * step + q, 5 * p * step + q
            ar, ai = load(xr, i), load(xi, i)
            br, bi = load(xr, i + rest * step), load(xi, i + rest * step)
            cr, ci = load(xr, i + 2 * rest * step), load(xi, i + 2 * rest * step)
            dr, di = load(xr, i + 3 * rest * step), load(xi, i + 3 * rest * step)
            er, ei = load(xr, i + 4 * rest * step), load(xi, i + 4 * rest * step)
            fr, fi, gr, gi = br + er, bi + ei, cr + dr, ci + di
            hr, hi, kr, ki = br - er, bi - ei, cr - dr, ci - di
            store(yr, o, ar + fr + gr)
            store(yi, o, ai + fi + gi)
            mr, mi = ar + fr * c1 + gr * c2, ai + fi * c1 + gi * c2
            nr, ni = hi * s1 + ki * s2, kr * s2 + hr * s1
            _turned(yr, yi, o + step, mr + nr, mi - ni, turns, p * stride, sign)
            _turned(yr, yi, o + 4 * step, mr - nr, mi + ni, turns, 4 * p * stride, sign)
            mr, mi = ar + fr * c2 + gr * c1, ai + fi * c2 + gi * c1
            nr, ni = hi * s2 - ki * s1, hr * s2 - kr * s1
            _turned(yr, yi, o + 2 * step, mr + nr, mi - ni, turns, 2 * p * stride, sign)
            _turned(yr, yi, o + 3 * step, mr - nr, mi + ni, turns, 3 * p * stride, sign)


@jit
def _turned(yr, yi, o, tr, ti, turns, at, sign):  # type: ignore[no-untyped-def]
    wr, wi = spread(turns[at, 0]), spread(turns[at, 1] * sign)
    store(yr, o, tr * wr - ti * wi)
    store(yi, o, tr * wi + ti * wr)
