"""The verb ``projections``: the phase sums of all tilts on one grid, with their gauges taken off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from stemtomo.algorithms.ptychography.phase import centred, observed, vacuum_background
from stemtomo.distributed import Executor, PlanRow
from stemtomo.distributed import executor as default_executor
from stemtomo.errors import ConfigurationError
from stemtomo.geometry import Detector, Scan
from stemtomo.io.provenance import Provenance
from stemtomo.io.schema import tilt_name
from stemtomo.io.store import Store
from stemtomo.physics.electron import interaction_parameter
from stemtomo.pipeline.config import ProjectionSettings
from stemtomo.pipeline.progress import Progress, Silent

GROUP = "projections"


def projections(
    store: Store | str | Path,
    settings: ProjectionSettings | None = None,
    *,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Bring the phase sums of all tilts to one grid, mask what was not observed and set vacuum to zero.

    The result's phase is in rad, (tilt, y, x), with the rotation centre at index n // 2.

    Returns
    -------
    dict
        ``background_rad``: per tilt, the scatter (standard deviation) of the background that was taken off;
        ``observed_fraction``: per tilt.

    Raises
    ------
    StoreError
        If a tilt has no ptychography.
    ConfigurationError
        If object pixels differ between tilts, or are not square.
    """
    store = Store.of(store)
    settings = settings or ProjectionSettings()
    executor = executor or default_executor()
    progress = progress or Silent()
    groups = [f"ptychography/{tilt_name(index)}" for index in range(len(store.tilt_series()))]
    provenance = Provenance.start(GROUP, settings.model_dump(), {group: store.fingerprint(group) for group in groups})
    progress.start(GROUP, store.tilt_count, "tilt")
    if not store.is_complete(GROUP, provenance.fingerprint):
        images = [np.zeros(0)] * store.tilt_count
        jobs = [(str(store.path), group, index, settings) for index, group in enumerate(groups)]
        for index, image in executor.map_bounded(_flattened, jobs):
            images[index] = image
            progress.advance()
        store.write(GROUP, _stacked(store, images, _pixel(store, groups)), provenance)
    progress.finish(GROUP)
    result = store.read(GROUP)
    return {
        "background_rad": result["background_rad"].values.tolist(),
        "observed_fraction": result["valid"].mean(("y", "x")).values.tolist(),
    }


def plan_row(scan: Scan, detector: Detector, tilts: int, settings: ProjectionSettings) -> PlanRow:
    """Say what :func:`projections` will hold, read and write."""
    height, width = field_px(scan, detector.object_pixel_angstrom_yx, settings)
    stack = tilts * height * width * 5
    return PlanRow(
        stage=GROUP,
        tasks=tilts,
        bytes_per_task=height * width * 64,
        bytes_read=stack,
        bytes_written=stack,
        resident_bytes=2 * stack,
    )


def _flattened(job: tuple[str, str, int, ProjectionSettings]) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the flattened phase, the mask, and the scatter of the background of one tilt."""
    path, group, index, settings = job
    store = Store.open(path)
    result = store.read(group)
    pixel = tuple(result.attrs["pixel_angstrom"])
    field = field_px(store.scan(index), (pixel[0], pixel[1]), settings)
    illumination = result["illumination"].values
    # A ramp would break the period, so a periodic phase has a level alone.
    kind = "level" if store.scan(index).periodic and settings.background == "plane" else settings.background
    phase = centred(result["phase_sum"].values, field)
    # The mask is judged on the whole object: inside the field alone everything may be equally bright.
    valid = centred(observed(illumination, settings.illumination_fraction), field, fill=False)
    background = vacuum_background(phase, valid, kind)
    flat = np.where(valid, phase - background, 0).astype(np.float32)
    return flat, valid, float(background[valid].std())


def _stacked(store: Store, images: list[Any], pixel_angstrom: float) -> xr.Dataset:
    flats, masks, scatters = zip(*images, strict=True)
    shape = tuple(np.max([flat.shape for flat in flats], axis=0))
    poses = store.tilt_series().poses
    degrees = {
        f"{name}_deg": (("tilt",), np.degrees([getattr(pose, f"{name}_rad") for pose in poses]))
        for name in ("theta", "phi", "psi")
    }
    return xr.Dataset(
        {
            "phase": (("tilt", "y", "x"), np.stack([centred(flat, (shape[0], shape[1])) for flat in flats])),
            "valid": (
                ("tilt", "y", "x"),
                np.stack([centred(mask, (shape[0], shape[1]), fill=False) for mask in masks]),
            ),
            "background_rad": (("tilt",), np.array(scatters), {"units": "rad"}),
            **degrees,
        },
        attrs={
            "pixel_angstrom": pixel_angstrom,
            "sigma_rad_per_volt_angstrom": interaction_parameter(store.optics(0).energy_ev),
            "energy_kev": store.optics(0).energy_ev / 1e3,
            "periodic": store.scan(0).periodic,
        },
    )


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
