"""How far atoms of local-orbital tomography lie from known ones over depth, and whether their stated errors hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from stemtomo.algorithms.atoms.scoring import match_atoms
from stemtomo.io.export import read_atoms
from stemtomo.io.provenance import Provenance, file_digest
from stemtomo.io.store import Store

GROUP = "local_orbital_deviation"
_ATOMS = "local_orbital"
_RADIUS_ANGSTROM = 0.75


def write_deviation(store: Store, truth: str | Path, layer_angstrom: float = 4.0) -> dict[str, Any]:
    """Compare the atoms of ``local_orbital`` in ``store`` with the known ones in the file ``truth``; keep the result.

    Layers of ``layer_angstrom`` along z at tilt 0, which is the mean depth of an atom over a symmetric tilt series
    (Mao et al. 2024, figures 2 and 3).

    Returns
    -------
    dict
        ``recall``, ``precision``, ``rmsd_pm``; ``rmsd_over_stated``: root mean square of the deviations along x, y and
        z over the standard deviations stated for them, 1 where these are true.

    Raises
    ------
    FormatError
        If the file of known atoms cannot be read.
    """
    known = read_atoms(truth)[0]
    inputs = {_ATOMS: store.fingerprint(_ATOMS), "truth": file_digest(truth)}
    provenance = Provenance.start(GROUP, {"layer_angstrom": layer_angstrom}, inputs)
    if not store.is_complete(GROUP, provenance.fingerprint):
        store.write(GROUP, _deviation(store.read(_ATOMS).compute(), known, layer_angstrom), provenance)
    return dict(store.read(GROUP).attrs)


def _deviation(atoms: xr.Dataset, known: np.ndarray, step: float) -> xr.Dataset:
    found = np.stack([atoms[axis].values for axis in "xyz"], axis=1)
    sigma = np.stack([atoms[f"sigma_{axis}"].values for axis in "xyz"], axis=1)
    match = match_atoms(found, known, _RADIUS_ANGSTROM)
    deviation, stated = match.deviation_angstrom, sigma[match.found]
    length = np.linalg.norm(deviation, axis=1)
    layer = np.rint(known[match.truth, 2] / step).astype(int)
    numbers = np.unique(layer)
    rows = [layer == number for number in numbers]
    columns = {
        "z_angstrom": numbers * step,
        "atoms": np.array([row.sum() for row in rows]),
        "rmsd_pm": 100 * np.array([np.sqrt((length[row] ** 2).mean()) for row in rows]),
        "stated_pm": 100 * np.array([np.sqrt((stated[row] ** 2).sum(axis=1).mean()) for row in rows]),
    }
    for name, share in (("lower", 0.25), ("median", 0.5), ("upper", 0.75)):
        columns[f"{name}_pm"] = 100 * np.array([np.quantile(length[row], share) for row in rows])
    return xr.Dataset(
        {name: (("layer",), values) for name, values in columns.items()},
        attrs={
            "recall": match.recall,
            "precision": match.precision,
            "rmsd_pm": 100 * match.rmsd_angstrom if len(length) else None,
            "rmsd_over_stated": float(np.sqrt(((deviation / stated) ** 2).mean())) if len(length) else None,
        },
    )
