"""The verb ``joint``: the volume straight from the patterns of all tilts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from stemtomo import backend
from stemtomo.algorithms.joint.pose import SHIFTS, TURNS
from stemtomo.algorithms.joint.solver import Constraint, elements, start_slices
from stemtomo.algorithms.joint.view import Box, View
from stemtomo.backend import Array
from stemtomo.distributed import Checkpoint, Executor, PlanRow
from stemtomo.distributed import executor as default_executor
from stemtomo.geometry import Detector, Optics, Pose, Scan
from stemtomo.io.provenance import Provenance
from stemtomo.io.schema import CHUNK_POSITIONS, tilt_name
from stemtomo.io.store import Store
from stemtomo.physics.electron import interaction_parameter
from stemtomo.pipeline.joint_epochs import epochs_of, reconstruct
from stemtomo.pipeline.joint_hand import compare_hands, short_run
from stemtomo.pipeline.joint_parts import Tilt, box_for, joint_grid, tile_cuts, tilts_of, voxels_per_slice
from stemtomo.pipeline.joint_steps import FOCUS, JointRun, Standing
from stemtomo.pipeline.progress import Progress, Silent
from stemtomo.pipeline.ptychography import good_pixels
from stemtomo.pipeline.settings.joint import JointSettings
from stemtomo.pipeline.tile_fields import GROUP_BYTES

GROUP = "joint"
#: Processor seconds per slice, pattern and n² log2(n²) of its n² pixels, there and back, measured on one core.
_SECONDS_PER_PASS = 1.0e-9


def joint(
    store: Store | str | Path,
    settings: JointSettings | None = None,
    *,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Reconstruct the potential from all patterns at once, by multislice through the turned volume.

    After Lee et al., Phys. Rev. Applied 19, 054062 (2023). The first sweeps take each tilt for a single slice, which
    costs little and shows where the specimen is; then every tilt is cut into slices. It continues from its last
    checkpoint, to the same bits.

    Parameters
    ----------
    store
        Store with frames, opened with mode ``"r+"``; the result is written to ``joint``.
    settings
        See :class:`~stemtomo.pipeline.settings.joint.JointSettings`.

    Returns
    -------
    dict
        ``loss``: mean misfit per detector pixel over all tilts as met in every epoch; ``final_loss``: that of the
        result; ``vacuum_tilts``: how many tilts show vacuum, whose phase was taken off; ``tilt_sign``, where asked:
        ``verdict``, ``sentence`` (the ``note``) and the losses of both hands; ``shift_change_rms_px``; ``slices``;
        ``computed``.

    Raises
    ------
    StoreError
        If frames, or for ``start = "sequential"`` the results of the sequential way, are missing.
    ConfigurationError
        If tilts have different pixels, or the poses need a cubic box.
    """
    store = Store.of(store)
    settings = settings or JointSettings()
    executor = executor or default_executor()
    progress = progress or Silent()
    provenance = Provenance.start(GROUP, settings.result_settings(), _inputs(store, settings))
    schedule = epochs_of(settings)
    progress.start(GROUP, len(schedule), "epoch")
    todo = not store.is_complete(GROUP, provenance.fingerprint)
    if todo:
        checkpoint = Checkpoint(store.checkpoint_path(GROUP), provenance.fingerprint)
        tilts = tilts_of(store, settings)
        run = JointRun.prepare(executor, tilts, settings)
        found = reconstruct(store, run, schedule, checkpoint, progress)
        dataset = _dataset(run, found)
        if settings.check_tilt_sign:
            dataset.attrs["tilt_sign"] = compare_hands(store, run, progress).to_attrs()
        store.write(GROUP, dataset, provenance)
        checkpoint.clear()
    progress.finish(GROUP)
    return {**_numbers(store.read(GROUP), settings), "computed": todo}


def _inputs(store: Store, settings: JointSettings) -> dict[str, str | None]:
    """Return the fingerprints of what the volume is made from."""
    names = [tilt_name(index) for index in range(store.tilt_count)]
    groups = [f"tilt/{name}" for name in names]
    if settings.mask_bad_pixels:
        calibrated = (f"calibration/{name}" for name in names)
        groups += [group for group in calibrated if store.fingerprint(group) is not None]
    if settings.start == "sequential":
        groups += ["volume", *(f"ptychography/{name}" for name in names)]
    return {group: store.fingerprint(group) for group in groups}


def _numbers(result: xr.Dataset, settings: JointSettings) -> dict[str, Any]:
    hand = dict(result.attrs["tilt_sign"]) if settings.check_tilt_sign else None
    return {
        "loss": result["loss"].values.tolist(),
        "final_loss": float(result.attrs["final_loss"]),
        **({"tilt_sign": hand, "note": hand["sentence"]} if hand else {}),
        "vacuum_tilts": int((result["vacuum_share"] > 0).sum()),
        "shift_change_rms_px": float(result.attrs["shift_change_rms_px"]),
        "slices": result.attrs["slices"],
    }


def plan_joint(store: Store, settings: JointSettings | None = None, workers: int = 1) -> PlanRow:
    """Say what :func:`joint` will hold, read, write and take, from the store's metadata alone."""
    itemsize = store.frames(0, require_complete=False).dtype.itemsize
    poses = [store.pose(i) for i in range(store.tilt_count)]
    told = settings or JointSettings()
    return plan_row(store.scan(0), store.detector(0), store.optics(0), itemsize, poses, told, workers)


def plan_row(
    scan: Scan,
    detector: Detector,
    optics: Optics,
    itemsize: int,
    poses: Sequence[Pose],
    settings: JointSettings,
    workers: int = 1,
) -> PlanRow:
    """Say the same for a series that is not ingested yet, with frames of ``itemsize`` bytes per pixel."""
    grid = joint_grid(scan, detector, settings)
    box = box_for(scan, float(np.mean(grid.pixel_angstrom_yx)), poses, settings)
    tilts, window, schedule = len(poses), math.prod(grid.window_yx), epochs_of(settings)
    pattern = math.prod(detector.shape_yx) * itemsize
    frames = scan.count * pattern
    slices = 1 if settings.single_slice else -(-box.shape_zyx[0] // voxels_per_slice(settings, box, optics))
    cuts = tile_cuts(scan.count, grid, slices, settings)
    voxels, area = math.prod(box.shape_zyx), math.prod(grid.shape_yx)
    # The volume, its look-ahead and gradient, and while it is turned its complex copies; slices, their gradients, and
    # transmissions with theirs.
    value = 4 if settings.precision == "single" else 8
    working = voxels * value * 10 + slices * max(area, math.prod(box.shape_zyx[1:])) * value * 12
    working += 64 * backend.CACHE_BYTES
    # Patterns that are worked on, those that are read meanwhile, and the pieces that these come in.
    streaming = 4 * min(GROUP_BYTES, len(cuts[0]) * pattern)
    passes = sum((1 if epoch.kind == "single" else slices) + 1 for epoch in schedule)
    passes += (slices + 1) * (1 + 10 * settings.check_tilt_sign)
    return PlanRow(
        stage=GROUP,
        tasks=tilts * len(schedule),
        bytes_per_task=max(working, streaming) if settings.resident else working + streaming,
        bytes_read=tilts * pattern * _patterns_read(scan, cuts) * (1 if settings.resident else _times_read(settings)),
        bytes_written=voxels * 4 * (1 + len(schedule) // settings.checkpoint_every),
        seconds=tilts * scan.count * window * math.log2(window) * passes * _SECONDS_PER_PASS / workers,
        resident_bytes=frames * tilts if settings.resident else 0,
    )


def _patterns_read(scan: Scan, cuts: Sequence[np.ndarray]) -> int:
    """Return how many patterns tiles of a tilt read: a chunk that two share, both."""
    height, width = scan.shape_yx
    rows = [(cut[0] // width // CHUNK_POSITIONS, cut[-1] // width // CHUNK_POSITIONS + 1) for cut in cuts]
    return width * sum(min(int(last) * CHUNK_POSITIONS, height) - int(first) * CHUNK_POSITIONS for first, last in rows)


def _times_read(settings: JointSettings) -> int:
    """Return how often patterns that are not held are read: for their electrons, every batch, and the last loss."""
    # A batch, unless it is a pattern, has some of every chunk.
    alone = CHUNK_POSITIONS**2
    focus = 2 * settings.refine_focus
    runs = [settings] + [short_run(settings)] * (2 * settings.check_tilt_sign)
    schedule = [epoch for told in runs for epoch in epochs_of(told)]
    return 2 * len(runs) + sum((epoch.batches or alone) + focus * (epoch.kind == "sweep") for epoch in schedule)


def _dataset(run: JointRun, found: Standing) -> xr.Dataset:
    """Return the volume in V, and its projections: what atoms are refined against, free of the missing wedge."""
    tilts, settings = run.tilts, run.settings
    state, probes = run.executor.gather([found.volume.handles[0], list(found.probes)])
    coefficients = state["coefficients"]
    box = tilts[0].view.box
    sigma = interaction_parameter(tilts[0].optics.energy_ev)
    volume = backend.to_host(elements(coefficients, settings.element_width_px)) / (sigma * box.voxel_angstrom)
    poses = [run.pose(tilt.number, found.poses[tilt.number]) for tilt in tilts]
    projections = [_projection(coefficients, pose, box, run.constraint) for pose in poses]
    angles = np.degrees([(pose.theta_rad, pose.phi_rad, pose.psi_rad) for pose in poses])
    shifts = found.poses[:, :2] * box.voxel_angstrom
    return xr.Dataset(
        {
            "potential": (("z", "y", "x"), volume.astype(np.float32)),
            "loss": (("epoch",), np.array(found.losses)),
            "projection": (("tilt", "y", "x"), np.stack(projections).astype(np.float32)),
            "probe": (
                ("tilt", "mode", "probe_y", "probe_x"),
                np.stack([backend.to_host(p) for p in probes]).astype(np.complex64),
            ),
            "shift_x_angstrom": (("tilt",), shifts[:, 0]),
            "shift_y_angstrom": (("tilt",), shifts[:, 1]),
            "theta_deg": (("tilt",), angles[:, 0]),
            "phi_deg": (("tilt",), angles[:, 1]),
            "psi_deg": (("tilt",), angles[:, 2]),
            "turn_deg": (("tilt", "axis"), np.degrees(found.poses[:, TURNS])),
            "focus_change_angstrom": (("tilt",), found.poses[:, FOCUS]),
            "vacuum_share": (("tilt",), found.vacuum, {"long_name": "share of the lit field with vacuum taken off"}),
        },
        attrs={
            "voxel_angstrom": box.voxel_angstrom,
            "slice_thickness_angstrom": tilts[0].view.slice_thickness_angstrom,
            "slices": tilts[0].view.slices,
            "epochs": [epoch.kind for epoch in epochs_of(settings)],
            "sigma_rad_per_volt_angstrom": sigma,
            "shift_change_rms_px": float(np.sqrt(np.mean(np.sum(found.poses[:, SHIFTS] ** 2, axis=1)))),
            "masked_pixels": [_masked(tilt, settings) for tilt in tilts],
            "final_loss": float(np.average(run.losses(found), weights=[len(tilt.recorded) for tilt in tilts])),
            "loss_unit": "per detector pixel and pattern, as met in each epoch",
        },
    )


def _masked(tilt: Tilt, settings: JointSettings) -> int:
    good = good_pixels(Store.open(tilt.path), tilt.number, settings)
    return 0 if good is None else int(np.count_nonzero(~good))


def _projection(coefficients: Array, pose: Pose, box: Box, constraint: Constraint) -> np.ndarray:
    """Return the projection (y, x) in rad of the volume at ``pose``, without its shift, on the box."""
    view = View.whole(pose, box, box.shape_zyx[1:], box.shape_zyx[0])
    return backend.to_host(start_slices(coefficients, view, constraint))[0]
