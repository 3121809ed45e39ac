"""The verb ``projections``: the phase sums of all tilts on one grid, with their gauges taken off."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from stemtomo.algorithms.imaging.unwrapping import phase_sum
from stemtomo.algorithms.ptychography.phase import centred, depth_profile, observed, vacuum, vacuum_background
from stemtomo.distributed import Executor, PlanRow
from stemtomo.distributed import executor as default_executor
from stemtomo.errors import ConfigurationError
from stemtomo.geometry import Detector, Scan
from stemtomo.io.provenance import Provenance
from stemtomo.io.schema import tilt_name
from stemtomo.io.store import Store
from stemtomo.physics.electron import interaction_parameter
from stemtomo.pipeline import phase_filters
from stemtomo.pipeline.config import ProjectionSettings
from stemtomo.pipeline.progress import Progress, Silent

GROUP = "projections"
HALVES = "half_scans"


def projections(
    store: Store | str | Path,
    settings: ProjectionSettings | None = None,
    *,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Bring the phase sums of all tilts to one grid, mask what was not observed and set vacuum to zero.

    The result's phase is in rad, (tilt, y, x), with the rotation centre at index n // 2. Where filters are asked for,
    ``phase`` is filtered, and ``phase_raw`` the same without.

    Returns
    -------
    dict
        ``background_rad``: per tilt, the scatter (standard deviation) of the background that was taken off;
        ``observed_fraction``: per tilt. With filters, also per tilt ``noise_rad`` (standard deviation of a pixel),
        ``noise_source``, ``removed_rad`` (standard deviation of what was taken off), ``kept_fraction`` of the
        frequencies and ``protected_fraction`` of the pixels, and ``notes``: what to know of the filters.

    Raises
    ------
    StoreError
        If a tilt has no ptychography.
    ConfigurationError
        If object pixels differ between tilts, or are not square; if a filter lacks its package or its noise.
    """
    store = Store.of(store)
    settings = phase_filters.resolved(settings or ProjectionSettings())
    executor = executor or default_executor()
    progress = progress or Silent()
    groups = [f"ptychography/{tilt_name(index)}" for index in range(len(store.tilt_series()))]
    inputs = {group: store.fingerprint(group) for group in [*groups, *_half_groups(store, settings)]}
    provenance = Provenance.start(GROUP, settings.model_dump(), inputs)
    progress.start(GROUP, store.tilt_count, "tilt")
    if not store.is_complete(GROUP, provenance.fingerprint):
        images: list[Any] = [None] * store.tilt_count
        jobs = [_Job(str(store.path), index, settings) for index in range(len(groups))]
        for index, image in executor.map_bounded(_flattened, jobs):
            images[index] = image
            progress.advance()
        store.write(GROUP, _stacked(store, images, _pixel(store, groups), settings), provenance)
    progress.finish(GROUP)
    result = store.read(GROUP)
    return {
        "background_rad": result["background_rad"].values.tolist(),
        "observed_fraction": result["valid"].mean(("y", "x")).values.tolist(),
        **result.attrs.get("filters", {}),
    }


def plan_row(scan: Scan, detector: Detector, tilts: int, settings: ProjectionSettings) -> PlanRow:
    """Say what :func:`projections` will hold, read and write."""
    height, width = field_px(scan, detector.object_pixel_angstrom_yx, settings)
    stack = tilts * height * width * (9 if phase_filters.wanted(settings) else 5)
    return PlanRow(
        stage=GROUP,
        tasks=tilts,
        bytes_per_task=height * width * (400 if phase_filters.wanted(settings) else 64),
        bytes_read=stack,
        bytes_written=stack,
        resident_bytes=2 * stack,
    )


class _Job(NamedTuple):
    path: str
    tilt: int
    settings: ProjectionSettings


class _Image(NamedTuple):
    """Flattened phase and mask (y, x) of one tilt; scatter of its background; filters; slices; residues."""

    flat: np.ndarray
    valid: np.ndarray
    scatter_rad: float
    filtered: phase_filters.Filtered | None
    depth_rad: tuple[np.ndarray, np.ndarray]
    residues: int


def _half_groups(store: Store, settings: ProjectionSettings) -> list[str]:
    """Return the half scans that decide the result: those of all tilts, where the noise may come from them."""
    names = [f"{HALVES}/{tilt_name(index)}" for index in range(store.tilt_count)]
    used = phase_filters.wanted(settings) and settings.noise in ("auto", "halves")
    return names if used and all(store.fingerprint(name) for name in names) else []


def _flattened(job: _Job) -> _Image:
    """Return what the projections hold of one tilt."""
    store, settings = Store.open(job.path), job.settings
    result = store.read(f"ptychography/{tilt_name(job.tilt)}")
    pixel = tuple(result.attrs["pixel_angstrom"])
    field = field_px(store.scan(job.tilt), (pixel[0], pixel[1]), settings)
    illumination = result["illumination"].values
    # The mask is judged on the whole object: inside the field alone everything may be equally bright.
    lit = observed(illumination, settings.illumination_fraction)
    angles = phase_sum(result["object"].values, np.where(lit, illumination, 0))
    valid = centred(lit, field, fill=False)
    phase = result["phase_sum"].values if settings.phase == "stored" else angles.phase
    flat, background = _without_background(centred(phase, field), valid, store.scan(job.tilt), settings)
    filtered = None
    if phase_filters.wanted(settings):
        halves = _halves(store, job.tilt, valid, settings)
        filtered = phase_filters.filtered(flat, valid, pixel[0], settings, halves)
    profile = depth_profile(centred(angles.slices, field), valid, vacuum(flat, valid))
    return _Image(flat, valid, float(background[valid].std()), filtered, profile, angles.residues)


def _without_background(
    phase: np.ndarray, valid: np.ndarray, scan: Scan, settings: ProjectionSettings
) -> tuple[np.ndarray, np.ndarray]:
    # A ramp would break the period, so a periodic phase has a level alone.
    kind = "level" if scan.periodic and settings.background == "plane" else settings.background
    background = vacuum_background(phase, valid, kind)
    return np.where(valid, phase - background, 0).astype(np.float32), background


def _halves(store: Store, tilt: int, valid: np.ndarray, settings: ProjectionSettings) -> phase_filters.Halves | None:
    """Return the phases of the two half scans of a tilt, flattened, where they are in the store."""
    if not _half_groups(store, settings):
        return None
    return phase_filters.Halves(*_flat_halves(store, tilt, valid, settings), valid)


def _flat_halves(
    store: Store, tilt: int, valid: np.ndarray, settings: ProjectionSettings
) -> tuple[np.ndarray, np.ndarray]:
    pair = store.read(f"{HALVES}/{tilt_name(tilt)}")
    field = (valid.shape[0], valid.shape[1])
    images = [centred(pair[name].values, field) for name in ("first", "second")]
    first, second = (_without_background(image, valid, store.scan(tilt), settings)[0] for image in images)
    return first, second


def half_phases(
    store: Store, tilt: int, settings: ProjectionSettings | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Return the flattened phases (y, x) in rad of the two half scans of ``tilt``, their mask, and the pixel in Å."""
    settings = settings or ProjectionSettings()
    result = store.read(f"ptychography/{tilt_name(tilt)}")
    pixel = tuple(result.attrs["pixel_angstrom"])
    field = field_px(store.scan(tilt), (pixel[0], pixel[1]), settings)
    lit = observed(result["illumination"].values, settings.illumination_fraction)
    valid = centred(lit, field, fill=False)
    return *_flat_halves(store, tilt, valid, settings), valid, float(pixel[0])


def _stacked(store: Store, images: list[_Image], pixel_angstrom: float, settings: ProjectionSettings) -> xr.Dataset:
    shape = tuple(int(length) for length in np.max([image.flat.shape for image in images], axis=0))
    dims = ("tilt", "y", "x")

    def stack(arrays: list[np.ndarray], fill: float | bool = 0) -> np.ndarray:
        return np.stack([centred(array, (shape[0], shape[1]), fill) for array in arrays])

    raw = stack([image.flat for image in images])
    variables: dict[str, Any] = {"phase": (dims, raw)}
    filters = [image.filtered for image in images if image.filtered is not None]
    if filters:
        variables["phase"] = (dims, stack([item.phase for item in filters]))
        variables["phase_raw"] = (dims, raw)
    variables["valid"] = (dims, stack([image.valid for image in images], fill=False))
    variables["background_rad"] = (("tilt",), np.array([image.scatter_rad for image in images]), {"units": "rad"})
    poses = store.tilt_series().poses
    for name in ("theta", "phi", "psi"):
        variables[f"{name}_deg"] = (("tilt",), np.degrees([getattr(pose, f"{name}_rad") for pose in poses]))
    if len({len(image.depth_rad[0]) for image in images}) == 1:
        for name, column in (("depth_phase", 0), ("depth_contrast", 1)):
            variables[name] = (("tilt", "slice"), np.stack([image.depth_rad[column] for image in images]))
    attrs: dict[str, Any] = {
        "pixel_angstrom": pixel_angstrom,
        "sigma_rad_per_volt_angstrom": interaction_parameter(store.optics(0).energy_ev),
        "energy_kev": store.optics(0).energy_ev / 1e3,
        "periodic": store.scan(0).periodic,
        "phase_residues": [image.residues for image in images],
        **({"filters": {**phase_filters.numbers(filters), "notes": phase_filters.notes(settings)}} if filters else {}),
    }
    return xr.Dataset(variables, attrs=attrs)


def _pixel(store: Store, groups: list[str]) -> float:
    pixels = {tuple(round(p, 6) for p in store.read(group).attrs["pixel_angstrom"]) for group in groups}
    if len(pixels) != 1 or len(set(next(iter(pixels)))) != 1:
        raise ConfigurationError(
            f"the object pixels (y, x) in Å are {sorted(pixels)}; tomography needs one square pixel for all tilts:"
            " give every tilt the same detector shape and pixel_inv_angstrom"
        )
    return float(store.read(groups[0]).attrs["pixel_angstrom"][0])


def field_px(scan: Scan, pixel_yx: tuple[float, float], settings: ProjectionSettings) -> tuple[int, int]:
    """Pixels (y, x) of the projections; even, unless a periodic specimen has an odd number."""
    field = settings.field_angstrom
    if field is None:
        field = scan.extent_angstrom_yx
    elif not isinstance(field, tuple):
        field = (field, field)
    pixels = [length / pixel for length, pixel in zip(field, pixel_yx, strict=True)]
    if scan.periodic and settings.field_angstrom is None:
        return (round(pixels[0]), round(pixels[1]))
    height, width = (2 * max(1, int(np.ceil(count / 2 - 1e-6))) for count in pixels)
    return (height, width)
