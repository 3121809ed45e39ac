"""Object and probe settled by L-BFGS: a search over all positions at once, for when batches have done their work.

Each iteration costs about one pass over the patterns. The loss falls at every iteration, which batches do not promise.
A blur along the beam, which the other rules apply after a step, is part of the variables here: u = B v with a gradient
B^T dL/du, so that the search sees the function it descends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from stemtomo.algorithms.ptychography import solver
from stemtomo.algorithms.ptychography.model import CURVATURE, Model, State
from stemtomo.algorithms.ptychography.parameters import Parameter
from stemtomo.algorithms.ptychography.regularisation import blur_matrix
from stemtomo.algorithms.quasi_newton import Iterate, Point, minimise
from stemtomo.backend import Array, array_namespace, real_dtype


def settle(
    state: State,
    model: Model,
    counts: Array,
    iterations: int,
    *,
    width_slices: float = 0.0,
    update_probe: bool = True,
    damping: float = 0.1,
    parts: int = 1,
    where: np.ndarray | None = None,
    parameters: Sequence[Parameter] = (),
    on_iteration: Callable[[int, float, State], bool | None] | None = None,
) -> tuple[State, list[float]]:
    """Return the state after up to ``iterations`` of L-BFGS from ``state``, and the loss per pattern after each.

    Parameters
    ----------
    width_slices
        Blur along the beam, as in :func:`~stemtomo.algorithms.ptychography.regularisation.blurred_along_beam`.
    damping
        Share of the peak illumination in the inverse curvature that the search begins with.
    parts
        Parts of the positions whose sums are formed one after another, to bound the memory.
    where
        Indices of the positions that take part; all unless given.
    parameters
        Parameters beside object and probe; they stay where they are.
    on_iteration
        Called with number, loss and state after each; the search ends where it returns True.
    """
    blur = blur_of(state, model, width_slices)
    taking_part = np.arange(len(counts)) if where is None else where
    pieces = np.array_split(taking_part, parts)

    def state_at(point: Point) -> State:
        return replace(state, phase=mixed(blur, point[0]), probe=point[1] if update_probe else state.probe)

    def evaluate(point: Point) -> tuple[float, Point]:
        at = state_at(point)
        sums = [solver.gradients(at, model, counts, piece, parameters) for piece in pieces]
        slope = mixed(blur.T, _total(part.phase for part in sums))
        gradient = (slope, _total(part.probe for part in sums)) if update_probe else (slope,)
        return sum(part.loss for part in sums), gradient

    losses: list[float] = []

    def follow(iterate: Iterate) -> bool:
        losses.append(iterate.loss / len(taking_part))
        return bool(on_iteration and on_iteration(len(losses) - 1, losses[-1], state_at(iterate.point)))

    begin = (state.phase, state.probe) if update_probe else (state.phase,)
    found = minimise(evaluate, begin, inverse_curvature(state, model, damping, update_probe), iterations,
                     on_iteration=follow)  # fmt: skip
    return replace(state_at(found.point), memory={}), losses


def inverse_curvature(
    state: State,
    model: Model,
    damping: float,
    update_probe: bool,
    *,
    lit: Array | None = None,
    peak: float | None = None,
    positions: int | None = None,
) -> Point:
    """Return inverse diagonals: that of the object as its other rules have it, one number for the probe.

    Of a part, ``lit`` is the illumination of its window, ``peak`` the largest and ``positions`` the number of all.
    """
    lit = solver.illumination(state.probe, model.grid) if lit is None else lit
    peak = lit.max() if peak is None else lit.dtype.type(peak)
    shared = model.slices // len(state.phase)
    curvature = 2 * CURVATURE[model.loss] * model.slices * shared
    real = real_dtype(state.phase)
    phase = (1 / (curvature * ((1 - damping) * lit + damping * peak)))[None].astype(real)
    if not update_probe:
        return (phase,)
    xp = array_namespace(state.probe)
    count = len(model.grid.corners) if positions is None else positions
    return phase, xp.asarray(1 / (2 * CURVATURE[model.loss] * count), dtype=real)


def blur_of(state: State, model: Model, width_slices: float) -> Array:
    """Return the blur along the beam as a matrix (layer, layer)."""
    return blur_matrix(len(state.phase), width_slices, state.phase, model.weights)


def mixed(matrix: Array, phase: Array) -> Array:
    """Return ``phase`` (layer, Y, X) with its layers mixed by ``matrix``; a single one as it is."""
    if len(phase) == 1:
        return phase
    return (matrix @ phase.reshape(len(phase), -1)).reshape(phase.shape)


def _total(arrays: Any) -> Array:
    first, *rest = arrays
    for other in rest:
        first = first + other
    return first
