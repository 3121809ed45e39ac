"""One tilt of a file that is being written: how much of it is there, what it is, what of it was lost."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stemtomo.errors import AcquisitionError, FormatError
from stemtomo.io.archive import StreamedMember
from stemtomo.io.formats.records import Run
from stemtomo.io.gaps import Gapped, MaskedFrames
from stemtomo.io.raw import ArrayFile
from stemtomo.io.sources import Checked, FrameSource

_HEAD_BYTES = 4096
_HDF5 = b"\x89HDF\r\n\x1a\n"


@dataclass(frozen=True)
class GrowingTilt:
    """Tilt number ``tilt`` of ``source``, as one follows it.

    Parameters
    ----------
    head_bytes
        Length of the beginning of the file that was there when it was first seen; it must not change any more. 0 for
        folders, and for HDF5, which writes its first bytes again when it grows.
    """

    source: FrameSource
    tilt: int
    head_bytes: int

    @classmethod
    def begin(cls, source: FrameSource, tilt: int, seen: dict[str, Any] | None = None) -> GrowingTilt:
        """Begin to follow a tilt, or go on with one whose identity was ``seen`` by an earlier run."""
        if seen is not None and "head_bytes" in seen:
            return cls(source, tilt, int(seen["head_bytes"]))
        return cls(source, tilt, _head_bytes(source.path))

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
        if not isinstance(self.source, ArrayFile) or not self.source.path.exists():
            return 0
        return self.source.partial_bytes()

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

    def missing(self, ready: int) -> list[Run]:
        """Return the runs of the first ``ready`` positions whose frame was lost, where the format tells."""
        if not isinstance(self.source, Gapped):
            return []
        begin = self.tilt * self.n_expected
        cut = ((max(0, start - begin), min(ready, stop - begin)) for start, stop in self.source.missing())
        return [(start, stop) for start, stop in cut if start < stop]

    def lost_text(self) -> str:
        """Return what the format knows of frames that were lost or cut, as a sentence that follows others."""
        if not isinstance(self.source, Checked):
            return ""
        try:
            self.source.check()
        except (AcquisitionError, FormatError, OSError) as error:
            return f" ({error})"
        return ""

    def readable(self, missing: Sequence[Run]) -> FrameSource:
        """Return the source that gives zeros at the positions ``missing`` of the tilt."""
        if not missing:
            return self.source
        begin = self.tilt * self.n_expected
        source = self.source.tolerant() if isinstance(self.source, Gapped) else self.source
        return MaskedFrames(source, tuple((begin + start, begin + stop) for start, stop in missing))


def _head_bytes(path: Path) -> int:
    if path.is_dir():
        return 0
    with path.open("rb") as file:
        if file.read(len(_HDF5)) == _HDF5:
            return 0
    return min(_HEAD_BYTES, path.stat().st_size)


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
