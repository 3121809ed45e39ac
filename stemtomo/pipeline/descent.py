"""A volume cut into blocks, and the methods that descend a gradient: plain, accelerated, balanced, smoothed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any, NamedTuple, Protocol

import numpy as np

from stemtomo import backend
from stemtomo.algorithms import total_variation
from stemtomo.algorithms.tomography import quality, refinement, solver
from stemtomo.algorithms.tomography.poses import stepped
from stemtomo.distributed import Executor, Handle, Parts
from stemtomo.physics.projection import (
    TiltGeometry,
    Window,
    backproject,
    depth_moments,
    footprint,
    project,
    seen_everywhere,
    slabs,
)
from stemtomo.pipeline.config import TomographySettings

#: Voxels times tilts of a block that keeps a core busy for about 50 ms per iteration.
_VOXEL_TILTS_PER_BLOCK = 100_000_000


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
    matched
        The shifts were found under strong noise, by matching projections.
    """

    measured: solver.Measurement
    geometry: TiltGeometry
    voxel_angstrom: float
    sigma_rad_per_volt_angstrom: float
    wholly_in_view: bool = True
    matched: bool = False


class Reconstruction(NamedTuple):
    """Coefficients of the volume (z, y, x) in rad per voxel, loss per iteration, poses and R factors at the end.

    A streamed volume has its blocks in ``files``, and no coefficients in memory.
    """

    coefficients: np.ndarray
    losses: list[float]
    geometry: TiltGeometry
    factors: quality.Factors
    misses: tuple[float, ...] = ()
    files: tuple[Any, ...] = ()

    @property
    def r_free(self) -> float | None:
        """R factor of what was held out: pixels, or Fourier points; ``None`` if nothing was."""
        found = self.misses[-1] if self.misses else self.factors.r_free
        return None if math.isnan(found) else float(found)

    @property
    def shifts_px(self) -> np.ndarray:
        """Shifts (tilt, 2), columns x, y."""
        return self.geometry.shifts_px


class Iterate(NamedTuple):
    """Where a reconstruction stands after an iteration: blocks, what they share, poses, the last step of these."""

    blocks: Parts
    control: Handle
    geometry: TiltGeometry
    last_step: np.ndarray
    losses: list[float]


class Method(Protocol):
    """An iterative method over blocks."""

    def start(self) -> Iterate:
        """Return the empty volume."""

    def iterate(self, state: Iterate, iteration: int) -> Iterate:
        """Return the next iterate; waits for its loss."""

    def saved(self, state: Iterate) -> dict[str, Any]:
        """Return what a checkpoint holds beside the blocks."""

    def resumed(self, blocks: Parts, shared: dict[str, Any]) -> Iterate:
        """Return what :meth:`saved` and the blocks were made of."""


@dataclass(frozen=True)
class Blocks:
    """The volume cut into slabs, with the projections that all of them share.

    Parameters
    ----------
    measured
        Handle of the projections, on the GPU where there is one.
    supports
        Where each block may be, boolean or ``None``.
    """

    executor: Executor
    measured: Handle
    windows: list[Window]
    supports: Parts

    @classmethod
    def cut(cls, problem: Problem, settings: TomographySettings, executor: Executor, count: int) -> Blocks:
        """Cut the volume of ``problem`` into ``count`` slabs."""
        windows = slabs(problem.geometry.volume_shape, count)
        measured = executor.submit(_placed, executor.broadcast(problem.measured))
        supports = Parts.create(executor, _support, windows, problem.geometry, measured, settings.support)
        return cls(executor, measured, windows, supports)

    def project(self, function: Any, parts: Parts, geometry: TiltGeometry) -> Handle:
        """Return the sum of ``function(state, geometry, window, image, support)`` over the blocks, whole images."""
        images = self.footprints(geometry)
        found = parts.map(function, geometry, each=(self.windows, images, self.supports))
        return found.sum_into(geometry.image_shape, images)

    def back(self, function: Any, images: Handle, parts: Parts, geometry: TiltGeometry) -> Parts:
        """Return ``function(state, geometry, window, image, images of the window, support)`` of every block."""
        views = self.footprints(geometry)
        cuts = parts.cut(images, views)
        return parts.map(function, geometry, each=(self.windows, views, cuts, self.supports))

    def lipschitz(self, geometry: TiltGeometry) -> float:
        """Return the Lipschitz constant of the gradient by power iterations."""
        handle = self.executor.submit(solver.power_start, self.measured)
        norm: Handle = 0.0
        for _ in range(solver.POWER_ITERATIONS):
            images = self.footprints(geometry)
            cuts = self.supports.cut(handle, images)
            parts = cuts.map(solver.project_backprojection, geometry, each=(self.windows, images, self.supports))
            summed = parts.sum_into(geometry.image_shape, images)
            result = self.executor.submit(solver.power_step, summed, self.measured)
            handle, norm = self.executor.submit(getitem, result, 0), self.executor.submit(getitem, result, 1)
        return float(self.executor.gather(norm))

    def footprints(self, geometry: TiltGeometry) -> list[Window]:
        """Return where the blocks are seen."""
        return [footprint(geometry, window) for window in self.windows]


@dataclass(frozen=True)
class Descent:
    """The methods that descend the gradient: plain or accelerated, balanced or not, with constraints or smoothing."""

    blocks: Blocks
    geometry: TiltGeometry
    constraint: solver.Constraint
    step: float
    accelerated: bool = True
    schedule: refinement.PoseSchedule | None = None
    scales: Parts | None = None
    tv_weight: float = 0.0

    def start(self) -> Iterate:
        """Return the empty volume."""
        blocks = Parts.create(self.blocks.executor, _empty, self.blocks.windows, beside=self.blocks.supports)
        images = self.blocks.project(solver.project_block, blocks, self.geometry)
        control = self.steer(images, None)
        return Iterate(blocks, control, self.geometry, np.zeros((len(self.geometry), 6)), [])

    def resumed(self, blocks: Parts, shared: dict[str, Any]) -> Iterate:
        """Return what :meth:`saved` and the blocks were made of."""
        control = self.blocks.executor.broadcast(shared["control"])
        losses = [float(loss) for loss in shared["losses"]]
        scales = shared["scales"] if self.geometry.magnifications is not None or (shared["scales"] != 1).any() else None
        geometry = replace(
            self.geometry, rotations=shared["rotations"], shifts_px=shared["shifts_px"], magnifications=scales
        )
        return Iterate(blocks, control, geometry, shared["last_step"], losses)

    def saved(self, state: Iterate) -> dict[str, Any]:
        """Return what a checkpoint holds beside the blocks."""
        return {
            "control": state.control,
            "rotations": state.geometry.rotations,
            "shifts_px": state.geometry.shifts_px,
            "scales": state.geometry.scales,
            "last_step": state.last_step,
            "losses": np.array(state.losses),
        }

    def iterate(self, state: Iterate, iteration: int) -> Iterate:
        """Return the next iterate; waits for its loss."""
        executor, geometry, last = self.blocks.executor, state.geometry, state.last_step
        (blocks, images), control = self.advanced(state), state.control
        if self.schedule is not None and self.schedule.due(iteration):
            last = self.pose_steps(blocks, images, geometry, iteration) + self.schedule.momentum * last
            geometry = stepped(geometry, last)
            before, images = images, self.blocks.project(solver.project_block, blocks, geometry)
            control = executor.submit(solver.moved, control, before, images)
        control = self.steer(images, control)
        loss = executor.gather(executor.submit(getitem, control, "loss"))
        return Iterate(blocks, control, geometry, last, [*state.losses, float(loss)])

    def advanced(self, state: Iterate) -> tuple[Parts, Handle]:
        """Return the blocks after one step, and their projections."""
        blocks = self.smoothed(self.descend(state))
        return blocks, self.blocks.project(solver.project_block, blocks, state.geometry)

    def pose_steps(self, blocks: Parts, images: Handle, geometry: TiltGeometry, iteration: int) -> np.ndarray:
        """Return the Gauss-Newton steps of the poses."""
        assert self.schedule is not None
        columns = self.schedule.refined(iteration)
        out_of_plane = {"turn_x", "turn_y"} & set(columns)
        moments = self.blocks.project(_moments, blocks, geometry) if out_of_plane else None
        prior = refinement.Prior(self.geometry.rotations, self.schedule.angle_prior_rad) if len(columns) > 2 else None
        wanted = self.blocks.executor.submit(
            _pose_steps,
            images,
            moments,
            self.blocks.measured,
            geometry,
            columns,
            self.schedule.blur_px(iteration),
            prior,
        )
        return np.asarray(self.blocks.executor.gather(wanted))

    def steer(self, images: Handle, control: Handle | None) -> Handle:
        """Return what all blocks need for their next step."""
        return self.blocks.executor.submit(solver.steer, images, control, self.blocks.measured, self.accelerated)

    def descend(self, state: Iterate) -> Parts:
        """Return the blocks after one gradient step."""
        blocks, views = self.blocks, self.blocks.footprints(state.geometry)
        residuals = state.blocks.cut(blocks.executor.submit(getitem, state.control, "residual"), views)
        beta = blocks.executor.submit(getitem, state.control, "beta")
        constraint = replace(self.constraint, positive=False) if self.tv_weight else self.constraint
        scales = self.scales if self.scales is not None else [None] * len(blocks.windows)
        columns = (blocks.windows, views, residuals, blocks.supports, scales)
        return state.blocks.map(solver.descend, state.geometry, constraint, beta, self.step, each=columns)

    def smoothed(self, blocks: Parts) -> Parts:
        """Return the blocks after the proximal step of the total variation, which looks into their neighbours."""
        if not self.tv_weight:
            return blocks
        wide = self.wide_windows()
        around = blocks.pick("volume").exchange(self.blocks.windows, wide, beside=blocks)
        weight = self.tv_weight * self.step
        return blocks.map(_smoothed, weight, self.constraint.positive, each=(self.blocks.windows, wide, around))

    def wide_windows(self) -> list[Window]:
        """Return the blocks with the rows of their neighbours that the smoothing looks at."""
        length, reach = self.geometry.volume_shape[1], total_variation.REACH
        return [(z, (max(0, y[0] - reach), min(length, y[1] + reach)), x) for z, y, x in self.blocks.windows]


def refined_by(problem: Problem, settings: TomographySettings) -> refinement.PoseSchedule | None:
    """Return when the shifts are refined during a reconstruction; ``None`` if they are not."""
    possible = problem.wholly_in_view and len(problem.geometry) > 1 and settings.method in ("fista", "fista_tv")
    wanted = not problem.matched if settings.refine_shifts == "auto" else settings.refine_shifts
    return refinement.PoseSchedule(settings.iterations // 2) if wanted and possible else None


def useful_blocks(voxels: int, tilts: int) -> int:
    """Blocks that are worth a task each."""
    return max(1, voxels * tilts // _VOXEL_TILTS_PER_BLOCK)


def useful_blocks_of(geometry: TiltGeometry) -> int:
    """Blocks of a volume that are worth a task each."""
    return useful_blocks(math.prod(geometry.volume_shape), len(geometry))


def ray_lengths(window: Window, geometry: TiltGeometry, image: Window, support: Any) -> backend.Array:
    """Return the projections of a block of ones."""
    place = backend.to_device if backend.gpu_available() else np.asarray
    ones = place(np.ones([stop - start for start, stop in window], np.float32))
    return project(geometry, ones, window, image, support)


def voxel_scales(
    window: Window, geometry: TiltGeometry, image: Window, images: backend.Array, support: Any
) -> backend.Array:
    """Return SIRT's factor of every voxel of a block."""
    return solver.balance(backproject(geometry, images, image, window, support))


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


def _moments(block: solver.Block, geometry: TiltGeometry, window: Window, image: Window, support: Any) -> backend.Array:
    return depth_moments(geometry, block["volume"], window, image, support)


def _pose_steps(
    images: backend.Array,
    moments: backend.Array | None,
    measured: solver.Measurement,
    geometry: TiltGeometry,
    columns: tuple[str, ...],
    blur_px: float,
    prior: refinement.Prior | None,
) -> np.ndarray:
    seen = measured.seen(images)
    depth = None if moments is None else measured.seen(moments)
    left = seen - measured.images
    return refinement.gauss_newton_poses(geometry, seen, depth, left, measured.valid, columns, blur_px, prior)


def _smoothed(
    block: solver.Block, weight: float, positive: bool, window: Window, wide: Window, around: backend.Array
) -> solver.Block:
    return {**block, "volume": smoothed_inside(around, weight, positive, window, wide)}


def smoothed_inside(
    around: backend.Array, weight: float, positive: bool, window: Window, wide: Window
) -> backend.Array:
    """Return what lies in ``window`` of the smoothed ``around``, which lies in ``wide``."""
    start = window[1][0] - wide[1][0]
    inner = slice(start, start + window[1][1] - window[1][0])
    volume = total_variation.smoothed_in_pieces(around, weight, positive)[:, inner]
    return backend.array_namespace(volume).ascontiguousarray(volume)


def coefficients(block: dict[str, backend.Array]) -> np.ndarray:
    """Return the volume of a block in host memory."""
    return backend.to_host(block["volume"])
