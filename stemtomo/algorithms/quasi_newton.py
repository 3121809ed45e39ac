"""L-BFGS over several arrays of different units at once, from sums over parts alone.

The function's value and gradient are all it asks of the data, so they may come from anywhere; the inverse diagonal of
the curvature that it is given makes objects, angles and thicknesses comparable. Source: Nocedal and Wright, Numerical
Optimization (2006), algorithms 7.4 and 7.5.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from stemtomo.backend import Array, array_namespace

#: Values of the variables: arrays, real or complex, in a fixed order.
Point = tuple[Array, ...]

_SUFFICIENT_DECREASE = 1e-4
_SHORTEN = 0.4
_SHORTEST = 1e-3


#: What a search moves: a :data:`Point`, or whatever its :class:`Vectors` know to add and to multiply.
Vector = Any


class Vectors(Protocol):
    """What a search does with its vectors."""

    def dot(self, a: Vector, b: Vector) -> float:
        """Return the real part of the product."""
        ...

    def add(self, a: Vector, b: Vector, factor: float) -> Vector:
        """Return ``a + factor b``."""
        ...

    def scaled(self, a: Vector, diagonal: Vector, factor: float) -> Vector:
        """Return ``factor`` times ``a`` times ``diagonal``, element by element."""
        ...

    def allowed(self, direction: Vector, largest_step: Sequence[float | None] | None) -> float:
        """Return the share of ``direction``, one at most, by which no element moves more than it may."""
        ...


class Arrays:
    """Vectors that are points: arrays of one process."""

    def dot(self, a: Point, b: Point) -> float:
        """Return the real part of the product."""
        return sum(float(array_namespace(x).vdot(x, y).real) for x, y in zip(a, b, strict=True))

    def add(self, a: Point, b: Point, factor: float) -> Point:
        """Return ``a + factor b``."""
        return tuple(x + _like(factor, x) * y for x, y in zip(a, b, strict=True))

    def scaled(self, a: Point, diagonal: Point, factor: float) -> Point:
        """Return ``factor`` times ``a`` times ``diagonal``, element by element."""
        return tuple(_like(factor, x) * (x * d) for x, d in zip(a, diagonal, strict=True))

    def allowed(self, direction: Point, largest_step: Sequence[float | None] | None) -> float:
        """Return the share of ``direction``, one at most, by which no element moves more than it may."""
        step = 1.0
        for array, largest in zip(direction, largest_step or (None,) * len(direction), strict=True):
            if largest is not None:
                reach = float(array_namespace(array).abs(array).max())
                step = min(step, largest / reach) if reach > 0 else step
        return step


class Iterate(NamedTuple):
    """What the search has reached."""

    point: Vector
    loss: float
    evaluations: int


def minimise(
    evaluate: Callable[[Vector], tuple[float, Vector]],
    start: Vector,
    inverse_curvature: Vector,
    iterations: int,
    *,
    largest_step: Sequence[float | None] | None = None,
    singly: bool = False,
    memory: int = 8,
    on_iteration: Callable[[Iterate], bool] | None = None,
    vectors: Vectors | None = None,
) -> Iterate:
    """Return the last iterate of a search with backtracking; every iterate is lower than the one before.

    Parameters
    ----------
    evaluate
        Value and gradient (Wirtinger, 2 dL/d conj(z), for complex arrays) at a point.
    inverse_curvature
        Positive inverse diagonal, of the variables' shapes or scalars.
    largest_step
        Largest change per iteration of any element of each variable; ``None`` for no limit.
    singly
        Cut the elements, of real variables, that would go further, instead of shortening the whole step: a few that are
        astray among many hold nobody up.
    on_iteration
        Called after every iteration; True ends the search.
    vectors
        How vectors are added and multiplied; they are arrays unless given.
    """
    by = Arrays() if vectors is None else vectors
    point = start
    loss, gradient = evaluate(point)
    pairs: deque[tuple[Vector, Vector, float]] = deque(maxlen=memory)
    evaluations = 1
    for _ in range(iterations):
        direction = _direction(by, gradient, pairs, inverse_curvature)
        slope = by.dot(gradient, direction)
        if slope >= 0:
            pairs.clear()
            direction = _direction(by, gradient, pairs, inverse_curvature)
            slope = by.dot(gradient, direction)
        if singly:
            direction, slope = _cut(by, direction, slope, gradient, largest_step)
        step = by.allowed(direction, largest_step)
        trial, trial_gradient = _backtracked(by, evaluate, Iterate(point, loss, evaluations), direction, slope, step)
        evaluations = trial.evaluations
        if not trial.loss <= loss:  # higher, or no number
            break
        change, turn = by.add(trial.point, point, -1.0), by.add(trial_gradient, gradient, -1.0)
        curvature = by.dot(change, turn)
        if curvature > 0:
            pairs.append((change, turn, 1 / curvature))
        point, loss, gradient = trial.point, trial.loss, trial_gradient
        if on_iteration is not None and on_iteration(Iterate(point, loss, evaluations)):
            break
    return Iterate(point, loss, evaluations)


def _backtracked(
    by: Vectors,
    evaluate: Callable[[Vector], tuple[float, Vector]],
    at: Iterate,
    direction: Vector,
    slope: float,
    step: float,
) -> tuple[Iterate, Vector]:
    """Return the first of ever shorter steps along ``direction`` that lowers the loss enough, and the gradient there.

    The shortest, a thousandth of ``step``, is returned whatever its loss.
    """
    shortest, evaluations = _SHORTEST * step, at.evaluations
    while True:
        point = by.add(at.point, direction, step)
        loss, gradient = evaluate(point)
        evaluations += 1
        if loss <= at.loss + _SUFFICIENT_DECREASE * step * slope or step < shortest:
            return Iterate(point, loss, evaluations), gradient
        step *= _SHORTEN


def _direction(
    by: Vectors, gradient: Vector, pairs: Sequence[tuple[Vector, Vector, float]], inverse_curvature: Vector
) -> Vector:
    """The two-loop recursion, with the newest pair scaling the inverse diagonal."""
    found, along = gradient, []
    for change, turn, inverse in reversed(pairs):
        along.append(inverse * by.dot(change, found))
        found = by.add(found, turn, -along[-1])
    scale = 1.0
    if pairs:
        change, turn, inverse = pairs[-1]
        scale = 1 / (inverse * by.dot(turn, by.scaled(turn, inverse_curvature, 1.0)))
    found = by.scaled(found, inverse_curvature, -scale)
    for (change, turn, inverse), amount in zip(pairs, reversed(along), strict=True):
        # The sign is turned already: `found` is downhill from here on.
        found = by.add(found, change, -amount - inverse * by.dot(turn, found))
    return found


def _cut(
    by: Vectors, direction: Point, slope: float, gradient: Point, largest_step: Sequence[float | None] | None
) -> tuple[Point, float]:
    """Return the direction with no element above the largest step, and its slope; as it was if that leads uphill."""
    limits = largest_step or (None,) * len(direction)
    within = tuple(
        array if limit is None else array_namespace(array).clip(array, -limit, limit)
        for array, limit in zip(direction, limits, strict=True)
    )
    cut = by.dot(gradient, within)
    return (within, cut) if cut < 0 else (direction, slope)


def _like(factor: float, array: Array) -> np.floating:
    """``factor`` in the precision of ``array``, which it then does not change."""
    return np.zeros(0, array.dtype).real.dtype.type(factor)
