"""Arrays inside files of many things: HDF5 (EMD, NeXus), Zarr, and signals of RosettaSciIO, read slice by slice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from stemtomo.errors import AcquisitionError, FormatError
from stemtomo.io.formats.records import Run, ScannedFrames, placed, scan
from stemtomo.io.layout import CANONICAL_AXES, POSITION, AxisLayout, check_dtype

DEFAULT_AXES = {5: CANONICAL_AXES, 4: CANONICAL_AXES[1:], 3: (POSITION, "ky", "kx")}
"""Axes of an array that are not named: the usual order."""


class Handle(Protocol):
    """An array in a file: its place, and how to open it where it is read."""

    @property
    def path(self) -> Path:
        """The file."""
        ...

    @property
    def where(self) -> str:
        """File and array, for messages."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes when it was opened."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Dtype in the file."""
        ...

    def open(self) -> AbstractContextManager[Any]:
        """Open the array: something with ``shape`` that basic slices can be taken of."""
        ...

    def identity(self) -> dict[str, Any]:
        """Return the identity of the file, and the name of the array."""
        ...


@dataclass(frozen=True)
class DatasetFrames:
    """Frames of an array with axes y and x; a :class:`stemtomo.io.sources.FrameSource`."""

    handle: Handle
    layout: AxisLayout
    has_tilt: bool

    @property
    def path(self) -> Path:
        """The file."""
        return self.handle.path

    @property
    def where(self) -> str:
        """File and array, for messages."""
        return self.handle.where

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Lengths of tilt, y, x, ky, kx."""
        return self.layout.canonical_shape

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the frames read, in the machine's byte order."""
        return self.handle.dtype.newbyteorder("=")

    @property
    def n_expected(self) -> int:
        """Number of frames of the whole series."""
        return math.prod(self.shape[:3])

    def ready(self) -> int:
        """Return ``n_expected``: an array has its shape from the beginning, and does not say what is written."""
        return self.n_expected

    def read(self, tilt: int, y0: int, y1: int, x0: int = 0, x1: int | None = None) -> np.ndarray:
        """Return the frames (y, x, ky, kx) of rows ``y0`` to ``y1`` and columns ``x0`` to ``x1`` of ``tilt``."""
        cuts = {"tilt": slice(tilt, tilt + 1), "y": slice(y0, y1), "x": slice(x0, x1)}
        names = self.layout.axes if self.has_tilt else self.layout.axes[1:]
        with self.handle.open() as array:
            block = np.asarray(array[tuple(cuts.get(name, slice(None)) for name in names)])
        block = block if self.has_tilt else block[None]
        return self.layout.to_canonical(block)[0].astype(self.dtype, copy=False)

    def identity(self) -> dict[str, Any]:
        """Return the identity of the file and of the array in it."""
        return {
            **self.handle.identity(),
            "axes": list(self.layout.axes),
            "shape": list(self.layout.shape),
            "dtype": self.handle.dtype.str,
        }


@dataclass(frozen=True)
class DatasetRecords:
    """Frames of an array with a ``position`` axis, one tilt; a :class:`stemtomo.io.formats.records.FrameRecords`."""

    handle: Handle
    axes: tuple[str, ...]
    tilt: int | None = None
    recorded_scan: None = None

    @property
    def path(self) -> Path:
        """The file."""
        return self.handle.path

    @property
    def where(self) -> str:
        """File, array and tilt, for messages."""
        return self.handle.where if self.tilt is None else f"{self.handle.where}, tilt {self.tilt}"

    @property
    def frame_shape(self) -> tuple[int, int]:
        """Lengths of ky and kx."""
        shape = self.handle.shape
        return (shape[self.axes.index("ky")], shape[self.axes.index("kx")])

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the frames read, in the machine's byte order."""
        return self.handle.dtype.newbyteorder("=")

    def count(self) -> int:
        """Return the length of the position axis now."""
        with self.handle.open() as array:
            return int(array.shape[self.axes.index(POSITION)])

    def check(self, expected: int) -> None:
        """Nothing more to check than the number of frames."""

    def read(self, runs: Sequence[Run], out: np.ndarray) -> None:
        """Fill ``out`` (frame, ky, kx) with the frames of ``runs``.

        Raises
        ------
        AcquisitionError
            If the array ends before a run does.
        """
        names = [name for name in self.axes if name != "tilt"]
        order = [names.index(name) for name in (POSITION, "ky", "kx")]
        with self.handle.open() as array:
            for start, stop, part in placed(runs, out):
                cuts: dict[str, Any] = {"tilt": self.tilt, POSITION: slice(start, stop)}
                block = np.asarray(array[tuple(cuts.get(name, slice(None)) for name in self.axes)]).transpose(order)
                if len(block) != stop - start:
                    raise AcquisitionError(f"{self.where}: ends before frame {stop - 1}; was it replaced?")
                part[...] = block

    def identity(self) -> dict[str, Any]:
        """Return the identity of the file and array; and the tilt, if it has several."""
        return {**self.handle.identity(), **({} if self.tilt is None else {"tilt": self.tilt})}


def open_dataset(
    handle: Handle,
    axes: tuple[str, ...] = CANONICAL_AXES,
    scan_shape: tuple[int, int] | None = None,
    skip: int = 0,
    flyback: int = 0,
) -> DatasetFrames | tuple[ScannedFrames, ...]:
    """Return the array of ``handle`` as frames; as one source per tilt if it has a position axis.

    ``axes`` left at its default stands for the last 4 or 5 of tilt, y, x, ky, kx, or for position, ky, kx.

    Raises
    ------
    FormatError, AcquisitionError
        If the axes are not those of frames, or do not match the scan.
    """
    check_dtype(handle.where, handle.dtype)
    if tuple(axes) == CANONICAL_AXES:
        axes = DEFAULT_AXES.get(len(handle.shape), axes)
    if POSITION not in axes:
        if skip or flyback:
            raise FormatError(
                f"{handle.where}: its frames lie on axes y and x, so input.skip and input.flyback mean nothing; "
                "name its axes 'position', 'ky', 'kx' if it is one row of frames"
            )
        return DatasetFrames(handle, AxisLayout.declare(handle.where, axes, handle.shape, scan_shape), "tilt" in axes)
    if len(axes) != len(handle.shape) or sorted(set(axes) - {"tilt"}) != ["kx", "ky", POSITION]:
        raise FormatError(
            f"{handle.where}: axes {list(axes)} do not fit its shape {list(handle.shape)}; name every axis of it "
            "in the order of the file, tilt (optional), position, ky and kx"
        )
    tilts = range(handle.shape[axes.index("tilt")]) if "tilt" in axes else (None,)
    records = (DatasetRecords(handle, tuple(axes), tilt) for tilt in tilts)
    return tuple(scan(one, scan_shape, skip, flyback) for one in records)
