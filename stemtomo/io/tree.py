"""Opening a series as an xarray DataTree: lazy, complete results only, with dims, units and sizes in its repr."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import xarray as xr

from stemtomo.geometry import Detector, Scan
from stemtomo.io.durable import human_bytes
from stemtomo.io.nodes import MARK
from stemtomo.io.schema import FRAME_DIMS, GROUPS, tilt_name
from stemtomo.io.store import Store

_UNITS = "units"


def open(path: str | Path) -> xr.DataTree:
    """Open the store at ``path`` as a tree of datasets: ``tilt/000``, ``ptychography/000``, ``volume`` ...

    Only complete tilts and results are in the tree. Arrays are lazy (dask, one chunk per shard); opening reads metadata
    and no frames. Attributes of the root say name, size and what there is; every node says the units of its variables.

    Raises
    ------
    StoreError
        If nothing is at ``path``, it is not a store, or a later stemtomo wrote it.
    """
    store = Store.open(path)
    nodes: dict[str, xr.Dataset] = {"tilt": xr.Dataset()} if store.tilt_count else {}
    for index in range(store.tilt_count):
        group = f"tilt/{tilt_name(index)}"
        if store.fingerprint(group):
            nodes[group] = _with_units(_tilt_dataset(store, index))
    for name in GROUPS:
        members = store.members(name) if name != "tilt" else []
        if members:
            nodes[name] = xr.Dataset()  # before its members, so that groups stay in the order of the stages
        nodes.update({member: _with_units(store.read(member)) for member in members})
    nodes["/"] = xr.Dataset(attrs=_root_attrs(store, nodes))
    return xr.DataTree.from_dict(nodes, name=store.name)


def _tilt_dataset(store: Store, index: int) -> xr.Dataset:
    attrs = store.tilt_attrs(index)
    array = store.frames(index)
    lazy = dask.array.from_zarr(array, chunks=array.shards)
    coordinates = _frame_coordinates(Scan.from_attrs(attrs["scan"]), Detector.from_attrs(attrs["detector"]))
    valid = store.valid(index)
    masks = {}
    if not valid.all():
        said = {_UNITS: "1", "long_name": "where a frame was recorded"}
        masks["valid"] = xr.DataArray(valid, dims=("y", "x"), attrs=said)
    frames = xr.DataArray(lazy, dims=FRAME_DIMS, coords=coordinates, attrs=dict(array.attrs))
    shown: dict[str, Any] = {key: value for key, value in attrs.items() if key not in (MARK, "source")}
    return xr.Dataset({"frames": frames, **masks}, attrs=shown)


def _frame_coordinates(scan: Scan, detector: Detector) -> dict[str, xr.DataArray]:
    """Scan positions from the rotation centre along the scan's own axes, in Å, and spatial frequencies in 1/Å."""
    coordinates = {}
    for dim, count, step in zip("yx", scan.shape_yx, scan.step_angstrom_yx, strict=True):
        zero = (count - 1) / 2 if scan.origin == "centre" else count // 2
        values = (np.arange(count) - zero) * step
        attrs = {_UNITS: "Å", "long_name": f"scan position along {dim}"}
        coordinates[dim] = xr.DataArray(values, dims=dim, attrs=attrs)
    for dim, count, zero in zip(("ky", "kx"), detector.shape_yx, detector.centre_yx, strict=True):
        values = (np.arange(count) - zero) * detector.pixel_inv_angstrom
        attrs = {_UNITS: "1/Å", "long_name": f"spatial frequency {dim}"}
        coordinates[dim] = xr.DataArray(values, dims=dim, attrs=attrs)
    return coordinates


def _with_units(dataset: xr.Dataset) -> xr.Dataset:
    """Return ``dataset`` with attributes ``in UNIT: names``: reprs show a node's attributes, not its variables'."""
    units: dict[str, list[str]] = {}
    for name, variable in dataset.variables.items():
        unit = variable.attrs.get(_UNITS)
        if unit is not None:
            units.setdefault("dimensionless" if unit == "1" else f"in {unit}", []).append(str(name))
    return dataset.assign_attrs({unit: ", ".join(names) for unit, names in units.items()})


def _root_attrs(store: Store, nodes: dict[str, xr.Dataset]) -> dict[str, Any]:
    """Attributes of the root, each short enough for a line of a repr."""
    frames = [dataset["frames"] for group, dataset in nodes.items() if group.startswith("tilt/")]
    results = sorted({group.partition("/")[0] for group in nodes} - {"tilt"}, key=list(GROUPS).index)
    attrs: dict[str, Any] = {
        "name": store.name,
        "size": human_bytes(sum(dataset.nbytes for dataset in nodes.values())),
        "tilts": f"{len(frames)} of {store.tilt_count} complete",
    }
    if frames:
        dims = ", ".join(f"{dim} {count}" for dim, count in frames[0].sizes.items())
        attrs["frames"] = f"({dims}) {frames[0].dtype} [{frames[0].attrs[_UNITS]}]"
    attrs["results"] = ", ".join(results) or "none"
    return {**attrs, **{key: store.attrs[key] for key in ("created", "stemtomo_schema")}}
