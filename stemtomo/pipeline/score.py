"""The verb ``score``: the atoms that were found against known ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from stemtomo.algorithms.atoms.scoring import Match, confusion_matrix, deviation_over_depth, match_atoms, mirrored
from stemtomo.distributed import Executor
from stemtomo.errors import ConfigurationError
from stemtomo.io.export import SYMBOLS, UNKNOWN_SPECIES, read_atoms
from stemtomo.io.provenance import Provenance, file_digest
from stemtomo.io.store import Store
from stemtomo.pipeline.config import ScoreSettings
from stemtomo.pipeline.progress import Progress, Silent
from stemtomo.pipeline.structure import AtomSource, structure

GROUP = "score"


def score(
    store: Store | str | Path,
    settings: ScoreSettings | None = None,
    *,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare the atoms of ``store`` with the known ones in the file ``settings.truth``.

    One rigid shift is removed, then atoms are matched one to one within ``settings.match_radius_angstrom``. The mirror
    image in z, which a wrong sign of the tilts would give, is matched too, and reported, but never scored.

    Parameters
    ----------
    store
        Store with atoms, opened with mode ``"r+"``; the result is written to ``score``.
    settings
        See :class:`~stemtomo.pipeline.config.ScoreSettings`.
    executor
        Not used: matching is short. Here so that all stages are called alike.

    Returns
    -------
    dict
        ``recall``, ``precision``, ``rmsd_pm`` over matched atoms in 3D and per axis, ``species_accuracy`` over matched
        atoms (``None`` where the species of either side are unknown) and ``confusion`` (rows true, columns found),
        ``found``, ``known``, ``matched``, ``extra``, ``missing``, ``shift_angstrom``, ``mirrored_recall``,
        ``mirrored_is_better`` and a ``note`` where that is so.

    Raises
    ------
    StoreError
        If the store has no atoms.
    ConfigurationError
        If ``settings.truth`` is not given.
    FormatError
        If the file of known atoms cannot be read.
    """
    store = Store.of(store)
    settings = settings or ScoreSettings()
    progress = progress or Silent()
    if settings.truth is None:
        raise ConfigurationError("score.truth is not given: name an .xyz or .npz file of known atoms to score against")
    positions, symbols = read_atoms(settings.truth)
    provenance = Provenance.start(
        GROUP,
        {**settings.model_dump(), "truth": settings.truth.name},
        {"atoms": store.fingerprint("atoms"), "truth": file_digest(settings.truth)},
    )
    progress.start(GROUP, 1, "comparison")
    if not store.is_complete(GROUP, provenance.fingerprint):
        store.write(
            GROUP, _compared(store.read("atoms"), positions, symbols, settings.match_radius_angstrom), provenance
        )
    numbers = dict(store.read(GROUP).attrs)
    progress.advance()
    progress.finish(GROUP)
    return numbers


def score_atoms(found: AtomSource, known: AtomSource, *, match_radius_angstrom: float = 0.75) -> dict[str, Any]:
    """Compare two lists of atoms; nothing is written.

    The rule: one rigid shift is removed, that which lets most atoms meet and then brings the pairs closest (sought from
    no shift and from equal centroids); atoms are paired one to one, no two further apart than
    ``match_radius_angstrom``, as many as can be and then with the least sum of squares (Hungarian method); species play
    no part in the pairing.

    Parameters
    ----------
    found, known
        A store, a file of atoms, a dataset with x, y, z (and species), ``(positions, species)`` or positions (atom, 3)
        in Å. ``known`` is the reference.

    Returns
    -------
    dict
        As :func:`score`: ``recall`` (pairs over known), ``precision`` (pairs over found), ``rmsd_pm`` in 3D and
        ``rmsd_x_pm``, ``rmsd_y_pm``, ``rmsd_z_pm`` over the pairs, ``species_accuracy`` over the pairs (``None`` where
        a side has no elements) with ``confusion``, ``matched``, ``extra``, ``missing``, ``shift_angstrom`` ...

    Raises
    ------
    ConfigurationError
        If there is no known atom or the radius is not positive.
    """
    ours, theirs = structure(found), structure(known)
    table = ours.table if "classes" in ours.table.attrs else ours.table.assign_attrs(classes=ours.names)
    return dict(_compared(table, theirs.positions, theirs.species.tolist(), match_radius_angstrom).attrs)


def _compared(atoms: xr.Dataset, truth: np.ndarray, symbols: list[str], radius: float) -> xr.Dataset:
    """Return the score as attributes, and the matched pairs with their deviations as variables."""
    found = np.stack([atoms[axis].values for axis in "xyz"], axis=-1)
    match = match_atoms(found, truth, radius)
    mirror = match_atoms(mirrored(found), truth, radius)
    pairs = {
        "found_atom": (match.found, "1", "index into the found atoms"),
        "known_atom": (match.truth, "1", "index into the known atoms"),
        **{
            f"deviation_{axis}": (match.deviation_angstrom[:, i], "Å", "found minus known position")
            for i, axis in enumerate("xyz")
        },
    }
    return xr.Dataset(
        {
            name: xr.Variable("pair", values, {"units": units, "long_name": meaning})
            for name, (values, units, meaning) in pairs.items()
        },
        attrs={
            **_positions_scored(match, len(found), len(truth)),
            "by_depth": deviation_over_depth(match, truth),
            **_species_scored(atoms, symbols, match),
            **_mirror_scored(match, mirror),
            "match_radius_angstrom": radius,
        },
    )


def _positions_scored(match: Match, found: int, known: int) -> dict[str, Any]:
    matched = len(match.found)
    per_axis = match.rmsd_xyz_angstrom * 100
    return {
        "recall": match.recall,
        "precision": match.precision,
        "rmsd_pm": match.rmsd_angstrom * 100 if matched else None,
        **{f"rmsd_{axis}_pm": float(value) if matched else None for axis, value in zip("xyz", per_axis, strict=True)},
        "found": found,
        "known": known,
        "matched": matched,
        "extra": found - matched,
        "missing": known - matched,
        "shift_angstrom": match.shift_angstrom.tolist(),
    }


def _species_scored(atoms: xr.Dataset, symbols: list[str], match: Match) -> dict[str, Any]:
    """Return accuracy and confusion; numbered classes stand for the known species in order of atomic number."""
    labels = atoms["species"].values
    species = sorted(set(symbols), key=lambda name: (SYMBOLS.index(name) if name in SYMBOLS else len(SYMBOLS), name))
    numbered = labels.dtype.kind in "iu"
    if UNKNOWN_SPECIES in {*species, *map(str, labels)} or (numbered and len(atoms.attrs["classes"]) != len(species)):
        return {"species_accuracy": None, "species_names": [], "confusion": []}
    if numbered:
        labels = np.array(species)[labels]
    given = np.array([str(label) for label in labels])[match.found]
    true = np.array(symbols)[match.truth]
    names = [*species, *sorted(set(given) - set(species))]
    table = confusion_matrix(given, true, names)
    return {
        "species_accuracy": float(np.trace(table) / table.sum()) if table.sum() else None,
        "species_names": names,
        "confusion": table.tolist(),
    }


def _mirror_scored(match: Match, mirror: Match) -> dict[str, Any]:
    better = mirror.recall > match.recall
    numbers: dict[str, Any] = {"mirrored_recall": mirror.recall, "mirrored_is_better": better}
    if better:
        numbers["note"] = (
            f"the mirror image in z matches better (recall {mirror.recall:.3f}, {mirror.rmsd_angstrom * 100:.1f} pm) "
            f"than the atoms as found (recall {match.recall:.3f}): the sign of the tilt angles is probably reversed; "
            "the score is that of the atoms as found"
        )
    return numbers
