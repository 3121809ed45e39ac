"""The CUDA sources of ``stemtomo.kernels`` compiled for the host, so that their arithmetic is tested without a GPU.

A kernel of one thread per element with atomicAdd as its only interaction means the same when its threads run one after
the other; the wrapper below is that loop.
"""

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from stemtomo.kernels import cuda

COMPILER = shutil.which("g++") or shutil.which("c++")

_PRELUDE = """
#include <cmath>
#include <algorithm>
using std::min; using std::max;
#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__
struct Index { long long x; };
static Index blockIdx, threadIdx, blockDim;
template <class T> static T atomicAdd(T* where, T what) { T old = *where; *where += what; return old; }
"""

_SIGNATURE = re.compile(r'extern "C" __global__ void (\w+)\(([^)]*)\)', re.S)


@functools.cache
def _library(module: str, real: str) -> ctypes.CDLL:
    source = cuda.source(module)
    wrappers = []
    for name, parameters in _SIGNATURE.findall(source):
        names = [p.replace("*", " ").split()[-1] for p in parameters.split(",")]
        wrappers.append(
            f'extern "C" void {name}_on_host({parameters}) {{ blockDim.x = 1; threadIdx.x = 0; '
            f"for (long long b = 0; b < {names[0]}; ++b) {{ blockIdx.x = b; {name}({', '.join(names)}); }} }}"
        )
    folder = Path(tempfile.mkdtemp(prefix="stemtomo-cuda-"))
    (folder / "kernels.cpp").write_text(_PRELUDE + source + "\n".join(wrappers), encoding="utf-8")
    precision = {"float32": "float", "float64": "double"}[real]
    subprocess.run(
        [
            COMPILER,
            "-O1",
            "-shared",
            "-fPIC",
            "-std=c++14",
            f"-DREAL={precision}",
            "-o",
            folder / "kernels.so",
            folder / "kernels.cpp",
        ],
        check=True,
    )
    return ctypes.CDLL(str(folder / "kernels.so"))


def launch(module: str, kernel: str, count: int, real: np.dtype, *arguments: object) -> None:
    """Stand in for :func:`stemtomo.kernels.cuda.launch` on host arrays."""
    real = np.dtype(real)
    scalar = {"float32": ctypes.c_float, "float64": ctypes.c_double}[real.name]
    typed: list[object] = [ctypes.c_longlong(count)]
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            assert argument.flags.c_contiguous
            typed.append(ctypes.c_void_p(argument.ctypes.data))
        elif isinstance(argument, int):
            typed.append(ctypes.c_longlong(argument))
        else:
            typed.append(scalar(argument))
    getattr(_library(module, real.name), f"{kernel}_on_host")(*typed)
