"""A group of a store as a folder with a ``zarr.json``: its attributes, replaced in one step, and what lies in it.

Zarr 3.1 writes its files under a temporary name and renames them, but does not wait for the disk, and earlier releases
write in place. Group metadata is therefore written here, and arrays are made in a staging folder that is renamed.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stemtomo.errors import StoreError, UnreachableError
from stemtomo.io.durable import make_folder, replace_json, sync, sync_tree
from stemtomo.io.untrusted import reading
from stemtomo.locations import ObjectPath, is_object, published, remove_tree

MARK = "complete"
"""Attribute of a finished group: fingerprint and provenance. A group without it is not there for readers."""

_LEAST_MARK = {"fingerprint": "", "time_utc": "", "wall_s": 0.0}
_METADATA = "zarr.json"
_STAGING = ".staging"


def read_node(folder: Path, group: Path | None = None) -> dict[str, Any] | None:
    """Return the Zarr metadata in ``folder``, an array of ``group`` or a group itself; ``None`` if there is none.

    Raises
    ------
    StoreError
        If the metadata cannot be read.
    """
    path = folder / _METADATA
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnreachableError:
        raise
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        advice = f"it was damaged outside stemtomo: {_advice(group or folder)}"
        raise StoreError(f"{path}: is not Zarr v3 metadata ({error}); {advice}") from error
    if not isinstance(content, dict) or content.get("zarr_format") != 3:
        raise StoreError(f"{path}: is not Zarr v3 metadata; expected zarr_format 3")
    return content


def read_attrs(folder: Path) -> dict[str, Any]:
    """Return the attributes of the group in ``folder``; empty if there is no group.

    Raises
    ------
    StoreError
        If they are damaged.
    """
    node = read_node(folder)
    attrs = {} if node is None else node.get("attributes", {})
    mark = attrs.get(MARK, _LEAST_MARK) if isinstance(attrs, dict) else None
    if not isinstance(mark, dict) or not mark.keys() >= _LEAST_MARK.keys():
        raise StoreError(f"{folder / _METADATA}: its record of how it was made is damaged; {_advice(folder)}")
    return dict(attrs)


def _advice(folder: Path) -> str:
    """Return what to do about damaged metadata: frames and results of other groups are never thrown away for it."""
    if any(re.fullmatch(r"\d{3,}", path.name) for path in folder.iterdir()):
        return "remove this file, keep what lies beside it, and run the stage again"
    if any((folder / name).is_dir() for name in ("tilt", "projections", "focal_series")):
        return f"write the file again as docs/store.md says (Running again), and keep what lies beside it in {folder}"
    return f"remove {folder} and run the stage again"


def write_group(folder: Path, attrs: Mapping[str, Any]) -> None:
    """Make ``folder`` a Zarr group with exactly ``attrs``; its metadata is replaced in one step."""
    make_folder(folder)
    replace_json(folder / _METADATA, {"zarr_format": 3, "node_type": "group", "attributes": dict(attrs)})


def ensure_group(folder: Path) -> None:
    """Make ``folder`` a Zarr group without attributes unless it is one."""
    if read_node(folder) is None:
        write_group(folder, {})


@dataclass(frozen=True)
class ArraySummary:
    """What the metadata of an array says."""

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    units: str

    @property
    def size_bytes(self) -> int:
        """Bytes of the array before compression (eight for a text of any length)."""
        itemsize = 8 if self.dtype == "string" else np.dtype(self.dtype).itemsize
        return math.prod(self.shape) * itemsize


def array_summaries(folder: Path) -> list[ArraySummary]:
    """Return the arrays of the group in ``folder`` by name, from their metadata alone.

    Raises
    ------
    StoreError
        If their metadata are damaged.
    """
    summaries = []
    for path in sorted(folder.iterdir()):
        node = read_node(path, folder) if is_object(path) or path.is_dir() else None
        if node is not None and node.get("node_type") == "array":
            advice = f"it was damaged outside stemtomo: remove {folder} and run the stage again"
            with reading(path / _METADATA, "the metadata of a Zarr array", advice, error=StoreError):
                summaries.append(_summary(path.name, node))
    return summaries


def _summary(name: str, node: Mapping[str, Any]) -> ArraySummary:
    shape = tuple(int(length) for length in node["shape"])
    dims = tuple(str(dim) for dim in node.get("dimension_names") or ())
    if len(dims) != len(shape):
        raise ValueError(f"{len(dims)} names of dimensions for {len(shape)}")
    dtype = node["data_type"] if isinstance(node["data_type"], str) else "string"
    if dtype != "string":
        np.dtype(dtype)  # an unknown type is met here
    return ArraySummary(name, dims, shape, dtype, str(node.get("attributes", {}).get("units", "")))


@contextmanager
def staged(root: Path, group: str) -> Iterator[Path]:
    """Yield an empty folder of the store ``root``; on success it becomes ``group``, in place of what was there.

    Between the moment the old group goes and the new one comes there is none, never a mixture. What a killed process
    left in staging for this group is removed by the next one that succeeds.
    """
    folder = root / _STAGING / f"{_staging_prefix(group)}{uuid.uuid4().hex}"
    if isinstance(folder, ObjectPath):
        with published(folder.parent.parent / group, _METADATA) as local:
            yield local
        return
    old, target = folder.with_name(folder.name + ".old"), root / group
    _make_folder(folder)
    try:
        yield folder
        sync_tree(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            target.rename(old)
        folder.rename(target)
        sync(target.parent)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(folder, ignore_errors=True)
        _remove_if_empty(folder.parent)
        raise
    clear_staging(root, group)


def clear_staging(root: Path, group: str) -> None:
    """Remove what is staged for ``group``, and the staging folder if nothing else is in it."""
    staging = root / _STAGING
    try:
        paths = list(staging.glob(f"{_staging_prefix(group)}*"))
    except FileNotFoundError:  # a task beside this one has just finished, and removed the empty folder
        return
    for path in paths:
        remove_tree(path)
    _remove_if_empty(staging)


def _staging_prefix(group: str) -> str:
    return group.replace("/", "-") + "."


def _make_folder(folder: Path) -> None:
    """Make ``folder``; a task that has just finished may remove the empty parent meanwhile."""
    for _ in range(100):
        try:
            folder.mkdir(parents=True)
            return
        except FileNotFoundError:
            continue
    raise StoreError(f"{folder}: cannot be made, its parent is removed again and again; is another program at work?")


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return  # not there, or another group is being written
