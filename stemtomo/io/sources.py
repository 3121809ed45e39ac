"""Where frames come from: a source for every format, with its axes in canonical order, read in pieces.

Here are .npy, .npz members and raw binary, with axes in any order; :mod:`stemtomo.io.formats` has those of microscopes.

A source knows shapes and bytes and nothing of stores. It holds no open file, so tasks may carry it to other processes.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from stemtomo.errors import AcquisitionError, FormatError
from stemtomo.io.archive import StreamedMember, array_header, member_names, member_offset, open_member
from stemtomo.io.formats import registry
from stemtomo.io.formats.datasets import open_dataset
from stemtomo.io.formats.tilts import stack
from stemtomo.io.layout import CANONICAL_AXES, AxisLayout, check_dtype
from stemtomo.io.raw import ArrayFile, MappedArray
from stemtomo.io.untrusted import check_frame

Shape = tuple[int, int, int, int, int]


@runtime_checkable
class FrameSource(Protocol):
    """Frames of a tilt series as some file holds them.

    ``shape`` is (tilt, y, x, ky, kx), ``dtype`` that of the frames read (in the machine's byte order), ``n_expected``
    the number of frames that the shape promises, ``path`` the file, ``where`` its name for messages.
    """

    @property
    def path(self) -> Path:
        """The file."""
        ...

    @property
    def where(self) -> str:
        """File and array, for messages."""
        ...

    @property
    def shape(self) -> Shape:
        """Lengths of tilt, y, x, ky, kx."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the frames that :meth:`read` returns."""
        ...

    @property
    def n_expected(self) -> int:
        """Number of frames (patterns) of the whole series."""
        ...

    def ready(self) -> int:
        """Return how many frames the file holds now; more than ``n_expected`` if it is longer than promised."""
        ...

    def read(self, tilt: int, y0: int, y1: int, x0: int = 0, x1: int | None = None) -> np.ndarray:
        """Return the frames (y, x, ky, kx) of rows ``y0`` to ``y1`` and columns ``x0`` to ``x1`` of ``tilt``."""
        ...

    def identity(self) -> dict[str, Any]:
        """Return what tells this source from another: the file's name, size, mtime, ends; axes, shape and dtype."""
        ...


@runtime_checkable
class Checked(Protocol):
    """A source that knows more of its files than a count: which one is short, lost frames, frames that are cut."""

    def check(self) -> None:
        """Check that a finished acquisition is whole; raise AcquisitionError otherwise."""
        ...


def open_frames(
    path: str | Path | Sequence[str | Path],
    *,
    format: str | None = None,
    array: str | None = None,
    axes: tuple[str, ...] = CANONICAL_AXES,
    scan_shape: tuple[int, int] | None = None,
    skip: int = 0,
    flyback: int = 0,
    channel: str | int | None = None,
    dtype: str | np.dtype | None = None,
    shape: tuple[int, ...] | None = None,
    offset_bytes: int = 0,
) -> FrameSource:
    """Open a file of frames, or one file per tilt; only headers are read.

    Parameters
    ----------
    path
        A file (or Zarr folder); or several, one per tilt, in the order of the tilts.
    format
        Name of the format, see :data:`stemtomo.io.formats.registry.FORMATS`; told from the file if not given.
    array
        Member of an ``.npz``, dataset of an HDF5 file, array of a Zarr group, signal of a RosettaSciIO file; may be
        left out if there is only one.
    axes
        Names of the array's axes in the order of the file: tilt (optional), y and x (or ``position``), ky and kx.
        Detectors' own files have their order; where the files are the tilts, a tilt axis is left out.
    scan_shape
        Positions along y and x; needed where frames come in one row and the file does not say.
    skip, flyback
        Frames in one row: how many to leave out before the scan, and at the end of each of its lines.
    channel
        Threshold of a DECTRIS file that has several: its name, or its number from 1.
    dtype, shape, offset_bytes
        Raw binary only: type with byte order (``"<u2"``, ``">u2"``), lengths of ``axes``, bytes before the first frame.

    Raises
    ------
    FormatError
        If the file is missing, truncated, not of its format, or its array is not what was said.
    AcquisitionError
        If it does not hold the frames that ``scan_shape`` promises, or files of tilts differ.
    """
    options = registry.Options(format, array, axes, scan_shape, skip, flyback, channel)
    if not isinstance(path, str | Path):
        if len(path) > 1:
            options = options._replace(axes=tuple(name for name in axes if name != "tilt"))
        return stack(tuple(_sane(_open_one(Path(file), options, dtype, shape, offset_bytes)) for file in path))
    return _sane(_open_one(Path(path), options, dtype, shape, offset_bytes))


def _sane(source: FrameSource) -> FrameSource:
    check_frame(source.where, source.shape[3:], source.dtype)
    return source


def _open_one(
    path: Path,
    options: registry.Options,
    dtype: str | np.dtype | None,
    shape: tuple[int, ...] | None,
    offset_bytes: int,
) -> FrameSource:
    path = path.expanduser().absolute()  # tasks may run in another folder
    name = registry.identify(path, options.format, raw=dtype is not None and shape is not None)
    if name != "raw" and (dtype is not None or shape is not None or offset_bytes):
        raise FormatError(f"{path}: dtype, shape and offset_bytes are for raw binary; {name} says them itself")
    if name not in ("npy", "npz", "raw"):
        opened = registry.open_format(name, path, options)
        return stack(opened) if isinstance(opened, tuple) else opened
    if options.channel is not None:
        raise FormatError(f"{path}: input.channel is for DECTRIS files with several thresholds, not for {name}")
    if name in ("npz", "npy"):
        opened = (_open_npz if name == "npz" else _open_npy)(path, options)
    else:
        if options.array is not None:
            raise FormatError(f"{path}: array {options.array!r} was named, but raw binary has no named arrays")
        if dtype is None or shape is None:
            raise FormatError(f"{path}: raw binary needs dtype and shape")
        file_dtype = _parse_dtype(path, dtype)
        opened = _raw(path, str(path), options, file_dtype, tuple(shape), offset_bytes, fortran=False)
    return stack(opened) if isinstance(opened, tuple) else opened


def check_complete(source: FrameSource) -> None:
    """Check that the file of ``source`` holds exactly the frames that its shape promises.

    Raises
    ------
    AcquisitionError
        With both counts, if frames are missing or left over.
    """
    if isinstance(source, Checked):
        source.check()
        return
    ready, expected = source.ready(), source.n_expected
    if ready < expected:
        cut = isinstance(source, ArrayFile) and source.partial_bytes()
        ends = f"ends inside frame {ready} (of {expected})" if cut else f"ends after frame {ready} of {expected}"
        raise AcquisitionError(
            f"{source.where}: {ends}: {expected - ready} frames are missing; copy the file again if it is cut off, "
            f"wait if it is still being written, correct the shape, or give ingest.missing = 'mask' to keep {ready}"
        )
    if ready > expected:
        raise AcquisitionError(
            f"{source.where}: is longer than its {expected} frames, {ready - expected} frames too many; correct the "
            "shape or the offset, frames are never dropped silently"
        )


def _open_npz(path: Path, options: registry.Options) -> FrameSource | tuple[FrameSource, ...]:
    names, array = member_names(path), options.array
    if array is None and len(names) == 1:
        array = names[0]
    if array not in names:
        said = "no array was named" if array is None else f"there is no array {array!r}"
        raise FormatError(f"{path}: {said}; it holds {', '.join(names) or 'no arrays'}: name one of them")
    where = f"{path}[{array}]"
    info, stream = open_member(path, array)
    with stream:
        shape, fortran, dtype, header_bytes = array_header(stream, where)
    check_dtype(where, dtype)
    promised = header_bytes + math.prod(shape) * dtype.itemsize
    if info.file_size != promised:
        raise FormatError(
            f"{where}: the member has {info.file_size} bytes, its header {shape} {dtype} promises {promised}; "
            "the archive is damaged, write it again"
        )
    if info.compress_type == zipfile.ZIP_STORED:
        offset = member_offset(path, info) + header_bytes
        return _raw(path, where, options, dtype, shape, offset, fortran, array)
    if options.skip or options.flyback:
        raise FormatError(
            f"{where}: is compressed; input.skip and input.flyback need numpy.savez, not savez_compressed"
        )
    return StreamedMember(path, array, _layout(where, options.axes, shape, options.scan_shape, fortran), dtype)


def _open_npy(path: Path, options: registry.Options) -> FrameSource | tuple[FrameSource, ...]:
    if options.array is not None:
        raise FormatError(f"{path}: array {options.array!r} was named, but an .npy holds one array without a name")
    with path.open("rb") as stream:
        shape, fortran, dtype, header_bytes = array_header(stream, str(path))
    check_dtype(str(path), dtype)
    return _raw(path, str(path), options, dtype, shape, header_bytes, fortran)


def _raw(
    path: Path,
    where: str,
    options: registry.Options,
    dtype: np.dtype,
    shape: tuple[int, ...],
    offset_bytes: int,
    fortran: bool,
    array: str | None = None,
) -> FrameSource | tuple[FrameSource, ...]:
    if options.skip or options.flyback:  # frames in one row
        handle = MappedArray(path, where, shape, dtype, offset_bytes, "F" if fortran else "C", array)
        return open_dataset(handle, options.axes, options.scan_shape, options.skip, options.flyback)
    layout = _layout(where, options.axes, shape, options.scan_shape, fortran)
    return ArrayFile(path, where, layout, dtype, offset_bytes, array)


def _layout(
    where: str, axes: tuple[str, ...], shape: tuple[int, ...], scan_shape: tuple[int, int] | None, fortran: bool
) -> AxisLayout:
    if fortran and len(axes) == len(shape):  # the first axis varies fastest: the file's order is the reverse
        axes, shape = tuple(axes)[::-1], tuple(shape)[::-1]
    return AxisLayout.declare(where, tuple(axes), tuple(shape), scan_shape)


def _parse_dtype(path: Path, dtype: str | np.dtype) -> np.dtype:
    try:
        parsed = np.dtype(dtype)
    except TypeError:
        advice = "give byte order, kind and bytes, such as '<u2'"
        raise FormatError(f"{path}: dtype {dtype!r} is not known; {advice}") from None
    check_dtype(str(path), parsed)
    return parsed
