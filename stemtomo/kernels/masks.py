"""One pass over a block of frames: every virtual detector, the first moments, the summed and the brightest pattern."""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from stemtomo.backend import Array, array_namespace, is_device_array
from stemtomo.errors import FormatError
from stemtomo.kernels import cuda

#: Types of a pixel that the CUDA source reads as they are; others are turned to float32 on the device first.
_DEVICE_TYPES = ("uint8", "uint16", "uint32", "float32", "float64")
#: Frames that one device thread adds up for its detector pixel.
_FRAMES_PER_THREAD = 64

_jit = numba.njit(nogil=True, cache=True, fastmath={"contract", "nsz", "arcp", "reassoc"}, error_model="numpy")


class FrameSums(NamedTuple):
    """What one pass over a block of frames leaves.

    ``weighted`` is (y, x, weight) in the precision of the weights, ``pattern_sum`` (ky, kx) float64, and
    ``pattern_maximum`` (ky, kx) in the type of the frames.
    """

    weighted: Array
    pattern_sum: Array
    pattern_maximum: Array


def frame_sums(frames: Array, weights: Array) -> FrameSums:
    """Sum every frame under every weight, and all frames pixel by pixel, reading each pixel once.

    Parameters
    ----------
    frames
        (y, x, ky, kx), any real type; cast on the fly, never copied whole.
    weights
        (weight, ky, kx), float32 or float64: masks of 0 and 1, or coordinates for first moments.

    Raises
    ------
    FormatError
        If the shapes do not belong together.
    """
    if frames.ndim != 4 or weights.ndim != 3 or frames.shape[2:] != weights.shape[1:]:
        raise FormatError(
            f"frames of shape {frames.shape} and weights of shape {weights.shape} do not fit: "
            "expected (y, x, ky, kx) and (weight, ky, kx)"
        )
    scan, pixels = frames.shape[:2], frames.shape[2:]
    flat = frames.reshape(-1, *pixels)
    if is_device_array(frames):
        weighted, total, maximum = _on_device(flat, weights)
    else:
        weighted = np.zeros((len(flat), len(weights)), dtype=weights.dtype)
        total, maximum = np.zeros(pixels), np.array(flat[0])
        _frame_sums(flat, np.ascontiguousarray(weights), weighted, total, maximum)
    return FrameSums(weighted.reshape(*scan, len(weights)), total, maximum)


def _on_device(frames: Array, weights: Array) -> tuple[Array, Array, Array]:
    xp, kind = array_namespace(frames), frames.dtype
    if kind.name not in _DEVICE_TYPES:
        frames = frames.astype(np.float32)
    frames, weights = xp.ascontiguousarray(frames), xp.ascontiguousarray(weights)
    count, height, width = frames.shape
    weighted = xp.zeros((count, len(weights)), dtype=weights.dtype)
    name = frames.dtype.name
    cuda.launch(
        "masks",
        f"weighted_{name}",
        count * height,
        weights.dtype,
        frames,
        weights,
        len(weights),
        height,
        width,
        weighted,
    )
    chunks = -(-count // _FRAMES_PER_THREAD)
    total, maximum = xp.empty((chunks, height, width)), xp.empty((chunks, height, width), dtype=frames.dtype)
    size = chunks * height * width
    cuda.launch(
        "masks",
        f"patterns_{name}",
        size,
        weights.dtype,
        frames,
        count,
        _FRAMES_PER_THREAD,
        height * width,
        total,
        maximum,
    )
    return weighted, total.sum(axis=0), maximum.max(axis=0).astype(kind)


@_jit
def _frame_sums(frames, weights, weighted, total, maximum):  # type: ignore[no-untyped-def]
    count, height, width = frames.shape
    line = np.empty(width, dtype=np.float64)
    for i in range(count):
        for y in range(height):
            # One line is cast, added and compared while it is in the cache; then only the copy is read.
            for x in range(width):
                pixel = frames[i, y, x]
                line[x] = pixel
                total[y, x] += pixel
                maximum[y, x] = max(maximum[y, x], pixel)
            for k in range(weights.shape[0]):
                row_sum = 0.0
                for x in range(width):
                    row_sum += line[x] * weights[k, y, x]
                weighted[i, k] += row_sum
