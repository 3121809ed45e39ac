"""Refining the shifts of the projections while the volume is reconstructed.

The shifts t_k enter the loss (:mod:`stemtomo.algorithms.tomography.solver`) through the projections of the volume
alone: two derivative images per tilt give a Gauss-Newton step. Volume and shifts improve side by side; the momentum of
the volume is kept through the changes of the shifts (:func:`stemtomo.algorithms.tomography.solver.moved`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stemtomo.algorithms.tomography.alignment import without_translation
from stemtomo.backend import Array, array_namespace, to_host
from stemtomo.physics.projection import blur, shift_derivatives


def gauss_newton_shifts(
    seen: Array, residual: Array, valid: Array, rotations: np.ndarray, blur_px: float = 0.0, limit_px: float = 1.0
) -> np.ndarray:
    """Return the steps (tilt, 2) of the shifts, columns x, y in px, that best explain what is left of the projections.

    One damped Gauss-Newton step per tilt, from two derivative images; the part that is a translation of the specimen
    is taken out, and no step is longer than ``limit_px``.

    Parameters
    ----------
    seen
        Projections of the current volume, (tilt, y, x).
    residual
        ``seen`` less the measured projections.
    valid
        Boolean (tilt, y, x).
    rotations
        Matrices R, (tilt, 3, 3).
    blur_px
        Standard deviation of a Gaussian through which both are compared; wide while the shifts are far off, as
        features further apart than this do not yet fall on each other.
    """
    xp = array_namespace(seen)
    along_x, along_y = (blur(derivative * valid, blur_px) for derivative in shift_derivatives(seen))
    left = blur(residual * valid, blur_px)

    def inner(a: Array, b: Array) -> np.ndarray:
        return to_host(xp.sum(a * b, axis=(1, 2), dtype=np.float64))

    xx, xy, yy = inner(along_x, along_x), inner(along_x, along_y), inner(along_y, along_y)
    normal = np.stack([np.stack([xx, xy], -1), np.stack([xy, yy], -1)], -2)
    normal += (1e-6 * (xx + yy) + 1e-30)[:, None, None] * np.eye(2)
    right = -np.stack([inner(along_x, left), inner(along_y, left)], axis=-1)
    steps = np.linalg.solve(normal, right[..., None])[..., 0]
    steps *= (limit_px / np.maximum(np.hypot(*steps.T), limit_px))[:, None]
    return without_translation(steps, rotations)


@dataclass(frozen=True)
class ShiftSchedule:
    """When and how the shifts are refined during a reconstruction.

    Found on simulated series (shifts wrong by 0 to 3 px, projections without noise to a signal-to-noise ratio of 1):
    every fifth iteration of the first half, through a blur that shrinks to one pixel, with some momentum.

    Parameters
    ----------
    iterations
        Iterations of the reconstruction; shifts are refined in the first half.
    every
        Iterations between two refinements.
    start_px, end_px, half_life
        The blur begins at ``start_px``, halves after ``half_life`` iterations, and ends at ``end_px``.
    momentum
        Fraction of the last step that is taken again.
    """

    iterations: int
    every: int = 5
    start_px: float = 4.0
    end_px: float = 1.0
    half_life: float = 15.0
    momentum: float = 0.4

    def due(self, iteration: int) -> bool:
        """Whether the shifts are refined after ``iteration`` (counted from 1)."""
        return iteration % self.every == 0 and 2 * iteration <= self.iterations

    def blur_px(self, iteration: int) -> float:
        """Return the blur of the refinement after ``iteration``."""
        return max(self.end_px, self.start_px * 0.5 ** (iteration / self.half_life))
