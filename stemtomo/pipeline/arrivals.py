"""Files of an acquisition as they appear: found, opened when they can be, refused when they cannot be meant."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stemtomo.errors import AcquisitionError, ConfigurationError, FormatError
from stemtomo.io.growing import GrowingTilt, counts_records, needs_whole_reads
from stemtomo.io.series import TiltFiles, check_like
from stemtomo.io.sources import FrameSource
from stemtomo.pipeline.config import Configuration
from stemtomo.pipeline.ingest import open_file

_LOG = logging.getLogger(__name__)
_HINT = (
    "is it still being copied, written by HDF5 without SWMR, of another format, or is a plugin (hdf5plugin) or option "
    "missing to read it?"
)


@dataclass
class _Candidate:
    """A file that is there but not followed yet."""

    status: tuple[int, int]
    since: float
    polls: int = 1
    error: Exception | None = None


@dataclass
class Arrivals:
    """What is at the place of the acquisition; every call of :meth:`look` looks again.

    ``refused`` maps names of files to why they are not taken, ``refused_tilts`` are the tilts that they stand for.
    """

    configuration: Configuration
    path: Path
    files: TiltFiles | None
    settle_s: float
    first: FrameSource | Mapping[str, Any] | None = None
    refused: dict[str, str] = field(default_factory=dict)
    refused_tilts: set[int] = field(default_factory=set)
    _candidates: dict[Path, _Candidate] = field(default_factory=dict)
    _opened: set[Path] = field(default_factory=set)
    _turned_away: dict[Path, tuple[str, set[int]]] = field(default_factory=dict)

    @classmethod
    def at(cls, path: Path, configuration: Configuration) -> Arrivals:
        """Say where to look: a file, or a folder with the files that ``input.files`` names.

        Raises
        ------
        ConfigurationError
            If ``path`` is a folder and ``input.files`` is not given.
        """
        names, settle_s = configuration.input.files, configuration.watch.settle_s
        if names is not None:
            return cls(configuration, path, TiltFiles(path, names, configuration.theta_deg()), settle_s)
        if path.is_dir():
            raise ConfigurationError(
                f"{path} is a folder: say with input.files which of its files is which tilt, such as "
                "'scan_{theta_deg}.npy' or a list of names; files are never taken in the order of their names"
            )
        return cls(configuration, path, None, settle_s)

    def look(self, now: float) -> Iterator[tuple[int, GrowingTilt]]:
        """Yield the tilts whose file has become readable since the last look."""
        self.refused, self.refused_tilts = {}, set()
        tilts = len(self.configuration.theta_deg())
        if self.files is None:
            there = {-1: self.path} if self.path.exists() else {}
        else:
            found = self.files.scan()
            there, self.refused, self.refused_tilts = found.files, found.refused, found.refused_tilts
        for index, path in there.items():
            if path in self._opened or path in self._turned_away:
                continue
            wanted = set(range(tilts)) if index < 0 else {index}
            try:
                source = self._open(path, now)
                if source is None:
                    continue
                self._check(source, tilts if index < 0 else 1)
            except AcquisitionError as error:
                self._turned_away[path] = (str(error), wanted)
                continue
            self._opened.add(path)
            self.first = self.first or source
            yield from ((tilt, GrowingTilt.begin(source, tilt if index < 0 else 0)) for tilt in sorted(wanted))
        for path, (why, wanted) in self._turned_away.items():
            self.refused[path.name] = why
            self.refused_tilts |= wanted

    @property
    def unreadable(self) -> dict[Path, Exception]:
        """Files that are there and cannot be read yet, with what reading them says."""
        return {path: found.error for path, found in self._candidates.items() if found.error is not None}

    @property
    def changed_at(self) -> float:
        """When a file that cannot be followed yet changed last."""
        return max((found.since for found in self._candidates.values()), default=float("-inf"))

    def open_again(self, path: Path) -> FrameSource:
        """Open the file ``path`` as it is now: what was opened while it grew need not know what came later."""
        return open_file(self.configuration.input, self.configuration.scan.shape, path)

    def _open(self, path: Path, now: float) -> FrameSource | None:
        """Open ``path`` if it can be read, and is finished where its format does not say how much of it is whole."""
        try:
            found = path.stat()
            status = (found.st_size, found.st_mtime_ns)
            candidate = self._candidates.get(path)
            if candidate is None or candidate.status != status:
                error = None if candidate is None else candidate.error
                candidate = self._candidates[path] = _Candidate(status, now, error=error)
            else:
                candidate.polls += 1
            source = self.open_again(path)
        except (FormatError, AcquisitionError, OSError) as error:
            if path in self._candidates:
                if self._candidates[path].error is None:
                    _LOG.info("%s: cannot be read yet (%s); waiting", path, error)
                self._candidates[path].error = error
            return None
        if needs_whole_reads(source):
            raise AcquisitionError(
                f"{source.where}: is compressed as a whole and cannot be read in parts; write it uncompressed to have "
                "it followed, or use ingest when the acquisition is over"
            )
        if not counts_records(source):
            if candidate.polls < 2 or now - candidate.since < self.settle_s:
                candidate.error = None
                return None
            _LOG.info("%s: taken as finished: it has not changed for %g s", path, self.settle_s)
        del self._candidates[path]
        return source

    def _check(self, source: FrameSource, tilts: int) -> None:
        if source.shape[0] != tilts:
            raise AcquisitionError(
                f"{source.where}: is laid out for {source.shape[0]} tilts, {tilts} expected; correct the axes, "
                "tilts or input.files"
            )
        if self.files is not None and self.first is not None:
            check_like(source, self.first)


def unreadable_text(path: Path, error: Exception) -> str:
    """Say that ``path`` could not be read until the deadline."""
    return f"{path}: could not be read until the deadline ({error}); {_HINT}"
