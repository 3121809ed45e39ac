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
_FRAMES_IN_32_BITS = 1 << 16

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


class Lines(NamedTuple):
    """What is known of weights and labels line by line, see :func:`prepare`; for frames on the host."""

    even: np.ndarray
    inside: np.ndarray
    used: np.ndarray
    last: np.ndarray
    runs: np.ndarray
    first: np.ndarray
    superpixels: int


def prepare(weights: np.ndarray, labels: np.ndarray | None = None) -> Lines:
    """Look through weights and labels once, for all the blocks that :func:`frame_sums` sums under them."""
    labels = np.full(weights.shape[1:], -1) if labels is None else np.ascontiguousarray(labels, dtype=np.int64)
    even = _even_lines(np.ascontiguousarray(weights))
    inside, used, last, runs, first = _label_bands(labels)
    return Lines(even, inside, used, last, runs, first, max(0, int(labels.max()) + 1))


def frame_sums(
    frames: Array, weights: Array, labels: np.ndarray | None = None, lines: Lines | None = None
) -> FrameSums:
    """Sum every frame under every weight and in every superpixel, and all frames pixel by pixel, reading each once.

    Parameters
    ----------
    frames
        (y, x, ky, kx), any real type; cast on the fly, never copied whole.
    weights
        (weight, ky, kx), float32 or float64: masks of 0 and 1, or coordinates for first moments.
    labels
        (ky, kx), whole numbers on the host: the superpixel that a pixel belongs to, -1 for none.
    lines
        What :func:`prepare` says of both, where many blocks are summed on the host.

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
    if is_device_array(frames):
        runs, count = _label_runs(labels)
        weighted, total, maximum, binned = _on_device(flat, weights, runs, count)
    else:
        lines = prepare(weights, labels) if lines is None else lines
        count = lines.superpixels
        weighted, total, maximum, binned = _on_host(flat, np.ascontiguousarray(weights), lines)
    return FrameSums(weighted.reshape(*scan, len(weights)), total, maximum, binned.reshape(*scan, count))


def _on_host(flat: np.ndarray, weights: np.ndarray, lines: Lines) -> tuple[np.ndarray, ...]:
    pixels, kind = flat.shape[1:], flat.dtype
    weighted = np.zeros((len(flat), len(weights)), dtype=weights.dtype)
    binned = np.zeros((len(flat), lines.superpixels), dtype=weights.dtype)
    # Few small whole numbers add up exactly in 32 bits, at half the traffic of float64.
    narrow = kind.kind == "u" and kind.itemsize <= 2 and len(flat) <= _FRAMES_IN_32_BITS
    total, maximum = np.zeros(pixels, np.uint32 if narrow else np.float64), np.array(flat[0])
    line = np.empty(pixels[1], weights.dtype if kind.itemsize <= 2 else np.float64)
    _frame_sums(flat, weights, *lines[:-1], weighted, total, maximum, binned, line)
    return weighted, total.astype(np.float64, copy=False), maximum, binned


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
def _even_lines(weights):  # type: ignore[no-untyped-def]
    """Return (weight, ky): whether all pixels of a line have one weight, as most lines of a mask have."""
    even = np.ones(weights.shape[:2], dtype=np.bool_)
    for k in range(weights.shape[0]):
        for y in range(weights.shape[1]):
            for x in range(1, weights.shape[2]):
                if weights[k, y, x] != weights[k, y, 0]:
                    even[k, y] = False
                    break
    return even


@_jit
def _label_bands(labels):  # type: ignore[no-untyped-def]
    """Cut the lines into bands in which no pixel column belongs to two superpixels.

    Returns ``inside`` (ky, kx): 1 in superpixels; ``used`` (ky): lines with any; ``last`` (ky): lines that end a band;
    ``runs`` (run, 3): first pixel, end and superpixel; ``first``: the first run of each band.
    """
    height, width = labels.shape
    inside = np.zeros((height, width), dtype=np.float32)
    used, last = np.zeros(height, dtype=np.bool_), np.zeros(height, dtype=np.bool_)
    runs, first = np.empty((height * width, 3), dtype=np.int64), np.zeros(height + 1, dtype=np.int64)
    column = np.full(width, -1, dtype=np.int64)
    count, bands = 0, 0
    for y in range(height):
        for x in range(width):
            if labels[y, x] >= 0:
                inside[y, x] = 1
                used[y] = True
                column[x] = labels[y, x]
        ends = y == height - 1
        if not ends:
            for x in range(width):
                if labels[y + 1, x] >= 0 and column[x] >= 0 and labels[y + 1, x] != column[x]:
                    ends = True
                    break
        if ends:
            start = 0
            for x in range(width):
                if x == width - 1 or column[x + 1] != column[x]:
                    if column[x] >= 0:
                        runs[count, 0], runs[count, 1], runs[count, 2] = start, x + 1, column[x]
                        count += 1
                    start = x + 1
            last[y] = True
            bands += 1
            first[bands] = count
            column[:] = -1
    return inside, used, last, runs[:count].copy(), first[: bands + 1].copy()


@_jit
def _one_sum(line, weight):  # type: ignore[no-untyped-def]
    total = line[0] * weight[0]
    for x in range(1, line.size):
        total += line[x] * weight[x]
    return total


@_jit
def _two_sums(line, weight, other):  # type: ignore[no-untyped-def]
    """Sum ``line`` under two weights at once: it is loaded once, and neither sum waits for the other."""
    first, second = line[0] * weight[0], line[0] * other[0]
    for x in range(1, line.size):
        first += line[x] * weight[x]
        second += line[x] * other[x]
    return first, second


@_jit
def _frame_sums(frames, weights, even, inside, used, last, runs, first, weighted, total, maximum, binned, line):  # type: ignore[no-untyped-def]
    count, height, width = frames.shape
    column = np.zeros(width, dtype=line.dtype)
    zero = column[0]  # sums in the type of the line: twice as many in a register as of float64
    for i in range(count):
        band = 0
        for y in range(height):
            # One line is cast, added and compared while it is in the cache; then only the copy is read.
            line_sum = zero
            for x in range(width):
                pixel = frames[i, y, x]
                line[x] = pixel
                line_sum += line[x]
                total[y, x] += pixel
                maximum[y, x] = max(maximum[y, x], pixel)
            waiting = -1
            for k in range(weights.shape[0]):
                if even[k, y]:
                    weighted[i, k] += line_sum * weights[k, y, 0]
                elif waiting < 0:
                    waiting = k
                else:
                    one, other = _two_sums(line, weights[waiting, y], weights[k, y])
                    weighted[i, waiting] += one
                    weighted[i, k] += other
                    waiting = -1
            if waiting >= 0:
                weighted[i, waiting] += _one_sum(line, weights[waiting, y])
            if used[y]:  # the lines of a band are added up before their pixels are: few long sums, not many short ones
                for x in range(width):
                    column[x] += line[x] * inside[y, x]
            if last[y]:
                for run in range(first[band], first[band + 1]):
                    run_sum = zero
                    for x in range(runs[run, 0], runs[run, 1]):
                        run_sum += column[x]
                    binned[i, runs[run, 2]] += run_sum
                if first[band + 1] > first[band]:
                    column[:] = 0
                band += 1
