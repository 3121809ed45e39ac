"""Volume from projections: accelerated projected gradient, one block of the volume at a time.

The loss is L(v) = 1/2 sum_k w_k |M_k (G A_k v - b_k)|², with the projections b_k, their masks M_k, the projector A_k of
:mod:`stemtomo.physics.projection` and a Gaussian G that stands for the width of the volume's elements, over v >= 0:
the volume is a sum of non-negative smooth elements, which noise cannot make rougher than they are. The method is FISTA
(Beck and Teboulle, SIAM J. Imaging Sci. 2, 183 (2009)) with the gradient restart of O'Donoghue and Candès (Found.
Comput. Math. 15, 715 (2015)); one iteration is

    project     every block: A_k of its voxels                        (summed over blocks)
    steer       once: loss, restart, residual at the extrapolated point  (cut into the blocks' windows)
    descend     every block: step along its own back-projection

Because A is linear, A of the extrapolated point x + beta (x - x_previous) follows from the projections of x and of
x_previous: each iteration projects once, and the loss belongs to x itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from stemtomo.backend import Array, array_namespace
from stemtomo.physics.projection import TiltGeometry, Window, backproject, blur, project

POWER_ITERATIONS = 12
_STEP_SAFETY = 1.05  # the power iteration approaches the Lipschitz constant from below


class Block(TypedDict):
    """State of one block of the volume: the last two iterates, (z, y, x), rad per voxel."""

    volume: Array
    previous: Array


class Control(TypedDict):
    """What all blocks share between two iterations; images are (tilt, y, x), rad."""

    images: Array
    residual: Array
    momentum: float
    beta: float
    loss: float


@dataclass(frozen=True)
class Measurement:
    """Projections to be explained.

    Parameters
    ----------
    images
        (tilt, y, x), rad.
    valid
        Boolean (tilt, y, x); pixels outside do not count.
    weights
        (tilt,), the weight w_k of each tilt.
    element_width_px
        Standard deviation of G: what the volume's elements are wider than B-splines.
    balance
        (tilt, y, x), factors of the residual that make every ray count alike (SIRT); none if not given.
    """

    images: Array
    valid: Array
    weights: Array
    element_width_px: float = 0.0
    balance: Array | None = None

    def seen(self, images: Array) -> Array:
        """Return the projections of the volume, G A_k v, from those of its coefficients, A_k v."""
        return blur(images, self.element_width_px)

    def residual(self, seen: Array) -> Array:
        """Return G w_k M_k (seen - b_k), the gradient of the loss in A_k v."""
        left = self.weigh(seen - self.images)
        return self.seen(left if self.balance is None else left * self.balance)

    def weigh(self, images: Array) -> Array:
        """Return w_k M_k images."""
        factors = self.weights.astype(images.dtype)[:, None, None]
        return images * self.valid * factors

    def misfit(self, seen: Array) -> float:
        """Return |G A v - b| / |b| over the valid pixels, weighted by tilt."""
        norms = [self.norm(seen - self.images), self.norm(self.images)]
        return norms[0] / norms[1] if norms[1] > 0 else norms[0]

    def norm(self, images: Array) -> float:
        """Return the weighted Euclidean norm of ``images`` over the valid pixels."""
        xp = array_namespace(images)
        return math.sqrt(float(xp.sum(self.weigh(images) * images, dtype=np.float64)))


@dataclass(frozen=True)
class Constraint:
    """What is known about the volume beside its projections.

    Parameters
    ----------
    positive
        Voxels are not negative.
    threshold
        Soft threshold per unit step, in units of the gradient: the penalty ``threshold`` times the sum of |v|.
    """

    positive: bool = True
    threshold: float = 0.0

    def apply(self, values: Array, step: float) -> Array:
        """Return the proximal point of ``values`` for a gradient step of length ``step``."""
        xp = array_namespace(values)
        shrink = values.dtype.type(self.threshold * step)
        if self.positive:
            return xp.maximum(values - shrink, 0)
        if shrink == 0:
            return values
        return xp.sign(values) * xp.maximum(xp.abs(values) - shrink, 0)


def project_block(
    block: Block, geometry: TiltGeometry, window: Window, image: Window, support: Array | None = None
) -> Array:
    """Return the projections (tilt, y, x) of ``block`` in the window ``image``."""
    return project(geometry, block["volume"], window, image, support)


def steer(images: Array, control: Control | None, measured: Measurement, accelerated: bool = True) -> Control:
    """Return the residual at the next extrapolated point from the projections A_k v of the current volume.

    Parameters
    ----------
    images
        Projections of the coefficients of the whole volume, (tilt, y, x).
    control
        What the last call returned; ``None`` at the start.
    accelerated
        Extrapolate; else the steps are those of the plain gradient.
    """
    xp = array_namespace(images)
    seen = measured.seen(images)
    loss = measured.misfit(seen)
    if control is None or not accelerated:
        return {"images": images, "residual": measured.residual(seen), "momentum": 1.0, "beta": 0.0, "loss": loss}
    change = images - control["images"]
    # The step went uphill as seen from the extrapolated point: momentum no longer helps.
    uphill = float(xp.sum(control["residual"] * change, dtype=np.float64)) > 0
    momentum = 1.0 if uphill else control["momentum"]
    following = (1 + math.sqrt(1 + 4 * momentum * momentum)) / 2
    beta = (momentum - 1) / following
    residual = measured.residual(seen + images.dtype.type(beta) * measured.seen(change))
    return {"images": images, "residual": residual, "momentum": following, "beta": beta, "loss": loss}


def moved(control: Control, before: Array, after: Array) -> Control:
    """Return ``control`` after the geometry has changed, so that the momentum lives on.

    Parameters
    ----------
    before, after
        Projections A_k v of the current volume in the old and in the new geometry. What the last iteration changed in
        them is taken to be the same in both.
    """
    return {**control, "images": control["images"] + (after - before)}


def descend(
    block: Block,
    geometry: TiltGeometry,
    constraint: Constraint,
    beta: float,
    step: float,
    window: Window,
    image: Window,
    residual: Array,
    support: Array | None = None,
    scale: Array | None = None,
) -> Block:
    """Return ``block`` after one projected gradient step from its extrapolated point.

    Parameters
    ----------
    beta
        Extrapolation, from :func:`steer`.
    step
        Length of the step, from :func:`step_length`.
    residual
        The residual of :func:`steer` in the window ``image``.
    scale
        Factor of the step of every voxel, (z, y, x).
    """
    real = block["volume"].dtype.type
    point = block["volume"] + real(beta) * (block["volume"] - block["previous"])
    gradient = backproject(geometry, residual, image, window, support)
    point -= real(step) * (gradient if scale is None else gradient * scale)
    return {"volume": constraint.apply(point, step), "previous": block["volume"]}


def project_backprojection(
    images: Array, geometry: TiltGeometry, window: Window, image: Window, support: Array | None = None
) -> Array:
    """Return A A^T of ``images`` (in ``image``) through the voxels of ``window``, for the power iteration."""
    return project(geometry, backproject(geometry, images, image, window, support), window, image, support)


def power_start(measured: Measurement) -> Array:
    """Return the images that the power iteration begins with."""
    xp = array_namespace(measured.images)
    ones = xp.ones_like(measured.images)
    return measured.seen(measured.weigh(ones)) / ones.dtype.type(max(measured.norm(ones), 1e-30))


def power_step(images: Array, measured: Measurement) -> tuple[Array, float]:
    """Return the next images of the power iteration, and its estimate of the Lipschitz constant of the gradient.

    Parameters
    ----------
    images
        Projections of the back-projection of the images of the last step.
    """
    seen = measured.seen(images)
    norm = measured.norm(seen)
    return measured.seen(measured.weigh(seen)) / seen.dtype.type(max(norm, 1e-30)), norm


def balance(lengths: Array) -> Array:
    """Return 1 / ``lengths`` where there are any, else zero: the weights of SIRT for rays and, alike, for voxels.

    Parameters
    ----------
    lengths
        Projections of a volume of ones, or back-projections of images of ones.
    """
    xp = array_namespace(lengths)
    least = 1e-3 * float(lengths.max()) if lengths.size else 0.0
    return xp.where(lengths > least, 1 / xp.maximum(lengths, max(least, 1e-30)), 0).astype(lengths.dtype)


def step_length(lipschitz: float) -> float:
    """Return the step for an estimate of the Lipschitz constant."""
    return 1 / (_STEP_SAFETY * lipschitz)
