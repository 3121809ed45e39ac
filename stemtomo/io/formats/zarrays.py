"""Zarr arrays, versions 2 and 3, in a folder: the array itself, or a group and the name of an array in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from stemtomo.errors import FormatError
from stemtomo.io.provenance import file_identity
from stemtomo.io.untrusted import reading

METADATA = ("zarr.json", ".zarray", ".zgroup")


@dataclass(frozen=True)
class ZarrArray:
    """An array in a folder; a :class:`stemtomo.io.formats.datasets.Handle`."""

    path: Path
    name: str | None
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def where(self) -> str:
        """Folder and array, for messages."""
        return str(self.path) if self.name is None else f"{self.path}[{self.name}]"

    @contextmanager
    def open(self) -> Iterator[Any]:
        """Yield the opened array."""
        with reading(self.where, "a Zarr array", passing=(OSError,)):  # storage has errors of its own
            yield zarr.open_array(store=str(_folder(self.path, self.name)), mode="r")

    def identity(self) -> dict[str, Any]:
        """Return the identity of the array's metadata: its chunks may be millions of files."""
        folder = _folder(self.path, self.name)
        metadata = next(folder / name for name in METADATA if (folder / name).is_file())
        return {**file_identity(metadata), "file": self.path.name, "array": self.name}


def find_array(path: Path, name: str | None = None) -> ZarrArray:
    """Return the array ``name`` of the group in ``path``, or the array that ``path`` is.

    Raises
    ------
    FormatError
        If there is no such array; listing those of the group.
    """
    folder = _folder(path, name)
    try:
        array = zarr.open_array(store=str(folder), mode="r")
    except Exception as error:  # zarr's own errors differ between versions and storage formats
        raise FormatError(f"{path}: {_listing(path, name)} ({error})") from error
    return ZarrArray(path, name, tuple(array.shape), np.dtype(array.dtype))


def arrays(path: Path) -> tuple[ZarrArray, ...]:
    """Return the array that ``path`` is, or those of the group that it is."""
    names = _names(path)
    if names is None:  # an array; or nothing at all, which is then said
        return (find_array(path),)
    return tuple(find_array(path, name) for name in names)


def _names(path: Path) -> list[str] | None:
    """Return the arrays of the group that ``path`` is; ``None`` if it is none."""
    try:
        return sorted(key for key, _ in zarr.open_group(store=str(path), mode="r").arrays())
    except Exception:  # zarr's own errors differ between versions, storage formats and kinds of damage
        return None


def _folder(path: Path, name: str | None) -> Path:
    return path if name is None else path / name


def _listing(path: Path, name: str | None) -> str:
    names = _names(path)
    if names is None:
        return "is neither a Zarr array nor a group of arrays"
    said = "is a group, no array was named" if name is None else f"there is no array {name!r}"
    return f"{said}; it holds {', '.join(names) or 'no arrays'}: name one as input.array"
