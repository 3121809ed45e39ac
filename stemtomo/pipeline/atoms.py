"""The verb ``find_atoms``: positions and species of the atoms in the volume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from stemtomo.algorithms.atoms.classification import Classes, classify, order_by_atomic_number
from stemtomo.algorithms.atoms.completion import CompletedAtoms, CompletionRules, complete_atoms
from stemtomo.algorithms.atoms.projected import ProjectedImages
from stemtomo.algorithms.atoms.refinement import RefinedAtoms
from stemtomo.algorithms.atoms.tracing import TracedAtoms
from stemtomo.algorithms.atoms.uncertainty import position_uncertainty
from stemtomo.distributed import Executor, PlanRow
from stemtomo.distributed import executor as default_executor
from stemtomo.errors import ConfigurationError
from stemtomo.io.provenance import Provenance
from stemtomo.io.store import Store
from stemtomo.physics.potential import atomic_number
from stemtomo.pipeline.alignment import aligned_images, aligned_rotations, series_of
from stemtomo.pipeline.atoms_multislice import multislice_atoms
from stemtomo.pipeline.config import AtomSettings
from stemtomo.pipeline.progress import Progress, Silent
from stemtomo.pipeline.tracing import (
    atoms_alone,
    measured_in_blocks,
    near_bright_ones,
    plan_block,
    traced_in_blocks,
    with_local_species,
)

GROUP = "atoms"

#: Share of the projections' variance below which Gaussian atoms are no model of them, and traced positions are kept.
_LEAST_EXPLAINED = 0.6
#: Width of the running mean that projections are compared without, in widths of an atom.
_BACKGROUND_WIDTHS = 3.0


def find_atoms(
    store: Store | str | Path,
    settings: AtomSettings | None = None,
    *,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trace the atoms of the volume, refine them against the projections, and tell their species apart.

    How many there are is never given. The volume finds the atoms; the projections, which know no missing wedge, place
    them. Where Gaussian atoms do not explain the projections, or the specimen is not wholly in view, the traced
    positions are kept, and the result says so.

    Parameters
    ----------
    store
        Store with a volume, opened with mode ``"r+"``; the result is written to ``atoms``.
    settings
        See :class:`~stemtomo.pipeline.config.AtomSettings`. Chemical symbols are given to the classes of intensity by
        atomic number: the heaviest element is the brightest class.

    Returns
    -------
    dict
        ``atoms``: their number; ``species``: number of each; ``class_intensity_v_angstrom3``: mean of each class;
        ``confidence``: mean probability of the assigned species; ``width_angstrom``: median width; ``refinement``:
        "done", or why the positions are the traced ones; ``removed`` and ``added``: atoms that the refinement removed
        and added; ``misfit_rad`` and ``explained_variance`` of the projections, and ``uncertainty_pm``, the median
        standard deviation of positions, ``None`` without refinement; ``pattern_loss``, with ``refine_model =
        "multislice"`` alone: the misfit per detector pixel before and after it.

    Raises
    ------
    StoreError
        If the store has no volume, or no projections to refine against.
    ConfigurationError
        If nothing in the volume is an atom, a species is unknown, or ``refine_model = "multislice"`` has no joint
        volume.
    """
    store = Store.of(store)
    settings = settings or AtomSettings()
    workers = executor or default_executor()
    progress = progress or Silent()
    source = volume_group(store, settings)
    _require_joint(source, settings)
    groups = (source, "projections") if settings.refine and source == "volume" else (source,)
    inputs = {group: store.fingerprint(group) for group in groups}
    provenance = Provenance.start("find_atoms", settings.model_dump(), inputs)
    progress.start("find_atoms", 1, "volume")
    if not store.is_complete(GROUP, provenance.fingerprint):
        for group in groups:
            store.read(group)  # what is missing is said before a task begins
        store.write(GROUP, _all_of(store, source, settings, workers, progress), provenance)
    result = store.read(GROUP).load()
    progress.advance(atoms=float(result.sizes["atom"]))
    progress.finish("find_atoms")
    return _numbers(result)


def _require_joint(source: str, settings: AtomSettings) -> None:
    _names(settings)
    if _by_multislice(settings) and source != "joint":
        raise ConfigurationError(
            "atoms.refine_model is 'multislice': that needs the poses and probes of joint tomography; run joint, and do"
            " not set atoms.volume to 'tomography'"
        )


def _by_multislice(settings: AtomSettings) -> bool:
    return settings.refine and settings.refine_model == "multislice"


def _all_of(store: Store, source: str, settings: AtomSettings, workers: Executor, progress: Progress) -> xr.Dataset:
    """Trace, refine, tell apart and measure the atoms of the volume ``source``."""
    names = _names(settings)
    traced = near_bright_ones(traced_in_blocks(store, source, settings, workers), settings)
    if settings.non_atoms and len(traced):
        traced = atoms_alone(traced, settings.species if isinstance(settings.species, int) else len(settings.species))
    dataset = workers.gather(workers.submit(_found, str(store.path), source, settings, names, traced))
    if _by_multislice(settings):
        dataset = _by_patterns(dataset, store, settings, names, workers, progress)
    dataset = dataset.assign(_measured(dataset, store, source, settings, workers))
    if settings.reclassify_radius_angstrom > 0:
        dataset = with_local_species(dataset, store, source, settings, workers)
    return dataset


def plan_row(shape_zyx: tuple[int, int, int], settings: AtomSettings | None = None) -> PlanRow:
    """Say what :func:`find_atoms` will hold, read and write for a volume of ``shape_zyx``."""
    return plan_block(shape_zyx, settings or AtomSettings())


class _Model(NamedTuple):
    """Atoms to be written, which of ``traced`` each was (-1: none, it was added), and what refinement did."""

    traced: TracedAtoms
    origin: np.ndarray
    positions: np.ndarray
    intensity: np.ndarray
    width_angstrom: np.ndarray
    refinement: str
    refined: RefinedAtoms | None
    sigma_angstrom: np.ndarray | None = None


def _names(settings: AtomSettings) -> tuple[str, ...] | None:
    """Return the species from the faintest to the brightest; ``None`` where classes are only numbered."""
    if isinstance(settings.species, int):
        return None
    if len(set(settings.species)) != len(settings.species) or not settings.species:
        raise ConfigurationError(f"atoms.species is {list(settings.species)}: name each element once")
    return order_by_atomic_number(settings.species, tuple(atomic_number(symbol) for symbol in settings.species))


def volume_group(store: Store, settings: AtomSettings) -> str:
    """Return the group of ``store`` whose volume is traced: that of joint tomography where there is one."""
    if settings.volume != "auto":
        return "volume" if settings.volume == "tomography" else "joint"
    return "joint" if store.fingerprint("joint") else "volume"


def _found(
    path: str, source: str, settings: AtomSettings, names: tuple[str, ...] | None, traced: TracedAtoms
) -> xr.Dataset:
    """Return the atoms of the store at ``path`` from those ``traced``; runs in a worker."""
    store = Store.open(path)
    if len(traced) == 0:
        raise ConfigurationError(
            f"{path}: no atom was found in the volume; look at it, and lower atoms.threshold if it shows atoms"
        )
    count = settings.species if isinstance(settings.species, int) else len(settings.species)
    model = _traced_model(traced, "not asked for")
    if settings.refine:
        model = _refined_model(store, source, traced, classify(traced.integrated, count).labels, settings)
    return _dataset(model, classify(model.intensity, count), names)


def _traced_model(traced: TracedAtoms, reason: str) -> _Model:
    every = np.arange(len(traced))
    return _Model(traced, every, traced.positions, traced.integrated, traced.width_angstrom, reason, None)


def _refined_model(
    store: Store, source: str, traced: TracedAtoms, labels: np.ndarray, settings: AtomSettings
) -> _Model:
    """Return the atoms refined against the projections, without faint and double ones; or as traced, and why."""
    alignment = store.read("alignment").attrs if source == "volume" and store.fingerprint("alignment") else {}
    if not alignment.get("wholly_in_view", True):
        return _traced_model(traced, "left out: atoms beyond the field of view are in the projections")
    projected = _projected(store) if source == "volume" else _projected_jointly(store)
    width = float(np.median(traced.width_angstrom))
    width = max(0.5 * projected.pixel_angstrom, np.sqrt(max(width**2 - settings.smoothing_angstrom**2, 0.0)))
    slow = _BACKGROUND_WIDTHS * width if settings.background_angstrom is None else settings.background_angstrom
    # While atoms are missing, slow frequencies show them; where that fails, as at few electrons, it goes without.
    judged = settings.background_angstrom is None
    for begin in (0.0, slow)[: 1 + (source != "volume")] if judged else (slow,):
        found = _completed(
            traced,
            replace(projected, background_angstrom=begin),
            labels,
            width,
            settings,
            measured=source == "volume",
            background_angstrom=slow - begin,
        )
        refined, old = found.refined, found.origin >= 0
        moved = np.linalg.norm(refined.positions[old] - traced.positions[found.origin[old]], axis=1)
        typical = float(np.median(moved)) if old.any() else np.inf
        if refined.explained >= _LEAST_EXPLAINED and typical <= settings.minimum_distance_angstrom / 4:
            break
        reason = f"atoms explain {refined.explained:.0%} of the projections, half of them moved by {typical:.2f} Å"
    else:
        return _traced_model(traced, f"failed: {reason}")
    sigma = float(store.read("projections" if source == "volume" else source).attrs["sigma_rad_per_volt_angstrom"])
    errors = position_uncertainty(refined, found.labels, projected) if settings.uncertainty else None
    model = refined.model
    return _Model(
        traced, found.origin, model.positions, model.intensity / sigma, model.width_angstrom, "done", refined, errors
    )


def _completed(
    traced: TracedAtoms,
    projected: ProjectedImages,
    labels: np.ndarray,
    width_angstrom: float,
    settings: AtomSettings,
    *,
    measured: bool,
    background_angstrom: float,
) -> CompletedAtoms:
    """Return the ``traced`` atoms refined, with those that are missing; of ``measured`` projections, or a volume's."""
    rules = CompletionRules(
        insertion=settings.insertion_fraction,
        pruning=settings.pruning_fraction,
        minimum_distance_angstrom=settings.minimum_distance_angstrom,
        threshold=settings.threshold,
        rounds=settings.completion_rounds if settings.complete else 0,
        splitting=measured,
    )
    return complete_atoms(
        traced.positions,
        projected,
        settings.species if isinstance(settings.species, int) else len(settings.species),
        labels=labels,
        width_angstrom=width_angstrom,
        rules=rules,
        iterations=settings.refine_iterations,
        refine_shifts=measured,
        intensity_spread=settings.intensity_spread,
        weigh=settings.weigh_noise,
        widths=settings.widths,
        background_angstrom=background_angstrom,
    )


def _projected(store: Store) -> ProjectedImages:
    """Return the projections with the shifts that the volume was made with."""
    projections, volume = store.read("projections").load(), store.read("volume")
    alignment = store.read("alignment") if store.fingerprint("alignment") else None
    shifts = np.zeros((projections.sizes["tilt"], 2))
    for source in (alignment, volume):
        if source is not None and "shift_x_angstrom" in source:
            shifts = np.stack([source[f"shift_{axis}_angstrom"].values for axis in "xy"], axis=-1)
    return ProjectedImages(
        images=aligned_images(projections, alignment),
        valid=projections["valid"].values,
        rotations=aligned_rotations(projections, alignment),
        shifts_angstrom=shifts,
        pixel_angstrom=float(projections.attrs["pixel_angstrom"]),
    )


def _projected_jointly(store: Store) -> ProjectedImages:
    """Return the projections of the joint volume: there, and only there, the patterns determine it."""
    result = store.read("joint").load()
    images = result["projection"].values.astype(np.float32)
    return ProjectedImages(
        images=images,
        valid=np.ones(images.shape, dtype=bool),
        rotations=series_of(result).rotations,
        shifts_angstrom=np.zeros((len(images), 2)),
        pixel_angstrom=float(result.attrs["voxel_angstrom"]),
    )


def _by_patterns(
    dataset: xr.Dataset,
    store: Store,
    settings: AtomSettings,
    names: tuple[str, ...] | None,
    workers: Executor,
    progress: Progress,
) -> xr.Dataset:
    """Return ``dataset`` with its atoms refined against the patterns themselves; or as it is, and why."""
    found = multislice_atoms(dataset, store, settings, workers, progress)
    model, before = found.model, np.stack([dataset[axis].values for axis in "xyz"], axis=-1)
    typical = float(np.median(np.linalg.norm(model.positions - before, axis=1)))
    if found.loss[1] >= found.loss[0] or typical > settings.minimum_distance_angstrom / 4:
        reason = f"loss {found.loss[0]:.5g} to {found.loss[1]:.5g}, half of the atoms moved by {typical:.2f} Å"
        return dataset.assign_attrs(refinement=f"{dataset.attrs['refinement']}; multislice failed: {reason}")
    classes = classify(model.intensity, len(dataset.attrs["classes"]))
    labels = classes.labels if names is None else np.array(names)[classes.labels]
    changed = {name: model.positions[:, axis] for axis, name in enumerate("xyz")}
    changed |= {"intensity": model.intensity, "width_angstrom": model.width_angstrom}
    changed |= {"species": labels, "confidence": classes.confidence}
    variables = {name: ("atom", values, dataset[name].attrs) for name, values in changed.items()}
    if found.sigma_angstrom is not None:
        variables |= _deviations(found.sigma_angstrom)
    told = {"class_intensity": classes.centres.tolist(), "refinement": "done by multislice"}
    return dataset.assign(variables).assign_attrs(**told, pattern_loss=list(found.loss))


def _deviations(sigma_angstrom: np.ndarray) -> dict[str, tuple[str, np.ndarray, dict[str, str]]]:
    meaning = "standard deviation of"
    return {
        f"sigma_{name}": ("atom", sigma_angstrom[:, axis], {"units": "Å", "long_name": f"{meaning} {name}"})
        for axis, name in enumerate("xyz")
    }


def _dataset(model: _Model, classes: Classes, names: tuple[str, ...] | None) -> xr.Dataset:
    labels = classes.labels if names is None else np.array(names)[classes.labels]
    traced, added = model.traced, model.origin < 0
    residual, integrated = traced.residual[model.origin], traced.integrated[model.origin]
    per_atom = {
        "x": (model.positions[:, 0], "Å", ""),
        "y": (model.positions[:, 1], "Å", ""),
        "z": (model.positions[:, 2], "Å", ""),
        "species": (labels, "1", ""),
        "intensity": (model.intensity, "V Å^3", ""),
        "width_angstrom": (model.width_angstrom, "Å", ""),
        "fit_residual": (residual, "1", ""),
        "traced_intensity": (integrated, "V Å^3", "potential of the volume close to the atom"),
        "confidence": (classes.confidence, "1", "probability of the species"),
        "added": (added, "1", "whether the projections showed it and not the volume"),
    }
    variables = {
        name: xr.Variable("atom", values, {"units": units} | ({"long_name": meaning} if meaning else {}))
        for name, (values, units, meaning) in per_atom.items()
    }
    if model.sigma_angstrom is not None:
        variables |= {name: xr.Variable(*told) for name, told in _deviations(model.sigma_angstrom).items()}
    refined = model.refined
    attrs = {
        "classes": [str(name) for name in (names or range(len(classes.centres)))],
        "class_intensity": classes.centres.tolist(),
        "refinement": model.refinement,
        "removed": len(traced) - int((~added).sum()),
        "added": int(added.sum()),
        "misfit_rad": refined.loss[1] if refined else None,
        "explained_variance": refined.explained if refined else None,
        "background_angstrom": refined.background_angstrom if refined else None,
    }
    return xr.Dataset(variables, attrs=attrs)


def _measured(
    dataset: xr.Dataset, store: Store, source: str, settings: AtomSettings, workers: Executor
) -> dict[str, xr.Variable]:
    """Return what tracing says of each atom; of added ones, which it did not see, what it says at their places."""
    added = dataset["added"].values
    names = {"fit_residual": "residual", "traced_intensity": "integrated"}
    variables = {name: dataset[name].variable.copy() for name in names}
    if added.any():
        positions = np.stack([dataset[axis].values[added] for axis in "xyz"], axis=-1)
        measured = measured_in_blocks(store, source, positions, settings, workers)
        for name, field in names.items():
            variables[name].values[added] = getattr(measured, field)
    return variables


def _numbers(result: xr.Dataset) -> dict[str, Any]:
    names = list(result.attrs["classes"])
    species = np.array([str(label) for label in result["species"].values])
    return {
        "atoms": int(result.sizes["atom"]),
        "species": {name: int(np.count_nonzero(species == name)) for name in names},
        "class_intensity_v_angstrom3": dict(zip(names, result.attrs["class_intensity"], strict=True)),
        "confidence": float(result["confidence"].mean()),
        "width_angstrom": float(result["width_angstrom"].median()),
        "uncertainty_pm": _uncertainty_pm(result),
        **({"pattern_loss": result.attrs["pattern_loss"]} if "pattern_loss" in result.attrs else {}),
        **{key: result.attrs[key] for key in ("refinement", "removed", "added", "misfit_rad", "explained_variance")},
    }


def _uncertainty_pm(result: xr.Dataset) -> float | None:
    """Return the median over atoms of the standard deviation of a position in three dimensions."""
    if "sigma_x" not in result:
        return None
    squared = sum(result[f"sigma_{axis}"].values ** 2 for axis in "xyz")
    return float(np.median(np.sqrt(squared)) * 100)
