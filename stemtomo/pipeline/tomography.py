"""The verb ``tomography``: the volume from the projections of all tilts, block by block."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from stemtomo.algorithms import total_variation
from stemtomo.algorithms.tomography import genfire, solver
from stemtomo.algorithms.tomography.diagnosis import require_sound
from stemtomo.distributed import Checkpoint, Executor, PlanRow
from stemtomo.distributed import executor as default_executor
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.errors import ConfigurationError
from stemtomo.io.provenance import Provenance
from stemtomo.io.store import Store
from stemtomo.locations import is_object, remove_tree
from stemtomo.physics.projection import render, seen_extent
from stemtomo.pipeline import streaming
from stemtomo.pipeline.alignment import aligned_geometry, aligned_images, series_of
from stemtomo.pipeline.config import TomographySettings
from stemtomo.pipeline.descent import Problem, Reconstruction, refined_by, useful_blocks, useful_blocks_of
from stemtomo.pipeline.progress import Progress, Silent
from stemtomo.pipeline.reconstruction import reconstruct
from stemtomo.pipeline.substrate import without_substrate

GROUP = "volume"
STAGE = "tomography"
#: Methods whose result is the volume itself, not coefficients of B-splines.
_PLAIN = ("wbp", "genfire")
#: CPU seconds of an iteration per voxel and tilt, about y and about any axis, and bytes per second of files; measured,
#: docs/performance.md.
_SECONDS_PER_VOXEL_TILT = (1.5e-9, 12e-9)
_FILE_BYTES_PER_S = 1e9
_SECONDS_PER_SMOOTHED_VOXEL = 3e-7
"""CPU seconds of a step of the total variation per voxel of slabs of 32 rows, margins included; measured there too."""


def tomography(
    store: Store | str | Path,
    settings: TomographySettings | None = None,
    *,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Reconstruct the potential from ``projections`` and ``alignment``, and refine the shifts on the way.

    The volume is cut into slabs along y that never leave their workers; per iteration only projections travel. It
    continues from its last checkpoint, to the same bits. Shifts are refined where the alignment found the specimen
    wholly in view: what enters and leaves the view as it tilts would pull at them otherwise. Those that were matched
    under noise stay, unless ``settings.refine_shifts`` is true.

    Returns
    -------
    dict
        ``loss``: relative misfit |A v - b| / |b| after every iteration (the Fourier error of ``genfire``); ``r1`` and
        ``r2``: R factors, mean over the projections; ``r_free``: that of the pixels (Fourier points) held out, if any;
        ``refined``: whether shifts were refined, and ``shift_change_rms_px`` how far; ``computed``: whether anything
        was done.

    Raises
    ------
    StoreError
        If projections or alignment are missing.
    ConfigurationError
        If the projections do not say how phase and potential are related, or a volume in memory does not fit.
    """
    store = Store.of(store)
    settings = settings or TomographySettings()
    executor = executor or default_executor()
    progress = progress or Silent()
    inputs = {group: store.fingerprint(group) for group in ("projections", "alignment")}
    provenance = Provenance.start(STAGE, settings.result_settings(), inputs)
    progress.start(STAGE, settings.iterations, "iteration")
    todo = not store.is_complete(GROUP, provenance.fingerprint)
    if todo:
        problem = _problem(store, settings)
        if settings.mask == "substrate":
            problem = without_substrate(problem, settings, executor)
        files = _files(store, problem, settings, executor, provenance.fingerprint)
        if settings.blocks is None and useful_blocks_of(problem.geometry) == 1:
            executor = ThreadExecutor(1)  # an iteration takes less time than sending its parts to workers and back
        checkpoint = Checkpoint(store.checkpoint_path(GROUP), provenance.fingerprint)
        found = reconstruct(problem, settings, executor, progress, checkpoint, files=files)
        store.write(GROUP, _dataset(found, problem, refined_by(problem, settings) is not None, settings), provenance)
        remove_tree(store.checkpoint_path(GROUP))  # with files of a run that had less memory
    progress.finish(STAGE)
    result = store.read(GROUP)
    return {
        "method": settings.method,
        "loss": result["loss"].values.tolist(),
        "r1": float(result["r1"].mean()),
        "r2": float(result["r2"].mean()),
        "r_free": result.attrs["r_free"],
        "refined": result.attrs["shifts_refined"],
        "shift_change_rms_px": result.attrs["shift_change_rms_px"],
        "computed": todo,
    }


def plan_tomography(
    store: Store, settings: TomographySettings | None = None, workers: int = 1, memory_bytes: int | None = None
) -> PlanRow:
    """Say what :func:`tomography` will hold, read and write, from the store's metadata alone."""
    projections = store.read("projections")
    _, height, width = projections["phase"].shape
    pixel = float(projections.attrs["pixel_angstrom"])
    rotations = series_of(projections).rotations
    return plan_row((height, width), rotations, pixel, settings or TomographySettings(), workers, memory_bytes)


def plan_row(
    shape_yx: tuple[int, int],
    rotations: np.ndarray,
    pixel_angstrom: float,
    settings: TomographySettings,
    workers: int = 1,
    memory_bytes: int | None = None,
) -> PlanRow:
    """Say the same for projections of ``shape_yx`` that are not there yet, taken at ``rotations`` (tilt, 3, 3).

    Parameters
    ----------
    memory_bytes
        Of all workers together, which decides whether the volume is kept in files; not known if not given.
    """
    shape, tilts = _volume_shape(shape_yx, pixel_angstrom, settings, rotations), len(rotations)
    voxels, pixels = math.prod(shape), math.prod(shape_yx)
    stack = tilts * pixels
    seconds = _seconds(settings, voxels, rotations, workers)
    if settings.memory_gib is not None:
        memory_bytes = math.floor(settings.memory_gib * 2**30)
    if memory_bytes is not None and streaming.streams(settings, voxels, tilts, pixels, memory_bytes):
        blocks = settings.blocks or streaming.block_count(voxels, tilts, shape[1], workers)
        moved = (1 if settings.method in _PLAIN else settings.iterations) * voxels * 4
        reads, writes = streaming.passes(settings.method, blocks, shape[1])
        return PlanRow(
            STAGE,
            tasks=blocks,
            bytes_per_task=max(math.ceil(voxels / blocks) * 20, _smoothing_bytes(settings, shape, blocks)) + stack * 24,
            bytes_read=stack * 5 + math.ceil(reads * moved),
            bytes_written=writes * moved + voxels * 4,
            seconds=None if seconds is None else seconds + (reads + writes) * moved / _FILE_BYTES_PER_S,
            resident_bytes=stack * 17,
        )
    blocks = min(settings.blocks or min(workers, useful_blocks(voxels, tilts)), shape[1])
    held = 12 if settings.method == "cgls" else 8
    cube = genfire.peak_bytes(genfire.edge_of(shape, settings.oversampling)) if settings.method == "genfire" else 0
    return PlanRow(
        STAGE,
        tasks=blocks,
        # A step holds its point and its gradient beside the two iterates that stay; images are summed and compared.
        bytes_per_task=math.ceil(voxels / blocks) * 12 + stack * 24 + cube + _smoothing_bytes(settings, shape, blocks),
        bytes_read=stack * 5,
        bytes_written=voxels * 4 + (settings.iterations // settings.checkpoint_every) * voxels * held,
        seconds=seconds,
        resident_bytes=voxels * held + stack * 17,
    )


def _smoothing_bytes(settings: TomographySettings, shape: tuple[int, int, int], blocks: int) -> int:
    """Return what a task holds to smooth a block by its total variation: the rows around it, and a piece of them."""
    if settings.method != "fista_tv":
        return 0
    rows = min(shape[1], math.ceil(shape[1] / blocks) + 2 * total_variation.REACH)
    wide = shape[0] * rows * shape[2]
    return wide * 8 + total_variation.BYTES_PER_VOXEL * min(wide, total_variation.PIECE_VOXELS)


def _seconds(settings: TomographySettings, voxels: int, rotations: np.ndarray, workers: int) -> float | None:
    """Return the wall time on CPUs of the methods that descend; ``None`` for the others."""
    if settings.method in _PLAIN:
        return None
    about_y = np.abs(rotations[:, 1] - np.array([0.0, 1.0, 0.0])).max(axis=1) < 1e-12
    passes = settings.iterations + (solver.POWER_ITERATIONS if settings.method.startswith("fista") else 0)
    per_voxel = np.where(about_y, *_SECONDS_PER_VOXEL_TILT).sum()
    smoothing = settings.iterations * _SECONDS_PER_SMOOTHED_VOXEL if settings.method == "fista_tv" else 0.0
    return float(
        voxels * (passes * per_voxel + smoothing) / max(1, min(workers, useful_blocks(voxels, len(rotations))))
    )


def _problem(store: Store, settings: TomographySettings) -> Problem:
    projections, alignment = store.read("projections").compute(), store.read("alignment").compute()
    attrs = projections.attrs
    if "sigma_rad_per_volt_angstrom" not in attrs:
        raise ConfigurationError(
            f"{store.path}: projections have no sigma_rad_per_volt_angstrom, which turns phase into potential; "
            "run the stage 'projections' again"
        )
    pixel = float(attrs["pixel_angstrom"])
    images = aligned_images(projections, alignment)
    require_sound(images, projections["valid"].values)
    shape = (images.shape[1], images.shape[2])
    plain = settings.method in _PLAIN
    geometry = aligned_geometry(projections, alignment, degree=1 if plain else settings.degree)
    geometry = replace(geometry, volume_shape=_volume_shape(shape, pixel, settings, geometry.rotations))
    weights = np.ones(len(images), np.float32)
    width = 0.0 if plain else settings.element_width_px
    measured = solver.Measurement(images, projections["valid"].values, weights, width)
    sigma = float(attrs["sigma_rad_per_volt_angstrom"])
    matched = "_matching" in alignment.attrs.get("method", "")
    return Problem(measured, geometry, pixel, sigma, bool(alignment.attrs["wholly_in_view"]), matched)


def _files(
    store: Store, problem: Problem, settings: TomographySettings, executor: Executor, fingerprint: str
) -> Checkpoint | None:
    """Return where the blocks of a volume that does not fit the memory lie; ``None`` for one that does."""
    shape, tilts = problem.geometry.volume_shape, len(problem.geometry)
    pixels = math.prod(problem.geometry.image_shape)
    streaming.require_streamable(settings)
    if settings.method == "genfire":
        cube = genfire.peak_bytes(genfire.edge_of((*shape, *problem.geometry.image_shape), settings.oversampling))
        streaming.require_room(cube, streaming.memory_of_one(executor, settings.memory_gib))
    memory_bytes = streaming.memory_of(executor, settings.memory_gib)
    if not streaming.streams(settings, math.prod(shape), tilts, pixels, memory_bytes):
        return None
    if is_object(store.path):
        raise ConfigurationError(
            f"{store.path}: the volume does not fit the memory, and its blocks are kept in files that are read in "
            "parts, which object storage has not; take more memory or workers, set tomography.stream = 'never', or "
            "use a store on a file system"
        )
    keep = 1 if settings.method == "cgls" else 2  # the steps that the next one begins from
    return Checkpoint(store.checkpoint_path(GROUP) / "files", fingerprint, keep=keep)


def _volume_shape(
    shape_yx: tuple[int, int], pixel_angstrom: float, settings: TomographySettings, rotations: np.ndarray
) -> tuple[int, int, int]:
    depth = shape_yx[1]
    if settings.depth_angstrom is not None:
        depth = 2 * max(1, math.ceil(settings.depth_angstrom / pixel_angstrom / 2))
    if not settings.extended:
        return (depth, *shape_yx)
    height, width = (max(a, b) for a, b in zip(seen_extent(rotations, shape_yx, depth), shape_yx, strict=True))
    return (depth, height, width)


def _under_images(volume: Any, shape_yx: tuple[int, int]) -> Any:
    """Return the part of a volume (z, y, x) that lies under the images at zero tilt."""
    starts = [length // 2 - kept // 2 for length, kept in zip(volume.shape[1:], shape_yx, strict=True)]
    rows, columns = (slice(start, start + kept) for start, kept in zip(starts, shape_yx, strict=True))
    kept = volume[:, rows, columns]
    return np.ascontiguousarray(kept) if isinstance(kept, np.ndarray) else kept


def _dataset(found: Reconstruction, problem: Problem, refined: bool, settings: TomographySettings) -> xr.Dataset:
    volts = 1 / (problem.sigma_rad_per_volt_angstrom * problem.voxel_angstrom)
    element = (problem.geometry.degree, problem.measured.element_width_px)
    if found.files:
        volume = _under_images(streaming.rendered(list(found.files), *element, volts), problem.geometry.image_shape)
    else:
        volume = _under_images(render(found.coefficients, *element), problem.geometry.image_shape)
        volume *= volume.dtype.type(volts)
    shifts = found.shifts_px * problem.voxel_angstrom
    change = found.shifts_px - problem.geometry.shifts_px
    return xr.Dataset(
        {
            "potential": (("z", "y", "x"), volume),
            "loss": (("iteration",), np.array(found.losses)),
            "shift_x_angstrom": (("tilt",), shifts[:, 0]),
            "shift_y_angstrom": (("tilt",), shifts[:, 1]),
            "r1": (("tilt",), found.factors.r1),
            "r2": (("tilt",), found.factors.r2),
        },
        attrs={
            "method": settings.method,
            "r_free": found.r_free,
            "voxel_angstrom": problem.voxel_angstrom,
            "shifts_refined": refined,
            "shift_change_rms_px": float(np.sqrt(np.mean(np.sum(change**2, axis=1)))),
            "loss_unit": "misfit of the projections over their norm",
        },
    )
