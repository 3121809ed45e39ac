"""The verb ``local_orbital``: atoms straight from focal tilt series, with the probe over depth (dLOT, nLOT)."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from stemtomo.algorithms.atoms.classification import classify
from stemtomo.algorithms.local_orbital.focus import look_for_foci, spread_over
from stemtomo.algorithms.local_orbital.model import FocalSeries, Orbitals, sums
from stemtomo.algorithms.local_orbital.probes import depth_of_focus, start_probes
from stemtomo.algorithms.local_orbital.schedule import Focused, Schedule, Step, held_out, solve
from stemtomo.algorithms.local_orbital.solver import Geometry, gradient_power, position_uncertainty
from stemtomo.distributed import Checkpoint, Executor, PlanRow
from stemtomo.distributed import executor as default_executor
from stemtomo.errors import ConfigurationError
from stemtomo.geometry import Optics
from stemtomo.io.export import read_atoms
from stemtomo.io.provenance import Provenance, file_digest
from stemtomo.io.store import Store
from stemtomo.io.structures import write_structure
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.pipeline.focal_series import GROUP as SERIES
from stemtomo.pipeline.focal_series import add_focal_series, optics_of
from stemtomo.pipeline.local_orbital_deviation import write_deviation
from stemtomo.pipeline.local_orbital_parts import Sums, first_atoms, read_images
from stemtomo.pipeline.local_orbital_plan import Size, plan_for, slices_of, window_px
from stemtomo.pipeline.progress import Progress, Silent
from stemtomo.pipeline.settings.local_orbital import LocalOrbitalSettings

GROUP = "local_orbital"
_TOLD = ("held_out_loss", "focus_angstrom", "width_angstrom", "species", "searches")
_COLUMNS = ["x", "y", "z", "species", "intensity", "width_angstrom", "sigma_x", "sigma_y", "sigma_z"]
#: Images of every section that its focus is looked for in.
_IMAGES_FOR_FOCUS = 4
_PARAMETERS = ("positions", "intensity", "width_angstrom", "probes", "shifts_angstrom", "tilts_rad")


def local_orbital(
    store: Store | str | Path,
    settings: LocalOrbitalSettings | None = None,
    *,
    images: str | Path | None = None,
    out: str | Path | None = None,
    truth: str | Path | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Find the atoms of a focal tilt series of incoherent images, with the probe at every depth.

    After Mao et al., "3D reconstruction of a million atoms by multiple-section local-orbital tomography" (2024). It
    goes on behind the last search of an interrupted run.

    Parameters
    ----------
    store
        Store with a focal series, opened with mode ``"r+"``, or where ``images`` are to go; the result is written to
        ``local_orbital``.
    images
        File of a focal tilt series (see :func:`~stemtomo.pipeline.focal_series.read_focal_series`) to put there first.
    out
        File to write the atoms to: .xyz, .parquet, .cif, .pdb.
    truth
        File of known atoms, .xyz or .npz, from which the deviations over depth are kept for the report.

    Returns
    -------
    dict
        ``atoms``; ``loss`` after every iteration, per pixel; ``held_out_loss`` per pixel, ``null`` without such images;
        ``focus_angstrom``: per section, the depth at which its probe is sharpest; ``width_angstrom``: median;
        ``species``: of each its ``atoms``, median ``intensity`` and ``width_angstrom``; ``searches``: of each
        its stage, atoms added and dropped; ``computed``; ``deviation``, see :func:`.write_deviation`.

    Raises
    ------
    StoreError, FormatError
        If there is no focal series, or the file is not one.
    ConfigurationError
        If no atoms are found to begin with, or the settings do not fit the series.
    """
    store = add_focal_series(store, images) if images is not None else Store.of(store)
    settings, progress = settings or LocalOrbitalSettings(), progress or Silent()
    provenance = _provenance(store, settings)
    todo = not store.is_complete(GROUP, provenance.fingerprint)
    if todo:
        executor = executor or default_executor()
        store.write(GROUP, _reconstruct(store, settings, executor, progress, provenance.fingerprint), provenance)
        Checkpoint(store.checkpoint_path(GROUP), provenance.fingerprint).clear()
    result = store.read(GROUP).compute()
    if out is not None:
        write_structure(out, result[_COLUMNS])
    return {
        "atoms": result.sizes["atom"],
        "loss": result["loss"].values.tolist(),
        **{name: result.attrs[name] for name in _TOLD},
        "computed": todo,
        **({} if truth is None else {"deviation": write_deviation(store, truth)}),
    }


def plan_local_orbital(store: Store, settings: LocalOrbitalSettings | None = None) -> PlanRow:
    """Say what :func:`local_orbital` will hold, read and write, from the store's metadata alone."""
    series = store.read(SERIES)
    count, rows, columns = (series.sizes[dim] for dim in ("image", "y", "x"))
    pixel = float(series.attrs["pixel_angstrom"])
    diameter = min(rows, columns) * pixel
    # As many atoms as a ball that fills the images can hold.
    atoms = int(0.1 * math.pi / 6 * diameter**3)
    sections = int(series["section"].max()) + 1
    return plan_for(Size(count, (rows, columns), pixel, sections, atoms, diameter), settings)


def _provenance(store: Store, settings: LocalOrbitalSettings) -> Provenance:
    """Begin the record of the atoms: a file of atoms counts by its content, wherever it lies."""
    said, inputs = settings.model_dump(mode="json"), {SERIES: store.fingerprint(SERIES)}
    if settings.atoms is not None:
        said["atoms"], inputs["atoms"] = settings.atoms.name, file_digest(settings.atoms)
    return Provenance.start(GROUP, said, inputs)


def _reconstruct(
    store: Store, settings: LocalOrbitalSettings, executor: Executor, progress: Progress, fingerprint: str
) -> xr.Dataset:
    series = read_images(store, settings.precision)
    out = held_out(series.sections, settings.held_out)
    used = np.flatnonzero(~out)
    evaluate = Sums.over(executor, store.path, used, settings, len(series))
    geometry = Geometry(
        series.rotations,
        series.sections,
        (series.images.shape[1], series.images.shape[2]),
        series.pixel_angstrom,
        gradient_power(series.images, series.pixel_angstrom),
        used,
    )
    schedule = _schedule(settings)
    checkpoint = Checkpoint(store.checkpoint_path(GROUP), fingerprint)
    mark = checkpoint.latest()
    steps: list[Step] = []
    if mark is None:
        model = _first(store, series, settings, executor)
    else:
        model, steps = _resumed(mark.shared, settings)
    done = steps[-1].number if steps else 0
    progress.start(GROUP, schedule.searches, "search")
    progress.advance(done)
    pixels = math.prod(geometry.shape_yx) * len(used)

    def keep(number: int, step: Step, now: Orbitals) -> None:
        steps.append(step)
        checkpoint.begin(number, 0)
        checkpoint.commit(number, [], _saved(now, steps))
        progress.advance(number - progress_at[0], loss=step.losses[-1] / pixels, atoms=len(now))
        progress_at[0] = number

    progress_at = [done]
    several = None if settings.species == 1 else lambda intensity: classify(intensity, settings.species).labels
    focused = _focusing(evaluate, geometry, optics_of(store.read(SERIES)), settings)
    model = solve(model, evaluate, geometry, schedule, keep, tuple(steps), several, focused, evaluate.wanted)
    progress.finish(GROUP)
    return _dataset(model, evaluate, geometry, steps, series, np.flatnonzero(out))


def _first(store: Store, series: FocalSeries, settings: LocalOrbitalSettings, executor: Executor) -> Orbitals:
    """Return the model to begin with."""
    if settings.atoms is not None:
        positions = read_atoms(settings.atoms)[0]
    else:
        positions = first_atoms(series, settings, executor)
    sections = int(series.sections.max()) + 1
    defocus = (
        np.zeros(sections) if settings.start_defocus_angstrom is None else np.array(settings.start_defocus_angstrom)
    )
    if len(defocus) != sections:
        raise ConfigurationError(
            f"local_orbital.start_defocus_angstrom has {len(defocus)} values for {sections} sections: give one for each"
        )
    extent = 2 * float(np.linalg.norm(positions, axis=1).max()) + 4
    slices = slices_of(settings, extent)
    probes = _probes(optics_of(store.read(SERIES)), defocus, slices, series.pixel_angstrom, settings)
    count, images = len(positions), len(series)
    each = float(series.images.sum(axis=(1, 2), dtype=np.float64).mean()) / count
    return Orbitals(
        positions,
        np.full(count, each),
        np.full(count, settings.width_angstrom),
        probes,
        settings.slice_thickness_angstrom,
        np.zeros((images, 2)),
        np.zeros((images, 3)),
    )


def _focusing(evaluate: Sums, geometry: Geometry, optics: Optics, settings: LocalOrbitalSettings) -> Focused | None:
    """Return what moves a model's foci to where its atoms explain the images best, unless they are told."""
    if settings.model == "linear" or settings.start_defocus_angstrom is not None:
        return None
    numbers = spread_over(geometry.sections, geometry.numbers, _IMAGES_FOR_FOCUS)
    # A quarter of the depth of field.
    step = wavelength_angstrom(optics.energy_ev) / optics.semiangle_rad**2 / 2

    def at(model: Orbitals, defocus: np.ndarray) -> Orbitals:
        return replace(model, probes=_probes(optics, defocus, model.slices, geometry.pixel_angstrom, settings))

    def focused(model: Orbitals) -> Orbitals:
        thickness = model.slice_thickness_angstrom
        # Where the search before this one found them, said by the probes, which a checkpoint keeps.
        moved = depth_of_focus(at(model, np.zeros(len(model.probes))).probes, thickness)
        before = moved - depth_of_focus(model.probes, thickness)
        found = look_for_foci(
            lambda defocus: evaluate.misfit(at(model, defocus), numbers),
            len(model.probes),
            model.slices * thickness / 2,
            step,
            before if np.any(before) else None,
        )
        return at(model, found)

    return focused


def _probes(
    optics: Optics, defocus: np.ndarray, slices: int, pixel_angstrom: float, settings: LocalOrbitalSettings
) -> np.ndarray:
    """Return the probes (section, slice, y, x) of the optics, with C1 moved by ``defocus`` (section,) in Å."""
    window, thickness = window_px(settings, pixel_angstrom), settings.slice_thickness_angstrom
    source = settings.source_size_angstrom
    return start_probes(optics, defocus, slices, thickness, window, pixel_angstrom, source)


def _schedule(settings: LocalOrbitalSettings) -> Schedule:
    return Schedule(
        atom_iterations=settings.atom_iterations,
        probe_searches=0 if settings.model == "rigid" else settings.probe_searches,
        probe_iterations=settings.probe_iterations,
        tilt_iterations=settings.tilt_iterations,
        last_iterations=settings.last_iterations,
        still_angstrom=settings.still_pm / 100,
        rounds=settings.rounds,
        shifts=settings.refine_shifts,
        tilts=settings.refine_angles,
        width=settings.widths,
        insertion=settings.insertion,
        pruning=settings.pruning,
        minimum_distance_angstrom=settings.minimum_distance_angstrom,
    )


def _saved(model: Orbitals, steps: list[Step]) -> dict[str, Any]:
    return {
        **{name: getattr(model, name) for name in _PARAMETERS},
        "species": model.kinds,
        "stages": [step.stage for step in steps],
        "losses": [np.array(step.losses) for step in steps],
        "changes": np.array([[step.added, step.dropped] for step in steps]),
        "number": np.array([step.number for step in steps]),
    }


def _resumed(saved: dict[str, Any], settings: LocalOrbitalSettings) -> tuple[Orbitals, list[Step]]:
    arrays = {name: np.asarray(saved[name]) for name in _PARAMETERS}
    species = np.asarray(saved["species"])
    model = Orbitals(slice_thickness_angstrom=settings.slice_thickness_angstrom, species=species, **arrays)
    rows = zip(saved["number"], saved["stages"], saved["losses"], saved["changes"], strict=True)
    steps = [Step(int(n), str(stage), losses.tolist(), int(a), int(d)) for n, stage, losses, (a, d) in rows]
    return model, steps


def _species(model: Orbitals) -> list[dict[str, float]]:
    """Return how many atoms every species has, and what they are like."""
    members = [model.kept(model.kinds == kind) for kind in np.unique(model.kinds)]
    return [
        {
            "atoms": len(some),
            "intensity": float(np.median(some.intensity)),
            "width_angstrom": float(np.median(some.width_angstrom)),
        }
        for some in members
    ]


def _dataset(
    model: Orbitals, evaluate: Sums, geometry: Geometry, steps: list[Step], series: FocalSeries, out: np.ndarray
) -> xr.Dataset:
    pixels = math.prod(geometry.shape_yx)
    sigma = position_uncertainty(model, geometry, evaluate.variance(model))
    left = sums(model, series.part(out), out, with_probes=False).loss / pixels / len(out) if len(out) else None
    per_atom = {"intensity": model.intensity, "width_angstrom": model.width_angstrom}
    for number, axis in enumerate("xyz"):
        per_atom[axis] = model.positions[:, number]
        per_atom[f"sigma_{axis}"] = sigma[:, number]
    per_image = {
        **{f"shift_{axis}_angstrom": model.shifts_angstrom[:, n] for n, axis in enumerate("xy")},
        **{f"turn_{axis}_rad": model.tilts_rad[:, n] for n, axis in enumerate("xyz")},
    }
    losses = np.concatenate([step.losses for step in steps]) / pixels / len(geometry.numbers)
    return xr.Dataset(
        {
            **{name: (("atom",), values) for name, values in per_atom.items()},
            "species": (("atom",), model.kinds),
            **{name: (("image",), values) for name, values in per_image.items()},
            "probe": (("focus", "slice", "probe_y", "probe_x"), model.probes),
            "loss": (("iteration",), losses),
        },
        attrs={
            "pixel_angstrom": series.pixel_angstrom,
            "slice_thickness_angstrom": model.slice_thickness_angstrom,
            "focus_angstrom": depth_of_focus(model.probes, model.slice_thickness_angstrom).tolist(),
            "width_angstrom": float(np.median(model.width_angstrom)),
            "species": _species(model),
            "held_out_loss": left,
            "searches": [
                {"stage": s.stage, "iterations": len(s.losses), "added": s.added, "dropped": s.dropped} for s in steps
            ],
        },
    )
