"""Volumes from files: MRC, .npy, or the store that holds one; and into files: MRC, HDF5, TIFF, .npy."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stemtomo.errors import FormatError
from stemtomo.io.archive import load_array
from stemtomo.io.durable import replacing
from stemtomo.io.formats.optional import require
from stemtomo.io.stacks import TIFF, read_mrc
from stemtomo.io.store import Store
from stemtomo.locations import local_path

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
        volume, said = read_mrc(path)
    elif path.suffix.lower() == ".npy":
        volume, said = load_array(path), None
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


def write_volume(path: str | Path, volume: np.ndarray, voxel_angstrom: float) -> None:
    """Write ``volume`` (z, y, x) as float32; the file appears whole or not at all.

    ``.mrc`` (needs mrcfile) with the voxel in its header; ``.h5`` (needs h5py) with the dataset ``potential`` and its
    attributes ``units`` and ``voxel_angstrom``; ``.tif`` (needs tifffile), one page per z, resolution in pixels per
    centimetre; ``.npy``, which does not hold the voxel.

    Raises
    ------
    FormatError
        If the name says none of these, or the package is missing.
    StoreError
        If it cannot be written.
    """
    path = local_path(path, "volumes are written")
    writers = {**dict.fromkeys(_MRC, _write_mrc), ".h5": _write_hdf5, ".hdf5": _write_hdf5, ".npy": _write_npy}
    writers |= dict.fromkeys(TIFF, _write_tiff)
    writer = writers.get(path.suffix.lower())
    if writer is None:
        raise FormatError(f"{path}: the format {path.suffix!r} is not known; write .mrc, .h5, .tif or .npy")
    with replacing(path, volume.size * 4) as partial:
        writer(partial, np.ascontiguousarray(volume, dtype=np.float32), float(voxel_angstrom))


def _write_mrc(path: Path, volume: np.ndarray, voxel: float) -> None:
    with require("mrcfile", path).new(path) as file:
        file.set_data(volume)
        file.set_volume()
        file.voxel_size = voxel


def _write_hdf5(path: Path, volume: np.ndarray, voxel: float) -> None:
    with require("h5py", path).File(path, "w") as file:
        dataset = file.create_dataset("potential", data=volume)
        dataset.attrs.update({"units": "V", "voxel_angstrom": voxel, "axes": "z, y, x"})


def _write_tiff(path: Path, volume: np.ndarray, voxel: float) -> None:
    per_cm = 1e8 / voxel
    require("tifffile", path).imwrite(
        path,
        volume,
        imagej=True,
        resolution=(per_cm, per_cm),
        resolutionunit="CENTIMETER",
        metadata={"axes": "ZYX", "spacing": voxel, "unit": "angstrom"},
    )


def _write_npy(path: Path, volume: np.ndarray, voxel: float) -> None:
    np.save(path, volume)
