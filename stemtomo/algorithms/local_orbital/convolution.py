"""Convolution of a stack of slices with one kernel per slice, summed along the beam, and its adjoints.

Two slices go through a complex transform together, one as the real and one as the imaginary part: with z = a + i b
behind the kernel p - i q the real part is a * p + b * q, which is what is summed, and the correlation of a real
residual with that kernel holds both slices' correlations apart. No spectrum has to be taken apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import scipy.fft

from stemtomo.backend import Array, array_namespace, to_device_of, together_bytes
from stemtomo.kernels.fourier import fft2, ifft2


def padded_shape(shape_yx: tuple[int, int], window_yx: tuple[int, int]) -> tuple[int, int]:
    """Return the shape in which convolutions of what lies within the image do not fold back onto it."""
    rows, columns = (
        scipy.fft.next_fast_len(n + w // 2 + 1, real=True) for n, w in zip(shape_yx, window_yx, strict=True)
    )
    return int(rows), int(columns)


class SliceConvolution:
    """Buffers for the convolution of ``slices`` slices of ``shape``, in the dtype and the memory of ``like``."""

    def __init__(self, slices: int, shape: tuple[int, int], like: Array) -> None:
        xp = array_namespace(like)
        self._pairs = (slices + 1) // 2
        self._shape = shape
        self._stack = xp.zeros((2 * self._pairs, *shape), dtype=like.dtype)
        self._complex = xp.result_type(like.dtype, xp.complex64)
        size = math.prod(shape) * self._complex.itemsize
        self._together = max(1, int(together_bytes(like) // size))
        self._root = math.sqrt(math.prod(shape))
        #: The slices (slice, y, x), to draw into and to read correlations from.
        self.stack = self._stack[:slices]

    def cut(self, shape_yx: tuple[int, int]) -> None:
        """Make the slices zero beyond an image of ``shape_yx``: what stands there would fold back onto it."""
        self._stack[:, shape_yx[0] :] = 0
        self._stack[:, :, shape_yx[1] :] = 0

    def transfers(self, kernels: Array) -> Array:
        """Return what :meth:`image` multiplies with for ``kernels`` (slice, y, x), centred on index n // 2."""
        xp = array_namespace(kernels)
        at = self._window(kernels, kernels.shape[-2:])
        whole = xp.zeros((self._pairs, *self._shape), dtype=self._complex)
        whole.real[at] = kernels[0::2]
        whole.imag[: len(kernels) // 2][at] = -kernels[1::2]
        spectra = fft2(whole, overwrite=True)
        spectra *= spectra.real.dtype.type(self._root)
        return spectra

    def transfer(self, of_frequencies: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Array:
        """Return a function of ky (y, 1) and kx (x,), in cycles per pixel, to multiply spectra with."""
        rows, columns = self._shape
        found = of_frequencies(np.fft.fftfreq(rows)[:, None], np.fft.fftfreq(columns))
        return to_device_of(found.astype(self._stack.dtype), self._stack)

    def image(self, transfers: Array) -> tuple[Array, list[Array]]:
        """Return the sum of the slices behind their kernels, (y, x), and spectra of pairs of slices for later."""
        xp = array_namespace(transfers)
        total = xp.zeros(self._shape, dtype=self._complex)
        found: list[Array] = []
        for first in range(0, self._pairs, self._together):
            last = min(first + self._together, self._pairs)
            waves = xp.empty((last - first, *self._shape), dtype=self._complex)
            waves.real = self._stack[2 * first : 2 * last : 2]
            waves.imag = self._stack[2 * first + 1 : 2 * last : 2]
            found += list(fft2(waves, overwrite=True))
            for pair in range(first, last):
                total += found[pair] * transfers[pair]
        return ifft2(total, overwrite=True).real, found

    def turned_spectrum(self, residual: Array) -> Array:
        """Return the conjugate spectrum of a real image (y, x)."""
        return fft2(residual.astype(self._complex), overwrite=True).conj()

    def correlate(self, transfers: Array, turned: Array) -> None:
        """Fill the stack with the adjoint of :meth:`image` at an image with this :meth:`turned_spectrum`."""
        for first in range(0, self._pairs, self._together):
            last = min(first + self._together, self._pairs)
            # The inverse transform of a conjugate is the conjugate of the transform.
            waves = fft2(transfers[first:last] * turned, overwrite=True)
            self._stack[2 * first : 2 * last : 2] = waves.real
            array_namespace(waves).negative(waves.imag, out=self._stack[2 * first + 1 : 2 * last : 2])

    def kernels_adjoint(self, total: Array, slices: int, window_yx: tuple[int, int]) -> Array:
        """Return the adjoint in the kernels, (slice, y, x), from the sum of spectra times turned spectra."""
        spectra = fft2(total, overwrite=True)
        waves = spectra[self._window(total, window_yx)] * total.real.dtype.type(self._root)
        out = array_namespace(total).empty((slices, *window_yx), dtype=waves.real.dtype)
        out[0::2] = waves.real
        out[1::2] = waves.imag[: slices // 2]
        return out

    def _window(self, like: Array, window_yx: tuple[int, int]) -> tuple[slice, Array, Array]:
        """Return the index of a window around the origin, which is at index 0 and wraps."""
        xp = array_namespace(like)
        rows, columns = ((xp.arange(w) - w // 2) % n for w, n in zip(window_yx, self._shape, strict=True))
        return slice(None), rows[:, None], columns[None, :]
