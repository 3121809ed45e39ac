"""Array namespace of an array (NumPy or CuPy), batched FFTs and device memory.

Everything above this module is written once and works on the namespace of the array it is given.
CuPy is imported here and in ``kernels`` only, and only when a CuPy array or a GPU is asked for.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import scipy.fft

Array: TypeAlias = Any
"""A NumPy or CuPy array. Shapes, dims and units are stated where it is used."""

#: Bytes of arrays that stay in the cache of a core while they are worked on.
CACHE_BYTES = 1 << 20
CACHE_LINE_BYTES = 64
#: Bytes of arrays that fill a GPU; its kernels are too short otherwise.
DEVICE_TOGETHER_BYTES = 64 << 20


def is_device_array(array: Array) -> bool:
    """Whether ``array`` lives on a GPU (a CuPy array)."""
    return type(array).__module__.partition(".")[0] == "cupy"


def array_namespace(*arrays: Array) -> ModuleType:
    """Return ``cupy`` if any of ``arrays`` is a CuPy array, else ``numpy``."""
    if any(is_device_array(array) for array in arrays):
        return _cupy()
    return np


def to_host(array: Array) -> np.ndarray:
    """Return ``array`` as a NumPy array, copying from the device where needed."""
    return array.get() if is_device_array(array) else np.asarray(array)


def to_device_of(array: Array, like: Array) -> Array:
    """Return ``array`` in the memory of ``like``."""
    if is_device_array(like):
        return _cupy().asarray(array)
    return to_host(array)


def to_device(array: Array) -> Array:
    """Return ``array`` in the memory of the current GPU."""
    return _cupy().asarray(array)


def fft2(array: Array, overwrite: bool = False) -> Array:
    """Orthonormal 2D FFT over the last two axes, in the precision of ``array``; electrons are conserved (Parseval)."""
    return _fft_module(array).fft2(array, axes=(-2, -1), norm="ortho", overwrite_x=overwrite)


def ifft2(array: Array, overwrite: bool = False) -> Array:
    """Inverse (and adjoint) of :func:`fft2`."""
    return _fft_module(array).ifft2(array, axes=(-2, -1), norm="ortho", overwrite_x=overwrite)


def fft1(array: Array, axis: int) -> Array:
    """Orthonormal 1D FFT along ``axis``."""
    return _fft_module(array).fft(array, axis=axis, norm="ortho")


def ifft1(array: Array, axis: int) -> Array:
    """Inverse (and adjoint) of :func:`fft1`."""
    return _fft_module(array).ifft(array, axis=axis, norm="ortho")


def dct2(array: Array) -> Array:
    """Orthonormal 2D cosine transform (type II) over the last two axes: mirror boundaries."""
    return _fft_module(array).dctn(array, type=2, axes=(-2, -1), norm="ortho")


def idct2(array: Array) -> Array:
    """Inverse (and adjoint) of :func:`dct2`."""
    return _fft_module(array).idctn(array, type=2, axes=(-2, -1), norm="ortho")


def rfft2(array: Array) -> Array:
    """Return the plain 2D FFT of real images over the last two axes, in their precision; kx >= 0 alone."""
    return _fft_module(array).rfft2(array, axes=(-2, -1))


def irfft2(array: Array, shape_yx: tuple[int, int]) -> Array:
    """Inverse of :func:`rfft2` for images of ``shape_yx``."""
    return _fft_module(array).irfft2(array, shape_yx, axes=(-2, -1))


def rfft3(array: Array) -> Array:
    """Return the plain 3D FFT of a real volume (z, y, x), in its precision; kx >= 0 alone."""
    return _fft_module(array).rfftn(array)


def irfft3(array: Array, shape: tuple[int, int, int]) -> Array:
    """Inverse of :func:`rfft3` for a volume of ``shape``."""
    return _fft_module(array).irfftn(array, shape)


def fftfreq(count: int, spacing: float, like: Array) -> Array:
    """Sample frequencies (cycles per unit of ``spacing``), zero frequency first, in the memory of ``like``, float64."""
    return array_namespace(like).fft.fftfreq(count, spacing)


def together_bytes(like: Array) -> int:
    """Return how many bytes to work on together where ``like`` is: a core's cache, or what keeps a GPU busy."""
    return DEVICE_TOGETHER_BYTES if is_device_array(like) else CACHE_BYTES


def real_dtype(array: Array) -> np.dtype:
    """Real dtype of the precision of ``array``: complex64 -> float32, complex128 -> float64."""
    return np.zeros(0, array.dtype).real.dtype


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
    """Return an uninitialised host array that begins on a cache line, as vector loads of whole lines want it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + CACHE_LINE_BYTES, dtype=np.uint8)
    start = -raw.__array_interface__["data"][0] % CACHE_LINE_BYTES  # raw.ctypes takes several times as long
    return raw[start : start + size].view(dtype).reshape(shape)


def gpu_available() -> bool:
    """Whether CuPy is installed and sees a device."""
    try:
        return int(_cupy().cuda.runtime.getDeviceCount()) > 0
    except Exception:  # CuPy raises its own runtime error without a driver, ImportError without CuPy
        return False


def device_memory_bytes() -> int:
    """Free memory of the current GPU in bytes; 0 without one."""
    if not gpu_available():
        return 0
    free, _total = _cupy().cuda.runtime.memGetInfo()
    return int(free)


def _fft_module(array: Array) -> Any:
    if is_device_array(array):
        return _cupy_fft()
    return scipy.fft


@functools.cache
def _cupy() -> ModuleType:
    import cupy

    return cupy


@functools.cache
def _cupy_fft() -> ModuleType:
    import cupyx.scipy.fft

    return cupyx.scipy.fft
