"""Results of the stages: writing a dataset as a marked group, reading one lazily, summing up what a store holds."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import xarray as xr
import zarr
from zarr.codecs import ZstdCodec

from stemtomo.errors import StoreError
from stemtomo.io.durable import storage_errors, stored_bytes
from stemtomo.io.nodes import MARK, array_summaries, ensure_group, read_attrs, staged, write_group
from stemtomo.io.object_store import zarr_store
from stemtomo.io.provenance import Provenance, plain
from stemtomo.io.schema import GROUPS, conform, group_schema
from stemtomo.io.untrusted import reading


def write(root: Path, group: str, dataset: xr.Dataset, provenance: Provenance) -> None:
    """Write ``dataset`` as ``group`` of the store ``root`` and mark it complete; see ``Store.write``."""
    dataset = _storable(conform(group, dataset))
    attrs = plain(dataset.attrs, f"{group} attributes")
    parent = group.rpartition("/")[0]
    if parent:
        ensure_group(root / parent)
    with storage_errors(root / group, dataset.nbytes), staged(root, group) as folder:
        dataset.drop_attrs(deep=False).to_zarr(
            zarr_store(folder),
            mode="w",
            zarr_format=3,
            consolidated=False,
            # Chunks end with a checksum, so that a flipped bit is met and not used.
            encoding={
                name: {"_FillValue": None, "compressors": ZstdCodec(checksum=True)} for name in dataset.variables
            },
        )
        # xarray keeps the names of coordinates in the group's own attributes.
        mark = (provenance if provenance.wall_s is not None else provenance.finish()).to_attrs()
        write_group(folder, {**read_attrs(folder), **attrs, MARK: mark})


def read(root: Path, group: str) -> xr.Dataset:
    """Return the marked ``group`` of the store ``root`` as a lazy dataset, dask chunks as stored, without its mark."""
    with reading(root / group, "a result", _advice(root / group), (OSError,), StoreError):
        dataset = xr.open_zarr(
            zarr_store(root / group), chunks={}, consolidated=False, zarr_format=3, mask_and_scale=False,
            decode_times=False,
        )  # fmt: skip
    dataset.attrs.pop(MARK, None)
    known = list(group_schema(group).variables)
    # Folders are listed in any order; the schema's is the one to read.
    names = sorted(
        map(str, dataset.data_vars), key=lambda name: (known.index(name) if name in known else len(known), name)
    )
    return dataset[names].map(lambda array: _lazy(root / group, array))


@dataclass(frozen=True)
class _StoredArray:
    """An array of a result as Dask takes it: opened when it is first sliced, and damage is named then."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        with reading(self.path, "an array of a result", _advice(self.path.parent), (OSError,), StoreError):
            return np.asarray(self._array[index], self.dtype)

    @functools.cached_property
    def _array(self) -> zarr.Array:
        return zarr.open_array(store=zarr_store(self.path), mode="r")


def _lazy(folder: Path, array: xr.DataArray) -> xr.DataArray:
    """Return ``array`` of the group in ``folder``, read through :class:`_StoredArray` where it is read lazily."""
    if array.chunks is None:
        return array
    stored = _StoredArray(folder / str(array.name), array.shape, array.dtype)
    # Without a name of its own: what a stage replaces must not be taken for what was read before.
    lazy = dask.array.from_array(stored, array.chunks, name=False, fancy=False, meta=array.data._meta)
    return array.copy(data=lazy)


def _advice(folder: Path) -> str:
    return f"it was damaged outside stemtomo: remove {folder} and run the stage again"


def info_row(root: Path, name: str, members: Sequence[str], expected: int) -> dict[str, Any]:
    """Return the row of the group ``name`` for ``Store.info``."""
    marks = [read_attrs(root / member)[MARK] for member in members]
    if name == "tilt" and MARK in (series := read_attrs(root / name)):
        marks = [series[MARK]]  # the cost of ingest is recorded once, for all tilts
    summaries = [array_summaries(root / member) for member in members]
    return {
        "group": name,
        "stage": GROUPS[name].stage,
        "done": len(members),
        "expected": expected,
        "arrays": [
            f"{array.name} ({', '.join(f'{d} {n}' for d, n in zip(array.dims, array.shape, strict=True))}) "
            f"{array.dtype} [{array.units}]"
            for array in (summaries[0] if summaries else [])
        ],
        "size_bytes": sum(array.size_bytes for member in summaries for array in member),
        "stored_bytes": stored_bytes(root / name),
        "time_utc": max((mark["time_utc"] for mark in marks), default=None),
        "wall_s": sum(mark["wall_s"] or 0.0 for mark in marks) if marks else None,
    }


def _storable(dataset: xr.Dataset) -> xr.Dataset:
    """Return ``dataset`` in the types and chunks that Zarr v3 has: text of any length, chunks of one size."""
    result = dataset
    for name, variable in dataset.variables.items():
        if variable.dtype.kind == "U":  # Zarr v3 has no text of fixed length
            result = result.assign({name: variable.astype(object)})
        elif variable.chunks is not None:
            sizes = {d: max(c) for d, c in zip(variable.dims, variable.chunks, strict=True)}
            result = result.assign({name: variable.chunk(sizes)})
    return result
