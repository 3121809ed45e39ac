"""The verb ``joint``: the volume straight from the patterns of all tilts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from stemtomo import backend
from stemtomo.algorithms.joint.solver import Constraint, elements, start_slices
from stemtomo.algorithms.joint.view import View
from stemtomo.backend import Array
from stemtomo.distributed import Checkpoint, Executor, PlanRow
from stemtomo.distributed import executor as default_executor
from stemtomo.io.provenance import Provenance
from stemtomo.io.schema import tilt_name
from stemtomo.io.store import Store
from stemtomo.physics.electron import interaction_parameter
from stemtomo.pipeline.joint_epochs import epochs_of, reconstruct
from stemtomo.pipeline.joint_hand import compare_hands
from stemtomo.pipeline.joint_parts import box_of, tilts_of, voxels_per_slice
from stemtomo.pipeline.joint_steps import JointRun, Standing
from stemtomo.pipeline.progress import Progress, Silent
from stemtomo.pipeline.settings.joint import JointSettings

GROUP = "joint"


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
        result; ``tilt_sign``, where asked: ``verdict``, ``sentence`` (the ``note``) and the losses of both hands;
        ``shift_change_rms_px``; ``slices``; ``computed``.

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
    inputs = {f"tilt/{tilt_name(i)}": store.fingerprint(f"tilt/{tilt_name(i)}") for i in range(store.tilt_count)}
    if settings.start == "sequential":
        groups = ["volume", *(f"ptychography/{tilt_name(i)}" for i in range(store.tilt_count))]
        inputs.update({group: store.fingerprint(group) for group in groups})
    provenance = Provenance.start(GROUP, settings.model_dump(), inputs)
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
            dataset.attrs["tilt_sign"] = compare_hands(store, settings, executor, progress).to_attrs()
        store.write(GROUP, dataset, provenance)
        checkpoint.clear()
    progress.finish(GROUP)
    result = store.read(GROUP)
    hand = dict(result.attrs["tilt_sign"]) if settings.check_tilt_sign else None
    return {
        "loss": result["loss"].values.tolist(),
        "final_loss": float(result.attrs["final_loss"]),
        **({"tilt_sign": hand, "note": hand["sentence"]} if hand else {}),
        "shift_change_rms_px": float(result.attrs["shift_change_rms_px"]),
        "slices": result.attrs["slices"],
        "computed": todo,
    }


def plan_joint(store: Store, settings: JointSettings | None = None, workers: int = 1) -> PlanRow:
    """Say what :func:`joint` will hold, read and write, from the store's metadata alone."""
    settings = settings or JointSettings()
    scan, detector, optics = store.scan(0), store.detector(0), store.optics(0)
    box = box_of(store, settings)
    frames = scan.count * math.prod(detector.shape_yx) * store.frames(0, require_complete=False).dtype.itemsize
    slices = 1 if settings.single_slice else -(-box.shape_zyx[0] // voxels_per_slice(settings, box, optics))
    voxels = math.prod(box.shape_zyx)
    # The volume, its look-ahead and gradient, and while it is turned its complex copies; slices, their gradients.
    working = voxels * 4 * 10 + slices * math.prod(box.shape_zyx[1:]) * 4 * 8 + 64 * backend.CACHE_BYTES
    epochs = len(epochs_of(settings))
    return PlanRow(
        stage=GROUP,
        tasks=store.tilt_count * epochs,
        bytes_per_task=working + (0 if settings.resident else frames),
        bytes_read=frames * store.tilt_count * (1 if settings.resident else epochs),
        bytes_written=voxels * 4 * (1 + epochs // settings.checkpoint_every),
        resident_bytes=frames * store.tilt_count // max(1, workers) if settings.resident else 0,
    )


def _dataset(run: JointRun, found: Standing) -> xr.Dataset:
    """Return the volume in V, and its projections: what atoms are refined against, free of the missing wedge."""
    tilts, settings = run.tilts, run.settings
    state, probes = run.executor.gather([found.volume.handles[0], list(found.probes)])
    coefficients = state["coefficients"]
    constraint = Constraint(settings.positivity, settings.soft_threshold_rad, settings.element_width_px)
    box = tilts[0].view.box
    sigma = interaction_parameter(tilts[0].optics.energy_ev)
    volume = backend.to_host(elements(coefficients, settings.element_width_px)) / (sigma * box.voxel_angstrom)
    projections = [_projection(coefficients, tilt.single, constraint) for tilt in tilts]
    shifts = found.shifts_px * box.voxel_angstrom
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
        },
        attrs={
            "voxel_angstrom": box.voxel_angstrom,
            "slice_thickness_angstrom": tilts[0].view.slice_thickness_angstrom,
            "slices": tilts[0].view.slices,
            "sigma_rad_per_volt_angstrom": sigma,
            "shift_change_rms_px": float(np.sqrt(np.mean(np.sum(found.shifts_px**2, axis=1)))),
            "final_loss": float(np.average(run.losses(found), weights=[len(tilt.recorded) for tilt in tilts])),
            "loss_unit": "per detector pixel and pattern, as met in each epoch",
        },
    )


def _projection(coefficients: Array, view: View, constraint: Constraint) -> np.ndarray:
    """Return the projection (y, x) in rad of the volume at the pose of ``view``, without its shift, on the box."""
    unshifted = View.whole(view.pose, view.box, view.box.shape_zyx[1:], view.box.shape_zyx[0])
    return backend.to_host(start_slices(coefficients, unshifted, constraint))[0]
