"""One pass over a block of frames: every virtual detector, first moments, superpixels, summed and brightest pattern."""

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

    ``weighted`` is (y, x, weight) in the precision of the weights, ``pattern_sum`` (ky, kx) float64,
    ``pattern_maximum`` (ky, kx) in the type of the frames, and ``superpixels`` (y, x, superpixel) in the precision of
    the weights, of no superpixels where none were asked for.
    """

    weighted: Array
    pattern_sum: Array
    pattern_maximum: Array
    superpixels: Array


def frame_sums(frames: Array, weights: Array, labels: np.ndarray | None = None) -> FrameSums:
    """Sum every frame under every weight and in every superpixel, and all frames pixel by pixel, reading each once.

    Parameters
    ----------
    frames
        (y, x, ky, kx), any real type; cast on the fly, never copied whole.
    weights
        (weight, ky, kx), float32 or float64: masks of 0 and 1, or coordinates for first moments.
    labels
        (ky, kx), whole numbers on the host: the superpixel that a pixel belongs to, -1 for none.

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
    if labels is not None and labels.shape != frames.shape[2:]:
        raise FormatError(f"labels of shape {labels.shape} do not fit frames of shape {frames.shape}")
    scan, pixels = frames.shape[:2], frames.shape[2:]
    flat = frames.reshape(-1, *pixels)
    runs, count = _label_runs(labels)
    if is_device_array(frames):
        weighted, total, maximum, binned = _on_device(flat, weights, runs, count)
    else:
        weights = np.ascontiguousarray(weights)
        weighted = np.zeros((len(flat), len(weights)), dtype=weights.dtype)
        binned = np.zeros((len(flat), count), dtype=weights.dtype)
        total, maximum = np.zeros(pixels), np.array(flat[0])
        even = weights.min(axis=-1) == weights.max(axis=-1)
        first = np.searchsorted(runs[:, 0], np.arange(pixels[0] + 1))
        _frame_sums(flat, weights, even, runs, first, weighted, total, maximum, binned)
    return FrameSums(weighted.reshape(*scan, len(weights)), total, maximum, binned.reshape(*scan, count))


def _label_runs(labels: np.ndarray | None) -> tuple[np.ndarray, int]:
    """Return the runs of pixels of one superpixel, (run, 4) int64: line, first, end, superpixel; and their number."""
    if labels is None or not (labels >= 0).any():
        return np.zeros((0, 4), dtype=np.int64), 0
    width = labels.shape[1]
    edge = np.ones((labels.shape[0], width), dtype=bool)
    edge[:, 1:] = labels[:, 1:] != labels[:, :-1]
    start = np.flatnonzero(edge)
    end = np.append(start[1:], labels.size)
    line, first, label = start // width, start % width, labels.ravel()[start]
    runs = np.stack([line, first, end - line * width, label], axis=-1)[label >= 0]
    return np.ascontiguousarray(runs, dtype=np.int64), int(labels.max()) + 1


def _on_device(frames: Array, weights: Array, runs: np.ndarray, labels: int) -> tuple[Array, Array, Array, Array]:
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
    binned = xp.zeros((count, labels), dtype=weights.dtype)
    cuda.launch(
        "masks",
        f"superpixels_{name}",
        count * len(runs),
        weights.dtype,
        frames,
        xp.asarray(runs),
        len(runs),
        height,
        width,
        labels,
        binned,
    )
    return weighted, total.sum(axis=0), maximum.max(axis=0).astype(kind), binned


@_jit
def _frame_sums(frames, weights, even, runs, first, weighted, total, maximum, binned):  # type: ignore[no-untyped-def]
    count, height, width = frames.shape
    line = np.empty(width, dtype=np.float64)
    for i in range(count):
        for y in range(height):
            # One line is cast, added and compared while it is in the cache; then only the copy is read.
            line_sum = 0.0
            for x in range(width):
                pixel = frames[i, y, x]
                line[x] = pixel
                line_sum += pixel
                total[y, x] += pixel
                maximum[y, x] = max(maximum[y, x], pixel)
            for k in range(weights.shape[0]):
                if even[k, y]:  # most lines of a mask are all in or all out
                    weighted[i, k] += line_sum * weights[k, y, 0]
                    continue
                row_sum = 0.0
                for x in range(width):
                    row_sum += line[x] * weights[k, y, x]
                weighted[i, k] += row_sum
            for run in range(first[y], first[y + 1]):
                run_sum = 0.0
                for x in range(runs[run, 1], runs[run, 2]):
                    run_sum += line[x]
                binned[i, runs[run, 3]] += run_sum
