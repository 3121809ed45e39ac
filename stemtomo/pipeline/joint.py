"""The verb ``joint``: the volume straight from the patterns of all tilts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from stemtomo import backend
from stemtomo.algorithms.joint.solver import Constraint, elements, start_slices
from stemtomo.algorithms.joint.view import Box, View
from stemtomo.algorithms.ptychography.phase import centred
from stemtomo.backend import Array
from stemtomo.distributed import Checkpoint, Executor, Parts, PlanRow
from stemtomo.distributed import executor as default_executor
from stemtomo.errors import ConfigurationError
from stemtomo.io.provenance import Provenance
from stemtomo.io.schema import tilt_name
from stemtomo.io.store import Store
from stemtomo.physics.electron import interaction_parameter, wavelength_angstrom
from stemtomo.physics.propagation import fresnel_propagator, propagate
from stemtomo.pipeline.joint_parts import box_of, electrons_of, first_probe, tilts_of, voxels_per_slice
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
        ``loss``: mean misfit per detector pixel over all tilts as met in every epoch; ``mirror_loss_warning``: what
        the data cannot tell; ``shift_change_rms_px``; ``computed``.

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
        found = _reconstruct(store, run, schedule, checkpoint, progress)
        store.write(GROUP, _dataset(store, run, found), provenance)
        checkpoint.clear()
    progress.finish(GROUP)
    result = store.read(GROUP)
    return {
        "loss": result["loss"].values.tolist(),
        "shift_change_rms_px": float(result.attrs["shift_change_rms_px"]),
        "slices": result.attrs["slices"],
        "computed": todo,
    }


@dataclass(frozen=True)
class Epoch:
    """One pass over all patterns."""

    kind: str
    """``single``, ``sweep`` or ``accelerated``."""
    step: float
    batches: int


def epochs_of(settings: JointSettings) -> list[Epoch]:
    """Return every epoch in order."""
    single = 0 if settings.single_slice else settings.single_slice_epochs
    sweeps = settings.sweeps + (settings.single_slice_epochs if settings.single_slice else 0)
    found = [Epoch("single", settings.step, settings.batches)] * single
    found += [Epoch("sweep", settings.step, settings.batches)] * sweeps
    settling = range(1, settings.settling_sweeps + 1)
    found += [Epoch("sweep", settings.step * 0.5**number, 1) for number in settling]
    return found + [Epoch("accelerated", settings.step, 1)] * settings.accelerated_epochs


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


def _reconstruct(
    store: Store, run: JointRun, schedule: list[Epoch], checkpoint: Checkpoint, progress: Progress
) -> Standing:
    saved = Parts.load(run.executor, checkpoint)
    if saved:
        now, first = _resumed(run, saved.parts, saved.shared), saved.step
    else:
        now, first = _first(store, run), 0
    progress.advance(first)
    settings = run.settings
    for number in range(first, len(schedule)):
        epoch = schedule[number]
        fresh = number == 0 or schedule[number - 1].kind != epoch.kind
        if fresh and epoch.kind != "single" and settings.support == "auto" and now.losses:
            now = run.find_support(now)
        if epoch.kind == "accelerated":
            now = run.accelerate(now)
        else:
            now = run.sweep(now, number, epoch.step, epoch.batches, epoch.kind == "single")
        progress.advance(loss=now.losses[-1])
        if (number + 1) % settings.checkpoint_every == 0 and number + 1 < len(schedule):
            shared = {"probes": list(now.probes), "shifts_px": now.shifts_px, "losses": np.array(now.losses)}
            kept = now.volume.save(checkpoint, number + 1, shared)
            now = _resumed(run, kept.parts, kept.shared)
    return now


def _resumed(run: JointRun, volume: Parts, shared: dict[str, Any]) -> Standing:
    probes = [run.executor.broadcast(probe) for probe in shared["probes"]]
    return Standing(volume, probes, shared["shifts_px"], [float(loss) for loss in shared["losses"]])


def _first(store: Store, run: JointRun) -> Standing:
    settings = run.settings
    if settings.start == "sequential":
        return _from_sequential(store, run)
    electrons = run.executor.gather([run.executor.submit(electrons_of, tilt, settings) for tilt in run.tilts])
    if settings.probe == "shared":
        electrons = [float(np.mean(electrons))] * len(electrons)
    probes = [first_probe(tilt, count, settings) for tilt, count in zip(run.tilts, electrons, strict=True)]
    return run.start(probes, np.zeros((len(run.tilts), 2)))


def _from_sequential(store: Store, run: JointRun) -> Standing:
    """Start from what ptychography, alignment and tomography found."""
    volume, box = store.read("volume").load(), run.tilts[0].view.box
    if abs(float(volume.attrs["voxel_angstrom"]) - box.voxel_angstrom) > 1e-4 * box.voxel_angstrom:
        raise ConfigurationError(
            f"{store.path}: the volume has voxels of {volume.attrs['voxel_angstrom']} Å, the objects pixels of"
            f" {box.voxel_angstrom} Å; start the joint reconstruction from zero"
        )
    sigma = interaction_parameter(store.optics(0).energy_ev)
    start = _fitted_into(volume["potential"].values * sigma * box.voxel_angstrom, box)
    shifts = np.zeros((len(run.tilts), 2))
    if "shift_x_angstrom" in volume:
        shifts = np.stack([volume[f"shift_{axis}_angstrom"].values for axis in "xy"], axis=-1) / box.voxel_angstrom
    probes = []
    for tilt in run.tilts:
        result = store.read(f"ptychography/{tilt_name(tilt.number)}")
        probe = result["probe"].values
        probe = probe if probe.ndim == 3 else probe[None]
        pixel = (box.voxel_angstrom, box.voxel_angstrom)
        wavelength = wavelength_angstrom(tilt.optics.energy_ev)
        back = fresnel_propagator(probe.shape[-2:], pixel, wavelength, -float(result.attrs["first_slice_z_angstrom"]))
        probes.append(propagate(probe.copy(), back))
    return run.start(probes, shifts, np.maximum(start, 0) if run.settings.positivity else start)


def _fitted_into(volume: np.ndarray, box: Box) -> np.ndarray:
    """Return ``volume`` (z, y, x) cropped or padded to ``box``, centre on centre."""
    depth, height, width = box.shape_zyx
    lateral = centred(volume, (height, width))
    return np.ascontiguousarray(np.moveaxis(centred(np.moveaxis(lateral, 0, 1), (depth, width)), 0, 1))


def _dataset(store: Store, run: JointRun, found: Standing) -> xr.Dataset:
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
            "loss_unit": "per detector pixel and pattern, as met in each epoch",
        },
    )


def _projection(coefficients: Array, view: View, constraint: Constraint) -> np.ndarray:
    """Return the projection (y, x) in rad of the volume at the pose of ``view``, without its shift, on the box."""
    unshifted = View.whole(view.pose, view.box, view.box.shape_zyx[1:], view.box.shape_zyx[0])
    return backend.to_host(start_slices(coefficients, unshifted, constraint))[0]
