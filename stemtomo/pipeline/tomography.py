"""The verb ``tomography``: the volume from the projections of all tilts, block by block."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from stemtomo import backend
from stemtomo.algorithms.tomography import refinement, solver
from stemtomo.algorithms.tomography.alignment import without_translation
from stemtomo.distributed import Checkpoint, Executor, Handle, Parts, PlanRow
from stemtomo.distributed import executor as default_executor
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.errors import ConfigurationError
from stemtomo.io.provenance import Provenance
from stemtomo.io.store import Store
from stemtomo.physics.projection import TiltGeometry, Window, footprint, render, seen_everywhere, slabs
from stemtomo.pipeline.alignment import series_of
from stemtomo.pipeline.config import TomographySettings
from stemtomo.pipeline.progress import Progress, Silent

GROUP = "volume"
STAGE = "tomography"

#: Voxels times tilts of a block that keeps a core busy for about 50 ms per iteration.
_VOXEL_TILTS_PER_BLOCK = 100_000_000


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
    wholly in view: what enters and leaves the view as it tilts would pull at them otherwise.

    Returns
    -------
    dict
        ``loss``: relative misfit |A v - b| / |b| after every iteration; ``refined``: whether shifts were refined, and
        ``shift_change_rms_px`` how far; ``computed``: whether anything was done.

    Raises
    ------
    StoreError
        If projections or alignment are missing.
    ConfigurationError
        If the projections do not say how phase and potential are related.
    """
    store = Store.of(store)
    settings = settings or TomographySettings()
    executor = executor or default_executor()
    progress = progress or Silent()
    inputs = {group: store.fingerprint(group) for group in ("projections", "alignment")}
    provenance = Provenance.start(STAGE, settings.model_dump(), inputs)
    progress.start(STAGE, settings.iterations, "iteration")
    todo = not store.is_complete(GROUP, provenance.fingerprint)
    if todo:
        problem = _problem(store, settings)
        if settings.blocks is None and _useful_blocks_of(problem.geometry) == 1:
            executor = ThreadExecutor(1)  # an iteration takes less time than sending its parts to workers and back
        checkpoint = Checkpoint(store.checkpoint_path(GROUP), provenance.fingerprint)
        found = reconstruct(problem, settings, executor, progress, checkpoint)
        store.write(GROUP, _dataset(found, problem, _refined(problem, settings)), provenance)
        checkpoint.clear()
    progress.finish(STAGE)
    result = store.read(GROUP)
    return {
        "loss": result["loss"].values.tolist(),
        "refined": result.attrs["shifts_refined"],
        "shift_change_rms_px": result.attrs["shift_change_rms_px"],
        "computed": todo,
    }


def plan_tomography(store: Store, settings: TomographySettings | None = None, workers: int = 1) -> PlanRow:
    """Say what :func:`tomography` will hold, read and write, from the store's metadata alone."""
    projections = store.read("projections")
    tilts, height, width = projections["phase"].shape
    settings = settings or TomographySettings()
    return plan_row((height, width), tilts, float(projections.attrs["pixel_angstrom"]), settings, workers)


def plan_row(
    shape_yx: tuple[int, int], tilts: int, pixel_angstrom: float, settings: TomographySettings, workers: int = 1
) -> PlanRow:
    """Say the same for projections of ``shape_yx`` that are not there yet."""
    voxels = math.prod(_volume_shape(shape_yx, pixel_angstrom, settings))
    stack = tilts * math.prod(shape_yx)
    blocks = min(settings.blocks or min(workers, _useful_blocks(voxels, tilts)), shape_yx[0])
    return PlanRow(
        STAGE,
        tasks=blocks,
        # A step holds its point and its gradient beside the two iterates that stay; images are summed and compared.
        bytes_per_task=math.ceil(voxels / blocks) * 12 + stack * 24,
        bytes_read=stack * 5,
        bytes_written=voxels * 4 + (settings.iterations // settings.checkpoint_every) * voxels * 8,
        resident_bytes=voxels * 8 + stack * 17,
    )


@dataclass(frozen=True)
class Problem:
    """Projections, how they were taken, and what turns rad per voxel into V.

    Parameters
    ----------
    measured
        Projections in host memory.
    geometry
        Poses with the shifts of the alignment.
    voxel_angstrom
        Edge of a voxel, which is a pixel of the projections.
    sigma_rad_per_volt_angstrom
        Interaction parameter.
    wholly_in_view
        The specimen lies inside every projection.
    """

    measured: solver.Measurement
    geometry: TiltGeometry
    voxel_angstrom: float
    sigma_rad_per_volt_angstrom: float
    wholly_in_view: bool = True


class Reconstruction(NamedTuple):
    """Coefficients of the volume (z, y, x) in rad per voxel, loss per iteration, shifts (tilt, 2) in px."""

    coefficients: np.ndarray
    losses: list[float]
    shifts_px: np.ndarray


class _Iterate(NamedTuple):
    """Where a reconstruction stands after an iteration."""

    blocks: Parts
    control: Handle
    shifts_px: np.ndarray
    last_shift_step: np.ndarray
    losses: list[float]


def reconstruct(
    problem: Problem,
    settings: TomographySettings,
    executor: Executor,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> Reconstruction:
    """Return the volume of ``problem``; without a ``checkpoint``, from the start and in one go."""
    progress = progress or Silent()
    saved = Parts.load(executor, checkpoint) if checkpoint else None
    count = min(executor.workers, _useful_blocks_of(problem.geometry)) if settings.blocks is None else settings.blocks
    count = len(saved.parts) if saved else count
    run = _Run.prepare(problem, settings, executor, count)
    state, first = run.resume(saved.parts, saved.shared) if saved else run.start(), saved.step if saved else 0
    progress.advance(first)
    for iteration in range(first + 1, settings.iterations + 1):
        state = run.iterate(state, iteration)
        progress.advance(loss=state.losses[-1])
        if checkpoint and iteration % settings.checkpoint_every == 0 and iteration < settings.iterations:
            kept = state.blocks.save(checkpoint, iteration, run.shared(state))
            state = run.resume(kept.parts, kept.shared)
    volume = np.concatenate(state.blocks.map(_coefficients).gather(), axis=1)
    return Reconstruction(volume, state.losses, state.shifts_px)


@dataclass(frozen=True)
class _Run:
    """What the iterations of one reconstruction share."""

    executor: Executor
    measured: Handle
    geometry: TiltGeometry
    windows: list[Window]
    supports: Parts
    constraint: solver.Constraint
    schedule: refinement.ShiftSchedule | None
    step: float

    @classmethod
    def prepare(cls, problem: Problem, settings: TomographySettings, executor: Executor, count: int) -> _Run:
        windows = slabs(problem.geometry.volume_shape, count)
        measured = executor.submit(_placed, executor.broadcast(problem.measured))
        supports = Parts.create(executor, _support, windows, problem.geometry, measured, settings.support)
        run = cls(
            executor=executor,
            measured=measured,
            geometry=problem.geometry,
            windows=windows,
            supports=supports,
            constraint=solver.Constraint(settings.positivity, settings.soft_threshold_rad),
            schedule=refinement.ShiftSchedule(settings.iterations) if _refined(problem, settings) else None,
            step=0.0,
        )
        return replace(run, step=solver.step_length(run.lipschitz()))

    def start(self) -> _Iterate:
        """Return the empty volume."""
        blocks = Parts.create(self.executor, _empty, self.windows, beside=self.supports)
        control = self.executor.submit(solver.steer, self.project(blocks, self.geometry), None, self.measured)
        shifts = self.geometry.shifts_px
        return _Iterate(blocks, control, shifts, np.zeros_like(shifts), [])

    def resume(self, blocks: Parts, shared: dict[str, Any]) -> _Iterate:
        """Return what :meth:`shared` and the blocks were saved from."""
        control = self.executor.broadcast(shared["control"])
        losses = [float(loss) for loss in shared["losses"]]
        return _Iterate(blocks, control, shared["shifts_px"], shared["last_shift_step"], losses)

    def shared(self, state: _Iterate) -> dict[str, Any]:
        """Return what a checkpoint holds beside the blocks."""
        return {
            "control": state.control,
            "shifts_px": state.shifts_px,
            "last_shift_step": state.last_shift_step,
            "losses": np.array(state.losses),
        }

    def iterate(self, state: _Iterate, iteration: int) -> _Iterate:
        """Return the next iterate; waits for its loss."""
        geometry = self.geometry.shifted_to(state.shifts_px)
        blocks = self.descend(state, geometry)
        images, control, last = self.project(blocks, geometry), state.control, state.last_shift_step
        if self.schedule is not None and self.schedule.due(iteration):
            blur_px = self.schedule.blur_px(iteration)
            wanted = self.executor.submit(_shift_steps, images, self.measured, geometry.rotations, blur_px)
            last = self.executor.gather(wanted) + self.schedule.momentum * last
            geometry = geometry.shifted_to(without_translation(geometry.shifts_px + last, geometry.rotations))
            before, images = images, self.project(blocks, geometry)
            control = self.executor.submit(solver.moved, control, before, images)
        control = self.executor.submit(solver.steer, images, control, self.measured)
        loss = self.executor.gather(self.executor.submit(getitem, control, "loss"))
        return _Iterate(blocks, control, geometry.shifts_px, last, [*state.losses, float(loss)])

    def project(self, blocks: Parts, geometry: TiltGeometry) -> Handle:
        """Return the projections of the whole volume."""
        images = self.footprints(geometry)
        parts = blocks.map(solver.project_block, geometry, each=(self.windows, images, self.supports))
        return parts.sum_into(geometry.image_shape, images)

    def descend(self, state: _Iterate, geometry: TiltGeometry) -> Parts:
        """Return the blocks after one gradient step."""
        images = self.footprints(geometry)
        residuals = state.blocks.cut(self.executor.submit(getitem, state.control, "residual"), images)
        beta = self.executor.submit(getitem, state.control, "beta")
        columns = (self.windows, images, residuals, self.supports)
        return state.blocks.map(solver.descend, geometry, self.constraint, beta, self.step, each=columns)

    def lipschitz(self) -> float:
        """Return the Lipschitz constant of the gradient by power iterations."""
        images = self.footprints(self.geometry)
        handle = self.executor.submit(solver.power_start, self.measured)
        norm: Handle = 0.0
        for _ in range(solver.POWER_ITERATIONS):
            cuts = self.supports.cut(handle, images)
            parts = cuts.map(solver.project_backprojection, self.geometry, each=(self.windows, images, self.supports))
            result = self.executor.submit(
                solver.power_step, parts.sum_into(self.geometry.image_shape, images), self.measured
            )
            handle, norm = self.executor.submit(getitem, result, 0), self.executor.submit(getitem, result, 1)
        return float(self.executor.gather(norm))

    def footprints(self, geometry: TiltGeometry) -> list[Window]:
        """Return where the blocks are seen."""
        return [footprint(geometry, window) for window in self.windows]


def _problem(store: Store, settings: TomographySettings) -> Problem:
    projections, alignment = store.read("projections").compute(), store.read("alignment").compute()
    attrs = projections.attrs
    if "sigma_rad_per_volt_angstrom" not in attrs:
        raise ConfigurationError(
            f"{store.path}: projections have no sigma_rad_per_volt_angstrom, which turns phase into potential; "
            "run the stage 'projections' again"
        )
    pixel = float(attrs["pixel_angstrom"])
    images = projections["phase"].values.astype(np.float32)
    shifts = np.stack([alignment[f"shift_{axis}_angstrom"].values for axis in "xy"], axis=-1) / pixel
    shape = (images.shape[1], images.shape[2])
    rotations = series_of(projections).rotations
    geometry = TiltGeometry(rotations, shifts, _volume_shape(shape, pixel, settings), shape, settings.degree)
    weights = np.ones(len(images), np.float32)
    measured = solver.Measurement(images, projections["valid"].values, weights, settings.element_width_px)
    sigma = float(attrs["sigma_rad_per_volt_angstrom"])
    return Problem(measured, geometry, pixel, sigma, bool(alignment.attrs["wholly_in_view"]))


def _refined(problem: Problem, settings: TomographySettings) -> bool:
    return settings.refine_shifts and problem.wholly_in_view and len(problem.geometry) > 1


def _useful_blocks(voxels: int, tilts: int) -> int:
    """Blocks that are worth a task each."""
    return max(1, voxels * tilts // _VOXEL_TILTS_PER_BLOCK)


def _useful_blocks_of(geometry: TiltGeometry) -> int:
    return _useful_blocks(math.prod(geometry.volume_shape), len(geometry))


def _volume_shape(
    shape_yx: tuple[int, int], pixel_angstrom: float, settings: TomographySettings
) -> tuple[int, int, int]:
    if settings.depth_angstrom is None:
        return (shape_yx[1], *shape_yx)
    return (2 * max(1, math.ceil(settings.depth_angstrom / pixel_angstrom / 2)), *shape_yx)


def _dataset(found: Reconstruction, problem: Problem, refined: bool) -> xr.Dataset:
    volume = render(found.coefficients, problem.geometry.degree, problem.measured.element_width_px)
    volume *= volume.dtype.type(1 / (problem.sigma_rad_per_volt_angstrom * problem.voxel_angstrom))
    shifts = found.shifts_px * problem.voxel_angstrom
    change = found.shifts_px - problem.geometry.shifts_px
    return xr.Dataset(
        {
            "potential": (("z", "y", "x"), volume),
            "loss": (("iteration",), np.array(found.losses)),
            "shift_x_angstrom": (("tilt",), shifts[:, 0]),
            "shift_y_angstrom": (("tilt",), shifts[:, 1]),
        },
        attrs={
            "voxel_angstrom": problem.voxel_angstrom,
            "shifts_refined": refined,
            "shift_change_rms_px": float(np.sqrt(np.mean(np.sum(change**2, axis=1)))),
            "loss_unit": "misfit of the projections over their norm",
        },
    )


def _placed(measured: solver.Measurement) -> solver.Measurement:
    """Return ``measured`` in the memory of the GPU, where this worker has one."""
    place = backend.to_device if backend.gpu_available() else np.asarray
    return replace(
        measured, images=place(measured.images), valid=place(measured.valid), weights=place(measured.weights)
    )


def _empty(window: Window) -> solver.Block:
    place = backend.to_device if backend.gpu_available() else np.asarray
    volume = place(np.zeros([stop - start for start, stop in window], np.float32))
    return {"volume": volume, "previous": volume}


def _support(window: Window, geometry: TiltGeometry, measured: solver.Measurement, kind: str) -> Any:
    return seen_everywhere(geometry, measured.valid, window) if kind == "seen" else None


def _shift_steps(
    images: backend.Array, measured: solver.Measurement, rotations: np.ndarray, blur_px: float
) -> np.ndarray:
    seen = measured.seen(images)
    return refinement.gauss_newton_shifts(seen, seen - measured.images, measured.valid, rotations, blur_px)


def _coefficients(block: solver.Block) -> np.ndarray:
    return backend.to_host(block["volume"])
