"""Frames changed on their way into the store, as the user says: cropped, binned, dead pixels replaced, narrowed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from stemtomo.errors import ConfigurationError, FormatError
from stemtomo.geometry import Detector
from stemtomo.io.archive import load_array
from stemtomo.io.formats.tilts import StackedTilts
from stemtomo.io.series import SeriesOfFiles
from stemtomo.io.sources import FrameSource, Shape

_REACH = 2
"""A bad pixel takes the median of the good ones around it, at most this many pixels away."""


@dataclass(frozen=True)
class Preparation:
    """What is done to every frame.

    Parameters
    ----------
    crop
        Rows and columns [ky0, ky1, kx0, kx1) of the detector that are kept.
    binning
        Edge of the squares of pixels that are added up, after the crop.
    dead
        Pixels (ky, kx), bool, of the whole detector whose value is replaced by that of their neighbours.
    """

    crop: tuple[int, int, int, int] | None = None
    binning: int = 1
    dead: np.ndarray | None = field(default=None, compare=False)

    @property
    def changes(self) -> bool:
        """Whether there is anything to do."""
        return self.crop is not None or self.binning > 1 or self.dead is not None

    def region(self, shape: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return the part of a detector of ``shape`` (ky, kx) that is kept.

        Raises
        ------
        ConfigurationError
            If it lies outside, is no whole number of bins, or the dead pixels are those of another detector.
        """
        ky0, ky1, kx0, kx1 = self.crop or (0, shape[0], 0, shape[1])
        if not (0 <= ky0 < ky1 <= shape[0] and 0 <= kx0 < kx1 <= shape[1]):
            raise ConfigurationError(
                f"ingest.crop = [{ky0}, {ky1}, {kx0}, {kx1}] is not inside the detector of {shape[0]} x {shape[1]} "
                "(ky, kx)"
            )
        size = (ky1 - ky0, kx1 - kx0)
        if size[0] % self.binning or size[1] % self.binning:
            raise ConfigurationError(
                f"ingest.bin = {self.binning} does not divide the {size[0]} x {size[1]} (ky, kx) pixels that are kept; "
                "give ingest.crop so that it does: pixels are not left out silently"
            )
        if self.dead is not None and self.dead.shape != shape:
            raise ConfigurationError(
                f"ingest.dead_pixels has shape {list(self.dead.shape)}, the detector {list(shape)} (ky, kx)"
            )
        return ky0, ky1, kx0, kx1

    def detector(self, detector: Detector) -> Detector:
        """Return the detector of the frames that come out of that of the frames that go in."""
        ky0, ky1, kx0, kx1 = self.region(detector.shape_yx)
        centre = None
        if self.changes:
            centre = tuple(
                (at - first + 0.5) / self.binning - 0.5
                for at, first in zip(detector.centre_yx, (ky0, kx0), strict=True)
            )
        return Detector(
            ((ky1 - ky0) // self.binning, (kx1 - kx0) // self.binning),
            detector.pixel_inv_angstrom * self.binning,
            (centre[0], centre[1]) if centre is not None else detector.beam_centre_px_yx,
        )

    def identity(self) -> dict[str, Any]:
        """Return what tells this preparation from another."""
        dead = None if self.dead is None else hashlib.sha256(np.packbits(self.dead).tobytes()).hexdigest()[:16]
        return {"crop": list(self.crop) if self.crop else None, "bin": self.binning, "dead_pixels_sha256": dead}


@dataclass(frozen=True)
class PreparedFrames:
    """The frames of ``source`` after ``preparation``, of ``stored`` dtype; a :class:`FrameSource`.

    ``stored`` holds every value, which each read proves again.
    """

    source: FrameSource
    preparation: Preparation
    stored: np.dtype

    @classmethod
    def of(cls, source: FrameSource, preparation: Preparation) -> PreparedFrames:
        """Return the prepared frames in a dtype that holds sums of bins whatever the counts are."""
        preparation.region((source.shape[3], source.shape[4]))
        dtype = source.dtype
        if preparation.binning > 1 and dtype.kind == "u":
            needed = int(np.iinfo(dtype).max) * preparation.binning**2
            dtype = next((np.dtype(name) for name in ("u2", "u4") if needed <= np.iinfo(name).max), np.dtype(np.uint64))
        elif preparation.binning > 1 and dtype.kind == "i":
            dtype = np.dtype(np.int64)
        return cls(source, preparation, dtype)

    @property
    def path(self) -> Path:
        """The file."""
        return self.source.path

    @property
    def where(self) -> str:
        """File and array, for messages."""
        return self.source.where

    @property
    def shape(self) -> Shape:
        """Lengths of tilt, y, x, ky, kx."""
        tilt, y, x, ky, kx = self.source.shape
        ky0, ky1, kx0, kx1 = self.preparation.region((ky, kx))
        return (tilt, y, x, (ky1 - ky0) // self.preparation.binning, (kx1 - kx0) // self.preparation.binning)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the frames as they are stored."""
        return self.stored

    @property
    def n_expected(self) -> int:
        """Number of frames of the whole series."""
        return self.source.n_expected

    def ready(self) -> int:
        """Return how many frames the file holds."""
        return self.source.ready()

    def check(self) -> None:
        """Check that the file is whole."""
        from stemtomo.io.sources import check_complete

        check_complete(self.source)

    def read(self, tilt: int, y0: int, y1: int, x0: int = 0, x1: int | None = None) -> np.ndarray:
        """Return the prepared frames (y, x, ky, kx) of a block of the scan.

        Raises
        ------
        FormatError
            If a value does not fit the dtype that was chosen after a look at all frames.
        """
        block = self.source.read(tilt, y0, y1, x0, x1)
        told = self.preparation
        ky0, ky1, kx0, kx1 = told.region((block.shape[2], block.shape[3]))
        if told.dead is not None:
            block = block.copy() if not block.flags.writeable else block
            replace_pixels(block, told.dead, self.where)
        block = block[..., ky0:ky1, kx0:kx1]
        if told.binning > 1:
            y, x, ky, kx = block.shape
            edge = told.binning
            wide = np.dtype(np.float64) if block.dtype.kind == "f" else block.dtype
            wide = np.dtype(np.int64) if block.dtype.kind == "i" else wide
            wide = np.dtype(np.uint64) if block.dtype.kind == "u" else wide
            block = block.reshape(y, x, ky // edge, edge, kx // edge, edge).sum(axis=(3, 5), dtype=wide)
        return narrowed(block, self.stored, self.where)

    def identity(self) -> dict[str, Any]:
        """Return the identity of the file, and what was done to its frames."""
        said = self.preparation.identity() if self.preparation.changes else {}
        return {**self.source.identity(), "prepared": {**said, "dtype": self.stored.str}}

    def narrow(self, dtype: np.dtype) -> PreparedFrames:
        """Return the same frames stored as ``dtype``."""
        return replace(self, stored=dtype)


def mapped(source: FrameSource, change: Callable[[FrameSource], FrameSource]) -> FrameSource:
    """Return ``source`` with ``change`` applied to the file, or to each of its files."""
    if isinstance(source, StackedTilts | SeriesOfFiles):
        return replace(source, sources=tuple(change(part) for part in source.sources))
    return change(source)


def first_file(source: FrameSource) -> FrameSource:
    """Return ``source``, or the first of its files."""
    return source.sources[0] if isinstance(source, StackedTilts | SeriesOfFiles) else source


def smallest_dtype(largest: float, whole: bool, dtype: np.dtype) -> np.dtype:
    """Return the smallest unsigned type that holds whole numbers from 0 to ``largest``; ``dtype`` for other numbers."""
    if not whole:
        return dtype
    fitting = [np.dtype(name) for name in ("u1", "u2", "u4") if largest <= np.iinfo(name).max]
    return fitting[0] if fitting and fitting[0].itemsize <= dtype.itemsize else dtype


def narrowed(block: np.ndarray, dtype: np.dtype, where: str) -> np.ndarray:
    """Return ``block`` as ``dtype``, the same numbers.

    Raises
    ------
    FormatError
        If a number would change.
    """
    if block.dtype == dtype:
        return block
    if dtype.kind == "f":
        return block.astype(dtype)
    with np.errstate(invalid="ignore"):
        same = block.astype(dtype)
    if not np.array_equal(same, block):
        raise FormatError(
            f"{where}: holds values that {dtype} cannot hold, up to {block.max()}; it was chosen after a look at all "
            "frames, so the file has changed: begin another store"
        )
    return same


def replace_pixels(block: np.ndarray, bad: np.ndarray, where: str) -> None:
    """Replace pixels of frames (y, x, ky, kx) by the median (the lower one) of the good pixels around them.

    Parameters
    ----------
    bad
        (ky, kx), the same in all frames; or one for each, (y, x, ky, kx).

    Raises
    ------
    FormatError
        If a pixel has no good neighbour at most 2 pixels away.
    """
    for place in np.argwhere(bad).tolist():
        frame, (ky, kx) = tuple(place[:-2]), place[-2:]
        rows = slice(max(0, ky - _REACH), ky + _REACH + 1)
        columns = slice(max(0, kx - _REACH), kx + _REACH + 1)
        good = ~bad[frame][rows, columns]
        distance = np.maximum(*np.abs(np.indices(good.shape) - [[[ky - rows.start]], [[kx - columns.start]]]))
        near = good & (distance <= 1)
        chosen = near if near.any() else good  # the nearest eight, if one of them is good
        if not chosen.any():
            raise FormatError(f"{where}: the bad pixel at ky {ky}, kx {kx} has no good one around it; crop it away")
        patterns = block[frame]
        values = np.sort(patterns[..., rows, columns][..., chosen], axis=-1)
        patterns[..., ky, kx] = values[..., (values.shape[-1] - 1) // 2]


def read_dead_pixels(path: Path) -> np.ndarray:
    """Read the pixels (ky, kx) that are dead from an .npy: true, or not zero, where they are.

    Raises
    ------
    ConfigurationError
        If the file is not such an array.
    """
    try:
        mask = load_array(path)
    except (OSError, FormatError) as error:
        raise ConfigurationError(f"ingest.dead_pixels = {path}: cannot be read as .npy ({error})") from error
    if mask.ndim != 2 or mask.dtype.kind not in "biu":
        raise ConfigurationError(
            f"ingest.dead_pixels = {path}: expected an array (ky, kx) that is true where a pixel is dead"
        )
    return mask != 0
