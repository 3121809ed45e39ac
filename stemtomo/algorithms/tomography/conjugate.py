"""Conjugate gradients on the normal equations (CGLS), one block of the volume at a time.

Minimises 1/2 sum_k w_k |M_k (G A_k v - b_k)|² without constraints (Hestenes and Stiefel, J. Res. Natl. Bur. Stand. 49,
409 (1952)); few iterations are a regularisation. One iteration is

    project     every block: A_k of its direction                     (summed over blocks)
    advance     once: how far to go, and what is left of the projections
    gradient    every block: back-projection of what is left           (squares summed over blocks)
    turn        every block: the next direction
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np

from stemtomo.algorithms.tomography.solver import Measurement
from stemtomo.backend import Array, array_namespace
from stemtomo.physics.projection import TiltGeometry, Window, backproject, project


class Block(TypedDict):
    """State of one block: the volume, the direction of the search and the gradient, (z, y, x)."""

    volume: Array
    direction: Array
    gradient: Array


class Control(TypedDict):
    """What all blocks share: projections A_k v, what is left of the measured ones, the step and the loss."""

    images: Array
    left: Array
    residual: Array
    squared: float
    step: float
    loss: float


def begin(measured: Measurement) -> Control:
    """Return the control of an empty volume."""
    nothing = array_namespace(measured.images).zeros_like(measured.images)
    return _control(nothing, -measured.weigh(measured.images), measured, 0.0, 0.0)


def project_direction(
    block: Block, geometry: TiltGeometry, window: Window, image: Window, support: Array | None = None
) -> Array:
    """Return the projections (tilt, y, x) of the direction of ``block`` in the window ``image``."""
    return project(geometry, block["direction"], window, image, support)


def advance(images: Array, squared: float, control: Control, measured: Measurement) -> Control:
    """Return the control after the step along the direction.

    Parameters
    ----------
    images
        Projections of the direction, (tilt, y, x).
    squared
        Squared norm of the gradient.
    """
    xp = array_namespace(images)
    seen = measured.seen(images)
    curvature = float(xp.sum(measured.weigh(seen) * seen, dtype=np.float64))
    step = squared / curvature if curvature > 0 else 0.0
    real = images.dtype.type
    left = control["left"] + real(step) * measured.weigh(seen)
    return _control(control["images"] + real(step) * images, left, measured, squared, step)


def gradient(
    block: Block, geometry: TiltGeometry, window: Window, image: Window, residual: Array, support: Array | None = None
) -> Block:
    """Return ``block`` with minus the gradient of the loss, from the residual in the window ``image``."""
    return {**block, "gradient": -backproject(geometry, residual, image, window, support)}


def squared_norm(block: Block) -> float:
    """Return the squared norm of the gradient of ``block``."""
    xp = array_namespace(block["gradient"])
    return float(xp.sum(block["gradient"] * block["gradient"], dtype=np.float64))


def travel(block: Block, step: float) -> Block:
    """Return ``block`` after the step along its direction."""
    real = block["volume"].dtype.type
    return {**block, "volume": block["volume"] + real(step) * block["direction"]}


def turn(block: Block, squared: float, before: float) -> Block:
    """Return ``block`` with its next direction, conjugate to the last one."""
    factor = block["volume"].dtype.type(squared / before if before > 0 else 0.0)
    return {**block, "direction": block["gradient"] + factor * block["direction"]}


def _control(images: Array, left: Array, measured: Measurement, squared: float, step: float) -> Control:
    loss = measured.misfit(measured.seen(images))
    return {
        "images": images,
        "left": left,
        "residual": measured.seen(left),
        "squared": squared,
        "step": step,
        "loss": loss,
    }
