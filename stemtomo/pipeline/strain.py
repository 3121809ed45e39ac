"""The verb ``strain``: displacement field and strain tensor against a registered crystal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from stemtomo.algorithms.atoms.strain import REACH, local_strain
from stemtomo.distributed import Executor
from stemtomo.distributed import executor as default_executor
from stemtomo.pipeline.crystals import crystal_inputs
from stemtomo.pipeline.lattice import registered
from stemtomo.pipeline.progress import Progress, Silent
from stemtomo.pipeline.settings.analysis import StrainSettings
from stemtomo.pipeline.structure import AtomSource, Structure, analysed, by_blocks, column, structure

GROUP = "strain"
_COMPONENTS = {"xx": (0, 0), "yy": (1, 1), "zz": (2, 2), "xy": (0, 1), "xz": (0, 2), "yz": (1, 2)}
#: Full width at half maximum of a Gaussian in its standard deviations.
_WIDTH = float(2 * np.sqrt(2 * np.log(2)))


def strain(
    source: AtomSource,
    settings: StrainSettings | None = None,
    *,
    out: str | Path | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Find the displacement of every atom from a registered crystal, and the strain tensor around it.

    At each atom an affine map is fitted to the displacements around, weighted by a Gaussian of standard deviation
    ``smoothing_angstrom``: its symmetric part is the strain, at the resolution (full width at half maximum) that the
    result states; its antisymmetric part is the rotation of the lattice. The error is that of the fit.

    Parameters
    ----------
    source
        As for :func:`stemtomo.order`; in a store the result is written to ``strain``.
    settings
        See :class:`~stemtomo.pipeline.settings.analysis.StrainSettings`.
    out
        File to write the atoms with displacement and strain to: .parquet or .xyz.

    Returns
    -------
    dict
        ``mean_strain`` and ``std_strain`` by component, over atoms whose strain is known; ``homogeneous_strain`` (3 x
        3) of the registration and its ``rotation``; ``smoothing_angstrom``, ``resolution_angstrom``; ``error``: median
        standard error of a component; ``atoms``, ``unassigned`` (on no site), ``unknown`` (too few around);
        ``rms_displacement_angstrom``; all components refer to the axes of the sample.

    Raises
    ------
    ConfigurationError
        If the crystal is not known, or is not that of the specimen.
    """
    atoms = structure(source)
    settings = settings or StrainSettings()
    workers, progress = executor or default_executor(), progress or Silent()
    progress.start(GROUP, -(-len(atoms.positions) // settings.atoms_per_block), "block")
    result = analysed(
        atoms,
        GROUP,
        settings.model_dump(),
        lambda: _strained(atoms, settings, workers, progress),
        out,
        crystal_inputs(settings),
    )
    progress.finish(GROUP)
    return dict(result.attrs)


def _strained(atoms: Structure, settings: StrainSettings, workers: Executor, progress: Progress) -> xr.Dataset:
    registration, sites, chosen = registered(atoms, settings)
    on = sites.basis >= 0
    ideal = registration.positions(sites.cell[on], sites.basis[on])
    if settings.reference == "crystal":
        # The crystal as given, turned and placed as the specimen is: what is left is strain and displacement.
        turn = registration.rotation @ np.linalg.inv(registration.matrix)
        middle = ideal.mean(axis=0)
        ideal = (ideal - middle) @ turn.T + middle
    displacement = atoms.positions[chosen[on]] - ideal
    found = by_blocks(
        workers,
        _local,
        (ideal, displacement),
        (settings.atoms_per_block, REACH * settings.smoothing_angstrom),
        settings.smoothing_angstrom,
        progress=progress,
    )
    return _dataset(atoms, settings, (chosen[on], displacement), found, registration)


def _local(item: tuple[tuple[np.ndarray, np.ndarray], int], smoothing: float) -> Mapping[str, np.ndarray]:
    (ideal, displacement), own = item
    found = local_strain(ideal, displacement, own, smoothing)
    return {"strain": found.strain, "rotation": found.rotation, "error": found.error}


def _dataset(
    atoms: Structure,
    settings: StrainSettings,
    on_sites: tuple[np.ndarray, np.ndarray],
    found: dict[str, np.ndarray],
    registration: Any,
) -> xr.Dataset:
    index, displacement = on_sites
    known = np.isfinite(found["error"])
    count = len(atoms.positions)

    def whole(values: np.ndarray, dtype: Any = float) -> np.ndarray:
        result = np.zeros(count, dtype=dtype)
        result[index] = np.nan_to_num(values)
        return result

    variables = {
        "assigned": column(whole(np.ones(len(index)), bool), "1", "whether the atom is on a site of the crystal"),
        "known": column(whole(known, bool), "1", "whether enough atoms are around to tell its strain"),
        "strain_error": column(whole(found["error"]), "1", "standard error of a component of strain"),
    }
    for axis, values in zip("xyz", atoms.positions.T, strict=True):
        variables[axis] = column(values, "Å", "position of the atom")
    for i, axis in enumerate("xyz"):
        variables[f"displacement_{axis}"] = column(whole(displacement[:, i]), "Å", "found minus site of the reference")
        meaning = "rotation of the lattice about the axis"
        variables[f"rotation_{axis}"] = column(whole(found["rotation"][:, i]), "rad", meaning)
    for name, (i, j) in _COMPONENTS.items():
        variables[f"strain_{name}"] = column(whole(found["strain"][:, i, j]), "1", "strain, 0 where not known")
    good = found["strain"][known]
    attrs = {
        "atoms": count,
        "unassigned": count - len(index),
        "unknown": int((~known).sum()),
        "smoothing_angstrom": settings.smoothing_angstrom,
        "resolution_angstrom": _WIDTH * settings.smoothing_angstrom,
        "reference": settings.reference,
        "crystal": registration.crystal.name,
        "homogeneous_strain": registration.strain.tolist(),
        "rotation": registration.rotation.tolist(),
        "mean_strain": {name: float(good[:, i, j].mean()) for name, (i, j) in _COMPONENTS.items()},
        "std_strain": {name: float(good[:, i, j].std()) for name, (i, j) in _COMPONENTS.items()},
        "error": float(np.median(found["error"][known])) if known.any() else None,
        "rms_displacement_angstrom": float(np.sqrt((displacement**2).sum(axis=1).mean())),
    }
    return xr.Dataset(variables, attrs=attrs)
