"""A tilt series that lies in one file per tilt: which file is which tilt, and the files as one source."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stemtomo.errors import AcquisitionError, ConfigurationError
from stemtomo.io.sources import FrameSource, Shape, check_complete

_FIELDS = ("theta_deg", "tilt", "number")
_TEMPORARY = (".part", ".partial", ".tmp", ".filepart", ".crdownload", "~")
_ANGLE_TOLERANCE_DEG = 1e-3
_ANGLE = re.compile(r"[+-]?\d+(\.\d*)?")


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
        ``{tilt}``, counted from 0; ``{number}``, counted from 1. The field may stand in the name of a folder:
        ``"{theta_deg}/scan_master.h5"``.
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
        field_of(self.files)
        angles = sorted(self.theta_deg)
        gaps = [b - a for a, b in itertools.pairwise(angles)]
        if field_of(self.files) == "theta_deg" and gaps and min(gaps) <= 2 * _ANGLE_TOLERANCE_DEG:
            raise ConfigurationError(
                f"input.files = {self.files!r} names tilts by theta, but two tilts have the same theta_deg; "
                "use {tilt} or {number}, or list the files"
            )

    def scan(self) -> Found:
        """Look at the folder: which tilts have their file, and which names are duplicate or cannot be read as a tilt.

        Files of other names, hidden ones and the temporary names of copying programs do not count.
        """
        found = Found()
        if not isinstance(self.files, str):
            files = {i: self.folder / name for i, name in enumerate(self.files)}
            found.files = {i: file for i, file in files.items() if file.exists()}
            return found
        name_of = field_of(self.files)
        claims: dict[int, list[str]] = {}
        for text, name in _fitting(self.folder, self.files):
            index, why = self._index(name_of, text)
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
            if not _ANGLE.fullmatch(text):
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


def field_of(files: str) -> str:
    """Return the field in braces of a name for the files of all tilts.

    Raises
    ------
    ConfigurationError
        If there is not exactly one, or it is not known.
    """
    fields = re.findall(r"\{(\w*)\}", files)
    if len(fields) != 1 or fields[0] not in _FIELDS:
        allowed = " or ".join(f"{{{name}}}" for name in _FIELDS)
        raise ConfigurationError(f"input.files = {files!r} has fields {fields}; give exactly one of {allowed}")
    return fields[0]


def angles_in_names(folder: Path, files: str) -> tuple[float, ...]:
    """Return the angles in degrees, ascending, in the names of ``folder`` that fit ``files`` with ``{theta_deg}``.

    Raises
    ------
    ConfigurationError
        If no name fits.
    AcquisitionError
        If two names have the same angle, or a name fits but for an angle that is no number; naming them.
    """
    found: dict[float, str] = {}
    for text, name in _fitting(folder, files):
        if not _ANGLE.fullmatch(text):
            raise AcquisitionError(
                f"{folder / name}: fits input.files = {files!r}, but {text!r} is no angle; rename the file, or "
                "list the files of the series"
            )
        before = found.setdefault(float(text), name)
        if before != name:
            raise AcquisitionError(
                f"{folder}: {before} and {name} both have the angle {float(text):g} deg; remove or rename one"
            )
    if not found:
        raise ConfigurationError(
            f"{folder}: no name fits input.files = {files!r}, from which the angles are to be taken; correct "
            "input.path or input.files, or give tilts.theta_deg if the files are still to come"
        )
    return tuple(sorted(found))


def _fitting(folder: Path, files: str) -> Iterator[tuple[str, str]]:
    """Yield what stands for the field, and the name, of what in ``folder`` fits ``files``, by name.

    Hidden files and the temporary names of copying programs do not.
    """
    parts = Path(files).parts
    level = next(index for index, part in enumerate(parts) if "{" in part)
    fixed, rest = folder.joinpath(*parts[:level]), parts[level + 1 :]
    before, _, after = re.split(r"\{(\w+)\}", parts[level])
    loose = re.compile(f"{re.escape(before)}(.+?){re.escape(after)}")
    try:
        names = sorted(entry.name for entry in fixed.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        match = loose.fullmatch(name)
        whole = str(Path(*parts[:level], name, *rest))
        if match and not name.startswith(".") and not name.endswith(_TEMPORARY) and (folder / whole).exists():
            yield match[1], whole


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

    def check(self) -> None:
        """Check every file on its own, so that the message names the one that is short, too long or has gaps."""
        for source in self.sources:
            check_complete(source)

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
