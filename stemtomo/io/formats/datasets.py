"""Arrays inside files of many things: HDF5 (EMD, NeXus), Zarr, and signals of RosettaSciIO, read slice by slice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from stemtomo.errors import AcquisitionError, FormatError
from stemtomo.io.formats.hdf5 import Hdf5Dataset
from stemtomo.io.formats.records import Run, ScannedFrames, placed, runs_of, scan
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

    @property
    def grows(self) -> bool:
        """Whether :meth:`ready` can be trusted while the file is written."""
        return bool(getattr(self.handle, "grows", False))

    def ready(self) -> int:
        """Return the frames from the first on whose chunks are complete; all, where an array does not say it."""
        missing = self.missing()
        return missing[0][0] if missing else self.n_expected

    def missing(self) -> list[Run]:
        """Return the runs of frames, counted over tilt, y, x, that were never written."""
        names = self.layout.axes if self.has_tilt else self.layout.axes[1:]
        whole = whole_frames(self.handle, names, dict(zip(self.layout.axes, self.layout.shape, strict=True)))
        return [] if whole is None else runs_of(np.flatnonzero(~whole))

    def tolerant(self) -> DatasetFrames:
        """Return itself: frames lie at their places."""
        return self

    def check(self) -> None:
        """Check that all frames were written: HDF5 reads what was not as zeros.

        Raises
        ------
        AcquisitionError
            With the frames that are missing.
        """
        _check_written(self.where, self.missing(), self.n_expected)

    def read(self, tilt: int, y0: int, y1: int, x0: int = 0, x1: int | None = None) -> np.ndarray:
        """Return the frames (y, x, ky, kx) of rows ``y0`` to ``y1`` and columns ``x0`` to ``x1`` of ``tilt``."""
        cuts = {"tilt": slice(tilt, tilt + 1), "y": slice(y0, y1), "x": slice(x0, x1)}
        names = self.layout.axes if self.has_tilt else self.layout.axes[1:]
        with self.handle.open() as array:
            block = np.asarray(array[tuple(cuts.get(name, slice(None)) for name in names)])
        block = self.layout.to_canonical(block if self.has_tilt else block[None])
        if block.shape[1:3] != (y1 - y0, (self.shape[2] if x1 is None else x1) - x0):
            raise AcquisitionError(
                f"{self.where}: frames of y {y0} to {y1 - 1} are not there yet; the array is shorter"
            )
        return block[0].astype(self.dtype, copy=False)

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

    @property
    def grows(self) -> bool:
        """Whether :meth:`count` can be trusted while the file is written."""
        return bool(getattr(self.handle, "grows", False))

    def count(self) -> int:
        """Return the frames from the first on whose chunks are complete; all, where an array does not say it."""
        whole = self._whole()
        if whole is not None:
            return len(whole) if whole.all() else int(np.argmin(whole))
        with self.handle.open() as array:
            return int(array.shape[self.axes.index(POSITION)])

    def absent(self, expected: int) -> list[Run]:
        """Return the runs of frames, of the first ``expected``, that were never written."""
        whole = self._whole()
        there = np.zeros(expected, bool)
        if whole is None:
            there[: self.count()] = True
        else:
            there[: len(whole)] = whole[:expected]
        return runs_of(np.flatnonzero(~there))

    def without(self, absent: list[Run]) -> DatasetRecords:
        """Return itself: frames lie at their places."""
        return self

    def check(self, expected: int) -> None:
        """Check that no frame in the middle is missing: HDF5 reads what was never written as zeros."""
        whole = self._whole()
        if whole is not None:
            _check_written(self.where, runs_of(np.flatnonzero(~whole[:expected])), len(whole))

    def _whole(self) -> np.ndarray | None:
        whole = whole_frames(self.handle, self.axes, {})
        if whole is None or self.tilt is None:
            return whole
        return whole.reshape(self.handle.shape[self.axes.index("tilt")], -1)[self.tilt]

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


def whole_frames(handle: Handle, names: Sequence[str], promised: Mapping[str, int]) -> np.ndarray | None:
    """Return which frames of the array of ``handle`` are written, in the order tilt, y, x (or tilt, position).

    Parameters
    ----------
    names
        Axes of the array.
    promised
        Length of an axis that the array has not reached yet, by its name.

    Returns
    -------
    A boolean for each frame; ``None`` where the format does not tell.
    """
    written = handle.written() if isinstance(handle, Hdf5Dataset) else None
    if written is None:
        return None
    detector = tuple(axis for axis, name in enumerate(names) if name in ("ky", "kx"))
    whole: np.ndarray = np.asarray(written.chunks.all(axis=detector))
    order = sorted(
        (axis for axis in range(len(names)) if axis not in detector),
        key=lambda axis: (*CANONICAL_AXES, POSITION).index(names[axis]),
    )
    left = [axis for axis in range(len(names)) if axis not in detector]
    whole = whole.transpose([left.index(axis) for axis in order])
    if written.growing and whole.any():
        whole = whole.copy()
        whole.flat[np.flatnonzero(whole)[-1]] = False
    for place, axis in enumerate(order):
        whole = np.repeat(whole, written.chunk[axis], axis=place)
    found = whole[tuple(slice(written.shape[axis]) for axis in order)]
    frames = np.zeros([max(promised.get(names[axis], 0), written.shape[axis]) for axis in order], bool)
    frames[tuple(slice(length) for length in found.shape)] = found
    return frames.reshape(-1)


def _check_written(where: str, missing: list[Run], total: int) -> None:
    if missing:
        count = sum(stop - start for start, stop in missing)
        shown = ", ".join(f"{start} to {stop - 1}" for start, stop in missing[:10])
        more = " ..." if len(missing) > 10 else ""
        raise AcquisitionError(
            f"{where}: {count} of {total} frames were never written: {shown}{more}. Wait if "
            "the file is still being written (clear the mark of a writer that died with h5clear -s), or give "
            "ingest.missing = 'mask' to leave these positions out"
        )


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
    handle = _promised(handle, axes, scan_shape)
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


def _promised(handle: Handle, axes: tuple[str, ...], scan_shape: tuple[int, int] | None) -> Handle:
    """Return ``handle`` with the lines of ``scan_shape`` where its axis y still grows up to them."""
    named = DEFAULT_AXES.get(len(handle.shape), axes) if tuple(axes) == CANONICAL_AXES else axes
    if not isinstance(handle, Hdf5Dataset) or scan_shape is None or "y" not in named or not handle.resizable:
        return handle
    y = named.index("y")
    if len(named) != len(handle.shape) or not handle.resizable[y] or handle.shape[y] >= scan_shape[0]:
        return handle
    return replace(handle, shape=(*handle.shape[:y], scan_shape[0], *handle.shape[y + 1 :]))
