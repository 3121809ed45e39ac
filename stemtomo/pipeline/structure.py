"""Where the analyses take atoms from (a store, a file, a dataset or arrays), and where they leave results."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import xarray as xr

from stemtomo.algorithms.atoms.blocks import atom_blocks
from stemtomo.distributed import Executor
from stemtomo.errors import ConfigurationError
from stemtomo.io.export import SYMBOLS
from stemtomo.io.provenance import Provenance
from stemtomo.io.schema import group_schema
from stemtomo.io.store import Store
from stemtomo.io.structures import read_structure, table, write_structure
from stemtomo.pipeline.progress import Progress

AtomSource: TypeAlias = "Store | str | Path | xr.Dataset | tuple[np.ndarray, Any] | np.ndarray"
"""A store or its path, a file of atoms, a dataset with x, y, z and species, positions with species, or positions."""


@dataclass(frozen=True)
class Structure:
    """Atoms to be analysed.

    Parameters
    ----------
    name
        What to call them in messages.
    positions
        (atom, 3), columns x, y, z in Å.
    species
        Symbols, or numbers of classes, as text, (atom,).
    table
        All that is known about them, dim ``atom``.
    store
        The store they come from, if they do.
    identity
        Fingerprint of the atoms.
    """

    name: str
    positions: np.ndarray
    species: np.ndarray
    table: xr.Dataset
    store: Store | None
    identity: str

    @property
    def names(self) -> list[str]:
        """Species, by atomic number where they are elements."""
        return sorted(set(self.species.tolist()), key=lambda n: (SYMBOLS.index(n) if n in SYMBOLS else 999, n))


def structure(source: AtomSource) -> Structure:
    """Return the atoms of ``source``.

    Raises
    ------
    StoreError
        If a store has no atoms.
    FormatError
        If a file cannot be read.
    ConfigurationError
        If ``source`` is none of these, or has no atoms.
    """
    store, name = None, "the atoms"
    if isinstance(source, Store) or (isinstance(source, str | Path) and Store.is_store(source)):
        store = Store.of(source)
        data, name = store.read("atoms").load(), str(store.path)
    elif isinstance(source, str | Path):
        data, name = read_structure(source), str(source)
    elif isinstance(source, xr.Dataset):
        data = source
    elif isinstance(source, tuple):
        data = table(np.asarray(source[0], dtype=float), np.asarray(source[1]))
    else:
        data = table(np.asarray(source, dtype=float), np.full(len(source), "X"))
    positions = np.stack([np.asarray(data[axis].values, dtype=float) for axis in "xyz"], axis=-1)
    if len(positions) == 0 or not np.isfinite(positions).all():
        raise ConfigurationError(f"{name}: has no atoms, or atoms without a finite position; find atoms first")
    labels = data["species"].values if "species" in data else np.full(len(positions), "X")
    species = np.array([str(label) for label in labels])
    identity = store.fingerprint("atoms") if store else None
    if identity is None:
        identity = hashlib.sha256(positions.tobytes() + "\n".join(species).encode()).hexdigest()
    return Structure(name, positions, species, data, store, identity)


def atom_summary(source: AtomSource, out: str | Path | None = None) -> dict[str, Any]:
    """Return what atoms ``source`` holds, and write them to ``out`` where given.

    Returns
    -------
    dict
        ``atoms``, ``species`` (number of each), ``lowest_angstrom`` and ``highest_angstrom`` (x, y, z), ``columns``
        with units, ``written``: the file.
    """
    found = structure(source)
    if out is not None:
        write_structure(out, found.table)
    columns = {str(n): str(v.attrs.get("units", "1")) for n, v in found.table.data_vars.items() if v.dims == ("atom",)}
    return {
        "atoms": len(found.positions),
        "species": {name: int(np.count_nonzero(found.species == name)) for name in found.names},
        "lowest_angstrom": found.positions.min(axis=0).tolist(),
        "highest_angstrom": found.positions.max(axis=0).tolist(),
        "columns": columns,
        "written": None if out is None else str(out),
    }


def analysed(
    atoms: Structure,
    group: str,
    configuration: Mapping[str, Any],
    compute: Callable[[], xr.Dataset],
    out: str | Path | None,
    inputs: Mapping[str, str | None] | None = None,
) -> xr.Dataset:
    """Return the result of ``compute``, or that of last time; keep it in the store, and beside the atoms in ``out``.

    Nothing is computed if the store has a result of the same atoms (and ``inputs``) and configuration.
    """
    result = kept(atoms.store, group, configuration, {"atoms": atoms.identity, **(inputs or {})}, compute)
    if out is not None:
        mine = {str(n): v.variable for n, v in result.data_vars.items() if v.dims == ("atom",)}
        theirs = {str(n): v.variable for n, v in atoms.table.data_vars.items() if v.dims == ("atom",)}
        write_structure(out, xr.Dataset({**theirs, **{n: v for n, v in mine.items() if n not in "xyz"}}))
    return result


def kept(
    store: Store | None,
    group: str,
    configuration: Mapping[str, Any],
    inputs: Mapping[str, str | None],
    compute: Callable[[], xr.Dataset],
) -> xr.Dataset:
    """Return the result of ``compute``, or what ``store`` has of it as ``group``, where there is a store."""
    if store is None:
        return compute()
    provenance = Provenance.start(group_schema(group).stage, configuration, inputs)
    if not store.is_complete(group, provenance.fingerprint):
        store.write(group, compute(), provenance)
    return store.read(group).load()


def column(values: np.ndarray, units: str, meaning: str, dim: str = "atom") -> xr.Variable:
    """Return ``values`` as a variable with its unit and what it means."""
    return xr.Variable(dim, values, {"units": units, "long_name": meaning})


def by_blocks(
    workers: Executor,
    function: Callable[..., Mapping[str, np.ndarray]],
    columns: Sequence[np.ndarray],
    cut: tuple[int, float],
    *shared: Any,
    progress: Progress,
) -> dict[str, np.ndarray]:
    """Return per-atom results of ``function`` over blocks of atoms, put together; memory is that of a few blocks.

    Parameters
    ----------
    function
        Called with (the columns of a block's atoms and of those around it, number of its own ones, which are first) and
        ``shared``; returns arrays by name, whose first rows are those of the block's own atoms.
    columns
        Values per atom; the first are the positions (atom, 3).
    cut
        Atoms per block, and the halo in Å that the function needs: with it the result is that of all atoms at once.
    """
    blocks = atom_blocks(columns[0], *cut)
    items = ((tuple(column[block.around] for column in columns), len(block.own)) for block in blocks)
    result: dict[str, np.ndarray] = {}
    for index, found in workers.map_bounded(function, items, *shared, window=workers.workers):
        for name, values in found.items():
            whole = result.setdefault(name, np.empty((len(columns[0]), *values.shape[1:]), dtype=values.dtype))
            whole[blocks[index].own] = values[: len(blocks[index].own)]
        progress.advance()
    return result
