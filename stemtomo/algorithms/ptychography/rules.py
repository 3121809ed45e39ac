"""How object and probe move, given sums over positions: update rules of one loop.

Every rule is a deterministic function of the state and of sums that add up over parts, so that parts of one object
which apply it to their windows stay equal where they overlap.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from stemtomo.algorithms.ptychography.model import Gradients, State
from stemtomo.backend import Array, array_namespace


class Rule(Protocol):
    """What the loop asks of an update rule."""

    def object_step(self, state: State, sums: Gradients, peak: float, slices: int) -> State:
        """Return the state with the object moved; ``peak`` is max N of the whole object, ``slices`` their number."""
        ...

    def probe_step_of(self, state: State, sums: Gradients) -> State:
        """Return the state with the probe moved."""
        ...


@dataclass(frozen=True)
class Nesterov:
    """Preconditioned gradient with momentum.

    The object's step at a pixel is ``step / slices`` times its gradient over 2 x ((1 - damping) N + damping max N), N
    the illumination of the batch: where all of N falls on a pixel, a step of 1 removes the residual of the phase.
    ``curvature`` is that of the loss (:data:`~stemtomo.algorithms.ptychography.model.CURVATURE`).
    """

    step: float = 1.0
    probe_step: float = 0.5
    momentum: float = 0.5
    damping: float = 0.1
    curvature: float = 1.0

    def object_step(self, state: State, sums: Gradients, peak: float, slices: int) -> State:
        """Return the state with the object moved."""
        # A layer that k slices share has k times the gradient of one, and k² times its curvature.
        shared = slices // len(state.phase)
        change = (self.step / (slices * shared)) * precondition(sums, self.damping, peak, self.curvature)
        phase, memory = self._moved(state.phase, change, state.memory.get("object"))
        return replace(state, phase=phase, memory={**state.memory, "object": memory})

    def probe_step_of(self, state: State, sums: Gradients) -> State:
        """Return the state with the probe moved."""
        # |t| is close to 1, so the probe's curvature is the number of positions, the same everywhere.
        change = (self.probe_step / (2 * self.curvature * sums.positions)) * sums.probe
        probe, memory = self._moved(state.probe, change, state.memory.get("probe"))
        return replace(state, probe=probe, memory={**state.memory, "probe": memory})

    def _moved(self, value: Array, change: Array, memory: dict[str, Array] | None) -> tuple[Array, dict[str, Array]]:
        last = memory["momentum"] if memory else array_namespace(value).zeros_like(value)
        momentum = self.momentum * last - change
        # Nesterov's look-ahead, in the form that keeps the point at which gradients are taken.
        return value + self.momentum * momentum - change, {"momentum": momentum}


def precondition(sums: Gradients, damping: float, peak: float, curvature: float) -> Array:
    """Return the object's gradient over twice its curvature, (layer, Y, X)."""
    return sums.phase / (2 * curvature * ((1 - damping) * sums.illumination + damping * peak))
