"""L-BFGS over an object that is in tiles: the search of one piece, with its vectors where the tiles are.

A vector is object and probe of every tile. Products count each pixel once and the probe once; a number of them travels
for every product, and nothing else but what a step with all positions exchanges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stemtomo.algorithms.ptychography import search, solver
from stemtomo.algorithms.ptychography.tiles import Rectangle
from stemtomo.algorithms.quasi_newton import Arrays, Iterate, Point, Vector, minimise
from stemtomo.backend import Array
from stemtomo.distributed import Executor, Handle, Parts
from stemtomo.pipeline.tile_bundles import Bundles, Halos
from stemtomo.pipeline.tile_fields import Field
from stemtomo.pipeline.tile_steps import Batch, owned_pixels


@dataclass(frozen=True)
class Search:
    """What a search over all positions is told.

    Parameters
    ----------
    width_slices
        Blur along the beam, which is part of the variables.
    damping
        Share of the peak illumination in the inverse curvature that it begins with.
    """

    iterations: int
    width_slices: float = 0.0
    update_probe: bool = True
    damping: float = 0.1


@dataclass(frozen=True)
class TileVectors:
    """Products and sums of vectors that are in tiles, as :func:`~stemtomo.algorithms.quasi_newton.minimise` asks."""

    windows: Sequence[Rectangle]

    def dot(self, a: Vector, b: Vector) -> float:
        """Return the real part of the product over all pixels and the probe."""
        numbers = list(range(len(a)))
        return float(a.executor.gather(a.map(vector_dot, list(self.windows), each=[b, numbers]).sum()))

    def add(self, a: Vector, b: Vector, factor: float) -> Vector:
        """Return ``a + factor b``."""
        return a.map(vector_add, factor, each=[b])

    def scaled(self, a: Vector, diagonal: Vector, factor: float) -> Vector:
        """Return ``factor`` times ``a`` times a diagonal."""
        return a.map(vector_scaled, factor, each=[diagonal])

    def allowed(self, direction: Vector, largest_step: Any) -> float:
        """Return one: no step is too long."""
        return 1.0


def settled(
    to: Search,
    states: Parts,
    fields: Parts,
    moving: Sequence[Any],
    bundles: Bundles,
    windows: Sequence[Rectangle],
    batch: Batch,
    on_iteration: Callable[[Parts, float], bool],
) -> Parts:
    """Return the states after the search, and tell ``on_iteration`` of every iterate and its loss; True ends it.

    ``batch`` takes all positions; what else moves stays where it is. Losses are told per pattern.
    """
    executor, patterns = states.executor, {"met": 1.0}

    def at(vector: Parts) -> Parts:
        return states.map(state_at, to, each=[vector, fields])

    def evaluate(vector: Parts) -> tuple[float, Parts]:
        together = executor.together()
        here = Parts(together, vector.handles, vector.places)
        there = Parts(together, states.handles, states.places).map(state_at, to, each=[here, fields])
        work = bundles.begin(together, there, batch, False, fields, moving)
        others = bundles.strips(together, work)
        sums = bundles.totals(together, work, batch.rule, others)
        slopes = bundles.each(together, bundle_slopes, work, sums, to, others, fields)
        parts = bundles.apart(together, slopes, states.places)
        found = together.send([*parts.handles, together.submit(loss_of, sums)])
        loss, patterns["met"] = executor.gather(found[-1])
        return loss, Parts(executor, tuple(found[:-1]), states.places)

    def follow(iterate: Iterate) -> bool:
        return on_iteration(at(iterate.point), iterate.loss / patterns["met"])

    diagonal = _diagonal(to, executor, states, fields, windows)
    start = states.map(state_vector, to)
    found = minimise(evaluate, start, diagonal, to.iterations, on_iteration=follow, vectors=TileVectors(windows))
    return at(found.point).map(without_memory)


def _diagonal(to: Search, executor: Executor, states: Parts, fields: Parts, windows: Sequence[Rectangle]) -> Parts:
    lit = states.map(told_illumination, each=[fields]).halo_sum(windows)
    peak: Handle = lit.map(peak_of).reduce(max)
    return lit.map(inverse_curvature, to, peak, each=[states, fields])


# -- tasks, under the names that a dashboard shows ---------------------------------------------------------------------


def state_vector(state: solver.State, to: Search) -> Point:
    """Return what the search moves of a tile."""
    return (state.phase, state.probe) if to.update_probe else (state.phase,)


def state_at(state: solver.State, to: Search, vector: Point, part: Field) -> solver.State:
    """Return the state of a tile at ``vector``."""
    phase = search.mixed(search.blur_of(state, part.model, to.width_slices), vector[0])
    return replace(state, phase=phase, probe=vector[1] if to.update_probe else state.probe)


def without_memory(state: solver.State) -> solver.State:
    """Return a state whose rules remember nothing."""
    return replace(state, memory={})


def told_illumination(state: solver.State, part: Field) -> Array:
    """Return the illumination of a tile's window by its own positions, where the scan has them."""
    return solver.illumination(state.probe, part.model.grid)


def peak_of(lit: Array) -> float:
    """Return the largest illumination of a tile."""
    return float(lit.max())


def inverse_curvature(lit: Array, to: Search, peak: float, state: solver.State, part: Field) -> Point:
    """Return the inverse diagonals of a tile that the search begins with."""
    return search.inverse_curvature(
        state, part.model, to.damping, to.update_probe, lit=lit, peak=peak, positions=part.scan_positions
    )


def bundle_slopes(
    work: Sequence[dict[str, Any]],
    halos: Halos,
    sums: dict[str, Any],
    to: Search,
    others: Sequence[Any],
    fields: Sequence[Field],
) -> list[Point]:
    """Return the gradient of every tile of a bundle."""
    found: list[Point] = []
    for number, (each, part) in enumerate(zip(work, fields, strict=True)):
        blur = search.blur_of(each["state"], part.model, to.width_slices)
        slope = search.mixed(blur.T, halos.of(number, work, others)["phase"])
        found.append((slope, sums["total"]["probe"]) if to.update_probe else (slope,))
    return found


def loss_of(sums: dict[str, Any]) -> tuple[float, float]:
    """Return the loss over all positions, and their number."""
    return float(sums["total"]["loss"]), float(sums["total"]["positions"])


def vector_dot(a: Point, windows: Sequence[Rectangle], b: Point, number: int) -> float:
    """Return what a tile adds to a product: the pixels that are its own, and the probe if it is the first."""
    mine: Point = (a[0] * owned_pixels(windows, number, a[0]),)
    mine = (*mine, *a[1:]) if number == 0 else mine
    return Arrays().dot(mine, b[: len(mine)])


def vector_add(a: Point, factor: float, b: Point) -> Point:
    """Return ``a + factor b``."""
    return Arrays().add(a, b, factor)


def vector_scaled(a: Point, factor: float, diagonal: Point) -> Point:
    """Return ``factor`` times ``a`` times a diagonal."""
    return Arrays().scaled(a, diagonal, factor)
