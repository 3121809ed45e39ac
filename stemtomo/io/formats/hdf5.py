"""A dataset in any HDF5 file (EMD, NeXus, Hyperspy, py4DSTEM ...), named by its path in the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stemtomo.errors import FormatError
from stemtomo.io.formats.optional import open_hdf5, require
from stemtomo.io.provenance import file_identity

_LEAST_AXES = 3


class Written(NamedTuple):
    """The shape of a dataset, that of a chunk, which chunks are in the file, and whether a writer has it open."""

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    chunks: np.ndarray
    growing: bool


@dataclass(frozen=True)
class Hdf5Dataset:
    """A dataset of an HDF5 file; a :class:`stemtomo.io.formats.datasets.Handle`.

    ``resizable`` says which axes may still grow; empty for a dataset that has no chunks.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    resizable: tuple[bool, ...] = ()

    @property
    def grows(self) -> bool:
        """Whether the file says which frames are written: it does so chunk by chunk."""
        return bool(self.resizable)

    @property
    def where(self) -> str:
        """File and dataset, for messages."""
        return f"{self.path}[{self.name}]"

    @contextmanager
    def open(self) -> Iterator[Any]:
        """Open the file and yield the dataset."""
        with open_hdf5(self.path) as file:
            dataset = file[self.name]
            if file.swmr_mode:
                dataset.refresh()  # that of dataset.id leaves the shape as it was
            yield dataset

    def written(self) -> Written | None:
        """Return which chunks are in the file, as it is now; ``None`` for a dataset without chunks.

        While a writer has the file open (SWMR), the last chunk may still be filled, and does not count.
        """
        with self.open() as dataset:
            if not self.resizable or dataset.chunks is None:
                return None
            grid = tuple(-(-length // chunk) for length, chunk in zip(dataset.shape, dataset.chunks, strict=True))
            chunks = np.zeros(grid, bool)

            def collect(chunk: Any) -> None:
                chunks[tuple(at // edge for at, edge in zip(chunk.chunk_offset, dataset.chunks, strict=True))] = True

            if 0 not in grid:
                dataset.id.chunk_iter(collect)
            return Written(tuple(dataset.shape), tuple(dataset.chunks), chunks, bool(dataset.file.swmr_mode))

    def identity(self) -> dict[str, Any]:
        """Return the identity of the file, and the name of the dataset."""
        return {**file_identity(self.path), "array": self.name}


def datasets(path: Path) -> tuple[Hdf5Dataset, ...]:
    """Return the datasets of ``path`` that can hold frames (3 or more axes of numbers), by name."""
    h5py = require("h5py", path)
    found: dict[str, Hdf5Dataset] = {}

    def collect(key: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.ndim >= _LEAST_AXES and item.dtype.kind in "iufc":
            found[key] = _handle(path, key, item)

    with open_hdf5(path) as file:
        file.visititems(collect)
    return tuple(found[key] for key in sorted(found))


def find_dataset(path: Path, name: str | None = None) -> Hdf5Dataset:
    """Return the dataset ``name`` of ``path``, or the only one that can hold frames (3 or more axes of numbers).

    Raises
    ------
    FormatError
        If there is no such dataset, or none was named and there are several; listing them.
    """
    h5py = require("h5py", path)
    if name is not None:
        with open_hdf5(path) as file:
            item = file.get(name)
            if isinstance(item, h5py.Dataset):
                return _handle(path, name, item)
    found = datasets(path)
    if name is None and len(found) == 1:
        return found[0]
    listed = ", ".join(f"{one.name} {list(one.shape)} {one.dtype}" for one in found[:12])
    said = "no dataset was named" if name is None else f"there is no dataset {name!r}"
    raise FormatError(f"{path}: {said}; it holds {listed or 'no array of frames'}: name one as input.array")


def _handle(path: Path, name: str, item: Any) -> Hdf5Dataset:
    limits = item.maxshape if item.chunks is not None and not item.is_virtual else ()
    resizable = tuple(limit is None or limit > length for limit, length in zip(limits, item.shape, strict=False))
    return Hdf5Dataset(path, name, tuple(item.shape), item.dtype, resizable)
