"""The verb ``find_atoms``: positions and species of the atoms in the volume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from stemtomo.algorithms.atoms.classification import Classes, classify, order_by_atomic_number
from stemtomo.algorithms.atoms.tracing import TracedAtoms
from stemtomo.distributed import Executor, PlanRow
from stemtomo.distributed import executor as default_executor
from stemtomo.errors import ConfigurationError
from stemtomo.io.provenance import Provenance
from stemtomo.io.store import Store
from stemtomo.physics.potential import atomic_number
from stemtomo.pipeline.atoms_multislice import multislice_atoms
from stemtomo.pipeline.atoms_refinement import Model, refined_model, traced_model
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
        If the store has no volume, or no projections to refine against, or the volume is of others, or of another
        alignment.
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
    groups: tuple[str, ...] = (source,)
    if source == "joint":
        store.require_current(source, *store.members("tilt"))
    elif settings.refine:
        groups = (source, "projections")
        store.require_current(source, "projections", "alignment")
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
    model = traced_model(traced, "not asked for")
    if settings.refine:
        model = refined_model(store, source, traced, classify(traced.integrated, count).labels, settings)
    return _dataset(model, classify(model.intensity, count), names)


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


def _dataset(model: Model, classes: Classes, names: tuple[str, ...] | None) -> xr.Dataset:
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
