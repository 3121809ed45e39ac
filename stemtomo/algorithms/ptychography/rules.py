"""How object and probe move, given sums over positions: update rules of one loop.

Every rule is a deterministic function of the state and of sums that add up over parts, so that parts of one object
which apply it to their windows stay equal where they overlap.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np

from stemtomo.algorithms.ptychography.model import Gradients, State
from stemtomo.backend import Array, array_namespace, real_dtype

#: Largest step of Adam: radians over all slices, and shares of the probe's rms amplitude; and its floor.
_ADAM_RADIAN, _ADAM_PROBE, _ADAM_FLOOR = 0.4, 0.3, 1e-3


class Rule(Protocol):
    """What the loop asks of an update rule."""

    #: Whether the step needs :meth:`along` of the whole object.
    sums_along: ClassVar[bool]

    def largest(self, state: State, sums: Gradients) -> float:
        """Return the largest number in the object that the step is scaled by: of a part, if ``sums`` hold a part."""
        ...

    def along(self, sums: Gradients, peak: float, owned: Array | None = None) -> Array | None:
        """Return what the length of the step is made of, (layer, 2), if any: sums over the pixels ``owned`` (Y, X)."""
        ...

    def object_step(
        self,
        state: State,
        sums: Gradients,
        peak: float,
        slices: int,
        largest: float | None = None,
        along: Array | None = None,
    ) -> State:
        """Return the state with the object moved.

        ``peak`` is max N of the whole object, ``slices`` their number; ``largest`` is that of :meth:`largest` over the
        whole object where ``sums`` hold a part, ``along`` the sum of :meth:`along`.
        """
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

    sums_along: ClassVar[bool] = False

    def largest(self, state: State, sums: Gradients) -> float:
        """Return zero: nothing but the peak illumination scales the step."""
        return 0.0

    def along(self, sums: Gradients, peak: float, owned: Array | None = None) -> Array | None:
        """Return nothing: the length of the step is known."""
        return None

    def object_step(
        self,
        state: State,
        sums: Gradients,
        peak: float,
        slices: int,
        largest: float | None = None,
        along: Array | None = None,
    ) -> State:
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


@dataclass(frozen=True)
class LeastSquares:
    """Preconditioned gradient whose length along every layer solves a least-squares problem of the batch.

    Along the direction D (that of :class:`Nesterov`), the linearised waves change by t D psi, so that the best length
    is -<G, D> over the curvature 2 sum |D|² N of all positions together; both are made of sums, so that no wave is
    propagated again and parts add up. The original has a length for every position and averages them, weighted.
    Source: Odstrčil, Menzel and Guizar-Sicairos, Opt. Express 26, 3108 (2018), eqs. 22 to 25.
    """

    step: float = 1.0
    probe_step: float = 0.5
    damping: float = 0.1
    curvature: float = 1.0

    sums_along: ClassVar[bool] = True

    def largest(self, state: State, sums: Gradients) -> float:
        """Return zero: nothing but the peak illumination and :meth:`along` scale the step."""
        return 0.0

    def along(self, sums: Gradients, peak: float, owned: Array | None = None) -> Array:
        """Return <G, D> and <D, N D> of every layer, (layer, 2), over the pixels ``owned``."""
        xp = array_namespace(sums.phase)
        slope, lit = sums.phase, sums.illumination
        direction = -precondition(sums, self.damping, peak, self.curvature)
        if owned is not None:
            direction = direction * owned
        found = [
            (float(xp.vdot(g, along).real), float(xp.vdot(along * lit, along).real))
            for g, along in zip(slope, direction, strict=True)
        ]
        return np.array(found)

    def object_step(
        self,
        state: State,
        sums: Gradients,
        peak: float,
        slices: int,
        largest: float | None = None,
        along: Array | None = None,
    ) -> State:
        """Return the state with the object moved."""
        xp = array_namespace(state.phase)
        shared = slices // len(state.phase)
        direction = -precondition(sums, self.damping, peak, self.curvature)
        along = self.along(sums, peak) if along is None else along
        length = [_ratio(-float(above), 2 * self.curvature * float(below)) for above, below in along]
        factors = xp.asarray(length, dtype=real_dtype(state.phase))[:, None, None]
        phase = state.phase + (self.step / (slices * shared)) * factors * direction
        return replace(state, phase=phase)

    def probe_step_of(self, state: State, sums: Gradients) -> State:
        """Return the state with the probe moved."""
        # With |t| = 1 the least-squares length of the probe's step is that of the number of positions.
        return replace(
            state, probe=state.probe - (self.probe_step / (2 * self.curvature * sums.positions)) * sums.probe
        )


@dataclass(frozen=True)
class Adam:
    """Gradient over the root of its mean square, element by element, with momentum.

    Every lit pixel moves by up to ``step`` x 0.4 rad / slices, however bright it is; pixels with less than about one
    percent of the peak illumination are held back, since noise would move them as fast as the rest. The probe moves by
    up to ``probe_step`` times its root mean square amplitude, times 0.3. Source: Kingma and Ba, arXiv 1412.6980 (2014).
    """

    step: float = 1.0
    probe_step: float = 0.1
    first: float = 0.8
    second: float = 0.95
    dark: float = 0.01

    sums_along: ClassVar[bool] = False

    def largest(self, state: State, sums: Gradients) -> float:
        """Return the largest root mean square of the object's gradient."""
        return float(self._moments(sums.phase, state.memory.get("object"))[2].max())

    def along(self, sums: Gradients, peak: float, owned: Array | None = None) -> Array | None:
        """Return nothing: the length of the step is known."""
        return None

    def object_step(
        self,
        state: State,
        sums: Gradients,
        peak: float,
        slices: int,
        largest: float | None = None,
        along: Array | None = None,
    ) -> State:
        """Return the state with the object moved."""
        change, memory = self._change(sums.phase, state.memory.get("object"), largest)
        lit = sums.illumination / (sums.illumination + self.dark * peak)
        rate = _ADAM_RADIAN * self.step / slices
        return replace(state, phase=state.phase - rate * lit * change, memory={**state.memory, "object": memory})

    def probe_step_of(self, state: State, sums: Gradients) -> State:
        """Return the state with the probe moved."""
        xp = array_namespace(state.probe)
        change, memory = self._change(sums.probe, state.memory.get("probe"))
        rate = _ADAM_PROBE * self.probe_step * float(xp.sqrt(xp.mean(xp.square(xp.abs(state.probe)))))
        return replace(state, probe=state.probe - rate * change, memory={**state.memory, "probe": memory})

    def _change(
        self, gradient: Array, memory: dict[str, Any] | None, largest: float | None = None
    ) -> tuple[Array, dict[str, Any]]:
        mean, square, root, rounds = self._moments(gradient, memory)
        most = root.max() if largest is None else largest
        change = mean / ((1 - self.first**rounds) * (root + _ADAM_FLOOR * most))
        return change, {"mean": mean, "square": square, "rounds": rounds}

    def _moments(self, gradient: Array, memory: dict[str, Any] | None) -> tuple[Array, Array, Array, int]:
        xp = array_namespace(gradient)
        last = memory or {"mean": xp.zeros_like(gradient), "square": xp.zeros(gradient.shape, real_dtype(gradient))}
        rounds = int(last.get("rounds", 0)) + 1
        mean = self.first * last["mean"] + (1 - self.first) * gradient
        size = gradient.real**2 + gradient.imag**2 if xp.iscomplexobj(gradient) else gradient**2
        square = self.second * last["square"] + (1 - self.second) * size
        return mean, square, xp.sqrt(square / (1 - self.second**rounds)), rounds


def precondition(sums: Gradients, damping: float, peak: float, curvature: float) -> Array:
    """Return the object's gradient over twice its curvature, (layer, Y, X)."""
    return sums.phase / (2 * curvature * ((1 - damping) * sums.illumination + damping * peak))


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else 0.0
