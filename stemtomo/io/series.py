"""A tilt series that lies in one file per tilt: which file is which tilt, and the files as one source."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stemtomo.errors import AcquisitionError, ConfigurationError
from stemtomo.io.sources import FrameSource, Shape

_FIELDS = ("theta_deg", "tilt", "number")
_TEMPORARY = (".part", ".partial", ".tmp", ".filepart", ".crdownload", "~")
_ANGLE_TOLERANCE_DEG = 1e-3


@dataclass
class Found:
    """Files of tilts that are there, and names that cannot be used, with the reason and the tilts they stand for."""

    files: dict[int, Path] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    refused_tilts: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class TiltFiles:
    """Which file of ``folder`` holds which tilt.

    Parameters
    ----------
    files
        Names in the order of the tilts; or one name with a field in braces: ``{theta_deg}``, the angle in degrees;
        ``{tilt}``, counted from 0; ``{number}``, counted from 1.
    theta_deg
        Angles of the tilts in degrees.

    Raises
    ------
    ConfigurationError
        If the names do not fit the number of tilts, or the pattern cannot tell them apart.
    """

    folder: Path
    files: str | Sequence[str]
    theta_deg: Sequence[float]

    def __post_init__(self) -> None:
        count = len(self.theta_deg)
        if not isinstance(self.files, str):
            if len(self.files) != count or len(set(self.files)) != count:
                raise ConfigurationError(
                    f"input.files names {len(set(self.files))} different files for {count} tilts; name one per tilt"
                )
            return
        fields = re.findall(r"\{(\w*)\}", self.files)
        if len(fields) != 1 or fields[0] not in _FIELDS:
            allowed = " or ".join(f"{{{name}}}" for name in _FIELDS)
            raise ConfigurationError(f"input.files = {self.files!r} has fields {fields}; give exactly one of {allowed}")
        angles = sorted(self.theta_deg)
        gaps = [b - a for a, b in itertools.pairwise(angles)]
        if fields[0] == "theta_deg" and gaps and min(gaps) <= 2 * _ANGLE_TOLERANCE_DEG:
            raise ConfigurationError(
                f"input.files = {self.files!r} names tilts by theta, but two tilts have the same theta_deg; "
                "use {tilt} or {number}, or list the files"
            )

    def scan(self) -> Found:
        """Look at the folder: which tilts have their file, and which names are duplicate or cannot be read as a tilt.

        Files of other names, hidden ones and the temporary names of copying programs do not count.
        """
        found = Found()
        try:
            names = sorted(entry.name for entry in self.folder.iterdir())
        except FileNotFoundError:
            return found
        if not isinstance(self.files, str):
            found.files = {i: self.folder / name for i, name in enumerate(self.files) if name in names}
            return found
        before, name_of, after = re.split(r"\{(\w+)\}", self.files)
        loose = re.compile(f"{re.escape(before)}(.+?){re.escape(after)}")
        claims: dict[int, list[str]] = {}
        for name in names:
            match = loose.fullmatch(name)
            if match is None or name.startswith(".") or name.endswith(_TEMPORARY):
                continue
            index, why = self._index(name_of, match[1])
            if index is None:
                found.refused[name] = f"{self.folder / name}: {why}"
            else:
                claims.setdefault(index, []).append(name)
        for index, claimants in claims.items():
            if len(claimants) == 1:
                found.files[index] = self.folder / claimants[0]
                continue
            found.refused_tilts.add(index)
            found.refused[claimants[0]] = (
                f"{self.folder}: {' and '.join(claimants)} are both tilt {index} ({self.theta_deg[index]:g} deg); "
                "none of them is taken: remove or rename one"
            )
        return found

    def _index(self, name_of: str, text: str) -> tuple[int | None, str]:
        count = len(self.theta_deg)
        if name_of == "theta_deg":
            if not re.fullmatch(r"[+-]?\d+(\.\d*)?", text):
                return None, f"{text!r} is not a tilt angle in degrees; rename the file or correct input.files"
            angle = float(text)
            distances = [abs(angle - theta) for theta in self.theta_deg]
            index = int(np.argmin(distances))
            if distances[index] > _ANGLE_TOLERANCE_DEG:
                return None, f"{angle:g} deg is none of the {count} angles of tilts.theta_deg; correct one of the two"
            return index, ""
        if not re.fullmatch(r"\d+", text):
            return None, f"{text!r} is not the number of a tilt; rename the file or correct input.files"
        index = int(text) - (1 if name_of == "number" else 0)
        if not 0 <= index < count:
            return None, f"there is no tilt {text} in a series of {count}; correct tilts or the name"
        return index, ""


@dataclass(frozen=True)
class SeriesOfFiles:
    """Files of one tilt each as one source of frames (tilt, y, x, ky, kx).

    Raises
    ------
    AcquisitionError
        If a file has another shape or dtype than the first, or holds several tilts.
    """

    sources: tuple[FrameSource, ...]

    def __post_init__(self) -> None:
        for source in self.sources:
            check_like(source, self.sources[0])

    @classmethod
    def open(cls, files: TiltFiles, open_file: Callable[[Path], FrameSource]) -> SeriesOfFiles:
        """Open all files of a finished acquisition.

        Raises
        ------
        AcquisitionError
            If the file of a tilt is missing, or a name is duplicate or cannot be read as a tilt.
        """
        found = files.scan()
        if found.refused:
            raise AcquisitionError("\n".join(found.refused.values()))
        missing = [index for index in range(len(files.theta_deg)) if index not in found.files]
        if missing:
            raise AcquisitionError(
                f"{files.folder}: no file {files.files!r} for tilts {missing}, {len(missing)} of "
                f"{len(files.theta_deg)}; wait for them with watch, or correct input.files or tilts"
            )
        return cls(tuple(open_file(found.files[index]) for index in range(len(files.theta_deg))))

    @property
    def path(self) -> Path:
        """The folder."""
        return self.sources[0].path.parent

    @property
    def where(self) -> str:
        """The folder, for messages."""
        return str(self.path)

    @property
    def shape(self) -> Shape:
        """Lengths of tilt, y, x, ky, kx."""
        return (len(self.sources), *self.sources[0].shape[1:])

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the frames."""
        return self.sources[0].dtype

    @property
    def n_expected(self) -> int:
        """Number of frames of the series."""
        return math.prod(self.shape[:3])

    def ready(self) -> int:
        """Return how many frames the files hold; more than ``n_expected`` only if a file does, and none is short."""
        counts = [(source.ready(), source.n_expected) for source in self.sources]
        if any(ready < expected for ready, expected in counts):
            return sum(min(pair) for pair in counts)
        return sum(ready for ready, _ in counts)

    def read(self, tilt: int, y0: int, y1: int, x0: int = 0, x1: int | None = None) -> np.ndarray:
        """Return the frames (y, x, ky, kx) of a block of the scan of ``tilt``."""
        return self.sources[tilt].read(0, y0, y1, x0, x1)

    def identity(self) -> dict[str, Any]:
        """Return the identities of all files."""
        return {"files": [source.identity() for source in self.sources]}

    def tilt_identity(self, tilt: int) -> dict[str, Any]:
        """Return the identity of the file of ``tilt``."""
        return self.sources[tilt].identity()


def tilt_identities(source: FrameSource) -> list[dict[str, Any]]:
    """Return, for every tilt, the identity of the file that it comes from."""
    if isinstance(source, SeriesOfFiles):
        return [source.tilt_identity(tilt) for tilt in range(source.shape[0])]
    return [source.identity()] * source.shape[0]


def check_like(source: FrameSource, first: FrameSource | Mapping[str, Any]) -> None:
    """Check that ``source`` holds one tilt of the shape and dtype of the ``first`` file of its series.

    Raises
    ------
    AcquisitionError
        Naming the first one's.
    """
    if not isinstance(first, Mapping):
        first = {"where": first.where, "shape": first.shape, "dtype": first.dtype}
    shape, dtype = tuple(first["shape"]), np.dtype(first["dtype"])
    if (source.shape, source.dtype) != (shape, dtype) or source.shape[0] != 1:
        raise AcquisitionError(
            f"{source.where}: holds {list(source.shape)} (tilt, y, x, ky, kx) {source.dtype}; expected one tilt, like "
            f"{first['where']} with {list(shape)} {dtype}. It is not taken: record the tilt again, or leave it out"
        )
