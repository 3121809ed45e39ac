"""How an array in a file is laid out: which named axis is where, and how a part of it comes into canonical order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stemtomo.errors import AcquisitionError, FormatError

CANONICAL_AXES = ("tilt", "y", "x", "ky", "kx")
POSITION = "position"
"""Axis of a file that runs over the scan row by row; it stands for y and x."""

_ALLOWED_KINDS = "iuf"


@dataclass(frozen=True)
class AxisLayout:
    """The five axes of frames in the order in which a file has them, and their lengths.

    A missing tilt axis is one tilt, and a ``position`` axis is y and x; :meth:`declare` makes both explicit.
    """

    axes: tuple[str, ...]
    shape: tuple[int, ...]

    @classmethod
    def declare(
        cls, where: str, axes: tuple[str, ...], shape: tuple[int, ...], scan_shape: tuple[int, int] | None = None
    ) -> AxisLayout:
        """Return the layout of an array of ``shape`` whose axes are called ``axes``.

        Parameters
        ----------
        where
            File and array, the beginning of every error.
        axes
            Names in the order of the file: tilt (optional), y and x or position, ky and kx.
        scan_shape
            Positions along y and x; needed for a position axis, checked against the array otherwise.

        Raises
        ------
        FormatError
            If the names are not those axes, each once, or their number differs from the array's.
        AcquisitionError
            If the array does not hold the frames that the scan promises.
        """
        names = set(axes)
        if len(names) != len(axes) or names - {"tilt"} not in ({"y", "x", "ky", "kx"}, {POSITION, "ky", "kx"}):
            raise FormatError(
                f"{where}: axes {list(axes)} are not tilt (optional), y and x (or {POSITION}), ky and kx, each once; "
                "name every axis of the array in the order of the file"
            )
        if len(axes) != len(shape):
            raise FormatError(
                f"{where}: the array has {len(shape)} axes, shape {list(shape)}, but {len(axes)} were named, "
                f"{list(axes)}; name every axis in the order of the file"
            )
        if min(shape) < 1:
            raise FormatError(f"{where}: the array is empty, shape {list(shape)}; check which array was meant")
        lengths = dict(zip(axes, shape, strict=True))
        _check_scan(where, lengths, scan_shape)
        order = ("y" if name == POSITION else name for name in axes)
        expanded = [part for name in order for part in (("y", "x") if name == "y" and POSITION in names else (name,))]
        if POSITION in names and scan_shape is not None:
            lengths.update(y=scan_shape[0], x=scan_shape[1])
        if "tilt" not in names:
            expanded.insert(0, "tilt")
            lengths["tilt"] = 1
        return cls(tuple(expanded), tuple(int(lengths[name]) for name in expanded))

    @property
    def canonical_shape(self) -> tuple[int, int, int, int, int]:
        """Lengths of tilt, y, x, ky, kx."""
        tilt, y, x, ky, kx = (self.shape[self.axes.index(name)] for name in CANONICAL_AXES)
        return (tilt, y, x, ky, kx)

    @property
    def leading(self) -> int:
        """How many of tilt and y are the outermost axes of the file: what can be read on its own going forward."""
        if self.axes[0] != "tilt":
            return 0
        return 2 if self.axes[1] == "y" else 1

    def to_canonical(self, part: np.ndarray) -> np.ndarray:
        """Return a view of ``part``, whose five axes are the file's, as (tilt, y, x, ky, kx)."""
        return part.transpose([self.axes.index(name) for name in CANONICAL_AXES])


def _check_scan(where: str, lengths: dict[str, int], scan_shape: tuple[int, int] | None) -> None:
    if POSITION in lengths:
        if scan_shape is None:
            raise FormatError(
                f"{where}: has one axis of {lengths[POSITION]} positions; give the shape of the scan, [y, x]: "
                "it cannot be told from the number of frames"
            )
        promised, found = math.prod(scan_shape), lengths[POSITION]
        if promised != found:
            raise AcquisitionError(
                f"{where}: the scan of {scan_shape[0]} x {scan_shape[1]} (y, x) promises {promised} frames per tilt, "
                f"the file holds {found}, {_difference(found, promised)}; correct the scan shape, or cut the file to "
                "the frames of the scan (flyback and trigger frames are not guessed)"
            )
    elif scan_shape is not None and (lengths["y"], lengths["x"]) != tuple(scan_shape):
        found = lengths["y"] * lengths["x"]
        raise AcquisitionError(
            f"{where}: the scan is {scan_shape[0]} x {scan_shape[1]} (y, x), {math.prod(scan_shape)} frames per tilt, "
            f"but the array holds {lengths['y']} x {lengths['x']}, {found} frames; correct the scan shape or the axes"
        )


def _difference(found: int, promised: int) -> str:
    return f"{promised - found} too few" if found < promised else f"{found - promised} too many"


def check_dtype(where: str, dtype: np.dtype) -> None:
    """Check that frames can be of ``dtype``: whole or real numbers.

    Raises
    ------
    FormatError
        For complex, boolean, object, text and structured dtypes, and numbers wider than 8 bytes.
    """
    if dtype.kind not in _ALLOWED_KINDS or dtype.itemsize > 8 or dtype.subdtype is not None:
        raise FormatError(
            f"{where}: has dtype {dtype}, frames are whole or real numbers (uint8 to uint64, int8 to int64, float16 to "
            "float64); convert the array, or name the one that holds the frames"
        )


def check_values(block: np.ndarray, where: str | Path, tilt: int, y0: int, x0: int) -> None:
    """Check that ``block`` (y, x, ky, kx), at scan position (y0, x0), holds finite numbers and no negative counts.

    Negative real numbers are allowed: subtracting a dark reference leaves noise of both signs.

    Raises
    ------
    FormatError
        With the number of bad pixels and patterns in the block, and where the first is.
    """
    if block.dtype.kind == "f":
        # The sum of a block is finite unless a value is not: one pass without a mask as large as the block.
        with np.errstate(over="ignore", invalid="ignore"):
            suspicious = not math.isfinite(float(block.sum(dtype=np.float64)))
        bad = ~np.isfinite(block) if suspicious else None
        what, advice = "non-finite values", "repair or mask these pixels in the detector data"
    else:
        bad = block < 0 if block.dtype.kind == "i" and int(block.min()) < 0 else None
        what, advice = "negative counts", "check the dtype (unsigned?), or store dark-corrected data as float"
    if bad is None or not bad.any():
        return
    patterns = np.argwhere(bad.any(axis=(-2, -1)))
    (y, x), (rows, columns) = patterns[0], block.shape[:2]
    raise FormatError(
        f"{where}: {int(bad.sum())} {what} in {len(patterns)} of the {rows * columns} patterns at tilt {tilt}, "
        f"y {y0} to {y0 + rows - 1}, x {x0} to {x0 + columns - 1}, the first in the pattern at "
        f"y {y0 + y}, x {x0 + x}; {advice}"
    )
