"""Tables of atoms in and out of files: XYZ, CIF, PDB, Parquet, and whatever else ASE reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from stemtomo.errors import FormatError
from stemtomo.io.durable import replacing
from stemtomo.io.export import SYMBOLS, UNKNOWN_SPECIES, read_atoms, write_xyz
from stemtomo.io.untrusted import reading
from stemtomo.locations import local_path

OWN_READERS = (".xyz", ".extxyz", ".npz")
WRITTEN = (".xyz", ".extxyz", ".cif", ".pdb", ".parquet")
_AXES = ("x", "y", "z")
_MARGIN_ANGSTROM = 5.0
_UNITS_KEY = b"stemtomo_units"


def read_structure(path: str | Path) -> xr.Dataset:
    """Read the atoms of a file: ``x``, ``y``, ``z`` in Å and ``species``, dim ``atom``; all columns of a Parquet file.

    XYZ and .npz as :func:`stemtomo.io.export.read_atoms` reads them, Parquet as :func:`write_structure` writes it, all
    else by ASE. What is periodic in the file is not repeated.

    Raises
    ------
    FormatError
        If the file is missing or cannot be read, or a position is not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"{path}: no such file of atoms; give a store, or a file such as .xyz, .cif, .pdb, .parquet")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        dataset = _read_parquet(path)
    elif suffix in OWN_READERS:
        dataset = table(*read_atoms(path))
    else:
        dataset = _read_ase(path)
    kinds = {dataset[axis].dtype.kind for axis in _AXES}
    if not kinds <= set("fiu") or not np.isfinite(_positions(dataset)).all() or dataset.sizes["atom"] == 0:
        raise FormatError(f"{path}: holds no atom, or atoms without a finite position")
    return dataset


def table(positions: np.ndarray, species: Any) -> xr.Dataset:
    """Return the dataset of atoms at ``positions`` (n, 3) in Å with ``species`` (n,)."""
    columns = {axis: ("atom", np.asarray(positions, dtype=float)[:, i], {"units": "Å"}) for i, axis in enumerate(_AXES)}
    return xr.Dataset({**columns, "species": ("atom", np.asarray(species), {"units": "1"})})


def write_structure(path: str | Path, atoms: xr.Dataset) -> None:
    """Write ``atoms`` in the format that the name of ``path`` says; the file appears whole or not at all.

    Extended XYZ and Parquet keep every column of numbers, Parquet with its units (``json`` text under
    ``stemtomo_units`` in the metadata of its schema). CIF and PDB keep positions and elements; the box of a CIF is that
    of the atoms with 5 Å around, and its middle is the rotation centre. Numbered classes are written as ``X`` where
    only elements are allowed, and keep their number as the column ``class`` elsewhere.

    Parameters
    ----------
    atoms
        Dim ``atom``; ``x``, ``y``, ``z`` in Å, ``species``, and any columns.

    Raises
    ------
    FormatError
        If the format is not known or the package that writes it is not there.
    StoreError
        If the file cannot be written.
    """
    path = local_path(path, "atoms are written")
    writer = _WRITERS.get(path.suffix.lower())
    if writer is None:
        raise FormatError(f"{path}: atoms are written as {', '.join(WRITTEN)}; choose one of these endings")
    if path.suffix.lower() in (".xyz", ".extxyz"):
        writer(path, atoms)
        return
    with replacing(path) as partial:
        writer(partial, atoms)


def _symbols(atoms: xr.Dataset) -> list[str]:
    return [name if name in SYMBOLS else UNKNOWN_SPECIES for name in map(str, atoms["species"].values)]


def _columns(atoms: xr.Dataset) -> dict[str, np.ndarray]:
    """Columns of numbers beyond the positions, by name."""
    columns = {
        str(name): np.asarray(variable.values)
        for name, variable in atoms.data_vars.items()
        if variable.dims == ("atom",) and variable.dtype.kind in "fiub" and name not in (*_AXES, "species")
    }
    if atoms["species"].dtype.kind in "iu":
        columns["class"] = atoms["species"].values
    return columns


def _positions(atoms: xr.Dataset) -> np.ndarray:
    return np.stack([np.asarray(atoms[axis].values, dtype=float) for axis in _AXES], axis=-1)


def _write_xyz(path: Path, atoms: xr.Dataset) -> None:
    write_xyz(path, _positions(atoms), _symbols(atoms), _columns(atoms))


def _ase_writer(kind: str) -> Callable[[Path, xr.Dataset], None]:
    def write(path: Path, atoms: xr.Dataset) -> None:
        import ase
        import ase.io

        positions = _positions(atoms)
        half = np.abs(positions).max(axis=0) + _MARGIN_ANGSTROM
        if kind == "cif":
            molecule = ase.Atoms(_symbols(atoms), positions + half, cell=2 * half)
        else:
            molecule = ase.Atoms(_symbols(atoms), positions)
        ase.io.write(path, molecule, format="proteindatabank" if kind == "pdb" else kind)

    return write


def _write_parquet(path: Path, atoms: xr.Dataset) -> None:
    arrow, parquet = _pyarrow(path)
    columns = {str(name): variable.values for name, variable in atoms.data_vars.items() if variable.dims == ("atom",)}
    units = {name: str(atoms[name].attrs.get("units", "1")) for name in columns}
    arrays = {
        name: arrow.array(values if values.dtype.kind in "fiub" else [str(value) for value in values])
        for name, values in columns.items()
    }
    written = arrow.table(arrays).replace_schema_metadata({_UNITS_KEY: json.dumps(units)})
    parquet.write_table(written, path)


def _read_parquet(path: Path) -> xr.Dataset:
    arrow, parquet = _pyarrow(path)
    try:
        found = parquet.read_table(path)
    except (OSError, arrow.ArrowException) as error:
        raise FormatError(f"{path}: cannot be read as Parquet ({error})") from error
    missing = [axis for axis in _AXES if axis not in found.column_names]
    if missing:
        raise FormatError(f"{path}: has the columns {', '.join(found.column_names)}; x, y and z in Å are expected")
    with reading(path, "Parquet"):
        units = json.loads((found.schema.metadata or {}).get(_UNITS_KEY, b"{}"))
        columns = {name: np.asarray(found[name].to_pylist()) for name in found.column_names}
    columns.setdefault("species", np.full(found.num_rows, UNKNOWN_SPECIES))
    return xr.Dataset({n: ("atom", values, {"units": units.get(n, "1")}) for n, values in columns.items()})


def _pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise FormatError(f"{path}: Parquet needs pyarrow; install stemtomo[analysis], or use .xyz") from None
    return pyarrow, pyarrow.parquet


def _read_ase(path: Path) -> xr.Dataset:
    import ase.io

    try:
        molecule = _read_cif(path) if path.suffix.lower() == ".cif" else ase.io.read(path)
    # ASE's readers raise whatever their formats come upon.
    except Exception as error:
        raise FormatError(
            f"{path}: is not a file of atoms that ASE can read ({type(error).__name__}: {error})"
        ) from error
    return table(molecule.get_positions(), np.array(molecule.get_chemical_symbols()))


def _read_cif(path: Path) -> Any:
    """Read the first block of a CIF; without symmetry as it stands, for ASE compares every atom with every other."""
    from ase.io.cif import parse_cif

    block = next(iter(parse_cif(str(path))))
    names = ("_space_group_symop_operation_xyz", "_symmetry_equiv_pos_as_xyz")
    operations = next((block.get(name) for name in names if block.get(name)), None)
    return block.get_unsymmetrized_structure() if operations == ["x, y, z"] else block.get_atoms()


_WRITERS: dict[str, Callable[[Path, xr.Dataset], None]] = {
    ".xyz": _write_xyz,
    ".extxyz": _write_xyz,
    ".cif": _ase_writer("cif"),
    ".pdb": _ase_writer("pdb"),
    ".parquet": _write_parquet,
}
