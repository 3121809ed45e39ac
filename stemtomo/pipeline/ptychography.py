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
from stemtomo.algorithms.ptychography.advice import advise, advise_geometry, probe_diameter_angstrom
from stemtomo.algorithms.ptychography.misfit import misfit
from stemtomo.algorithms.ptychography.padding import commensurate, window_of
from stemtomo.algorithms.ptychography.regularisation import depth_blur_angstrom
from stemtomo.algorithms.ptychography.windows import ObjectGrid, object_grid
from stemtomo.distributed import Checkpoint, Executor, PlanRow
from stemtomo.distributed import executor as default_executor
from stemtomo.errors import ConfigurationError, FormatError
from stemtomo.geometry import Detector, Optics, Scan
from stemtomo.io.provenance import Provenance
from stemtomo.io.schema import tilt_name
from stemtomo.io.store import Store
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.pipeline.config import JointSettings, PtychographySettings
from stemtomo.pipeline.mistilt import Found, model_of, prepared
from stemtomo.pipeline.mistilt import find as find_geometry
from stemtomo.pipeline.mistilt_map import solve_map
from stemtomo.pipeline.phase_results import loss_map, result_of_solved
from stemtomo.pipeline.positions import affine_attrs, position_variables
from stemtomo.pipeline.progress import Progress, Silent
from stemtomo.pipeline.solving import Tilt, refuse_in_tiles, solve_tilt

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
        If the scan and the detector do not fit together (see :func:`grid_of`), or the settings to the scan.
    """
    from stemtomo.pipeline.tile_groups import reconstruct_in_groups
    from stemtomo.pipeline.tile_layout import Room, layout_of

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
    if len(whole) < len(todo):
        refuse_in_tiles(settings)
    progress.start(GROUP, len(jobs), "tilt")
    progress.advance(len(jobs) - len(todo))
    for _, loss in executor.map_bounded(_reconstruct, whole):
        progress.advance(loss=loss)
    progress.finish(GROUP)
    reconstruct_in_groups([job for job in todo if layouts[job.tilt] is not None], room, executor, progress)
    return {**_numbers(store, jobs), "computed": len(todo)}


def _numbers(store: Store, jobs: Sequence[Job]) -> dict[str, Any]:
    """Return what the results of the tilts say in numbers and words."""
    results = [store.read(job.group) for job in jobs]
    return {
        "loss": [result["loss"].values.tolist() for result in results],
        "noise_floor": [float(result.attrs["noise_floor"]) for result in results],
        "mistilt_mrad": [list(result.attrs["mistilt_mrad"]) for result in results],
        "thickness_angstrom": [float(result.attrs["thickness_angstrom"]) for result in results],
        "advice": [_advice(store, job, result) for job, result in zip(jobs, results, strict=True)],
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


def padding_of(scan: Scan, settings: PtychographySettings) -> float:
    """Return the share by which windows are larger than the detector."""
    if settings.detector_padding is not None:
        return settings.detector_padding
    return 0.0 if settings.slices == 1 or scan.periodic else 0.125


def load_counts(store: Store, index: int) -> np.ndarray:
    """Return the recorded patterns of a tilt, (position, ky, kx), zero frequency first, in the stored dtype.

    Raises
    ------
    FormatError
        If a pattern holds no electrons at all.
    """
    detector = store.detector(index)
    frames = store.read_frames(index)
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
    optics, thickness = store.optics(job.tilt), job.settings.mean_slice_angstrom
    depth = 2 * depth_blur_angstrom(wavelength_angstrom(optics.energy_ev), optics.semiangle_rad)
    losses = result["loss"].values.tolist()
    thickness = thickness if job.settings.slices > 1 else 0.0
    thickest = thickness * max(job.settings.slice_weights or (1.0,))
    found = advise(losses, float(result.attrs["noise_floor"]), thickest, depth)
    probe = probe_diameter_angstrom(
        wavelength_angstrom(optics.energy_ev),
        optics.semiangle_rad,
        optics.aberrations.get("C10", 0.0),
        job.settings.slices * thickness,
    )
    window = 1 / store.detector(job.tilt).pixel_inv_angstrom
    step = max(store.scan(job.tilt).step_angstrom_yx)
    return [*found, *advise_geometry(probe, step, window, thickness, depth, job.settings.depth_blur_angstrom)]


@dataclass(frozen=True)
class Job:
    """A tilt to reconstruct, and the group of the store that is to hold the result."""

    path: Path
    tilt: int
    group: str
    settings: PtychographySettings
    provenance: Provenance


def _job(store: Store, index: int, settings: PtychographySettings) -> Job:
    turn = float(np.degrees(store.scan(index).rotation_rad))
    if settings.notch_scan_raster and turn:
        raise ConfigurationError(
            "ptychography.notch_scan_raster takes out a raster along the axes of the object, and "
            f"scan.rotation_deg turns that of tilt {index}: {turn:.3g}; leave one of them out"
        )
    sources = [f"tilt/{tilt_name(index)}"]
    calibration = f"calibration/{tilt_name(index)}"
    if settings.mask_bad_pixels and store.fingerprint(calibration) is not None:
        sources.append(calibration)
    provenance = Provenance.start(
        GROUP, settings.result_settings(), {name: store.fingerprint(name) for name in sources}
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
    mask = good_pixels(store, job.tilt, settings)
    mask = None if mask is None else place(mask)
    # Checkpoints of tiles are other ones.
    checkpoint = Checkpoint(store.checkpoint_path(job.group), f"{job.provenance.fingerprint} in one piece")
    saved: Any = checkpoint.latest()
    if saved is None:
        found = find_geometry(optics, scan, grid, recorded, counts, electrons, settings, mask)
    else:
        found = Found.of_tree(saved.shared["beside"], place(saved.shared["state"]["probe"]))
    model = model_of(found, grid, detector, optics, settings, mask)
    settings = settings.with_mean_slice(found.geometry.slice_thickness_angstrom)
    state = solver.State.start(model, found.probe, tied=found.tied)
    if found.phase is not None:
        state = replace(state, phase=found.phase)
    told = scan.positions()[recorded]
    variables: dict[str, Any] = {}
    attrs: dict[str, Any] = found.attrs(settings.slices)
    if settings.mistilt_map_smoothing_angstrom is not None:
        stack, data = prepared(optics, grid, counts, electrons, settings, mask)
        mapped = solve_map(found, stack, data, model, scan, store.valid(job.tilt), settings)
        solved, variables = mapped.solved(), mapped.variables()
        attrs = {**attrs, **mapped.attrs()}
    else:
        tilt = Tilt(model, counts, told, blur_slices(settings, optics), found.tied, settings.seed + job.tilt)
        solved = solve_tilt(tilt, state, settings, checkpoint, found.tree())
        lost = solved.last_losses
        if lost is None:  # some positions were held out, or the last epochs were a search
            lost = misfit(solved.state, solved.model, counts, solved.beside_positions)
        variables["loss_map"] = loss_map(lost / np.prod(detector.shape_yx), recorded, scan)
    dataset = result_of_solved(solved, settings, optics, detector)
    dataset = dataset.assign(found.variables()).assign(variables).assign_attrs(attrs)
    if settings.refine_positions_from_epoch is not None:
        dataset = dataset.assign(position_variables(told, solved.state))
        dataset = dataset.assign_attrs(scan_affine=affine_attrs(told, solved.state))
    store.write(job.group, dataset, job.provenance)
    checkpoint.clear()
    return float(dataset["loss"][-1])


def good_pixels(store: Store, index: int, settings: PtychographySettings | JointSettings) -> np.ndarray | None:
    """Return (qy, qx) bool, zero frequency first, False where a calibration found a pixel dead or hot, if there is one.

    ``None`` where the tilt is not calibrated, all pixels are good, or ``settings`` say not to look.
    """
    group = f"calibration/{tilt_name(index)}"
    if not settings.mask_bad_pixels or store.fingerprint(group) is None:
        return None
    bad = store.read(group)["bad_pixels"].values != 0
    if not bad.any():
        return None
    return np.roll(~bad, tuple(-round(c) for c in store.detector(index).centre_yx), axis=(-2, -1))


def blur_slices(settings: PtychographySettings, optics: Optics) -> float:
    """Return the width of the blur along the beam in slices of the thickness that ``settings`` say."""
    blur = depth_blur_angstrom(wavelength_angstrom(optics.energy_ev), optics.semiangle_rad)
    blur = blur if settings.depth_blur_angstrom is None else settings.depth_blur_angstrom
    return blur / (settings.mean_slice_angstrom or blur or 1.0)


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
