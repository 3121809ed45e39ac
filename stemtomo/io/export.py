"""Atoms in and out of text files, and known atoms from archives: extended XYZ and .npz."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from stemtomo.errors import FormatError
from stemtomo.io.durable import replacing
from stemtomo.io.untrusted import reading
from stemtomo.locations import local_path

UNKNOWN_SPECIES = "X"
"""Symbol of an atom whose element is not known, as in other programs that write XYZ."""

_TABLE = (
    "X H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr "
    "Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt "
    "Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr"
)
SYMBOLS = tuple(_TABLE.split())
"""Chemical symbols by atomic number."""

_POSITION_KEYS = ("atoms_xyz_A", "gt_atoms_A")
_NUMBER_KEY = "atomic_numbers"


def write_xyz(
    path: str | Path,
    positions: np.ndarray,
    species: Sequence[str],
    columns: Mapping[str, np.ndarray] | None = None,
    comment: Mapping[str, str | float] | None = None,
) -> None:
    """Write atoms as extended XYZ, which ASE, OVITO and others read; the file appears whole or not at all.

    Parameters
    ----------
    positions
        (n, 3) in Å, columns x, y, z.
    species
        n chemical symbols (or ``X``).
    columns
        Further real numbers per atom by name, (n,) each.
    comment
        Keys and values for the comment line, without spaces in the keys.

    Raises
    ------
    FormatError
        If the lengths differ, or a name or symbol cannot be written.
    StoreError
        If it cannot be written.
    """
    positions, columns, names = np.asarray(positions, dtype=float), dict(columns or {}), [str(s) for s in species]
    if positions.ndim != 2 or positions.shape[1] != 3:
        raise FormatError(f"{path}: positions have shape {positions.shape}, expected (n, 3) in Å")
    lengths = {"species": len(names), **{name: len(values) for name, values in columns.items()}}
    if any(length != len(positions) for length in lengths.values()):
        raise FormatError(f"{path}: {len(positions)} positions, but {lengths}; give one value per atom")
    for word in (*names, *columns, *(comment or {})):
        if not re.fullmatch(r"[^\s:=\"]+", word):
            raise FormatError(
                f"{path}: {word!r} cannot be written as XYZ; use a word without spaces, colons, quotes or ="
            )
    properties = ":".join(["species:S:1:pos:R:3", *(f"{name}:R:1" for name in columns)])
    extra = "".join(f' {key}="{value}"' for key, value in (comment or {}).items())
    table = np.column_stack([positions, *(np.asarray(values, dtype=float) for values in columns.values())])
    lines = [str(len(positions)), f"Properties={properties}{extra}"]
    lines += [" ".join([name, *(f"{value:.6f}" for value in row)]) for name, row in zip(names, table, strict=True)]
    with replacing(local_path(path, "atoms are written")) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_atoms(path: str | Path) -> tuple[np.ndarray, list[str]]:
    """Read known atoms: XYZ (plain or extended), or an ``.npz`` with ``atoms_xyz_A`` and ``atomic_numbers``.

    Returns
    -------
    positions
        (n, 3) float64, columns x, y, z in Å.
    species
        n chemical symbols; ``X`` where the file does not say.

    Raises
    ------
    FormatError
        If the file is missing, is not of its format, or an atom is not three finite numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"{path}: no such file of known atoms; give the path of an .xyz or .npz file")
    if path.suffix.lower() == ".npz":
        positions, species = _read_npz(path)
    elif path.suffix.lower() in (".xyz", ".extxyz"):
        positions, species = _read_xyz(path)
    else:
        raise FormatError(f"{path}: the format {path.suffix!r} is not known; give atoms as .xyz or .npz")
    if positions.ndim != 2 or positions.shape[1] != 3 or len(positions) == 0:
        raise FormatError(
            f"{path}: the positions have shape {positions.shape}, expected (n, 3) with columns x, y, z in Å"
        )
    bad = np.flatnonzero(~np.isfinite(positions).all(axis=1))
    if bad.size:
        raise FormatError(
            f"{path}: {bad.size} of {len(positions)} atoms have no finite position, the first is atom {bad[0]}"
        )
    unknown = next((symbol for symbol in species if symbol not in SYMBOLS), None)
    if unknown is not None:
        raise FormatError(f"{path}: {unknown!r} is not a chemical symbol; write it as 'Au', or 'X' for an unknown one")
    if len(species) != len(positions):
        raise FormatError(f"{path}: {len(positions)} positions, but {len(species)} {_NUMBER_KEY}")
    return positions, species


def _read_npz(path: Path) -> tuple[np.ndarray, list[str]]:
    with reading(path, ".npz"), np.load(path, allow_pickle=False) as archive:
        key = next((key for key in _POSITION_KEYS if key in archive.files), None)
        if key is None:
            found = ", ".join(archive.files) or "nothing"
            raise FormatError(f"{path}: holds {found}; known atoms are expected as {' or '.join(_POSITION_KEYS)}")
        positions = np.asarray(archive[key], dtype=float)
        numbers = archive[_NUMBER_KEY] if _NUMBER_KEY in archive.files else np.zeros(len(positions), int)
    wrong = [number for number in np.ravel(numbers).tolist() if number not in range(len(SYMBOLS))]
    if wrong:
        raise FormatError(f"{path}: {_NUMBER_KEY} holds {wrong[0]!r}, expected whole numbers 0 to {len(SYMBOLS) - 1}")
    return positions, [SYMBOLS[int(number)] for number in np.ravel(numbers)]


def _read_xyz(path: Path) -> tuple[np.ndarray, list[str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        if (count := int(lines[0])) < 0:
            raise ValueError(f"{count} atoms")
    except (OSError, ValueError, IndexError) as error:
        raise FormatError(f"{path}: is not XYZ: its first line should be the number of atoms ({error})") from error
    rows = [line.split() for line in lines[2 : 2 + count]]
    if len(rows) < count:
        raise FormatError(f"{path}: ends after {len(rows)} of {count} atoms; copy the file again")
    if any(line.strip() for line in lines[2 + count :]):
        raise FormatError(f"{path}: goes on after its {count} atoms; correct the number in its first line")
    with reading(path, "extended XYZ", "its second line says what the columns are; correct it"):
        symbol, first = _xyz_columns(lines[1])
    positions, species = np.empty((count, 3)), []
    for index, row in enumerate(rows):
        try:
            positions[index] = [float(word) for word in row[first : first + 3]]
            species.append(row[symbol] if symbol is not None else UNKNOWN_SPECIES)
        except (ValueError, IndexError):
            raise FormatError(f"{path}, line {index + 3}: {' '.join(row)!r} is not a symbol and x, y, z in Å") from None
    return positions, species


def _xyz_columns(comment: str) -> tuple[int | None, int]:
    """Column of the symbol and of x; a plain file has them first, an extended one says so in its comment."""
    match = re.search(r"Properties=\"?([^\s\"]+)", comment)
    if match is None:
        return 0, 1
    fields, starts, column = match.group(1).split(":"), {}, 0
    for name, width in zip(fields[0::3], fields[2::3], strict=False):
        starts[name] = column
        column += int(width)
    return starts.get("species"), starts.get("pos", 1)
