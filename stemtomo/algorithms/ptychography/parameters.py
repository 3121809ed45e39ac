"""Parameters beside object and probe: each sums its own gradient over positions and takes its own step.

A subclass says how the model depends on its value, what it adds up while gradients are carried back, and how it moves.
Sums of a shared parameter add up over parts; those of a local one (a value per position) stay with the part that owns
the positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from stemtomo.algorithms.ptychography.model import Model
from stemtomo.backend import Array, array_namespace


class Chunk(NamedTuple):
    """Positions that are worked on together; modes of a position lie side by side in waves."""

    where: np.ndarray
    """Indices of the positions within the part."""
    modes: int
    probe: Array
    """The modes (mode, y, x) before they are shifted."""
    gradient: Array
    """Gradient of the waves on the first slice, (position x mode, y, x); to read only."""


class Parameter:
    """A parameter beside object and probe; the defaults change nothing."""

    name: str = ""
    shared: bool = True
    #: Whether :meth:`on_gap` wants to be called; it keeps the loop from calling back otherwise.
    watches_gaps: bool = False

    def model_at(self, value: Array, model: Model) -> Model:
        """Return ``model`` as it is at ``value``."""
        return model

    def background(self, value: Array) -> Array | None:
        """Return electrons per pixel (qy, qx) that the detector counts beside the waves, if this is that."""
        return None

    def probes(self, value: Any, probes: Array, model: Model, where: np.ndarray) -> Array:
        """Return the modes (position, mode, y, x) on the first slice at ``value``, from those that all share."""
        return probes

    def zero(self, value: Array) -> Any:
        """Return the empty sums: a tree of arrays that is added to in place."""
        return {"gradient": array_namespace(value).zeros_like(value)}

    def on_gap(self, sums: Any, value: Array, model: Model, chunk_where: np.ndarray, gap: int, *waves: Array) -> None:
        """Add what the gap between slices ``gap`` and ``gap + 1`` contributes.

        ``waves`` are the gradient of the waves behind the gap, and these waves: (position x mode, y, x), to read only.
        """

    def on_chunk(self, sums: Any, value: Array, model: Model, chunk: Chunk) -> None:
        """Add what the gradient of the waves on the first slice contributes."""

    def over_parts(self, value: Array, sums: Any) -> Any:
        """Return what adds up over parts: the ``sums`` if shared; what :meth:`step` needs of all parts if local.

        Of a local parameter it comes back as the entry ``over_parts`` of the part's own ``sums``.
        """
        return sums if self.shared else None

    def some(self, value: Any, where: np.ndarray) -> Any:
        """Return the value for the positions ``where`` alone."""
        return value if self.shared else value[where]

    def step(self, value: Array, sums: Any, memory: Any, positions: int) -> tuple[Array, Any]:
        """Return the next value and what is to be remembered, from the ``sums`` over ``positions`` positions."""
        return value, memory


class Background(Parameter):
    """Electrons per pixel and pattern that the detector counts beside the waves; never negative.

    The value is (qy, qx), zero frequency first. Where ``uniform``, one number for all pixels is looked for.
    """

    name = "background"

    def __init__(self, step_size: float = 0.5, uniform: bool = True, largest: float = np.inf) -> None:
        self.step_size, self.uniform, self.largest = step_size, uniform, largest

    def background(self, value: Array) -> Array:
        """Return the value: it is that."""
        return value

    def step(self, value: Array, sums: Any, memory: Any, positions: int) -> tuple[Array, Any]:
        """Return the background after a Newton step with the curvature of an Anscombe root at the present level.

        The loss per pixel is flat on the scale of (b + 3/8): d²L/db² is 1 / (2 (b + 3/8)) where the background rules.
        """
        xp = array_namespace(value)
        slope = sums["gradient"] / positions
        slope = xp.full_like(value, 1) * slope.mean() if self.uniform else slope
        return xp.clip(value - self.step_size * 2 * (value + 0.375) * slope, 0, self.largest), memory
