"""The formats by name, and how a file is told to be of one."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stemtomo.errors import FormatError
from stemtomo.io.formats.counted import EVENTS, open_counted
from stemtomo.io.formats.datasets import DatasetFrames, DatasetRecords, open_dataset
from stemtomo.io.formats.dectris import is_dectris, open_dectris
from stemtomo.io.formats.empad import open_empad
from stemtomo.io.formats.hdf5 import datasets, find_dataset
from stemtomo.io.formats.merlin import open_merlin
from stemtomo.io.formats.optional import EXTRA, open_hdf5
from stemtomo.io.formats.records import FrameRecords, ScannedFrames, scan
from stemtomo.io.formats.rosetta import PREFIX, Signal, find_signal, plugins, signals
from stemtomo.io.formats.sectors import is_sector_file, open_sectors
from stemtomo.io.formats.tilts import StackedTilts
from stemtomo.io.formats.zarrays import METADATA, arrays, find_array
from stemtomo.io.layout import CANONICAL_AXES

if TYPE_CHECKING:
    from stemtomo.io.sources import FrameSource


class Options(NamedTuple):
    """What a user says on a file, beside its path; see :func:`stemtomo.io.sources.open_frames`."""

    format: str | None = None
    array: str | None = None
    axes: tuple[str, ...] = CANONICAL_AXES
    scan_shape: tuple[int, int] | None = None
    skip: int = 0
    flyback: int = 0
    channel: str | int | None = None


FORMATS: dict[str, str] = {
    "npz": "NumPy archive, one member",
    "npy": "NumPy array",
    "raw": "raw binary with dtype and shape",
    "merlin": "Quantum Detectors Merlin .mib, .hdr",
    "empad": "EMPAD .raw, .xml",
    "dectris": "DECTRIS Arina, Quadro, Eiger: HDF5 master and data files",
    "counted": "4D Camera counted events, HDF5 of stempy",
    "sectors": "4D Camera raw files of its receivers, sectors:4 or sectors:5 by their version",
    "hdf5": "a dataset of an HDF5 file (EMD, NeXus ...)",
    "zarr": "a Zarr array",
    PREFIX: "any other, through RosettaSciIO",
}
"""Formats by the name that input.format takes, and what they are."""

_SUFFIXES = {
    ".npz": "npz",
    ".npy": "npy",
    ".mib": "merlin",
    ".hdr": "merlin",
    ".xml": "empad",
    ".zarr": "zarr",
}
_HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf", ".he5", ".nxs", ".nx5", ".nexus", ".hspy", ".emd")
_ROSETTA_HDF5 = {".emd": "EMD", ".nxs": "NeXus", ".nx5": "NeXus", ".nexus": "NeXus", ".hspy": "HSPY"}
"""HDF5 files of which RosettaSciIO knows the order of axes: it reads them unless a dataset is named."""


def identify(path: Path, format: str | None = None, *, raw: bool = False) -> str:
    """Return the name of the format of ``path``: the one that was said, or what its name and content say.

    Parameters
    ----------
    raw
        Whether dtype and shape were given, so that an unknown file is raw binary.

    Raises
    ------
    FormatError
        If there is no such file, or its format is not known, or not told; naming the known ones.
    """
    folder = path.is_dir()
    is_zarr = folder and any((path / name).is_file() for name in METADATA)
    if not path.exists() or (folder and not is_zarr):
        what = "is a folder, not a file of frames" if folder else "no such file"
        raise FormatError(f"{path}: {what}; check input.path")
    if format is not None:
        kind, colon, _ = format.partition(":")
        if kind not in FORMATS or (colon and kind not in ("sectors", PREFIX)):
            raise FormatError(f"{path}: there is no format {format!r}; {_known()}")
        return format
    if is_zarr:
        return "zarr"
    suffix = path.suffix.lower()
    if suffix in _SUFFIXES:
        return _SUFFIXES[suffix]
    if raw:
        return "raw"
    if is_sector_file(path):
        return "sectors"
    if suffix in _HDF5_SUFFIXES:
        return _identify_hdf5(path)
    if suffix == ".raw":
        raise FormatError(
            f"{path}: a .raw does not say what is in it; give the .xml of EMPAD or format = 'empad', or dtype and shape"
        )
    if plugins(path):
        return PREFIX
    raise FormatError(
        f"{path}: the format {suffix or 'without suffix'!r} is not known; {_known()}, or give dtype and shape. "
        f"More formats come with RosettaSciIO: {EXTRA}"
    )


def open_format(name: str, path: Path, options: Options) -> FrameSource | tuple[FrameSource, ...]:
    """Open ``path``, of the format ``name``; a source per tilt where one array with a position axis holds several.

    Raises
    ------
    FormatError, AcquisitionError
        If the file is not of that format, or does not fit ``options``.
    """
    if options.channel is not None and name != "dectris":
        raise FormatError(f"{path}: input.channel is for DECTRIS files with several thresholds, not for {name}")
    kind, _, variant = name.partition(":")
    if kind in _RECORDS:
        if options.axes not in (CANONICAL_AXES, CANONICAL_AXES[1:]) or options.array is not None:
            raise FormatError(f"{path}: {name} files have one array in one order; leave input.axes and input.array out")
        return scan(_RECORDS[kind](path, options, variant), options.scan_shape, options.skip, options.flyback)
    handle: Any
    if name == "zarr":
        handle = find_array(path, options.array)
    elif name == "hdf5":
        if options.array is None and path.suffix.lower() in _ROSETTA_HDF5:
            handle = find_signal(path, _ROSETTA_HDF5[path.suffix.lower()])
        else:
            handle = find_dataset(path, options.array)
    else:
        handle = find_signal(path, variant or None, options.array)
    return open_dataset(handle, options.axes, options.scan_shape, options.skip, options.flyback)


_RECORDS: dict[str, Callable[[Path, Options, str], FrameRecords]] = {
    "merlin": lambda path, options, variant: open_merlin(path),
    "empad": lambda path, options, variant: open_empad(path),
    "dectris": lambda path, options, variant: open_dectris(path, options.channel),
    "counted": lambda path, options, variant: open_counted(path),
    "sectors": lambda path, options, variant: open_sectors(path, int(variant) if variant.isdigit() else None),
}


def read_overhead_bytes(source: FrameSource) -> int:
    """Bytes that each read of ``source`` holds beside its block: the whole signal, where RosettaSciIO is not lazy."""
    if isinstance(source, StackedTilts):
        return read_overhead_bytes(source.sources[0])
    holder = source.records if isinstance(source, ScannedFrames) else source
    handle = holder.handle if isinstance(holder, DatasetFrames | DatasetRecords) else None
    if not isinstance(handle, Signal) or handle.lazy:
        return 0
    return math.prod(handle.shape) * handle.dtype.itemsize


def contents(path: Path, format: str | None = None) -> list[dict[str, Any]]:
    """Return what ``path`` holds, from its headers: a row with ``array``, ``shape`` and ``dtype`` for each array.

    A detector's own file is one array (frame, ky, kx); its row has ``scan`` too, (lines, frames per line), or ``None``
    where the file does not say it.

    Raises
    ------
    FormatError, AcquisitionError
        If it is no file of a known format, or damaged.
    """
    name = identify(path, format)
    kind, _, variant = name.partition(":")
    if kind in _RECORDS:
        records = _RECORDS[kind](path, Options(), variant)
        shape = (records.count(), *records.frame_shape)
        return [{"array": None, "shape": shape, "dtype": str(records.dtype), "scan": records.recorded_scan}]
    found: Any
    if name == "zarr":
        found = arrays(path)
    elif name == "hdf5":
        found = datasets(path)
    elif kind == PREFIX:
        found = signals(path, variant or None)
        return [
            {"array": one.title or str(one.number), "shape": one.signal_shape, "dtype": str(one.dtype)} for one in found
        ]
    else:
        raise FormatError(
            f"{path}: NumPy and raw binary files are not listed here; numpy.load(path) shows the first two"
        )
    return [{"array": one.name, "shape": one.shape, "dtype": str(one.dtype)} for one in found]


def _identify_hdf5(path: Path) -> str:
    with open_hdf5(path) as file:
        if EVENTS in file:
            return "counted"
        return "dectris" if is_dectris(file) else "hdf5"


def _known() -> str:
    return f"input.format can be {', '.join(FORMATS)}"
