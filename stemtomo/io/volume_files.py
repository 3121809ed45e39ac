"""Volumes from files: MRC, .npy, or the store that holds one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stemtomo.errors import FormatError
from stemtomo.io.formats.optional import require
from stemtomo.io.store import Store

_MRC = (".mrc", ".map", ".rec", ".ccp4")


def read_volume(path: str | Path, voxel_angstrom: float | None = None) -> tuple[np.ndarray, float]:
    """Return the volume (z, y, x) at ``path`` and its voxel in Å.

    Parameters
    ----------
    path
        A store with a volume, ``.mrc`` (needs the package mrcfile) or ``.npy``.
    voxel_angstrom
        Edge of a voxel of a file; what an MRC header says counts if not given.

    Raises
    ------
    FormatError
        If it is no volume, or nothing says its voxel.
    StoreError
        If the store has no volume.
    """
    path = Path(path)
    if Store.is_store(path):
        result = Store.open(path).read("volume")
        return result["potential"].values, float(result.attrs["voxel_angstrom"])
    if not path.exists():
        raise FormatError(f"{path}: no such file; give a store, an .mrc or an .npy file")
    if path.suffix.lower() in _MRC:
        volume, said = _read_mrc(path)
    elif path.suffix.lower() == ".npy":
        volume, said = np.load(path, allow_pickle=False), None
    else:
        raise FormatError(f"{path}: is no volume that can be read; give a store, an .mrc or an .npy file")
    if volume.ndim != 3 or volume.dtype.kind not in "fiu":
        raise FormatError(f"{path}: holds {volume.dtype} of shape {volume.shape}, expected real numbers (z, y, x)")
    if not np.isfinite(volume).all():
        raise FormatError(f"{path}: holds values that are no numbers; mask them first")
    voxel = voxel_angstrom or said
    if voxel is None:
        raise FormatError(f"{path}: does not say its voxel; give voxel_angstrom (--voxel-angstrom)")
    return volume.astype(np.float32, copy=False), voxel


def _read_mrc(path: Path) -> tuple[np.ndarray, float | None]:
    mrcfile = require("mrcfile", path)
    try:
        with mrcfile.open(path, permissive=False) as file:
            sizes = {round(float(file.voxel_size[axis]), 6) for axis in "xyz"}
            volume = np.array(file.data)
    except (ValueError, OSError) as error:
        raise FormatError(f"{path}: cannot be read as MRC ({error})") from error
    if len(sizes) > 1:
        raise FormatError(f"{path}: voxels of {sorted(sizes)} Å are not cubes; resample the volume first")
    return volume, sizes.pop() or None
