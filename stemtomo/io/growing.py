"""One tilt of a file that is being written: how much of it is there, what it is, and reading what is there."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from stemtomo.io.archive import StreamedMember
from stemtomo.io.raw import ArrayFile
from stemtomo.io.sources import FrameSource

_HEAD_BYTES = 4096


@dataclass(frozen=True)
class GrowingTilt:
    """Tilt number ``tilt`` of ``source``, as one follows it.

    Parameters
    ----------
    head_bytes
        Length of the beginning of the file that was there when it was first seen; it must not change any more.
    """

    source: FrameSource
    tilt: int
    head_bytes: int

    @classmethod
    def begin(cls, source: FrameSource, tilt: int, seen: dict[str, Any] | None = None) -> GrowingTilt:
        """Begin to follow a tilt, or go on with one whose identity was ``seen`` by an earlier run."""
        if seen is not None and "head_bytes" in seen:
            return cls(source, tilt, int(seen["head_bytes"]))
        return cls(source, tilt, min(_HEAD_BYTES, 0 if source.path.is_dir() else source.path.stat().st_size))

    @property
    def where(self) -> str:
        """File, array and tilt for messages."""
        return self.source.where if self.source.shape[0] == 1 else f"{self.source.where}, tilt {self.tilt}"

    @property
    def n_expected(self) -> int:
        """Frames of the tilt."""
        return self.source.shape[1] * self.source.shape[2]

    def ready(self) -> int:
        """Return how many frames of the tilt are whole, from its first one on; what is too much is in the last tilt."""
        ready = max(0, self.source.ready() - self.tilt * self.n_expected)
        return ready if self.tilt == self.source.shape[0] - 1 else min(ready, self.n_expected)

    def partial_bytes(self) -> int:
        """Return the bytes of a frame that is not whole at the end of the file, 0 where the format does not tell."""
        return self.source.partial_bytes() if isinstance(self.source, ArrayFile) else 0

    def identity(self) -> dict[str, Any]:
        """Return what stays the same while the file grows: its inode and its beginning, and how it is read."""
        path = self.source.path
        identity = {"file": path.name, "inode": path.stat().st_ino, "head_bytes": self.head_bytes}
        if self.head_bytes:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_ino != identity["inode"]:  # replaced between the two looks
                    identity["inode"] = os.fstat(file.fileno()).st_ino
                identity["head_sha256"] = hashlib.sha256(file.read(self.head_bytes)).hexdigest()[:16]
        return {**identity, "shape": list(self.source.shape), "dtype": self.source.dtype.str}

    def read(self, region: tuple[int, int, int, int], available: int) -> np.ndarray:
        """Return the frames of ``region`` (y0, y1, x0, x1); those from frame ``available`` of the tilt on are zero."""
        y0, y1, x0, x1 = region
        columns = self.source.shape[2]
        if (y1 - 1) * columns + x1 <= available:
            return self.source.read(self.tilt, y0, y1, x0, x1)
        block = np.zeros((y1 - y0, x1 - x0, *self.source.shape[3:]), self.source.dtype)
        for y in range(y0, y1):
            stop = min(x1, available - y * columns)
            if stop > x0:
                block[y - y0, : stop - x0] = self.source.read(self.tilt, y, y + 1, x0, stop)[0]
        return block


def counts_records(source: FrameSource) -> bool:
    """Whether :meth:`ready` of ``source`` can be trusted while its file is written.

    Sources that say so (``grows = True``), raw binary and .npy count whole records. Others are opaque: all that tells
    that they are finished is that they do not change any more.
    """
    said = getattr(source, "grows", None)
    return isinstance(source, ArrayFile) and source.array is None if said is None else bool(said)


def needs_whole_reads(source: FrameSource) -> bool:
    """Whether every read of ``source`` begins at its first frame: following it would read it once per shard."""
    return isinstance(source, StreamedMember)
