"""Poses refined together with a volume, from coarse to fine: shifts, angles, magnifications of all projections.

The two steps of Romanov et al., J. Phys. Mater. 8, 015005 (2025), translations at a tenth and rotations at a fifth of
the resolution, as one accelerated reconstruction per scale that takes a Gauss-Newton step of all poses every few
iterations. Projections and depth moments are sums over the volume's blocks, as in tomography.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from stemtomo.algorithms.tomography import refinement, solver
from stemtomo.algorithms.tomography.alignment import without_translation
from stemtomo.algorithms.tomography.poses import POSE_COLUMNS, turns_between
from stemtomo.distributed import Checkpoint, Executor
from stemtomo.errors import ConfigurationError
from stemtomo.physics.projection import TiltGeometry
from stemtomo.pipeline.config import AlignmentSettings, TomographySettings
from stemtomo.pipeline.descent import Problem
from stemtomo.pipeline.progress import Progress
from stemtomo.pipeline.reconstruction import reconstruct

_SMALLEST_PX, _LARGEST_PX = 48, 128
_FIRST_BLUR_HALF_LIFE = 25.0


class JointAlignment(NamedTuple):
    """Poses found, the loss per iteration of every scale, and R1 of every projection (tilt,) at the last one."""

    geometry: TiltGeometry
    losses: list[float]
    r1: np.ndarray

    def turned_deg(self, rotations: np.ndarray) -> float:
        """Return the root mean square turn from ``rotations``, in degrees."""
        turns = turns_between(rotations, self.geometry.rotations)
        return math.degrees(float(np.sqrt(np.mean(np.sum(turns**2, axis=1)))))


def refine_poses(
    images: np.ndarray,
    valid: np.ndarray,
    geometry: TiltGeometry,
    settings: AlignmentSettings,
    executor: Executor,
    blocks: int | None = None,
    *,
    progress: Progress | None = None,
    checkpoints: Sequence[Checkpoint] = (),
) -> JointAlignment:
    """Return better poses than those of ``geometry`` for projections (tilt, y, x) of a specimen wholly in view.

    The angles stay near those of ``geometry`` by ``settings.angle_prior_deg``; of all poses that explain the
    projections alike the nearest to these are returned.

    Parameters
    ----------
    blocks
        Slabs that the volume is cut into; as many as are worth a worker each if not given.
    checkpoints
        One per scale, with which an interrupted refinement goes on to the same bits; none are kept if not given.
    """
    if settings.clip_fraction < 1:
        images = np.minimum(images, settings.clip_fraction * images[valid].max())
    losses: list[float] = []
    r1 = np.zeros(len(images))
    for number, factor in enumerate(scales_of(geometry.image_shape, settings)):
        coarse, seen, offset = binned(images, valid, factor)
        depth = max(2, math.ceil(max(geometry.volume_shape[0], *geometry.image_shape) / factor))
        shape = (depth, *coarse.shape[1:])
        start = replace(
            geometry,
            shifts_px=(geometry.shifts_px - offset) / factor,
            volume_shape=(shape[0], shape[1], shape[2]),
            image_shape=(shape[1], shape[2]),
        )
        iterations = iterations_of(settings, number)
        schedule = refinement.PoseSchedule(
            iterations,
            columns_of(settings),
            angles_from=20 if number == 0 else 0,
            start_px=4.0 if number == 0 else 2.0,
            half_life=_FIRST_BLUR_HALF_LIFE,
            angle_prior_rad=math.radians(settings.angle_prior_deg),
        )
        measured = solver.Measurement(coarse, seen, np.ones(len(coarse), np.float32), 0.5)
        tomography = TomographySettings(iterations=iterations, blocks=blocks, stream="never")
        kept = checkpoints[number] if checkpoints else None
        problem = Problem(measured, start, 1.0, 1.0)
        found = reconstruct(problem, tomography, executor, progress, kept, schedule=schedule)
        rotations = found.geometry.rotations
        shifts = without_translation(found.geometry.shifts_px * factor + offset, rotations)
        geometry = replace(
            geometry, rotations=rotations, shifts_px=shifts, magnifications=found.geometry.magnifications
        )
        losses += found.losses
        r1 = found.factors.r1
    return JointAlignment(geometry, losses, r1)


def iterations_of(settings: AlignmentSettings, number: int) -> int:
    """Return the iterations at scale ``number``, counted from the coarsest."""
    return settings.joint_iterations if number == 0 else math.ceil(settings.joint_iterations / 2)


def columns_of(settings: AlignmentSettings) -> tuple[str, ...]:
    """Return which of :data:`POSE_COLUMNS` the settings ask for."""
    wanted = {"turn_z": settings.refine_in_plane, "magnification": settings.refine_magnification}
    return tuple(name for name in POSE_COLUMNS if wanted.get(name, True))


def scales_of(shape_yx: tuple[int, int], settings: AlignmentSettings) -> tuple[int, ...]:
    """Return by how many pixels the projections are binned, coarse to fine."""
    if settings.joint_bins is not None:
        if 2 * settings.joint_bins[0] > min(shape_yx):
            raise ConfigurationError(
                f"alignment.joint_bins begins with {settings.joint_bins[0]}, and projections of {shape_yx[0]} x "
                f"{shape_yx[1]} pixels leave nothing of that; begin with {min(shape_yx) // 2} at most"
            )
        return settings.joint_bins
    longest = max(shape_yx)
    useful = [2**n for n in range(8) if _SMALLEST_PX <= longest / 2**n <= _LARGEST_PX]
    return tuple(sorted(useful, reverse=True)) or (max(1, longest // _LARGEST_PX),)


def binned(images: np.ndarray, valid: np.ndarray, factor: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return means over ``factor`` x ``factor`` pixels, where all of them are valid, and where they lie.

    The last is the offset (x, y), in pixels of ``images``, of the coarse centre n // 2 from the fine one: a feature at
    the fine coordinate u lies at the coarse (u - offset) / factor.
    """
    count, height, width = images.shape
    rows, columns = height // factor, width // factor
    cut = (slice(None), slice(0, rows * factor), slice(0, columns * factor))
    shape = (count, rows, factor, columns, factor)
    means = images[cut].reshape(shape).mean(axis=(2, 4)).astype(np.float32)
    seen = np.asarray(valid[cut].reshape(shape).all(axis=(2, 4)))
    offset = [factor * (m // 2) + (factor - 1) / 2 - n // 2 for m, n in ((columns, width), (rows, height))]
    return means, seen, np.array(offset)
