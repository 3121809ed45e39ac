"""DECTRIS file writer (Arina, Quadro, Eiger): a master HDF5 file and its data files.

The old layout links data files, ``/entry/data/data_000001`` ..., of frames (frame, ky, kx). That of 2024 has one
virtual dataset ``/entry/data/data`` (frame, channel, ky, kx) over them, with a channel per threshold. HDF5 reads what
is missing of a virtual dataset as zeros; here a data file that is not there is an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stemtomo.errors import AcquisitionError, FormatError
from stemtomo.io.formats.optional import open_hdf5, require
from stemtomo.io.formats.records import Run, placed, runs_of
from stemtomo.io.layout import check_dtype
from stemtomo.io.provenance import file_identity, fingerprint_of

_DATA = "/entry/data"
_SPECIFIC = "/entry/instrument/detector/detectorSpecific"


class Part(NamedTuple):
    """A dataset with consecutive frames: its file, its name there, its first frame and the one after its last."""

    file: Path
    dataset: str
    start: int
    stop: int


@dataclass(frozen=True)
class DectrisFrames:
    """Frames of one acquisition of a DECTRIS detector; a :class:`stemtomo.io.formats.records.FrameRecords`.

    ``channel`` is the index of the threshold in files of four axes, ``None`` in those of three.
    """

    path: Path
    parts: tuple[Part, ...]
    frame_shape: tuple[int, int]
    dtype: np.dtype
    channel: int | None = None
    recorded_scan: None = None
    grows: bool = True

    @property
    def where(self) -> str:
        """Master file, for messages."""
        return str(self.path)

    def count(self) -> int:
        """Return the frames of the data files that are there now, up to the first that is not."""
        return _leading(_parts(self.path)[0])

    def absent(self, expected: int) -> list[Run]:
        """Return the runs of frames, of the first ``expected``, that no data file holds."""
        there = np.zeros(expected, bool)
        for part in _parts(self.path)[0]:
            there[part.start : part.stop] = True
        return runs_of(np.flatnonzero(~there))

    def without(self, absent: list[Run]) -> DectrisFrames:
        """Return itself: frames are found by their number."""
        return self

    def check(self, expected: int) -> None:
        """Check that all data files are there and hold the frames that the master promises.

        Raises
        ------
        AcquisitionError
            Naming the missing files, or both counts.
        """
        parts, missing = _parts(self.path)
        if missing:
            raise AcquisitionError(
                f"{self.path}: {len(missing)} of its data files cannot be read: {', '.join(missing[:5])}"
                f"{' ...' if len(missing) > 5 else ''}; copy them beside the master, wait if it is still recording, or "
                "give ingest.missing = 'mask' to leave these positions out"
            )
        count, promised = _leading(parts), _promised(self.path)
        later = [part for part in parts if part.start > count]
        if later:
            raise AcquisitionError(
                f"{later[0].file}: its first image has number {later[0].start + 1}, {count + 1} was expected: images "
                f"{count + 1} to {later[0].start} are missing; copy all data files, or give ingest.missing = 'mask' to "
                "leave these positions out"
            )
        if promised is not None and count < promised:
            raise AcquisitionError(
                f"{self.path}: its data files hold {count} frames, the master promises {promised}: "
                f"{promised - count} frames are missing; copy the files again, or wait if it is still recording"
            )

    def read(self, runs: Sequence[Run], out: np.ndarray) -> None:
        """Fill ``out`` (frame, ky, kx) with the frames of ``runs``.

        Raises
        ------
        AcquisitionError
            If they are not there yet.
        """
        parts, end = self.parts, runs[-1][1]
        if not parts or end > parts[-1].stop:  # the acquisition has grown since it was opened
            parts, _ = _parts(self.path)
        for start, stop in runs:
            held = sum(max(0, min(stop, part.stop) - max(start, part.start)) for part in parts)
            if held < stop - start:
                raise AcquisitionError(f"{self.path}: frame {stop - 1} is not there, or one before it")
        for part in parts:
            if any(start < part.stop and stop > part.start for start, stop in runs):
                self._read_part(part, runs, out)

    def _read_part(self, part: Part, runs: Sequence[Run], out: np.ndarray) -> None:
        with open_hdf5(part.file) as file:
            dataset = file[part.dataset]
            for start, stop, target in placed(runs, out):
                first, last = max(start, part.start), min(stop, part.stop)
                if first < last:
                    index = slice(first - part.start, last - part.start)
                    frames = dataset[index] if self.channel is None else dataset[index, self.channel]
                    target[first - start : last - start] = frames

    def identity(self) -> dict[str, Any]:
        """Return the identity of the master and of its data files."""
        files = sorted({part.file for part in self.parts} - {self.path})
        parts = [file_identity(file) for file in (self.path, *files)]
        return {
            "file": self.path.name,
            "size_bytes": sum(part["size_bytes"] for part in parts),
            "mtime_ns": max(part["mtime_ns"] for part in parts),
            "head_tail_sha256": fingerprint_of(parts),
            "array": None if self.channel is None else f"channel {self.channel + 1}",
        }


def is_dectris(file: Any) -> bool:
    """Whether the open HDF5 ``file`` is a master file, or a data file, of the DECTRIS file writer."""
    if _DATA not in file or not hasattr(file[_DATA], "keys"):
        return False
    keys = list(file[_DATA].keys())
    numbered = any(re.fullmatch(r"data_\d+", key) for key in keys)
    return numbered or ("data" in keys and _SPECIFIC in file) or {"data", "channel"} <= set(keys)


def open_dectris(path: Path, channel: str | int | None = None) -> DectrisFrames:
    """Open the acquisition with the master file ``path``; ``channel`` names a threshold, or numbers it from 1.

    Raises
    ------
    FormatError
        If it is no master file, its layout is not known, or several thresholds leave the choice open.
    AcquisitionError
        If no data file is there.
    """
    parts, missing = _parts(path)
    if not parts:
        raise AcquisitionError(
            f"{path}: has no frames: {', '.join(missing[:3]) or 'no dataset under /entry/data'} cannot be read; copy "
            "the data files beside the master file"
        )
    first = parts[0]
    with open_hdf5(first.file) as file:
        shape, dtype = file[first.dataset].shape, file[first.dataset].dtype
    check_dtype(f"{path}[{_DATA}]", dtype)
    if len(shape) not in (3, 4):
        raise FormatError(
            f"{path}: its data have {len(shape)} axes, shape {list(shape)}; 3 (frame, ky, kx) and 4 (frame, threshold, "
            "ky, kx) are known"
        )
    index = _channel(path, shape[1], channel) if len(shape) == 4 else None
    if index is None and channel not in (None, 1, "1"):
        raise FormatError(f"{path}: input.channel is {channel!r}, but the file has one threshold; leave the key out")
    return DectrisFrames(path, parts, (int(shape[-2]), int(shape[-1])), dtype.newbyteorder("="), index)


def _channel(path: Path, count: int, channel: str | int | None) -> int:
    with open_hdf5(path) as file:
        named = file[_DATA].get("channel")
        names = (
            [name.decode() if isinstance(name, bytes) else str(name) for name in named[()]] if named is not None else []
        )
    if channel is None and count == 1:
        return 0
    if channel is not None:
        if str(channel) in names:
            return names.index(str(channel))
        if str(channel).isdigit() and 1 <= int(channel) <= count:
            return int(channel) - 1
    found = f"{count} thresholds" + (f" ({', '.join(names)})" if names else "")
    said = "none was named" if channel is None else f"input.channel is {channel!r}"
    raise FormatError(f"{path}: holds {found}, {said}; give input.channel, a name or a number from 1 to {count}")


def _parts(path: Path) -> tuple[tuple[Part, ...], list[str]]:
    """Return the datasets that can be read and placed, and the names of those that cannot."""
    h5py = require("h5py", path)
    with open_hdf5(path) as file:
        group = file.get(_DATA)
        if group is None:
            raise FormatError(f"{path}: has no {_DATA}, so it is no master file of a DECTRIS detector")
        names = sorted((n for n in group if re.fullmatch(r"data_\d+", n)), key=lambda n: int(n[5:]))
        names = names or [n for n in group if n == "data"]
        if names == ["data"] and isinstance(group["data"], h5py.Dataset) and group["data"].is_virtual:
            wanted = _virtual(path, group["data"])
        else:
            wanted = []
            for name in names:
                link = group.get(name, getlink=True)
                external = isinstance(link, h5py.ExternalLink)
                target = (path.parent / link.filename, link.path) if external else (path, f"{_DATA}/{name}")
                wanted.append((*target, None))
    return _measure(wanted)


def _virtual(path: Path, dataset: Any) -> list[tuple[Path, str, int | None]]:
    """Return file, dataset and count of frames of each source of a virtual dataset, in the order of frames."""
    found = []
    for source in dataset.virtual_sources():
        low, high = source.vspace.get_select_bounds()
        file = path if source.file_name == "." else path.parent / source.file_name
        found.append((low[0], (file, source.dset_name, int(high[0] - low[0] + 1))))
    return [entry for _, entry in sorted(found, key=lambda item: item[0])]


def _measure(wanted: list[tuple[Path, str, int | None]]) -> tuple[tuple[Part, ...], list[str]]:
    """Open every dataset and place its frames by the number of its first image, or behind those before it."""
    parts: list[Part] = []
    missing: list[str] = []
    start: int | None = 0
    origin: int | None = None
    for file, name, expected in wanted:
        try:
            with open_hdf5(file) as opened:
                count, low = int(opened[name].shape[0]), opened[name].attrs.get("image_nr_low")
        except (FormatError, KeyError):
            missing.append(file.name)
            start = start + expected if start is not None and expected is not None else None
            continue
        if low is not None:
            if origin is None:  # images count from 1, unless the first file says otherwise
                origin = int(low) - start if start is not None else 1
            start = int(low) - origin
        if start is None:  # a file before it is missing, of unknown length
            continue
        if parts and start < parts[-1].stop:
            raise AcquisitionError(
                f"{file}: its first image has number {start + 1}, the file before it ends with {parts[-1].stop}; the "
                "data files are not those of one acquisition"
            )
        if expected is not None and count < expected:
            missing.append(f"{file.name} ({count} of {expected} frames)")
        parts.append(Part(file, name, start, start + count))
        start += count if expected is None else expected
    return tuple(parts), missing


def _leading(parts: Sequence[Part]) -> int:
    """Return how many frames, from the first on, are there without a gap."""
    end = 0
    for part in parts:
        if part.start > end:
            break
        end = part.stop
    return end


def _promised(path: Path) -> int | None:
    with open_hdf5(path) as file:
        specific = file.get(_SPECIFIC)
        if specific is None or "nimages" not in specific:
            return None
        triggers = int(specific["ntrigger"][()]) if "ntrigger" in specific else 1
        return int(specific["nimages"][()]) * triggers
