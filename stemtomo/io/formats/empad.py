"""EMPAD: a .raw of 130 x 128 floats per frame, the last two rows of which are metadata, and an .xml."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stemtomo.errors import AcquisitionError, FormatError
from stemtomo.io.formats.records import Run, placed
from stemtomo.io.provenance import file_identity
from stemtomo.io.untrusted import reading

_SIDE = 128
_ROWS = 130
_FILE_DTYPE = np.dtype("<f4")
_RECORD_BYTES = _ROWS * _SIDE * _FILE_DTYPE.itemsize
_PIECE_BYTES = 16 << 20


@dataclass(frozen=True)
class EmpadFrames:
    """Frames of an EMPAD .raw, without its metadata rows; a :class:`stemtomo.io.formats.records.FrameRecords`."""

    path: Path
    raw: Path
    recorded_scan: tuple[int, int] | None = None
    promised: int | None = None
    grows: bool = True

    @property
    def where(self) -> str:
        """File with the frames, for messages."""
        return str(self.raw)

    @property
    def frame_shape(self) -> tuple[int, int]:
        """128 x 128 pixels."""
        return (_SIDE, _SIDE)

    @property
    def dtype(self) -> np.dtype:
        """float32."""
        return _FILE_DTYPE.newbyteorder("=")

    def count(self) -> int:
        """Return the whole frames of the file."""
        return self.raw.stat().st_size // _RECORD_BYTES

    def check(self, expected: int) -> None:
        """Check that the file does not end inside a frame, and holds what the .xml promises.

        Raises
        ------
        AcquisitionError
            Naming the frame that is cut, or both counts.
        """
        frames, rest = divmod(self.raw.stat().st_size, _RECORD_BYTES)
        if rest:
            raise AcquisitionError(
                f"{self.raw}: ends inside frame {frames} (of {max(expected, self.promised or 0)}): {rest} of "
                f"{_RECORD_BYTES} bytes; copy the file again if it is cut off, wait if it is still being written, or "
                f"give ingest.missing = 'mask' to keep {frames}"
            )
        if self.promised is not None and frames < self.promised:
            raise AcquisitionError(
                f"{self.raw}: holds {frames} frames, {self.path.name} promises {self.promised}: "
                f"{self.promised - frames} frames are missing; copy the file again if it is cut off"
            )

    def read(self, runs: Sequence[Run], out: np.ndarray) -> None:
        """Fill ``out`` (frame, ky, kx) with the frames of ``runs``, read in pieces through one buffer.

        Raises
        ------
        AcquisitionError
            If the file ends before a run does.
        """
        step = max(1, _PIECE_BYTES // _RECORD_BYTES)
        buffer = np.empty((min(step, len(out)), _ROWS, _SIDE), _FILE_DTYPE)
        with self.raw.open("rb", buffering=0) as stream:
            for start, stop, part in placed(runs, out):
                stream.seek(start * _RECORD_BYTES)
                for done in range(0, len(part), step):
                    piece = buffer[: min(step, len(part) - done)]
                    if stream.readinto(piece.reshape(-1).view(np.uint8).data) != piece.nbytes:
                        raise AcquisitionError(f"{self.raw}: ends before frame {stop - 1}; copy the file again")
                    part[done : done + len(piece)] = piece[:, :_SIDE]

    def identity(self) -> dict[str, Any]:
        """Return the identity of the .raw."""
        return file_identity(self.raw)


def open_empad(path: Path) -> EmpadFrames:
    """Open the .xml of an acquisition, or its .raw alone, which then does not say its scan.

    The scan is ``pix_x`` and ``pix_y``, or else what the name of the .raw says (``scan_x256_y256.raw``). The
    resolutions under ``scan_parameters`` are settings of the search and acquire modes, and not those of this file.

    Raises
    ------
    FormatError
        If the .xml is not one of EMPAD, or names a .raw that is not there.
    """
    if path.suffix.lower() != ".xml":
        return EmpadFrames(path, path)
    with reading(path, "well-formed XML", "copy the file again"):
        root = ElementTree.parse(path).getroot()
    named = root.find("raw_file")
    name = named.get("filename", "") if named is not None else ""
    if not name:
        raise FormatError(f"{path}: names no raw_file, so it is no .xml of EMPAD; give the .raw with format = 'empad'")
    raw = path.parent / Path(name.replace("\\", "/")).name
    if not raw.is_file():
        raise FormatError(
            f"{path}: names {raw.name}, which is not beside it; copy it there under that name, or give the .raw itself "
            "with format = 'empad' and scan.shape"
        )
    series = root.findtext("scan_parameters/series_count")
    x, y = root.findtext("pix_x"), root.findtext("pix_y")
    in_name = re.search(r"_x(\d+)_y(\d+)", raw.name)
    with reading(path, "an .xml of EMPAD", "a number of positions is none; copy the file again, or give the .raw"):
        if series is not None:
            return EmpadFrames(path, raw, None, int(series))
        if x is not None and y is not None:
            return EmpadFrames(path, raw, (int(y), int(x)))
    return EmpadFrames(path, raw, (int(in_name[2]), int(in_name[1])) if in_name else None)
