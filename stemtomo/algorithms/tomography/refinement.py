"""Refining the poses of the projections while the volume is reconstructed.

Shifts, angles and magnifications enter the loss (:mod:`stemtomo.algorithms.tomography.solver`) through the projections
of the volume and their depth moments alone: up to six derivative images per tilt give a Gauss-Newton step. Volume and
poses improve side by side; the momentum of the volume is kept through the changes of the poses
(:func:`stemtomo.algorithms.tomography.solver.moved`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stemtomo.algorithms.tomography.alignment import without_translation
from stemtomo.algorithms.tomography.poses import POSE_COLUMNS, SHIFTS, TURNS, turns_between, without_rotation
from stemtomo.backend import Array, array_namespace, to_host
from stemtomo.physics.projection import TiltGeometry, blur, pose_derivatives

SHIFT_COLUMNS = POSE_COLUMNS[:2]
_LARGEST_STEP = np.array([1.0, 1.0, *[math.radians(1)] * 3, 0.01])


@dataclass(frozen=True)
class Prior:
    """What is known of the angles beforehand.

    Parameters
    ----------
    rotations
        Nominal matrices R, (tilt, 3, 3).
    angle_rad
        Standard deviation of the true angles about the nominal ones.
    """

    rotations: np.ndarray
    angle_rad: float


def gauss_newton_poses(
    geometry: TiltGeometry,
    seen: Array,
    moments: Array | None,
    residual: Array,
    valid: Array,
    columns: tuple[str, ...] = SHIFT_COLUMNS,
    blur_px: float = 0.0,
    prior: Prior | None = None,
) -> np.ndarray:
    """Return the steps (tilt, 6) of the poses that best explain what is left of the projections.

    One damped Gauss-Newton step per tilt in ``columns`` of :data:`POSE_COLUMNS`; the others are zero. What is a
    translation or a turn of the specimen is taken out, and no step is longer than 1 px, 1 degree or 1 %.

    Parameters
    ----------
    seen
        Projections of the current volume, (tilt, y, x).
    moments
        Their depth moments, (tilt, y, x), where a turn out of the plane is asked for.
    residual
        ``seen`` less the measured projections.
    valid
        Boolean (tilt, y, x).
    blur_px
        Standard deviation of a Gaussian through which both are compared; wide while the poses are far off, as
        features further apart than this do not yet fall on each other.
    """
    xp = array_namespace(seen)
    chosen = [POSE_COLUMNS.index(name) for name in columns]
    deviations = None if prior is None else turns_between(prior.rotations, geometry.rotations)
    steps = np.zeros((len(geometry), len(POSE_COLUMNS)))
    for tilt in range(len(geometry)):
        moment = seen[tilt] if moments is None else moments[tilt]
        derivatives = blur(pose_derivatives(geometry, tilt, seen[tilt], moment, columns) * valid[tilt], blur_px)
        left = blur(residual[tilt : tilt + 1] * valid[tilt], blur_px)
        flat = derivatives.reshape(len(columns), -1).astype(np.float64)
        normal = to_host(flat @ flat.transpose())
        right = -to_host(flat @ left.ravel().astype(np.float64))
        if prior is not None and deviations is not None:
            weight = float(xp.mean(left * left)) / prior.angle_rad**2
            for row, column in enumerate(chosen):
                if TURNS.start <= column < TURNS.stop:
                    normal[row, row] += weight
                    right[row] -= weight * deviations[tilt, column - TURNS.start]
        # Columns have units of their own, so each is damped by its own curvature.
        steps[tilt, chosen] = np.linalg.solve(normal + np.diag(1e-3 * np.diag(normal) + 1e-30), right)
    limited = _limited(steps)
    limited[:, SHIFTS] = without_translation(limited[:, SHIFTS], geometry.rotations)
    limited[:, TURNS] = without_rotation(limited[:, TURNS], geometry.rotations)
    return limited


def _limited(steps: np.ndarray) -> np.ndarray:
    """Return steps no longer than allowed, shortened in their own direction."""
    limited = steps.copy()
    for columns in (SHIFTS, TURNS, slice(5, 6)):
        length = np.linalg.norm(steps[:, columns], axis=1, keepdims=True)
        limited[:, columns] *= _LARGEST_STEP[columns] / np.maximum(length, _LARGEST_STEP[columns])
    return limited


@dataclass(frozen=True)
class PoseSchedule:
    """When and how the poses are refined during a reconstruction.

    Found on simulated series (shifts wrong by 0 to 3 px, angles by 0 to 3 degrees, projections without noise to a
    signal-to-noise ratio of 1): every fifth iteration, through a blur that shrinks to one pixel, with some momentum;
    angles begin when the shifts have settled.

    Parameters
    ----------
    iterations
        Iterations in which poses are refined.
    columns
        Of :data:`POSE_COLUMNS`, what is refined.
    angles_from
        First iteration at which more than the shifts is refined.
    every
        Iterations between two refinements.
    start_px, end_px, half_life
        The blur begins at ``start_px``, halves after ``half_life`` iterations, and ends at ``end_px``.
    momentum
        Fraction of the last step that is taken again.
    angle_prior_rad
        Standard deviation of the true angles about the nominal ones.
    """

    iterations: int
    columns: tuple[str, ...] = SHIFT_COLUMNS
    angles_from: int = 20
    every: int = 5
    start_px: float = 4.0
    end_px: float = 1.0
    half_life: float = 15.0
    momentum: float = 0.4
    angle_prior_rad: float = math.radians(2)

    def due(self, iteration: int) -> bool:
        """Whether the poses are refined after ``iteration`` (counted from 1)."""
        return iteration % self.every == 0 and iteration <= self.iterations

    def refined(self, iteration: int) -> tuple[str, ...]:
        """Return the columns that are refined after ``iteration``."""
        return self.columns if iteration >= self.angles_from else SHIFT_COLUMNS

    def blur_px(self, iteration: int) -> float:
        """Return the blur of the refinement after ``iteration``."""
        return max(self.end_px, self.start_px * 0.5 ** (iteration / self.half_life))
