"""Launching the raw CUDA kernels of this package: one thread per element, sources in the ``.cu`` files beside this one.

Every kernel is ``extern "C" __global__ void name(long long count, ...)``, uses the macro ``REAL`` for its precision,
sees complex arrays as interleaved ``REAL`` pairs, and touches shared results through ``atomicAdd`` alone; so the same
source can be checked on a machine without a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np

from stemtomo.backend import Array

THREADS_PER_BLOCK = 256


def source(module: str) -> str:
    """Return the CUDA source of ``module`` (the name of a ``.cu`` file beside this one)."""
    return resources.files(__package__).joinpath(f"{module}.cu").read_text(encoding="utf-8")


def launch(module: str, kernel: str, count: int, real: np.dtype, *arguments: Array | int | float) -> None:
    """Run ``kernel`` of ``module`` over ``count`` threads on the current device.

    Python ints are passed as ``long long`` and Python floats in the precision ``real``; arrays by pointer, so they must
    be C-contiguous and of the dtype that the kernel expects.
    """
    if count == 0:
        return
    require_contiguous(kernel, arguments)
    typed = [
        np.dtype(real).type(a) if isinstance(a, float) else np.int64(a) if isinstance(a, int) else a for a in arguments
    ]
    blocks = (count + THREADS_PER_BLOCK - 1) // THREADS_PER_BLOCK
    function = _compiled(module, np.dtype(real).name).get_function(kernel)
    function((blocks,), (THREADS_PER_BLOCK,), (np.int64(count), *typed))


def require_contiguous(kernel: str, arguments: Sequence[Array | int | float]) -> None:
    """Check that the arrays among ``arguments`` are laid out as a kernel reads them.

    Raises
    ------
    ValueError
        Naming the first array that is strided.
    """
    for number, argument in enumerate(arguments):
        if not isinstance(argument, (int, float)) and not argument.flags.c_contiguous:
            raise ValueError(
                f"argument {number} of the kernel {kernel}, an array of shape {argument.shape}, is not C-contiguous;"
                " copy it with ascontiguousarray first"
            )


@functools.cache
def _compiled(module: str, real: str) -> Any:
    import cupy

    precision = {"float32": "float", "float64": "double"}[real]
    return cupy.RawModule(code=source(module), options=("--std=c++14", f"-DREAL={precision}"))
