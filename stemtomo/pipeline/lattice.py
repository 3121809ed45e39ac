"""The verb ``lattice``: a known crystal registered with the atoms or the volume; missing sites and displacements."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from scipy import ndimage
from scipy.spatial.transform import Rotation

from stemtomo.algorithms.atoms.crystals import Crystal
from stemtomo.algorithms.atoms.lattice import (
    Lattice,
    Registration,
    Sites,
    assign_sites,
    complete_lattice,
    fit_affine,
    register_atoms,
    site_keys,
)
from stemtomo.algorithms.atoms.volume_sites import (
    Climb,
    Sampler,
    bragg_widths,
    climb,
    merged,
    occupation,
    register_volume,
    sites_within,
)
from stemtomo.distributed import Executor
from stemtomo.errors import ConfigurationError
from stemtomo.io.store import Store
from stemtomo.io.structures import write_structure
from stemtomo.pipeline.crystals import crystal_inputs, crystal_of
from stemtomo.pipeline.progress import Progress, Silent
from stemtomo.pipeline.settings.analysis import CrystalSettings, LatticeSettings
from stemtomo.pipeline.structure import AtomSource, Structure, column, kept, structure

GROUP = "lattice"
_ROUNDS = 3
#: Share of the smoothed volume's plateau above which a site may belong to the specimen.
_SUPPORT = 0.15


class _Found(NamedTuple):
    """Sites of the specimen and what is known about each."""

    registration: Registration
    positions: np.ndarray
    basis: np.ndarray
    occupied: np.ndarray
    fitted: np.ndarray
    displacement: np.ndarray
    atom: np.ndarray
    occupation: np.ndarray
    numbers: dict[str, Any]


def lattice(
    source: AtomSource,
    settings: LatticeSettings | None = None,
    *,
    volume: tuple[np.ndarray, float] | None = None,
    out: str | Path | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Register a known crystal with atoms or with the volume: Bragg peaks, then strain, then the origin, then sites.

    From atoms: each is put on a site, one a site; a vacancy is an empty site that occupied ones enclose. From the
    volume: the blur is read off the Bragg peaks, the occupation of every site is found by least squares, and the
    gradient followed from each site to its maximum (Romanov et al. 2025): its displacement; sites whose ascents end in
    one maximum, or nowhere within ``travel``, have none.

    Parameters
    ----------
    source
        As for :func:`stemtomo.order`; with ``settings.source`` "volume" a store with a volume.
    settings
        See :class:`~stemtomo.pipeline.settings.analysis.LatticeSettings`.
    volume
        (z, y, x) with the rotation centre at n // 2, and its voxel in Å, in place of a store's; ``source`` is then only
        a name.
    out
        File to write the sites to: .parquet, .xyz ...
    executor
        Not used: the fit is short. Here so that all analyses are called alike.

    Returns
    -------
    dict
        ``crystal``; ``matrix`` M and ``translation_angstrom`` t of r = M c + t; ``rotation`` (its columns are the
        crystal's axes), ``rotation_deg`` (vector); ``strain`` (3 x 3, in the sample's frame); ``sites``, ``occupied``,
        ``missing``, ``occupied_share``; ``unassigned`` atoms; ``displacement``: mean absolute and root mean square
        along x, y, z, along and across the missing wedge, and in all, in Å; ``nearest_angstrom`` of the crystal; of a
        volume ``blur_angstrom`` (standard deviation along x, y, z) and ``without_maximum``.

    Raises
    ------
    ConfigurationError
        If the crystal is not known, or is not that of the specimen.
    """
    settings = settings or LatticeSettings()
    progress = progress or Silent()
    progress.start(GROUP, 1, "crystal")
    if settings.source == "volume" or volume is not None:
        result = _of_volume(source, settings, volume)
    else:
        atoms = structure(source)
        crystal = crystal_of(settings, atoms.names).only(settings.sites)
        inputs = {"atoms": atoms.identity, **crystal_inputs(settings)}
        compute = functools.partial(_of_atoms, atoms, crystal, settings)
        result = kept(atoms.store, GROUP, settings.model_dump(), inputs, compute)
    if out is not None:
        write_structure(out, result.rename({"site": "atom"}))
    progress.advance()
    progress.finish(GROUP)
    return dict(result.attrs)


def registered(atoms: Structure, settings: CrystalSettings) -> tuple[Registration, Sites, np.ndarray]:
    """Register ``atoms`` with the crystal that ``settings`` name; return also the site of each, and which those are.

    The last are the indices (atom,) of the atoms of ``settings.sites``.
    """
    crystal = crystal_of(settings, atoms.names).only(settings.sites)
    chosen = np.arange(len(atoms.positions))
    if settings.sites is not None and set(settings.sites) & set(atoms.names):
        chosen = np.flatnonzero(np.isin(atoms.species, settings.sites))
    registration = register_atoms(atoms.positions[chosen], crystal)
    return registration, assign_sites(atoms.positions[chosen], registration), chosen


def _of_atoms(atoms: Structure, crystal: Crystal, settings: LatticeSettings) -> xr.Dataset:
    return _dataset(_from_atoms(atoms, crystal), settings)


def _from_atoms(atoms: Structure, crystal: Crystal) -> _Found:
    registration = register_atoms(atoms.positions, crystal)
    sites = assign_sites(atoms.positions, registration)
    complete = complete_lattice(sites, crystal)
    there = complete.atom >= 0
    displacement = np.zeros((len(there), 3))
    displacement[there] = sites.displacement[complete.atom[there]]
    numbers = {"unassigned": int((sites.basis < 0).sum()), "reflections": registration.reflections}
    positions = registration.positions(complete.cell, complete.basis)
    return _Found(
        registration, positions, complete.basis, there, there, displacement, complete.atom,
        there.astype(float), numbers,
    )  # fmt: skip


def _of_volume(source: AtomSource, settings: LatticeSettings, volume: tuple[np.ndarray, float] | None) -> xr.Dataset:
    store = None
    if volume is None:
        if not isinstance(source, Store | str | Path):
            raise ConfigurationError("lattice.source = 'volume' needs a store with a volume, or volume=(array, voxel)")
        store = Store.of(source)
        data = store.read("volume")
        values, voxel = data["potential"].values, float(np.mean(data.attrs["voxel_angstrom"]))
        identity = store.fingerprint("volume")
    else:
        values, voxel = volume
        identity = hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
    crystal = crystal_of(settings, ["X"])
    return kept(
        store,
        GROUP,
        settings.model_dump(),
        {"volume": identity, **crystal_inputs(settings)},
        lambda: _dataset(_from_volume(values, voxel, crystal, settings), settings),
    )


def _from_volume(values: np.ndarray, voxel: float, crystal: Crystal, settings: LatticeSettings) -> _Found:
    registration, found = register_volume(values, voxel, crystal, settings.highest_inv_angstrom)
    widths = bragg_widths(found, registration, settings.highest_inv_angstrom)
    sampler = Sampler(values, voxel)
    length = 0.5 * float(np.cbrt(abs(np.linalg.det(crystal.cell))))
    smoothed = Sampler(ndimage.gaussian_filter(np.clip(values, 0, None), length / voxel, mode="constant"), voxel)
    looked_at = np.isin(crystal.symbols, settings.sites or crystal.symbols)
    furthest = settings.travel * crystal.only(settings.sites).nearest_angstrom
    for _ in range(_ROUNDS):
        cell, basis = sites_within(registration, values.shape, voxel)
        positions = registration.positions(cell, basis)
        level = smoothed(positions)
        inside = level > _SUPPORT * np.percentile(level, 95)
        cell, basis, positions = cell[inside], basis[inside], positions[inside]
        share, _ = occupation(sampler, positions, crystal.weights[basis], widths)
        chosen = looked_at[basis]
        cell, basis, positions, share = cell[chosen], basis[chosen], positions[chosen], share[chosen]
        share /= np.median(share[share > settings.occupation_threshold])
        climbed = climb(sampler, positions, furthest)
        good = climbed.arrived & ~merged(climbed, positions) & (share > settings.occupation_threshold)
        if good.sum() < 12:
            raise ConfigurationError(
                f"the volume has no maxima near the sites of {crystal.name}: check its edge and sites"
            )
        registration = fit_affine(climbed.positions[good], cell[good], basis[good], registration)
    complete = complete_lattice(
        Sites(cell, np.where(share > settings.occupation_threshold, basis, -1), positions), crystal
    )
    return _volume_sites(registration, complete, climbed, good, share, (cell, basis), widths)


def _volume_sites(
    registration: Registration,
    complete: Lattice,
    climbed: Climb,
    good: np.ndarray,
    share: np.ndarray,
    looked_at: tuple[np.ndarray, np.ndarray],
    widths: np.ndarray,
) -> _Found:
    """Return the sites of the specimen with what was found at each; empty ones of other elements are no sites."""
    cell, basis = looked_at
    kinds = len(registration.crystal.fractional)
    low, high = (
        np.minimum(cell.min(axis=0), complete.cell.min(axis=0)),
        np.maximum(cell.max(axis=0), complete.cell.max(axis=0)),
    )
    known = {key: row for row, key in enumerate(site_keys(cell, basis, kinds, low, high).tolist())}
    rows = np.array([known.get(key, -1) for key in site_keys(complete.cell, complete.basis, kinds, low, high).tolist()])
    kept = (rows >= 0) & np.isin(complete.basis, np.unique(basis))
    rows, site_cell, site_basis = rows[kept], complete.cell[kept], complete.basis[kept]
    positions = registration.positions(site_cell, site_basis)
    occupied = complete.atom[kept] >= 0
    fitted = good[rows] & occupied
    displacement = np.where(fitted[:, None], climbed.positions[rows] - positions, 0.0)
    numbers = {
        "unassigned": 0,
        "reflections": registration.reflections,
        "blur_angstrom": widths.tolist(),
        "without_maximum": int((occupied & ~fitted).sum()),
    }
    return _Found(
        registration,
        positions,
        site_basis,
        occupied,
        fitted,
        displacement,
        np.full(len(rows), -1),
        share[rows],
        numbers,
    )


def _dataset(found: _Found, settings: LatticeSettings) -> xr.Dataset:
    symbols = np.array(found.registration.crystal.symbols)[found.basis]
    variables = {
        axis: column(found.positions[:, i], "Å", "position of the site", "site") for i, axis in enumerate("xyz")
    }
    variables |= {
        "species": column(symbols, "1", "element of the site", "site"),
        "occupied": column(found.occupied, "1", "whether an atom is on it", "site"),
        "fitted": column(found.fitted, "1", "whether its displacement is known", "site"),
        "occupation": column(found.occupation, "1", "1 for the usual one", "site"),
        "atom_index": column(found.atom, "1", "atom on it, -1 for none", "site"),
    }
    for i, axis in enumerate("xyz"):
        meaning = "found minus registered position, 0 where not known"
        variables[f"displacement_{axis}"] = column(found.displacement[:, i], "Å", meaning, "site")
    registration = found.registration
    attrs = {
        "crystal": registration.crystal.name,
        "matrix": registration.matrix.tolist(),
        "translation_angstrom": registration.translation.tolist(),
        "rotation": registration.rotation.tolist(),
        "rotation_deg": Rotation.from_matrix(registration.rotation).as_rotvec(degrees=True).tolist(),
        "strain": registration.strain.tolist(),
        "nearest_angstrom": registration.crystal.only(settings.sites).nearest_angstrom,
        "sites": len(found.occupied),
        "occupied": int(found.occupied.sum()),
        "missing": int((~found.occupied).sum()),
        "occupied_share": float(found.occupied.mean()),
        "displacement": _displacements(found.displacement[found.fitted], settings.missing_wedge_axis),
        **found.numbers,
    }
    return xr.Dataset(variables, attrs=attrs)


def _displacements(displacement: np.ndarray, wedge: str) -> dict[str, Any]:
    """Return mean absolute and root mean square displacements by axis, along and across the missing wedge, in Å."""
    along = "xyz".index(wedge)
    across = [axis for axis in range(3) if axis != along]
    size = np.abs(displacement)
    squares = displacement**2
    return {
        "mean_absolute_angstrom": dict(zip("xyz", size.mean(axis=0).tolist(), strict=True)),
        "rms_angstrom": dict(zip("xyz", np.sqrt(squares.mean(axis=0)).tolist(), strict=True)),
        "missing_wedge_axis": wedge,
        "mean_along_wedge_angstrom": float(size[:, along].mean()),
        "mean_across_wedge_angstrom": float(size[:, across].mean()),
        "mean_distance_angstrom": float(np.sqrt(squares.sum(axis=1)).mean()),
        "rms_distance_angstrom": float(np.sqrt(squares.sum(axis=1).mean())),
    }
