"""A series with a file per tilt: the files' frames behind one another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stemtomo.errors import AcquisitionError, FormatError
from stemtomo.io.archive import StreamedMember
from stemtomo.io.provenance import fingerprint_of

if TYPE_CHECKING:
    from stemtomo.io.sources import FrameSource


@dataclass(frozen=True)
class StackedTilts:
    """Sources of equal shape and dtype, one or more tilts each, as one source; :func:`stack` makes it."""

    sources: tuple[FrameSource, ...]

    @property
    def path(self) -> Path:
        """The first file."""
        return self.sources[0].path

    @property
    def where(self) -> str:
        """First file and how many there are, for messages."""
        return f"{self.sources[0].where} and {len(self.sources) - 1} more"

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Lengths of tilt, y, x, ky, kx."""
        tilt, y, x, ky, kx = self.sources[0].shape
        return (tilt * len(self.sources), y, x, ky, kx)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the frames read."""
        return self.sources[0].dtype

    @property
    def n_expected(self) -> int:
        """Frames of the whole series."""
        return math.prod(self.shape[:3])

    def ready(self) -> int:
        """Return the frames that are there from the first tilt on, up to the first file that is not whole."""
        ready = 0
        for source in self.sources:
            found = source.ready()
            ready += found
            if found < source.n_expected:
                break
        return ready

    def check(self) -> None:
        """Check every file on its own, so that the message names the one that is short or too long."""
        from stemtomo.io.sources import check_complete

        for source in self.sources:
            check_complete(source)

    def read(self, tilt: int, y0: int, y1: int, x0: int = 0, x1: int | None = None) -> np.ndarray:
        """Return the frames (y, x, ky, kx) of rows ``y0`` to ``y1`` and columns ``x0`` to ``x1`` of ``tilt``."""
        file, inside = divmod(tilt, self.sources[0].shape[0])
        return self.sources[file].read(inside, y0, y1, x0, x1)

    def identity(self) -> dict[str, Any]:
        """Return the identity of all files: sizes added, the newest time, and a hash of each one's identity."""
        parts = [source.identity() for source in self.sources]
        first = parts[0]
        return {
            "file": f"{first['file']} ... {parts[-1]['file']}",
            "size_bytes": sum(part["size_bytes"] for part in parts),
            "mtime_ns": max(part["mtime_ns"] for part in parts),
            "head_tail_sha256": fingerprint_of(parts),
            "files": len(parts),
            "array": first.get("array"),
            "axes": ["tilt", *(name for name in first["axes"] if name != "tilt")],
            "shape": list(self.shape),
            "dtype": first["dtype"],
        }


def stack(sources: tuple[FrameSource, ...]) -> FrameSource:
    """Return ``sources``, one or more tilts each, as one series in the order given.

    Raises
    ------
    AcquisitionError
        If shape or dtype differs between the files, or a file is named twice; naming both.
    FormatError
        If there is no file, or a compressed .npz, which cannot be read in parallel.
    """
    if not sources:
        raise FormatError("input.path is an empty list; name one file per tilt")
    if len(sources) == 1:
        return sources[0]
    first = sources[0]
    seen: dict[tuple[Path, str], int] = {}
    for number, source in enumerate(sources):
        if isinstance(source, StreamedMember):
            raise FormatError(f"{source.where}: is compressed; one file per tilt must be uncompressed (numpy.savez)")
        if (source.shape, source.dtype) != (first.shape, first.dtype):
            raise AcquisitionError(
                f"{source.where} (tilt file {number}): holds {list(source.shape[1:])} {source.dtype} (y, x, ky, kx), "
                f"the first, {first.where}, holds {list(first.shape[1:])} {first.dtype}; all tilts of a series "
                "must agree: leave this file out, or convert it"
            )
        before = seen.setdefault((source.path, source.where), number)
        if before != number:
            raise AcquisitionError(f"{source.where}: is named twice, as tilt files {before} and {number}; name it once")
    return StackedTilts(tuple(sources))
