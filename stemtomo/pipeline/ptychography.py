"""The verb ``ptychography``: one multislice reconstruction per tilt, one task per tilt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from stemtomo import backend
from stemtomo.algorithms.ptychography import solver
from stemtomo.algorithms.ptychography.advice import advise
from stemtomo.algorithms.ptychography.misfit import misfit
from stemtomo.algorithms.ptychography.noise import expected_loss
from stemtomo.algorithms.ptychography.padding import commensurate, to_detector_pixels, window_of
from stemtomo.algorithms.ptychography.regularisation import blurred_along_beam, depth_blur_angstrom
from stemtomo.algorithms.ptychography.windows import ObjectGrid, object_grid
from stemtomo.distributed import Executor, PlanRow
from stemtomo.distributed import executor as default_executor
from stemtomo.errors import ConfigurationError, FormatError
from stemtomo.geometry import Detector, Optics, Scan
from stemtomo.io.provenance import Provenance
from stemtomo.io.schema import tilt_name
from stemtomo.io.store import Store
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.physics.propagation import fresnel_propagator
from stemtomo.pipeline.config import PtychographySettings
from stemtomo.pipeline.mistilt import find as find_geometry
from stemtomo.pipeline.mistilt import tilted_propagator
from stemtomo.pipeline.positions import affine_attrs, position_variables, solve_with_positions
from stemtomo.pipeline.progress import Progress, Silent

GROUP = "ptychography"

#: Share of the incident electrons that a detector may count: it misses some, and gains are known to some percent.
_LEAST_COUNTED, _MOST_COUNTED = 0.25, 1.2


def ptychography(
    store: Store | str | Path,
    settings: PtychographySettings | None = None,
    *,
    executor: Executor | None = None,
    progress: Progress | None = None,
    tilts: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Reconstruct the object and the probe of every tilt whose result is missing or out of date.

    Parameters
    ----------
    store
        Store with frames, opened with mode ``"r+"``; the results are written to ``ptychography/NNN``.
    settings
        See :class:`~stemtomo.pipeline.config.PtychographySettings`.
    executor
        Where the tilts run; the active Dask client, else threads.
    tilts
        Numbers of the tilts to reconstruct; all unless given.

    Returns
    -------
    dict
        ``loss``: per tilt, the loss per pixel after every epoch; ``noise_floor``: per tilt, what counting noise alone
        leaves of it; ``advice``: per tilt, sentences on what to change where it went wrong; ``mistilt_mrad``,
        ``thickness_angstrom``: per tilt, what was told or found; ``computed``: number of tilts that were not there
        already.

    Raises
    ------
    StoreError
        If the frames of a tilt are missing.
    ConfigurationError
        If the scan and the detector do not fit together (see :func:`grid_of`).
    """
    from stemtomo.pipeline.tile_layout import Room, layout_of
    from stemtomo.pipeline.tiled_ptychography import reconstruct_tiled

    store = Store.of(store)
    settings = settings or PtychographySettings()
    executor = executor or default_executor()
    progress = progress or Silent()
    wanted = range(len(store.tilt_series())) if tilts is None else tilts
    jobs = [_job(store, index, settings) for index in wanted]
    todo = [job for job in jobs if not store.is_complete(job.group, job.provenance.fingerprint)]
    room = Room.of(executor, settings)
    layouts = {job.tilt: layout_of(store, job.tilt, settings, room) for job in todo}
    whole = [job for job in todo if layouts[job.tilt] is None]
    progress.start(GROUP, len(jobs), "tilt")
    progress.advance(len(jobs) - len(todo))
    for _, loss in executor.map_bounded(_reconstruct, whole):
        progress.advance(loss=loss)
    progress.finish(GROUP)
    for job in todo:
        if (layout := layouts[job.tilt]) is not None:
            reconstruct_tiled(job, layout, executor, progress)
    results = [store.read(job.group) for job in jobs]
    return {
        "loss": [result["loss"].values.tolist() for result in results],
        "noise_floor": [float(result.attrs["noise_floor"]) for result in results],
        "mistilt_mrad": [list(result.attrs["mistilt_mrad"]) for result in results],
        "thickness_angstrom": [float(result.attrs["thickness_angstrom"]) for result in results],
        "advice": [_advice(store, job, result) for job, result in zip(jobs, results, strict=True)],
        "computed": len(todo),
    }


def plan_ptychography(store: Store, settings: PtychographySettings) -> PlanRow:
    """Say what :func:`ptychography` will hold, read and write, from the store's metadata alone."""
    scan, detector, optics = store.scan(0), store.detector(0), store.optics(0)
    itemsize = store.frames(0, require_complete=False).dtype.itemsize
    return plan_row(scan, detector, optics, itemsize, store.tilt_count, settings)


def plan_row(
    scan: Scan, detector: Detector, optics: Optics, itemsize: int, tilts: int, settings: PtychographySettings
) -> PlanRow:
    """Say the same for a series that is not ingested yet, with frames of ``itemsize`` bytes per pixel."""
    frames = scan.count * int(np.prod(detector.shape_yx)) * itemsize
    pixels = int(np.prod(grid_of(scan, detector, padding_of(scan, settings)).shape_yx)) * settings.slices
    # Object, momentum, transmission, its gradient and the step, in single precision; frames once, as they are stored.
    working = pixels * (8 + 8 + 8 + 8 + 16)
    return PlanRow(
        stage=GROUP,
        tasks=tilts,
        bytes_per_task=frames + working + 64 * backend.CACHE_BYTES,
        bytes_read=frames * tilts,
        bytes_written=(pixels * 8 + pixels * 8 // settings.slices) * tilts,
    )


def grid_of(scan: Scan, detector: Detector, padding: float = 0.0) -> ObjectGrid:
    """Return the object grid that the positions of ``scan`` reach on ``detector``.

    With a ``padding`` its windows are larger than the detector by that share at least, and its pixels smaller.

    Raises
    ------
    ConfigurationError
        If a periodic specimen is not a whole number of object pixels.
    """
    period = scan.extent_angstrom_yx if scan.periodic else None
    pixel, shape = detector.object_pixel_angstrom_yx, detector.shape_yx
    extent = (pixel[0] * shape[0], pixel[1] * shape[1])
    window = window_of(shape, padding, extent, scan.step_angstrom_yx if scan.rotation_rad == 0 else None)
    try:
        grid = object_grid(scan.positions(), window, (extent[0] / window[0], extent[1] / window[1]), period)
        return grid if window == shape else commensurate(grid, shape)
    except ValueError as error:
        raise ConfigurationError(
            f"scan.periodic: {error}; correct scan.step_angstrom or detector.pixel_inv_angstrom"
        ) from error


def build_model(scan: Scan, detector: Detector, optics: Optics, settings: PtychographySettings) -> solver.Model:
    """Return what a reconstruction of one tilt holds fixed."""
    grid = grid_of(scan, detector, padding_of(scan, settings))
    propagator = fresnel_propagator(
        grid.window_yx,
        grid.pixel_angstrom_yx,
        wavelength_angstrom(optics.energy_ev),
        settings.slice_thickness_angstrom or 0.0,
    )
    return solver.Model(
        grid, (propagator,) * (settings.slices - 1), settings.loss, settings.object, detector_yx=detector.shape_yx
    )


def padding_of(scan: Scan, settings: PtychographySettings) -> float:
    """Return the share by which windows are larger than the detector."""
    if settings.detector_padding is not None:
        return settings.detector_padding
    return 0.0 if settings.slices == 1 or scan.periodic else 0.125


def first_slice_z_angstrom(settings: PtychographySettings) -> float:
    """Laboratory z of the first slice: the stack is centred on the rotation centre."""
    return -(settings.slices - 1) / 2 * (settings.slice_thickness_angstrom or 0.0)


def load_counts(store: Store, index: int) -> np.ndarray:
    """Return the recorded patterns of a tilt, (position, ky, kx), zero frequency first, in the stored dtype.

    Raises
    ------
    FormatError
        If a pattern holds no electrons at all.
    """
    detector = store.detector(index)
    frames = store.frames(index)[:]
    counts = frames.reshape(-1, *detector.shape_yx)
    recorded = np.flatnonzero(store.valid(index))
    if len(recorded) < len(counts):
        counts = counts[recorded]
    centre = tuple(-round(c) for c in detector.centre_yx)
    rolled = np.roll(counts, centre, axis=(-2, -1))
    empty = np.flatnonzero(rolled.reshape(len(rolled), -1).max(axis=1) <= 0)
    if empty.size:
        raise FormatError(
            f"{store.path}: tilt {index} has {empty.size} patterns without a single electron, the first at scan"
            f" position {int(recorded[empty[0]])}; the beam was blanked or frames were lost: leave this tilt out"
        )
    return rolled


def _advice(store: Store, job: Job, result: xr.Dataset) -> list[str]:
    optics, thickness = store.optics(job.tilt), job.settings.slice_thickness_angstrom
    depth = 2 * depth_blur_angstrom(wavelength_angstrom(optics.energy_ev), optics.semiangle_rad)
    losses = result["loss"].values.tolist()
    thickness = thickness if thickness is not None and job.settings.slices > 1 else 0.0
    return advise(losses, float(result.attrs["noise_floor"]), thickness, depth)


@dataclass(frozen=True)
class Job:
    """A tilt to reconstruct, and the group of the store that is to hold the result."""

    path: Path
    tilt: int
    group: str
    settings: PtychographySettings
    provenance: Provenance


def _job(store: Store, index: int, settings: PtychographySettings) -> Job:
    source = f"tilt/{tilt_name(index)}"
    provenance = Provenance.start(
        GROUP, settings.model_dump(exclude=set(settings.HOW)), {source: store.fingerprint(source)}
    )
    return Job(store.path, index, f"{GROUP}/{tilt_name(index)}", settings, provenance)


def _reconstruct(job: Job) -> float:
    """Reconstruct one tilt and write it; return its last loss per pixel."""
    store, settings = Store.open(job.path, "r+"), job.settings
    scan, detector, optics = store.scan(job.tilt), store.detector(job.tilt), store.optics(job.tilt)
    counts = load_counts(store, job.tilt)
    place = backend.to_device if backend.gpu_available() else np.asarray
    electrons = incident_electrons(str(store.path), job.tilt, counts, settings.electrons_per_pattern)
    counts = place(counts)
    recorded = np.flatnonzero(store.valid(job.tilt))
    whole = grid_of(scan, detector, padding_of(scan, settings))
    grid = replace(whole, corners=whole.corners[recorded], shifts_px=whole.shifts_px[recorded])
    found = find_geometry(optics, scan, grid, recorded, counts, electrons, settings)
    propagator = tilted_propagator(found, grid, wavelength_angstrom(optics.energy_ev))
    propagators = (propagator,) * (settings.slices - 1)
    model = solver.Model(grid, propagators, settings.loss, settings.object, detector.shape_yx)
    settings = settings.model_copy(update={"slice_thickness_angstrom": found.geometry.slice_thickness_angstrom})
    state = solver.State.start(model, found.probe, tied=found.tied)
    if found.phase is not None:
        state = replace(state, phase=found.phase)
    rules, batches = epochs_of(settings)
    width = blur_slices(settings, optics)
    told = scan.positions()[recorded]
    state, model, losses = solve_with_positions(
        state,
        model,
        counts,
        told,
        settings,
        rules,
        batches,
        seed=settings.seed + job.tilt,
        tied=found.tied,
        regularise=lambda now, _: replace(now, phase=blurred_along_beam(now.phase, width)),
    )
    state = solver.untied(state, model.slices)
    pixels = float(np.prod(detector.shape_yx))
    dataset = result_of(state, model, [loss / pixels for loss in losses], settings, optics)
    dataset = dataset.assign(loss_map=loss_map(misfit(state, model, counts) / pixels, recorded, scan))
    dataset = dataset.assign(found.variables()).assign_attrs(found.attrs(settings.slices))
    if settings.refine_positions_from_epoch is not None:
        dataset = dataset.assign(position_variables(told, state)).assign_attrs(scan_affine=affine_attrs(told, state))
    store.write(job.group, dataset, job.provenance)
    return losses[-1] / pixels


def epochs_of(settings: PtychographySettings) -> tuple[tuple[solver.Rule, ...], tuple[int, ...]]:
    """Return the update rule and the number of batches of every epoch."""
    curvature = solver.CURVATURE[settings.loss]
    rule = solver.Nesterov(settings.step, settings.probe_step, settings.momentum, settings.damping, curvature)
    schedule = solver.steps(settings.epochs, rule, settings.batches_per_epoch, settings.settling_of(settings.epochs))
    rules, batches = zip(*schedule, strict=True)
    return rules, batches


def blur_slices(settings: PtychographySettings, optics: Optics) -> float:
    """Return the width of the blur along the beam in slices of the thickness that ``settings`` say."""
    blur = depth_blur_angstrom(wavelength_angstrom(optics.energy_ev), optics.semiangle_rad)
    blur = blur if settings.depth_blur_angstrom is None else settings.depth_blur_angstrom
    return blur / (settings.slice_thickness_angstrom or blur or 1.0)


def loss_map(losses: np.ndarray, recorded: np.ndarray, scan: Scan) -> tuple[tuple[str, str], np.ndarray]:
    """Return the loss of the ``recorded`` positions (flat indices) as a variable over the scan; zero elsewhere."""
    found = np.zeros(scan.count, np.float32)
    found[recorded] = losses
    return ("scan_y", "scan_x"), found.reshape(scan.shape_yx)


def incident_electrons(path: str, tilt: int, counts: np.ndarray, said: float | None) -> float:
    """Return the electrons of the first probe: those that were said to come in, or the mean that was counted.

    A probe that starts at another scale than the counts converges to nothing, so a dose that cannot be is refused.
    """
    return checked_electrons(path, tilt, float(counts.sum(axis=(1, 2), dtype=np.float64).mean()), said)


def checked_electrons(path: str, tilt: int, counted: float, said: float | None) -> float:
    """Return :func:`incident_electrons` where ``counted`` electrons are the mean over the patterns."""
    if said is None:
        return counted
    if not _LEAST_COUNTED * said <= counted <= _MOST_COUNTED * said:
        raise ConfigurationError(
            f"{path}: electrons_per_pattern is {said:g}, but tilt {tilt} counts {counted:g} per pattern on"
            " average; give the incident electrons in the unit of the frames, or leave the dose out"
        )
    return said


def result_of(
    state: solver.State,
    model: solver.Model,
    losses: list[float],
    settings: PtychographySettings,
    optics: Optics,
    lit: backend.Array | None = None,
) -> xr.Dataset:
    """Return what the store keeps of a reconstruction; ``lit`` is its illumination (Y, X) where it is known."""
    window, detector = model.grid.window_yx, model.detector_yx or model.grid.window_yx
    phase = to_detector_pixels(backend.to_host(state.phase), window, detector)
    transmission = np.exp(1j * phase).astype(np.complex64)
    pixels = window[0] * window[1] / (detector[0] * detector[1])
    lit = solver.illumination(state.probe, model.grid) if lit is None else lit
    illumination = np.maximum(to_detector_pixels(backend.to_host(lit), window, detector), 0) * np.float32(pixels)
    modes = to_detector_pixels(backend.to_host(state.probe), window, detector) * np.float32(np.sqrt(pixels))
    powers = np.sum(np.abs(modes) ** 2, axis=(1, 2))
    return xr.Dataset(
        {
            "object": (("slice", "y", "x"), transmission),
            "phase_sum": (("y", "x"), phase.real.sum(axis=0).astype(np.float32)),
            "illumination": (("y", "x"), illumination),
            "probe": (("probe_y", "probe_x"), modes[0]),
            "loss": (("epoch",), np.array(losses)),
        },
        attrs={
            "pixel_angstrom": [
                p * w / d for p, w, d in zip(model.grid.pixel_angstrom_yx, window, detector, strict=True)
            ],
            "window_px": list(window),
            "mode_power": (powers / powers.sum()).tolist(),
            "slice_thickness_angstrom": settings.slice_thickness_angstrom or 0.0,
            "first_slice_z_angstrom": first_slice_z_angstrom(settings),
            "energy_kev": optics.energy_ev / 1e3,
            "noise_floor": _noise_floor(state, model),
            "loss_unit": "per detector pixel and pattern",
        },
    )


def _noise_floor(state: solver.State, model: solver.Model, positions: int = 64) -> float:
    """Loss per pixel that counting noise alone leaves, at the reconstructed model, over some positions."""
    where = np.unique(np.linspace(0, len(model.grid.corners) - 1, positions).astype(int))
    return expected_loss(backend.to_host(solver.patterns(state, model, where)), model.loss)
