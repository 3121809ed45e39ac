"""The epochs of joint tomography: their order, where they start from, and how an interrupted run goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from stemtomo.algorithms.joint.pose import SHIFTS, TURNS
from stemtomo.algorithms.joint.view import Box
from stemtomo.algorithms.ptychography.phase import centred
from stemtomo.algorithms.tomography.poses import turns_between
from stemtomo.distributed import Checkpoint, Parts
from stemtomo.errors import ConfigurationError
from stemtomo.io.schema import tilt_name
from stemtomo.io.store import Store
from stemtomo.physics.electron import interaction_parameter, wavelength_angstrom
from stemtomo.physics.propagation import fresnel_propagator, propagate
from stemtomo.pipeline.alignment import series_of
from stemtomo.pipeline.joint_parts import first_probe
from stemtomo.pipeline.joint_patterns import tile_counted, tilt_electrons
from stemtomo.pipeline.joint_steps import JointRun, Standing
from stemtomo.pipeline.progress import Progress
from stemtomo.pipeline.settings.joint import JointSettings


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


def reconstruct(
    store: Store, run: JointRun, schedule: list[Epoch], checkpoint: Checkpoint | None, progress: Progress
) -> Standing:
    """Return the standing after all epochs of ``schedule``, from the last checkpoint if there is one."""
    saved = Parts.load(run.executor, checkpoint) if checkpoint else None
    if saved:
        now, first = _resumed(run, saved.parts, saved.shared), saved.step
    else:
        now, first = first_standing(store, run), 0
    progress.advance(first)
    settings = run.settings
    for number in range(first, len(schedule)):
        epoch = schedule[number]
        fresh = number in (0, settings.single_slice_epochs) or schedule[number - 1].kind != epoch.kind
        settling = number > 0 and schedule[number - 1].batches != epoch.batches
        shown = now.losses or settings.start == "sequential"
        if (fresh or settling) and epoch.kind != "single" and settings.support == "auto" and shown:
            now = run.find_support(now)
        if epoch.kind == "accelerated":
            now = run.accelerate(now)
        else:
            now = run.sweep(now, number, epoch.step, epoch.batches, epoch.kind == "single")
        progress.advance(loss=now.losses[-1])
        due = (number + 1) % settings.checkpoint_every == 0 and number + 1 < len(schedule)
        if checkpoint and due:
            shared = {"probes": list(now.probes), "poses": now.poses, "losses": np.array(now.losses)}
            shared["vacuum"] = now.vacuum
            run.outlines.clear()  # they hold on to the tasks before the checkpoint
            kept = now.volume.save(checkpoint, number + 1, shared)
            now = _resumed(run, kept.parts, kept.shared)
    return now


def _resumed(run: JointRun, volume: Parts, shared: dict[str, Any]) -> Standing:
    probes = [run.executor.broadcast(probe) for probe in shared["probes"]]
    losses = [float(loss) for loss in shared["losses"]]
    return Standing(volume, probes, shared["poses"], shared["vacuum"], losses)


def first_standing(store: Store, run: JointRun) -> Standing:
    """Return where ``run`` starts from: an empty volume, or what the sequential way found."""
    settings = run.settings
    if settings.start == "sequential":
        return _from_sequential(store, run)
    electrons = electrons_of(run)
    if settings.probe == "shared":
        electrons = [float(np.mean(electrons))] * len(electrons)
    probes = [first_probe(tilt, count, settings) for tilt, count in zip(run.tilts, electrons, strict=True)]
    return run.start(probes, np.zeros((len(run.tilts), 6)))


def electrons_of(run: JointRun) -> list[float]:
    """Return the electrons of the probe of every tilt; each tile goes through its own patterns."""
    counted = [parts.map(tile_counted).sum() for parts in run.patterns]
    tasks = [
        run.executor.submit(tilt_electrons, total, tilt, run.settings)
        for total, tilt in zip(counted, run.tilts, strict=True)
    ]
    return [float(found) for found in run.executor.gather(tasks)]


def _from_sequential(store: Store, run: JointRun) -> Standing:
    """Start from what ptychography, alignment and tomography found."""
    store.require_current("volume", "alignment")
    volume, box = store.read("volume").load(), run.tilts[0].view.box
    if abs(float(volume.attrs["voxel_angstrom"]) - box.voxel_angstrom) > 1e-4 * box.voxel_angstrom:
        raise ConfigurationError(
            f"{store.path}: the volume has voxels of {volume.attrs['voxel_angstrom']} Å, the objects pixels of"
            f" {box.voxel_angstrom} Å; set ptychography.detector_padding and joint.detector_padding alike, or start the"
            " joint reconstruction from zero"
        )
    sigma = interaction_parameter(store.optics(0).energy_ev)
    start = _fitted_into(volume["potential"].values * sigma * box.voxel_angstrom, box)
    poses = np.zeros((len(run.tilts), 6))
    if "shift_x_angstrom" in volume:
        poses[:, SHIFTS] = (
            np.stack([volume[f"shift_{axis}_angstrom"].values for axis in "xy"], axis=-1) / box.voxel_angstrom
        )
    alignment = store.read("alignment")
    if "theta_deg" in alignment:
        told = np.stack([tilt.view.pose.rotation for tilt in run.tilts])
        poses[:, TURNS] = turns_between(told, series_of(alignment).rotations)
    probes = []
    for tilt in run.tilts:
        result = store.read(f"ptychography/{tilt_name(tilt.number)}")
        probe = result["probe"].values
        probe = probe if probe.ndim == 3 else probe[None]
        pixel = (box.voxel_angstrom, box.voxel_angstrom)
        wavelength = wavelength_angstrom(tilt.optics.energy_ev)
        back = fresnel_propagator(probe.shape[-2:], pixel, wavelength, -float(result.attrs["first_slice_z_angstrom"]))
        probes.append(propagate(probe.copy(), back))
    return run.start(probes, poses, np.maximum(start, 0) if run.settings.positivity else start)


def _fitted_into(volume: np.ndarray, box: Box) -> np.ndarray:
    """Return ``volume`` (z, y, x) cropped or padded to ``box``, centre on centre."""
    depth, height, width = box.shape_zyx
    lateral = centred(volume, (height, width))
    return np.ascontiguousarray(np.moveaxis(centred(np.moveaxis(lateral, 0, 1), (depth, width)), 0, 1))
