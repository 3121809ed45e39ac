"""Reconstructing a volume by the method that the settings name, with checkpoints and R factors."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from operator import getitem
from typing import Any

import numpy as np

from stemtomo import backend
from stemtomo.algorithms.tomography import conjugate, genfire, quality, refinement, solver, weighting
from stemtomo.distributed import Checkpoint, Executor, Handle, Parts
from stemtomo.physics.projection import TiltGeometry, Window, backproject, project
from stemtomo.pipeline import streaming, streaming_conjugate
from stemtomo.pipeline.config import TomographySettings
from stemtomo.pipeline.descent import (
    Blocks,
    Descent,
    Iterate,
    Method,
    Problem,
    Reconstruction,
    coefficients,
    ray_lengths,
    refined_by,
    useful_blocks_of,
    voxel_scales,
)
from stemtomo.pipeline.progress import Progress, Silent

_RESIRE_STEP = 2.0


def reconstruct(
    problem: Problem,
    settings: TomographySettings,
    executor: Executor,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
    schedule: refinement.PoseSchedule | None = None,
    files: Checkpoint | None = None,
) -> Reconstruction:
    """Return the volume of ``problem``; without a ``checkpoint``, from the start and in one go.

    Parameters
    ----------
    files
        Where the blocks of the volume lie, two steps of them; they stay in memory if not given.
    schedule
        When and how poses are refined; that of ``settings`` if not given.
    """
    progress = progress or Silent()
    if settings.method in ("wbp", "genfire"):
        return direct(problem, settings, executor, progress, files)
    free = quality.held_out(problem.measured.valid, settings.free_fraction) if settings.free_fraction else None
    used = problem
    if free is not None:
        used = replace(problem, measured=replace(problem.measured, valid=problem.measured.valid & ~free))
    if files is not None:
        return streamed(used, settings, executor, progress, files, schedule or refined_by(problem, settings), free)
    saved = Parts.load(executor, checkpoint) if checkpoint else None
    count = min(executor.workers, useful_blocks_of(problem.geometry)) if settings.blocks is None else settings.blocks
    blocks = Blocks.cut(used, settings, executor, len(saved.parts) if saved else count)
    method = iterative(used, settings, blocks, schedule or refined_by(problem, settings))
    state, first = method.resumed(saved.parts, saved.shared) if saved else method.start(), saved.step if saved else 0
    progress.advance(first)
    for iteration in range(first + 1, settings.iterations + 1):
        state = method.iterate(state, iteration)
        progress.advance(loss=state.losses[-1])
        if checkpoint and iteration % settings.checkpoint_every == 0 and iteration < settings.iterations:
            kept = state.blocks.save(checkpoint, iteration, method.saved(state))
            state = method.resumed(kept.parts, kept.shared)
    volume = np.concatenate(state.blocks.map(coefficients).gather(), axis=1)
    images = executor.submit(getitem, state.control, "images")
    factors = executor.gather(executor.submit(quality.factors, images, blocks.measured, free))
    return Reconstruction(volume, state.losses, state.geometry, factors)


def streamed(
    problem: Problem,
    settings: TomographySettings,
    executor: Executor,
    progress: Progress,
    files: Checkpoint,
    schedule: refinement.PoseSchedule | None,
    free: np.ndarray | None = None,
) -> Reconstruction:
    """Return the volume of ``problem``, whose blocks are in ``files``; goes on from there."""
    geometry, saved = problem.geometry, files.latest()
    voxels, rows = math.prod(geometry.volume_shape), geometry.volume_shape[1]
    count = settings.blocks or streaming.block_count(voxels, len(geometry), rows, executor.workers)
    each = streaming_conjugate.FILES if settings.method == "cgls" else 1
    count = count if saved is None else (len(saved.parts) - 1) // each
    blocks = streaming.FileBlocks.cut(problem, settings, executor, count)
    method = _in_files(problem, settings, blocks, files, schedule)
    state = method.begin()
    progress.advance(len(state.losses))
    for iteration in range(len(state.losses) + 1, settings.iterations + 1):
        state = method.iterate(state, iteration)
        progress.advance(loss=state.losses[-1])
    images = executor.submit(getitem, state.control, "images")
    factors = executor.gather(executor.submit(quality.factors, images, blocks.measured, free))
    return Reconstruction(np.empty(0), state.losses, state.geometry, factors, files=method.file_blocks(state))


def _in_files(
    problem: Problem,
    settings: TomographySettings,
    blocks: Blocks,
    files: Checkpoint,
    schedule: refinement.PoseSchedule | None,
) -> streaming.StreamedDescent | streaming_conjugate.StreamedConjugate:
    """Return the iterative method that ``settings`` name, over blocks in ``files``."""
    if settings.method == "cgls":
        return streaming_conjugate.StreamedConjugate(blocks, problem.geometry, files)
    plain = iterative(problem, settings, blocks, schedule)
    assert isinstance(plain, Descent)
    given = {field.name: getattr(plain, field.name) for field in fields(plain)}
    rays = blocks.executor.submit(_valid_images, plain.blocks.measured) if settings.method == "sirt" else None
    return streaming.StreamedDescent(**given, checkpoint=files, rays=rays)


def iterative(
    problem: Problem, settings: TomographySettings, blocks: Blocks, schedule: refinement.PoseSchedule | None
) -> Method:
    """Return the iterative method that ``settings`` name."""
    geometry = problem.geometry
    constraint = solver.Constraint(settings.positivity, settings.soft_threshold_rad)
    if settings.method == "cgls":
        return Conjugate(blocks, geometry)
    if settings.method == "sirt":
        blocks = replace(
            blocks, measured=blocks.executor.submit(_balanced, _lengths(blocks, geometry), blocks.measured)
        )
        in_files = isinstance(blocks, streaming.FileBlocks)  # a volume of factors would not fit the memory either
        scales = None if in_files else _scales(blocks, geometry)
        return Descent(blocks, geometry, constraint, 1.0, accelerated=False, scales=scales)
    if settings.method == "resire":
        step = _RESIRE_STEP / (len(geometry) * max(geometry.volume_shape))
        return Descent(blocks, geometry, constraint, step, accelerated=False)
    step = solver.step_length(blocks.lipschitz(geometry))
    weight = settings.tv_weight_rad if settings.method == "fista_tv" else 0.0
    return Descent(blocks, geometry, constraint, step, schedule=schedule, tv_weight=weight)


def direct(
    problem: Problem,
    settings: TomographySettings,
    executor: Executor,
    progress: Progress,
    files: Checkpoint | None = None,
) -> Reconstruction:
    """Return the volume by a method that is not a descent over blocks: weighted back-projection or GENFIRE."""
    geometry, measured = problem.geometry, problem.measured
    if files is not None:
        return _back_projected(problem, settings, executor, progress, files)
    if settings.method == "genfire":
        found: genfire.Solution = executor.gather(executor.submit(_genfire, problem, settings))
        volume, losses, misses = found
    else:
        images = executor.submit(_filtered, measured, geometry)
        count = min(executor.workers, useful_blocks_of(geometry)) if settings.blocks is None else settings.blocks
        blocks = Blocks.cut(problem, settings, executor, count)
        parts = blocks.back(_back, images, Parts.create(executor, tuple, blocks.windows), geometry)
        volume, losses, misses = np.concatenate(parts.gather(), axis=1), [], []
    progress.advance(settings.iterations)
    seen = project(geometry, np.ascontiguousarray(volume), geometry.whole_volume, geometry.whole_image)
    factors = quality.factors(seen, measured)
    losses = losses or [measured.misfit(measured.seen(seen))]
    return Reconstruction(volume, losses, geometry, factors, tuple(misses))


def _back_projected(
    problem: Problem, settings: TomographySettings, executor: Executor, progress: Progress, files: Checkpoint
) -> Reconstruction:
    """Return the weighted back-projection, its blocks in ``files``."""
    geometry, measured = problem.geometry, problem.measured
    shape = geometry.volume_shape
    count = settings.blocks or streaming.block_count(math.prod(shape), len(geometry), shape[1], executor.workers)
    blocks = streaming.FileBlocks.cut(problem, settings, executor, count)
    parts = streaming.back_projected(blocks, executor.submit(_filtered, measured, geometry), geometry, files)
    seen: np.ndarray = backend.to_host(executor.gather(blocks.project(solver.project_block, parts, geometry)))
    progress.advance(settings.iterations)
    losses, factors = [measured.misfit(measured.seen(seen))], quality.factors(seen, measured)
    return Reconstruction(np.empty(0), losses, geometry, factors, files=tuple(parts.gather()))


@dataclass(frozen=True)
class Conjugate:
    """Conjugate gradients over blocks."""

    blocks: Blocks
    geometry: TiltGeometry

    def start(self) -> Iterate:
        """Return the empty volume and its first direction."""
        executor = self.blocks.executor
        empty = Parts.create(executor, _empty, self.blocks.windows, beside=self.blocks.supports)
        control = executor.submit(conjugate.begin, self.blocks.measured)
        blocks = self._turned(empty, control, 0.0)
        return Iterate(blocks, control, self.geometry, np.zeros((len(self.geometry), 6)), [])

    def iterate(self, state: Iterate, iteration: int) -> Iterate:
        """Return the next iterate; waits for its loss."""
        executor = self.blocks.executor
        squared = executor.gather(state.blocks.map(conjugate.squared_norm).sum())
        images = self.blocks.project(conjugate.project_direction, state.blocks, self.geometry)
        control = executor.submit(conjugate.advance, images, squared, state.control, self.blocks.measured)
        moved = state.blocks.map(conjugate.travel, executor.submit(getitem, control, "step"))
        loss = executor.gather(executor.submit(getitem, control, "loss"))
        return Iterate(
            self._turned(moved, control, squared), control, self.geometry, state.last_step, [*state.losses, float(loss)]
        )

    def saved(self, state: Iterate) -> dict[str, Any]:
        """Return what a checkpoint holds beside the blocks."""
        return {"control": state.control, "losses": np.array(state.losses)}

    def resumed(self, blocks: Parts, shared: dict[str, Any]) -> Iterate:
        """Return what :meth:`saved` and the blocks were made of."""
        control = self.blocks.executor.broadcast(shared["control"])
        losses = [float(loss) for loss in shared["losses"]]
        return Iterate(blocks, control, self.geometry, np.zeros((len(self.geometry), 6)), losses)

    def _turned(self, blocks: Parts, control: Handle, before: float) -> Parts:
        executor = self.blocks.executor
        residual = executor.submit(getitem, control, "residual")
        found = self.blocks.back(conjugate.gradient, residual, blocks, self.geometry)
        return found.map(conjugate.turn, found.map(conjugate.squared_norm).sum(), before)


def _lengths(blocks: Blocks, geometry: TiltGeometry) -> Handle:
    views = blocks.footprints(geometry)
    columns = list(zip(blocks.windows, views, strict=True))
    parts = blocks.supports.map(_block_lengths, geometry, each=(columns,))
    return parts.sum_into(geometry.image_shape, views)


def _block_lengths(support: Any, geometry: TiltGeometry, windows: tuple[Window, Window]) -> backend.Array:
    return ray_lengths(windows[0], geometry, windows[1], support)


def _scales(blocks: Blocks, geometry: TiltGeometry) -> Parts:
    ones = blocks.executor.submit(_valid_images, blocks.measured)
    parts = Parts.create(blocks.executor, tuple, blocks.windows, beside=blocks.supports)
    return blocks.back(_voxel_scales, ones, parts, geometry)


def _valid_images(measured: solver.Measurement) -> backend.Array:
    return measured.seen(measured.weigh(backend.array_namespace(measured.images).ones_like(measured.images)))


def _voxel_scales(
    _: Any, geometry: TiltGeometry, window: Window, image: Window, images: backend.Array, support: Any
) -> backend.Array:
    return voxel_scales(window, geometry, image, images, support)


def _balanced(lengths: backend.Array, measured: solver.Measurement) -> solver.Measurement:
    return replace(measured, balance=solver.balance(measured.seen(lengths)))


def _filtered(measured: solver.Measurement, geometry: TiltGeometry) -> backend.Array:
    return weighting.filtered(measured.images * measured.valid, geometry.rotations, float(geometry.volume_shape[0]))


def _back(
    _: Any, geometry: TiltGeometry, window: Window, image: Window, images: backend.Array, support: Any
) -> np.ndarray:
    return backend.to_host(backproject(geometry, images, image, window, support))


def _genfire(problem: Problem, settings: TomographySettings) -> genfire.Solution:
    geometry, measured = problem.geometry, problem.measured
    fourier = genfire.gridded(
        measured.images * measured.valid,
        geometry.rotations,
        geometry.shifts_px,
        genfire.edge_of((*geometry.volume_shape, *geometry.image_shape), settings.oversampling),
        settings.gridding_reach_px,
        settings.gridding,
    )
    like = backend.to_device(np.zeros(1, np.float32)) if backend.gpu_available() else None
    solution = genfire.reconstruct(
        fourier,
        geometry.volume_shape,
        settings.iterations,
        positive=settings.positivity,
        extension=settings.resolution_extension,
        like=like,
    )
    return solution._replace(volume=backend.to_host(solution.volume))


def _empty(window: Window) -> conjugate.Block:
    place = backend.to_device if backend.gpu_available() else np.asarray
    volume = place(np.zeros([stop - start for start, stop in window], np.float32))
    return {"volume": volume, "direction": volume, "gradient": volume}
