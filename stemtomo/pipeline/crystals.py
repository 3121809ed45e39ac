"""The crystal that settings name: a structure with its edge, or a CIF file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stemtomo.algorithms.atoms.crystals import Crystal, named_crystal
from stemtomo.errors import ConfigurationError, FormatError
from stemtomo.io.provenance import file_digest
from stemtomo.physics.potential import atomic_number
from stemtomo.pipeline.settings.analysis import CrystalSettings


def crystal_of(settings: CrystalSettings, species: list[str]) -> Crystal:
    """Return the crystal that ``settings`` name; ``species`` are those of the atoms, where the settings say none.

    Raises
    ------
    ConfigurationError
        If the structure is unknown or its edge is not given.
    FormatError
        If the CIF file cannot be read.
    """
    if _is_file(settings):
        return _from_cif(Path(settings.crystal))
    if settings.a_angstrom is None:
        raise ConfigurationError(
            f"a_angstrom is not given: say the edge of the cell of {settings.crystal} in Å, or name a CIF file"
        )
    names = settings.crystal_species or tuple(species[:1])
    weights = tuple(float(_number(name)) for name in names)
    return named_crystal(settings.crystal, settings.a_angstrom, names, weights, settings.c_angstrom)


def crystal_inputs(settings: CrystalSettings) -> dict[str, str | None]:
    """Return what the crystal is made from beside the settings, for a record: the content of a CIF file."""
    return {"crystal": file_digest(settings.crystal)} if _is_file(settings) else {}


def _is_file(settings: CrystalSettings) -> bool:
    return settings.crystal.lower().endswith(".cif")


def _number(symbol: str) -> int:
    """Atomic number, 1 for atoms of unknown element."""
    return 1 if symbol == "X" or symbol.isdigit() else atomic_number(symbol)


def _from_cif(path: Path) -> Crystal:
    import ase.io

    if not path.is_file():
        raise FormatError(f"{path}: no such CIF file of a crystal")
    try:
        cell = ase.io.read(path)
    # ASE's readers raise whatever their formats come upon.
    except Exception as error:
        raise FormatError(f"{path}: cannot be read as CIF ({type(error).__name__}: {error})") from error
    return Crystal(
        path.stem,
        np.asarray(cell.cell.array, dtype=float),
        cell.get_scaled_positions() % 1.0,
        tuple(cell.get_chemical_symbols()),
        cell.numbers.astype(float),
    )
