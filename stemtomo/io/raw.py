"""Frames that lie in a file uncompressed from an offset on: raw binary, .npy, stored members of an .npz."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stemtomo.errors import FormatError
from stemtomo.io.layout import CANONICAL_AXES, AxisLayout
from stemtomo.io.provenance import file_identity

_SHORT_RUN_BYTES = 16384
"""Below this a read per contiguous run costs more than mapping the file and letting the system page it in."""


@dataclass(frozen=True)
class ArrayFile:
    """An uncompressed array in ``path`` from ``offset_bytes`` on; any part of it can be read on its own.

    Parameters
    ----------
    where
        Name of file and array for messages.
    layout
        Axes in the order of the file.
    file_dtype
        Dtype in the file, with its byte order.
    array
        Name of the member if the file is an archive; bytes after the array then belong to others.
    """

    path: Path
    where: str
    layout: AxisLayout
    file_dtype: np.dtype
    offset_bytes: int = 0
    array: str | None = None

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Lengths of tilt, y, x, ky, kx."""
        return self.layout.canonical_shape

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the frames read, in the machine's byte order."""
        return self.file_dtype.newbyteorder("=")

    @property
    def n_expected(self) -> int:
        """Number of frames of the whole series."""
        return math.prod(self.shape[:3])

    def ready(self) -> int:
        """Return how many frames from the first one on are whole in the file, in the order tilt, y, x.

        A file may grow meanwhile. Where its axes have another order, frames count in runs that lie in one piece: a
        whole tilt if y is not the second axis, the whole series if the tilt is not the first.
        """
        frames, rest = divmod(self._present_bytes(), self._frame_bytes)
        if self.array is not None:
            frames, rest = min(frames, self.n_expected), 0
        if frames >= self.n_expected:
            return frames + (1 if rest else 0)  # a piece too much is too much
        in_order = next((i for i in range(3) if self.layout.axes[i] != CANONICAL_AXES[i]), 3)
        return frames - frames % math.prod(self.shape[in_order:3])

    def partial_bytes(self) -> int:
        """Return how many bytes of a frame that is not whole lie at the end of the file."""
        return 0 if self.array is not None else self._present_bytes() % self._frame_bytes

    def read(self, tilt: int, y0: int, y1: int, x0: int = 0, x1: int | None = None) -> np.ndarray:
        """Return the frames (y, x, ky, kx) of a block of the scan, read run by run into one buffer.

        The result is a view in canonical order of a buffer in the file's order. A file whose detector axes come
        before its scan axes has very short runs and is mapped instead; that is right but slow for large files.

        Raises
        ------
        FormatError
            If the file ends before the block does.
        """
        x1 = self.shape[2] if x1 is None else x1
        cuts = {"tilt": (tilt, tilt + 1), "y": (y0, y1), "x": (x0, x1)}
        ranges = [cuts.get(name, (0, length)) for name, length in zip(self.layout.axes, self.layout.shape, strict=True)]
        block = self._read_ranges(ranges)
        if not block.dtype.isnative:
            block = block.byteswap(inplace=True).view(self.dtype)
        return self.layout.to_canonical(block)[0]

    def identity(self) -> dict[str, Any]:
        """Return the identity of the file and of the array in it."""
        return {
            **file_identity(self.path),
            "array": self.array,
            "axes": list(self.layout.axes),
            "shape": list(self.layout.shape),
            "dtype": self.file_dtype.str,
            "offset_bytes": self.offset_bytes,
        }

    @property
    def _frame_bytes(self) -> int:
        return math.prod(self.shape[3:]) * self.file_dtype.itemsize

    def _present_bytes(self) -> int:
        return max(0, self.path.stat().st_size - self.offset_bytes)

    def _read_ranges(self, ranges: Sequence[tuple[int, int]]) -> np.ndarray:
        shape = self.layout.shape
        block = np.empty([stop - start for start, stop in ranges], self.file_dtype)
        strides = [math.prod(shape[i + 1 :]) * self.file_dtype.itemsize for i in range(len(shape))]
        last = sum((stop - 1) * stride for (_, stop), stride in zip(ranges, strides, strict=True))
        if self._present_bytes() < last + self.file_dtype.itemsize:  # a file that still grows may end after the block
            raise self._truncated()
        # From the last axis that is cut on, a run is contiguous in the file.
        cut = max((i for i, bound in enumerate(ranges) if bound != (0, shape[i])), default=0)
        run_bytes = math.prod(block.shape[cut:]) * self.file_dtype.itemsize
        if run_bytes < min(_SHORT_RUN_BYTES, block.nbytes):
            mapped = np.memmap(self.path, np.uint8, "r", self.offset_bytes, (last + self.file_dtype.itemsize,))
            first = sum(start * stride for (start, _), stride in zip(ranges, strides, strict=True))
            block[...] = np.ndarray(block.shape, self.file_dtype, mapped.data, first, strides)
            return block
        view = block.reshape(-1).view(np.uint8).data
        with self.path.open("rb", buffering=0) as file:
            for run, outer in enumerate(itertools.product(*(range(*bound) for bound in ranges[:cut]))):
                at = (*outer, ranges[cut][0])
                start = sum(index * stride for index, stride in zip(at, strides, strict=False))
                file.seek(self.offset_bytes + start)
                self._read_into(file, view[run * run_bytes : (run + 1) * run_bytes])
        return block

    def _read_into(self, file: Any, target: memoryview) -> None:
        filled = 0
        while filled < len(target):
            count = file.readinto(target[filled:])
            if not count:
                raise self._truncated()
            filled += count

    def _truncated(self) -> FormatError:
        needed = self.offset_bytes + math.prod(self.layout.shape) * self.file_dtype.itemsize
        return FormatError(
            f"{self.where}: is truncated: {self.path.stat().st_size} bytes, {needed} expected for "
            f"{list(self.layout.shape)} {self.file_dtype}; copy the file again"
        )


@dataclass(frozen=True)
class MappedArray:
    """An uncompressed array as :mod:`stemtomo.io.formats.datasets` takes it; mapped only where it is read."""

    path: Path
    where: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset_bytes: int
    order: Literal["C", "F"]
    array: str | None = None

    @contextmanager
    def open(self) -> Iterator[np.ndarray]:
        """Yield the array, paged in by the system.

        Raises
        ------
        FormatError
            If the file is shorter than the array.
        """
        needed = self.offset_bytes + math.prod(self.shape) * self.dtype.itemsize
        found = self.path.stat().st_size
        if found < needed:
            raise FormatError(f"{self.where}: is truncated: {found} bytes, {needed} expected; copy the file again")
        yield np.memmap(self.path, self.dtype, "r", self.offset_bytes, self.shape, self.order)

    def identity(self) -> dict[str, Any]:
        """Return the identity of the file, and the name of the array."""
        return {**file_identity(self.path), "array": self.array, "offset_bytes": self.offset_bytes}
