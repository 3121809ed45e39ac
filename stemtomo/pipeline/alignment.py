"""The verb ``align``: shifts of the projections against one another, with which tomography poses them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from stemtomo.algorithms.tomography.alignment import (
    ShiftEstimate,
    border_fraction,
    centre_of_mass,
    common_line,
    neighbour_correlation,
    without_translation,
)
from stemtomo.algorithms.tomography.diagnosis import diagnoses, require_sound
from stemtomo.algorithms.tomography.intensity import gains
from stemtomo.algorithms.tomography.poses import euler_deg
from stemtomo.distributed import Checkpoint, Executor, PlanRow
from stemtomo.distributed import executor as default_executor
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.geometry import TiltSeries
from stemtomo.io.provenance import Provenance
from stemtomo.io.store import Store
from stemtomo.locations import remove_tree
from stemtomo.physics.projection import TiltGeometry
from stemtomo.pipeline.config import AlignmentSettings
from stemtomo.pipeline.joint_alignment import iterations_of, refine_poses, scales_of
from stemtomo.pipeline.progress import Progress, Silent
from stemtomo.pipeline.projection_matching import match_atoms, match_projections

GROUP = "alignment"
STAGE = "align"
_STEEPEST_RAD = math.radians(85)  # beyond, a neighbour's image is stretched more than tenfold


def align(
    store: Store | str | Path,
    settings: AlignmentSettings | None = None,
    *,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Estimate the detector shift of every projection.

    A specimen wholly in view is brought together by its centre of mass, and along the tilt axis of a series about y
    by its common line. One that goes on beyond the view has neither: then neighbouring tilts are correlated, or, if
    they do not turn about y alone, shifts are left at zero for tomography to refine.

    Returns
    -------
    dict
        ``method``: what was used; ``shift_rms_px``; ``score``: per tilt, residual in px of the centre of mass or, for
        the methods that correlate, a correlation; ``wholly_in_view``, and ``border_fraction``: the largest, how bright
        the border is beside the specimen; ``gain``: mean factor per tilt, if asked for; ``diagnoses``: what is likely
        wrong with the poses, each with its ``name`` (tilt_order, tilt_axis, tilt_sense, mirrored) and a ``text``;
        ``computed``: whether anything was done.

    Raises
    ------
    StoreError
        If there are no projections.
    FormatError
        If one of them has no angle, is constant, or holds values that are no numbers.
    """
    store = Store.of(store)
    settings = settings or AlignmentSettings()
    executor = executor or default_executor()
    progress = progress or Silent()
    provenance = Provenance.start(STAGE, settings.model_dump(), {"projections": store.fingerprint("projections")})
    shape = store.read("projections")["phase"].shape if settings.refine_angles else (1, 1, 1)
    scales = scales_of((shape[1], shape[2]), settings) if settings.refine_angles else ()
    progress.start(STAGE, 1 + sum(iterations_of(settings, number) for number in range(len(scales))))
    todo = not store.is_complete(GROUP, provenance.fingerprint)
    if todo:
        projections = store.read("projections")
        projections.load()
        require_sound(projections["phase"].values, projections["valid"].values, _angles_deg(projections))
        dataset: xr.Dataset = executor.gather(executor.submit(_estimate, projections, settings))
        if settings.refine_angles and dataset.attrs["wholly_in_view"] and projections.sizes["tilt"] > 2:
            folder = store.checkpoint_path(GROUP)
            kept = [Checkpoint(folder / f"scale-{factor}", provenance.fingerprint) for factor in scales]
            dataset = _jointly(projections, dataset, settings, executor, progress, kept)
        store.write(GROUP, dataset, provenance)
        remove_tree(store.checkpoint_path(GROUP))
    progress.advance()
    progress.finish(STAGE)
    return {**_numbers(store.read(GROUP)), "computed": todo}


def _numbers(result: xr.Dataset) -> dict[str, Any]:
    """Return what an alignment says in numbers."""
    shifts = np.hypot(result["shift_x_angstrom"].values, result["shift_y_angstrom"].values)
    return {
        "method": result.attrs["method"],
        "shift_rms_px": float(np.sqrt(np.mean(shifts**2)) / result.attrs["pixel_angstrom"]),
        "score": result["score"].values.tolist(),
        "wholly_in_view": bool(result.attrs["wholly_in_view"]),
        "border_fraction": result.attrs["border_fraction"],
        "angle_change_rms_deg": result.attrs.get("angle_change_rms_deg"),
        "gain": result["gain"].mean("y").values.tolist() if "gain" in result else None,
        "diagnoses": result.attrs.get("diagnoses", []),
    }


def plan_align(store: Store, settings: AlignmentSettings | None = None) -> PlanRow:
    """Say what :func:`align` will hold, read and write, from the store's metadata alone."""
    tilts, height, width = store.read("projections")["phase"].shape
    return plan_row((height, width), tilts, settings)


def plan_row(shape_yx: tuple[int, int], tilts: int, settings: AlignmentSettings | None = None) -> PlanRow:
    """Say the same for projections of ``shape_yx`` that are not there yet."""
    settings, stack = settings or AlignmentSettings(), tilts * math.prod(shape_yx)
    row = PlanRow(STAGE, tasks=1, bytes_per_task=stack * 20, bytes_read=stack * 5, bytes_written=tilts * 24)
    if not settings.refine_angles and not {"projection_matching", "atom_matching"} & set(settings.methods):
        return row
    # The finest scale holds two iterates, a step and the depth of a cube; six derivatives of a tilt beside the stack.
    finest = min(scales_of(shape_yx, settings))
    voxels = math.ceil(max(shape_yx) / finest) ** 3
    small = stack // finest**2
    scales = len(scales_of(shape_yx, settings)) if settings.refine_angles else 0
    saved = sum(iterations_of(settings, number) // 25 for number in range(scales))
    return replace(
        row,
        bytes_per_task=max(stack * 20, stack * 9 + voxels * 24 + small * 50),
        bytes_written=row.bytes_written + saved * (voxels * 8 + small * 8),
    )


def series_of(projections: xr.Dataset) -> TiltSeries:
    """Return the poses that the dataset ``projections`` carries, without shifts."""
    theta, phi, psi = (projections[f"{name}_deg"].values.tolist() for name in ("theta", "phi", "psi"))
    return TiltSeries.from_degrees(theta, phi, psi)


def aligned_geometry(projections: xr.Dataset, alignment: xr.Dataset, degree: int = 2) -> TiltGeometry:
    """Return how a cube as wide as the images is seen, with the poses that ``alignment`` found.

    Its angles and magnifications where it refined them, else those that the projections came with.
    """
    _, height, width = projections["phase"].shape
    shifts = np.stack([alignment[f"shift_{axis}_angstrom"].values for axis in "xy"], axis=-1)
    pixel = float(projections.attrs["pixel_angstrom"])
    scales = alignment["magnification"].values if "magnification" in alignment else None
    return TiltGeometry(
        aligned_rotations(projections, alignment),
        shifts / pixel,
        (width, height, width),
        (height, width),
        degree,
        scales,
    )


def aligned_images(projections: xr.Dataset, alignment: xr.Dataset | None) -> np.ndarray:
    """Return the phases (tilt, y, x), float32, in the one scale that ``alignment`` found."""
    images: np.ndarray = projections["phase"].values.astype(np.float32)
    if alignment is None or "gain" not in alignment:
        return images
    return images * alignment["gain"].values.astype(np.float32)[:, :, None]


def aligned_rotations(projections: xr.Dataset, alignment: xr.Dataset | None) -> np.ndarray:
    """Return the matrices R (tilt, 3, 3) that ``alignment`` refined, else those of the angles of the projections."""
    refined = alignment is not None and "theta_deg" in alignment
    return series_of(alignment if refined and alignment is not None else projections).rotations


def _estimate(projections: xr.Dataset, settings: AlignmentSettings) -> xr.Dataset:
    images, valid = projections["phase"].values, projections["valid"].values
    border = float(border_fraction(images, valid).max())
    in_view = border <= settings.largest_border_fraction
    series = series_of(projections)
    none = ShiftEstimate(np.zeros((len(series), 2)), np.zeros(len(series)))
    pixel = float(projections.attrs["pixel_angstrom"])
    if not settings.enabled:
        method, estimate = "none", none
    elif not in_view:
        method, estimate = _without_borders(images, valid, series, none)
    else:
        method, estimate = _in_view(images, valid, series, settings, none, pixel)
    shifts = estimate.shifts_px * pixel
    kind = "tilt" if settings.normalise == "rows" and not series.single_axis else settings.normalise
    found = gains(images, valid, estimate.shifts_px[:, 1], kind) if in_view and kind != "none" else None
    return xr.Dataset(
        {
            "shift_x_angstrom": (("tilt",), shifts[:, 0]),
            "shift_y_angstrom": (("tilt",), shifts[:, 1]),
            "score": (("tilt",), estimate.score),
            **({} if found is None else {"gain": (("tilt", "y"), found)}),
        },
        attrs={
            "method": method,
            "wholly_in_view": in_view,
            "border_fraction": border,
            "pixel_angstrom": pixel,
            "diagnoses": [each._asdict() for each in diagnoses(images, valid, series.rotations)] if in_view else [],
        },
    )


def _angles_deg(projections: xr.Dataset) -> np.ndarray:
    return np.stack([projections[f"{name}_deg"].values for name in ("theta", "phi", "psi")], axis=-1)


def _jointly(
    projections: xr.Dataset,
    estimate: xr.Dataset,
    settings: AlignmentSettings,
    executor: Executor,
    progress: Progress,
    checkpoints: list[Checkpoint],
) -> xr.Dataset:
    """Return ``estimate`` with poses refined together with a volume."""
    images, valid = aligned_images(projections, estimate), projections["valid"].values
    start = aligned_geometry(projections, estimate)
    found = refine_poses(images, valid, start, settings, executor, progress=progress, checkpoints=checkpoints)
    theta, phi, psi = euler_deg(found.geometry.rotations)
    shifts = found.geometry.shifts_px * float(estimate.attrs["pixel_angstrom"])
    values = {
        "shift_x_angstrom": shifts[:, 0],
        "shift_y_angstrom": shifts[:, 1],
        "score": 1 - found.r1,
        "theta_deg": theta,
        "phi_deg": phi,
        "psi_deg": psi,
    }
    if found.geometry.magnifications is not None:
        values["magnification"] = found.geometry.scales
    joint = {
        "method": f"{estimate.attrs['method']}+joint",
        "angle_change_rms_deg": found.turned_deg(start.rotations),
        "joint_loss": found.losses,
    }
    variables = {name: (("tilt",), array) for name, array in values.items()}
    return estimate.assign(variables).assign_attrs(joint)


def _in_view(
    images: np.ndarray,
    valid: np.ndarray,
    series: TiltSeries,
    settings: AlignmentSettings,
    estimate: ShiftEstimate,
    pixel_angstrom: float,
) -> tuple[str, ShiftEstimate]:
    """Return the estimates of ``settings.methods``, each beginning where the one before it ended."""
    used = []
    _, height, width = images.shape
    for method in settings.methods:
        where = TiltGeometry(series.rotations, estimate.shifts_px, (width, height, width), (height, width))
        phases = images.astype(np.float32)
        if method == "projection_matching" and len(series) > 2:
            estimate = match_projections(phases, valid, where, settings, ThreadExecutor(1))
        elif method == "atom_matching" and len(series) > 2:
            estimate = match_atoms(phases, valid, where, settings, ThreadExecutor(1), pixel_angstrom)
        elif method == "centre_of_mass":
            estimate = centre_of_mass(images, valid, series.rotations)
        elif method == "common_line" and series.single_axis and len(series) > 1:
            thetas = np.array([pose.theta_rad for pose in series])
            estimate = common_line(images, valid, thetas, estimate.shifts_px)
        else:
            continue  # the sums over x of other poses have nothing in common
        used.append(method)
    return "+".join(used) or "none", estimate


def _without_borders(
    images: np.ndarray, valid: np.ndarray, series: TiltSeries, none: ShiftEstimate
) -> tuple[str, ShiftEstimate]:
    thetas = np.array([pose.theta_rad for pose in series])
    if not series.single_axis or len(series) == 1 or np.abs(thetas).max() > _STEEPEST_RAD:
        return "none: the specimen is not wholly in view", none
    estimate = neighbour_correlation(images, valid, thetas)
    shifts = without_translation(estimate.shifts_px, series.rotations)
    return "neighbour_correlation: the specimen is not wholly in view", ShiftEstimate(shifts, estimate.score)
