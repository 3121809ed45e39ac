"""A stand-in for CuPy on a machine without a GPU: the same code runs, and what CuPy would refuse is refused.

Arrays are NumPy arrays inside a wrapper that, like CuPy's, does not turn into a NumPy array by itself, does not mix
with one in arithmetic or assignment, and keeps results of reductions on the device. Kernels are the CUDA sources
compiled for the host (:mod:`tests.kernels.host_cuda`), and take contiguous arrays of the declared types alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import scipy.fft

from stemtomo import backend
from stemtomo.kernels import cuda
from tests.kernels import host_cuda

#: Those of CuPy's methods that the package calls.
_METHODS = frozenset(
    ["sum", "mean", "max", "min", "any", "all", "clip", "astype", "reshape", "conj", "copy", "ravel", "transpose"]
)


class ndarray(np.lib.mixins.NDArrayOperatorsMixin):
    """An array that only the device can read."""

    def __init__(self, host: np.ndarray) -> None:
        self._host = host

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("implicit conversion to a NumPy array is not allowed; use .get()")

    def get(self) -> np.ndarray:
        return self._host.copy()

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        _refuse_host_arrays(inputs)
        if "out" in options:
            options["out"] = tuple(_host(out) for out in options["out"])
        found = _device(getattr(ufunc, method)(*map(_host, inputs), **options))
        return found

    def __array_function__(self, function: Callable, _types: Any, arguments: Any, options: Any) -> Any:
        return _on_device(function)(*arguments, **options)

    def __getitem__(self, key: Any) -> Any:
        # CuPy takes indices and masks of either memory.
        return _device(self._host[_host(key)])

    def __setitem__(self, key: Any, value: Any) -> None:
        _refuse_host_arrays((value,))
        self._host[_host(key)] = _host(value)

    def __len__(self) -> int:
        return len(self._host)

    def __iter__(self) -> Iterator[Any]:
        return (_device(item) for item in self._host)

    def __float__(self) -> float:
        return float(self._host)

    def __int__(self) -> int:
        return int(self._host)

    def __bool__(self) -> bool:
        return bool(self._host)

    @property
    def T(self) -> Any:
        return _device(self._host.T)

    @property
    def real(self) -> Any:
        return _device(self._host.real)

    @real.setter
    def real(self, value: Any) -> None:
        _refuse_host_arrays((value,))
        self._host.real = _host(value)

    @property
    def imag(self) -> Any:
        return _device(self._host.imag)

    @imag.setter
    def imag(self, value: Any) -> None:
        _refuse_host_arrays((value,))
        self._host.imag = _host(value)

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "dtype", "ndim", "size", "nbytes", "flags", "itemsize"):
            return getattr(self._host, name)
        if name in _METHODS:
            return _on_device(getattr(self._host, name))
        raise AttributeError(f"the pretended device array has no attribute {name!r}")


ndarray.__module__ = "cupy"


class _Namespace:
    """The functions of NumPy (or of one of its modules) on device arrays."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        if name == "fft" and self._module is np:
            return _Namespace(np.fft)
        found = getattr(self._module, name)
        return _on_device(found) if callable(found) and not isinstance(found, type) else found

    def asarray(self, value: Any, dtype: Any = None) -> ndarray:
        host = value._host if isinstance(value, ndarray) else np.array(value)
        return ndarray(host if dtype is None else host.astype(dtype, copy=False))


def launch(module: str, kernel: str, count: int, real: np.dtype, *arguments: Any) -> None:
    """Run the CUDA source on the host with arguments of the declared types."""
    declared = _declared(module, kernel, np.dtype(real))
    for argument, wanted in zip(arguments, declared, strict=True):
        if wanted is None:
            assert not isinstance(argument, ndarray), f"{kernel}: an array where a number is declared"
            continue
        assert isinstance(argument, ndarray), f"{kernel}: {type(argument)} where a device array is declared"
        assert argument.dtype in wanted, f"{kernel}: {argument.dtype} where {wanted} is declared"
    cuda.require_contiguous(kernel, arguments)
    host_cuda.launch(module, kernel, count, real, *map(_host, arguments))


def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[np.ndarray], ndarray]:
    """Make the package believe in the pretended device; return the function that puts an array there."""
    namespace = _Namespace(np)
    monkeypatch.setattr(backend, "_cupy", lambda: namespace)
    monkeypatch.setattr(backend, "_cupy_fft", lambda: _Namespace(scipy.fft))
    monkeypatch.setattr(cuda, "launch", launch)
    return namespace.asarray


def _declared(module: str, kernel: str, real: np.dtype) -> list[tuple[np.dtype, ...] | None]:
    """Return the types that each argument after the first may have; ``None`` for numbers."""
    (text,) = re.findall(rf'extern "C" __global__ void {kernel}\(([^)]*)\)', cuda.source(module), re.S)
    names = {"long long": np.int64, "bool": np.bool_, "double": np.float64, "float": np.float32}
    names |= {"unsigned char": np.uint8, "unsigned short": np.uint16, "unsigned int": np.uint32}
    types: list[tuple[np.dtype, ...] | None] = []
    for parameter in text.split(",")[1:]:
        if "*" not in parameter:
            types.append(None)
            continue
        name = parameter.partition("*")[0].replace("const", "").strip()
        if name == "REAL":
            types.append((real, np.result_type(real, np.complex64)))
        else:
            types.append((np.dtype(names[name]),))
    return types


def _on_device(function: Callable) -> Callable:
    def call(*arguments: Any, **options: Any) -> Any:
        _refuse_host_arrays([*arguments, *options.values()])
        options.pop("plan", None)
        return _device(function(*map(_host, arguments), **{key: _host(value) for key, value in options.items()}))

    return call


def _refuse_host_arrays(values: Any) -> None:
    for value in values:
        if isinstance(value, (list, tuple)):
            _refuse_host_arrays(value)
        if isinstance(value, np.ndarray):
            raise TypeError("Unsupported type <class 'numpy.ndarray'>: it is in host memory")


def _host(value: Any) -> Any:
    if isinstance(value, ndarray):
        return value._host
    if isinstance(value, (list, tuple)):
        return type(value)(_host(item) for item in value)
    return value


def _device(value: Any) -> Any:
    """Wrap arrays and, as CuPy does, the scalars that reductions and indexing leave."""
    if isinstance(value, (np.ndarray, np.generic)):
        return ndarray(np.asarray(value))
    if isinstance(value, list):
        return [_device(item) for item in value]
    if isinstance(value, tuple):  # NumPy's are named, CuPy's are not
        return tuple(_device(item) for item in value)
    return value
