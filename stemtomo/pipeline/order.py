"""The verb ``order``: how atoms are ordered, in shape and in chemistry."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from stemtomo.algorithms.atoms.chemical import PHASES, VARIANT_AXIS, VARIANT_PHASE, chemical_order, ordered_grains
from stemtomo.algorithms.atoms.frames import Frames, fcc_frames, grains_of
from stemtomo.algorithms.atoms.neighbours import bonds, connected_sets
from stemtomo.algorithms.atoms.order import bond_order
from stemtomo.algorithms.atoms.pair_distribution import (
    PairDistribution,
    body_of,
    count_pairs,
    first_valley,
    nearest_distance,
    pair_distribution,
)
from stemtomo.distributed import Executor
from stemtomo.distributed import executor as default_executor
from stemtomo.errors import ConfigurationError
from stemtomo.pipeline.progress import Progress, Silent
from stemtomo.pipeline.settings.analysis import OrderSettings, TrackSettings
from stemtomo.pipeline.structure import AtomSource, Structure, analysed, by_blocks, column, structure

GROUP = "order"
#: Atoms from which distances are measured for g(r); to all atoms from these.
_ORIGINS = 20_000
_AXIS_NAMES = ("", " x", " y", " z")


def order(
    source: AtomSource,
    settings: OrderSettings | None = None,
    *,
    out: str | Path | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Find how atoms are ordered: pair distribution, coordination, Steinhardt order, chemical order and grains.

    Parameters
    ----------
    source
        A store with atoms (the result is written to ``order``), a file of atoms (.xyz, .npz, .parquet, .cif, .pdb ...),
        a dataset with x, y, z and species, ``(positions, species)`` or positions (atom, 3) in Å.
    settings
        See :class:`~stemtomo.pipeline.settings.analysis.OrderSettings`.
    out
        File to write the atoms with their order to, one column each: .parquet or .xyz.

    Returns
    -------
    dict
        ``atoms``; ``cutoff_angstrom`` of neighbours; ``coordination``: mean, and mean of atoms deeper than the cutoff;
        ``crystalline``: atoms of at least ``threshold``, and ``crystalline_share``; ``regions``: connected sets of
        these with atoms, largest order, centre; ``nearest_angstrom``; ``density_per_angstrom3``;
        ``pair_distribution``: r and g; and of two species ``chemical``: mean order, antisites, and the ``grains``, each
        with phase, atoms, mean order, centre.

    Raises
    ------
    ConfigurationError
        If there are no atoms, or chemical order is asked for without two species.
    """
    atoms = structure(source)
    settings = settings or OrderSettings()
    workers, progress = executor or default_executor(), progress or Silent()
    pair = _two_species(atoms, settings)
    blocks = -(-len(atoms.positions) // settings.atoms_per_block) * (2 if pair else 1)
    progress.start(GROUP, blocks, "block")
    result = analysed(
        atoms, GROUP, settings.model_dump(), lambda: _ordered(atoms, settings, pair, workers, progress), out
    )
    progress.finish(GROUP)
    return {**result.attrs, "pair_distribution": {k: result[k].values.tolist() for k in ("r_angstrom", "g")}}


def nuclei_of(
    atoms: Structure, settings: TrackSettings, executor: Executor | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the order that ``settings.order`` names of each atom, and its nucleus, -1 for none, (atom,) each."""
    asked = OrderSettings(
        cutoff_angstrom=settings.cutoff_angstrom,
        chemical=settings.order == "chemical",
        species=settings.species,
        chemical_threshold=settings.threshold,
        smallest_grain=settings.smallest_nucleus,
    )
    workers, silent = executor or default_executor(), Silent()
    cutoff = asked.cutoff_angstrom
    if cutoff is None:
        distribution, _ = _distribution(atoms, asked, nearest_distance(atoms.positions))
        cutoff = first_valley(distribution.r_angstrom, distribution.g)
    pair = _two_species(atoms, asked)
    if pair is not None:
        found = _chemistry(atoms, asked, pair, cutoff, workers, silent)[0]
        return found["chemical_order"].values, found["grain"].values
    cut = (asked.atoms_per_block, 2 * cutoff)
    values = by_blocks(workers, _bonds, (atoms.positions,), cut, cutoff, progress=silent)["order"]
    return values, _regions(atoms.positions, values >= settings.threshold, cutoff, settings.smallest_nucleus)


def _two_species(atoms: Structure, settings: OrderSettings) -> tuple[str, str] | None:
    """Return the species A and B of chemical order, ``None`` if it is not to be found."""
    names = settings.species or tuple(atoms.names)
    if settings.chemical is False or (settings.chemical is None and len(names) != 2):
        return None
    if len(names) != 2 or not set(names) <= set(atoms.names):
        raise ConfigurationError(
            f"order.species is {list(names)}, and {atoms.name} has {atoms.names}: name two species that are there"
        )
    return (names[0], names[1])


def _ordered(
    atoms: Structure, settings: OrderSettings, pair: tuple[str, str] | None, workers: Executor, progress: Progress
) -> xr.Dataset:
    nearest = nearest_distance(atoms.positions)
    distribution, depth = _distribution(atoms, settings, nearest)
    cutoff = settings.cutoff_angstrom or first_valley(distribution.r_angstrom, distribution.g)
    size = settings.atoms_per_block
    per_atom = by_blocks(workers, _bonds, (atoms.positions,), (size, 2 * cutoff), cutoff, progress=progress)
    crystalline = per_atom["order"] >= settings.threshold
    per_atom["region"] = _regions(atoms.positions, crystalline, cutoff, settings.smallest_grain)
    numbers = _numbers(atoms, settings, per_atom, depth, cutoff)
    columns = {
        "q4": ("1", "Steinhardt q4 averaged over the neighbours"),
        "q6": ("1", "Steinhardt q6 averaged over the neighbours"),
        "order": ("1", "sqrt(q4^2 + q6^2), 1 in the fcc crystal"),
        "neighbours": ("1", "atoms within the cutoff"),
        "region": ("1", "connected set of crystalline atoms, -1 for none"),
    }
    variables = {name: column(per_atom[name], *said) for name, said in columns.items()}
    if pair is not None:
        chemical, found = _chemistry(atoms, settings, pair, cutoff, workers, progress)
        variables |= chemical
        numbers["chemical"] = found
    numbers |= {"nearest_angstrom": nearest, "density_per_angstrom3": distribution.density}
    for axis, values in zip("xyz", atoms.positions.T, strict=True):
        variables[axis] = column(values, "Å", "position of the atom")
    return xr.Dataset({**variables, **_curves(distribution)}, attrs=numbers)


def _bonds(item: tuple[tuple[np.ndarray], int], cutoff: float) -> Mapping[str, np.ndarray]:
    (positions,), own = item
    found = bond_order(positions, cutoff)
    return {name: getattr(found, name)[:own] for name in ("q4", "q6", "order", "neighbours")}


def _distribution(atoms: Structure, settings: OrderSettings, nearest: float) -> tuple[PairDistribution, np.ndarray]:
    """Return g(r) and the depth of every atom below the surface in Å."""
    edges = np.arange(0, settings.pair_distance_angstrom + settings.pair_step_angstrom, settings.pair_step_angstrom)
    body = body_of(atoms.positions, nearest)
    count = len(atoms.positions)
    chosen = np.random.default_rng(0).permutation(count)[:_ORIGINS]
    order_ = np.concatenate([chosen, np.setdiff1d(np.arange(count), chosen)]) if count > _ORIGINS else np.arange(count)
    counts = count_pairs(atoms.positions[order_], atoms.species[order_], len(chosen), edges, atoms.names)
    scaled = {key: values * count / len(chosen) for key, values in counts.items()}
    numbers = {name: int(np.count_nonzero(atoms.species == name)) for name in atoms.names}
    return pair_distribution(scaled, numbers, body, edges), body.depth(atoms.positions)


def _regions(positions: np.ndarray, crystalline: np.ndarray, cutoff: float, fewest: int) -> np.ndarray:
    """Return the connected set of each crystalline atom, (atom,), -1 for none."""
    inside = np.flatnonzero(crystalline)
    result = np.full(len(positions), -1)
    if len(inside):
        first, second = bonds(positions[inside], cutoff)
        result[inside] = connected_sets(len(inside), first, second, np.ones(len(inside), bool), fewest)
    return result


def _numbers(
    atoms: Structure, settings: OrderSettings, found: dict[str, np.ndarray], depth: np.ndarray, cutoff: float
) -> dict[str, Any]:
    crystalline, neighbours = found["order"] >= settings.threshold, found["neighbours"]
    inner = depth > cutoff
    return {
        "atoms": len(crystalline),
        "cutoff_angstrom": float(cutoff),
        "threshold": settings.threshold,
        "coordination": {
            "mean": float(neighbours.mean()),
            "mean_inside": float(neighbours[inner].mean()) if inner.any() else None,
            "atoms_inside": int(inner.sum()),
        },
        "crystalline": int(crystalline.sum()),
        "crystalline_share": float(crystalline.mean()),
        "mean_order": float(found["order"].mean()),
        "regions": described(atoms.positions, found["region"], found["order"]),
    }


def described(positions: np.ndarray, label: np.ndarray, values: np.ndarray) -> list[dict[str, Any]]:
    """Return a row per connected set 0, 1 ... of ``label`` (atom,): atoms, mean and largest of ``values``, centre."""
    inside = np.flatnonzero(label >= 0)
    inside = inside[np.argsort(label[inside], kind="stable")]
    bounds = np.flatnonzero(np.diff(label[inside])) + 1
    return [
        {
            "number": number,
            "atoms": len(members),
            "mean_order": float(values[members].mean()),
            "largest_order": float(values[members].max()),
            "centre_angstrom": positions[members].mean(axis=0).tolist(),
        }
        for number, members in enumerate(np.split(inside, bounds) if len(inside) else [])
    ]


def _frames_of(item: tuple[tuple[np.ndarray, np.ndarray], int], cutoff: float) -> Mapping[str, np.ndarray]:
    (positions, index), own = item
    found = fcc_frames(positions, own, cutoff)
    neighbour = np.where(found.neighbour >= 0, index[found.neighbour], -1)
    return {"rotation": found.rotation, "misfit": found.misfit, "neighbour": neighbour}


def _chemistry(
    atoms: Structure,
    settings: OrderSettings,
    pair: tuple[str, str],
    cutoff: float,
    workers: Executor,
    progress: Progress,
) -> tuple[dict[str, xr.Variable], dict[str, Any]]:
    """Return chemical order and grains per atom, and their numbers. Atoms of a third species count as B's."""
    columns = (atoms.positions, np.arange(len(atoms.positions)))
    found = by_blocks(workers, _frames_of, columns, (settings.atoms_per_block, cutoff), cutoff, progress=progress)
    oriented, frames = grains_of(Frames(**found), fewest=settings.smallest_grain)
    chemistry = chemical_order(frames, atoms.species == pair[0])
    value = np.where(oriented >= 0, chemistry.order, 0.0)
    grain = ordered_grains(frames, chemistry, oriented, settings.chemical_threshold, settings.smallest_grain)
    names = np.array([PHASES[p] + _AXIS_NAMES[a] for p, a in zip(VARIANT_PHASE, VARIANT_AXIS, strict=True)])
    phase = np.where(
        oriented < 0, "none", np.where(value < settings.chemical_threshold, "A1", names[chemistry.variant])
    )
    grains = described(atoms.positions, grain, value)
    for row in grains:
        members = grain == row["number"]
        kinds, counts = np.unique(phase[members], return_counts=True)
        row["phase"] = str(kinds[np.argmax(counts)])
        row["antisites"] = int(chemistry.antisite[members].sum())
        axes = frames.rotation[np.flatnonzero(members)[np.argmin(frames.misfit[members])]]
        row["axes"] = axes.T.tolist()
    variables = {
        "chemical_order": column(value, "1", "chemical order of the best variant, 1 for perfect"),
        "phase": column(phase, "1", "A1, or the ordered phase and the cubic axis its layers are perpendicular to"),
        "grain": column(grain, "1", "chemically ordered grain, -1 for none"),
        "orientation_grain": column(oriented, "1", "connected lattice of one orientation, -1 for none"),
        "antisite": column(chemistry.antisite & (grain >= 0), "1", "of the other species than its site in the grain"),
    }
    numbers = {
        "species_a": pair[0],
        "species_b": pair[1],
        "mean_order": float(value.mean()),
        "threshold": settings.chemical_threshold,
        "orientation_grains": np.bincount(oriented[oriented >= 0]).tolist(),
        "grains": grains,
    }
    return variables, numbers


def _curves(distribution: PairDistribution) -> dict[str, xr.Variable]:
    curves = {
        "r_angstrom": column(distribution.r_angstrom, "Å", "distance", "r"),
        "g": column(distribution.g, "1", "pair distribution function", "r"),
    }
    if len(distribution.partial) > 1:
        for (a, b), values in distribution.partial.items():
            curves[f"g_{a}_{b}"] = column(values, "1", f"pairs of {a} and {b}", "r")
    return curves
