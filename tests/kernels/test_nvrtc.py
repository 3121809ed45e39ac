"""The CUDA sources compile for the GPUs they are meant for; no device is needed."""

import ctypes
import ctypes.util
import functools
import site
from pathlib import Path

import pytest

from stemtomo.kernels import cuda


@functools.cache
def _library():
    """The CUDA run-time compiler: the system's, or the one of the package nvidia-cuda-nvrtc."""
    packages = [Path(folder) for folder in site.getsitepackages()]
    candidates = [str(path) for folder in packages for path in sorted(folder.glob("nvidia/**/libnvrtc.so.*"))]
    for name in filter(None, [*candidates, ctypes.util.find_library("nvrtc")]):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _compile(source, *options):
    """Return the exit code and the log."""
    library, program, size = _library(), ctypes.c_void_p(), ctypes.c_size_t()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None) == 0
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    code = library.nvrtcCompileProgram(program, len(options), given)
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return code, log.value.decode()


@pytest.mark.skipif(_library() is None, reason="no CUDA run-time compiler; pip install nvidia-cuda-nvrtc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("precision", ["float", "double"])
@pytest.mark.parametrize("module", ["atoms", "masks", "patches", "voxels"])
def test_the_source_compiles_without_a_warning(module, precision, architecture):
    options = ("--std=c++14", f"-DREAL={precision}", f"--gpu-architecture={architecture}")
    assert _compile(cuda.source(module), *options) == (0, "")
