"""Projections and tilt angles from files of other programs: MRC, TIFF, .npy, .npz; .rawtlt, .tlt, text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stemtomo.errors import FormatError
from stemtomo.io.archive import array_header, load_array, member_names, open_member
from stemtomo.io.formats.optional import require
from stemtomo.io.untrusted import reading

MRC = (".mrc", ".mrcs", ".st", ".ali", ".preali", ".map", ".rec", ".ccp4")
TIFF = (".tif", ".tiff")
ANGLES = (".rawtlt", ".tlt", ".txt", ".csv")


def read_stack(
    path: str | Path, array: str | None = None, repeats: bool = False, single: bool = False
) -> tuple[np.ndarray, float | None]:
    """Return the projections (tilt, y, x), float32, of the file at ``path``, and its pixel in Å if it says one.

    Rows and columns are in the order of the file; MRC files of microscopes count y from below.

    Parameters
    ----------
    path
        ``.mrc`` (``.st``, ``.ali`` ...; needs mrcfile), ``.tif`` (needs tifffile), ``.npy`` or ``.npz``.
    array
        Member of an ``.npz``; its only stack if not given.
    repeats
        Repeated frames (tilt, frame, y, x) are a stack too.
    single
        One image (y, x) is a stack of one.

    Raises
    ------
    FormatError
        If it is no stack of real images, or its package is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"{path}: no such file; give a stack of projections as .mrc, .st, .tif, .npy or .npz")
    suffix, pixel, axes = path.suffix.lower(), None, (3, 4) if repeats else ((2, 3) if single else (3,))
    if suffix in MRC:
        images, pixel = read_mrc(path, cubes=False)
    elif suffix in TIFF:
        images = _read_tiff(path)
    elif suffix in (".npy", ".npz"):
        images = _read_numpy(path, array, axes)
    else:
        raise FormatError(f"{path}: the format {suffix!r} is not known; give .mrc, .st, .tif, .npy or .npz")
    if single and images.ndim == 2:
        images = images[None]
    if images.ndim not in axes or images.dtype.kind not in "fiu":
        raise FormatError(f"{path}: holds {images.dtype} of shape {images.shape}, expected real images (tilt, y, x)")
    return images.astype(np.float32, copy=False), pixel


def read_angles(path: str | Path) -> np.ndarray:
    """Return the angles in degrees of a text file with one tilt per line: (tilt,) theta, or (tilt, 3) theta, phi, psi.

    Raises
    ------
    FormatError
        Naming the line that is not one or three numbers.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").replace(",", " ").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read as text with one tilt angle per line ({error})") from error
    rows = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            rows.append([float(word) for word in words])
        except ValueError:
            raise FormatError(f"{path}, line {number}: {line.strip()!r} is no angle in degrees") from None
        if len(rows[-1]) not in (1, 3) or len(rows[-1]) != len(rows[0]):
            raise FormatError(
                f"{path}, line {number}: {len(rows[-1])} numbers; give theta, or theta, phi and psi, on every line"
            )
    if not rows:
        raise FormatError(f"{path}: holds no angles; give one tilt per line, in degrees")
    angles = np.array(rows)
    return angles[:, 0] if angles.shape[1] == 1 else angles


def angles_beside(path: str | Path) -> Path | None:
    """Return the file of angles of the same name as the stack ``path``; ``None`` if there is none."""
    found = (Path(path).with_suffix(suffix) for suffix in ANGLES)
    return next((candidate for candidate in found if candidate.is_file()), None)


def read_mrc(path: Path, cubes: bool = True) -> tuple[np.ndarray, float | None]:
    """Return the array of an MRC file, (z, y, x), and the edge of its pixels or voxels in Å if it says one.

    Parameters
    ----------
    cubes
        It is a volume: voxels are as long along z.

    Raises
    ------
    FormatError
        If it is no MRC file, or its pixels or voxels are not square.
    """
    mrcfile = require("mrcfile", path)
    with reading(path, "MRC"), mrcfile.open(path, permissive=False) as file:
        sizes = [round(float(file.voxel_size[axis]), 6) for axis in "xyz"]
        values = np.array(file.data)
    if len(set(sizes if cubes else sizes[:2])) > 1:
        raise FormatError(f"{path}: voxels of {sorted(set(sizes))} Å are not cubes; resample it first")
    return values, sizes[0] or None


def _read_tiff(path: Path) -> np.ndarray:
    tifffile = require("tifffile", path)
    with reading(path, "TIFF"):
        return np.asarray(tifffile.imread(path))


def _read_numpy(path: Path, array: str | None, axes: tuple[int, ...]) -> np.ndarray:
    if path.suffix.lower() == ".npy":
        return load_array(path)
    names = member_names(path)
    stacks = [name for name in names if _axes(path, name) in axes] if array is None else [array]
    if len(stacks) != 1 or stacks[0] not in names:
        raise FormatError(f"{path}: holds {', '.join(names)}; say which is the stack (--array NAME)")
    with reading(path, "an .npz archive"), np.load(path, allow_pickle=False) as archive:
        return np.asarray(archive[stacks[0]])


def _axes(path: Path, name: str) -> int:
    """Return how many axes the member ``name`` has, from its header."""
    _, stream = open_member(path, name)
    with stream:
        return len(array_header(stream, f"{path}[{name}]")[0])
