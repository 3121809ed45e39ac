"""What the tiles of a scan do in a step: the tasks of :mod:`stemtomo.pipeline.tiles`, under names for a dashboard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stemtomo import backend
from stemtomo.algorithms.ptychography import solver
from stemtomo.algorithms.ptychography.constraints import flattened
from stemtomo.algorithms.ptychography.parameters import Background, Parameter
from stemtomo.algorithms.ptychography.positions import Positions, moved_grid, seen_curvature
from stemtomo.algorithms.ptychography.tiles import Rectangle, batch_of
from stemtomo.algorithms.ptychography.variation import Variation
from stemtomo.backend import Array, array_namespace, real_dtype
from stemtomo.distributed.trees import sum_trees
from stemtomo.distributed.windows import Window, intersection, window_shape
from stemtomo.pipeline.tile_fields import Field

#: What the loss of a position knows of beside its place, where a state has it.
_BESIDE = (Background(), Variation())
#: Where a state keeps the loss of every position as met in the last epoch.
LAST_LOSSES = "last_losses"


@dataclass(frozen=True)
class Share:
    """The members that take a step: batch ``number`` of ``batches``, as ``seed`` shuffles the ``members``."""

    number: int
    batches: int
    members: int
    seed: int

    def of(self, part: Field) -> np.ndarray:
        """Return which positions of a tile take the step."""
        taken = batch_of(self.members, self.batches, self.seed)[part.members] == self.number
        return np.flatnonzero(taken & (part.members >= 0))


@dataclass(frozen=True)
class Batch:
    """One step: who takes it, by which rule, and what moves."""

    share: Share
    rule: solver.Rule
    update_probe: bool
    epoch: int
    regularise: Callable[[solver.State, int], solver.State] | None
    last: bool
    """Whether it is the last one of its epoch."""
    background: Background | None = None
    """What moves the background, once it moves."""
    last_losses: bool = False
    """Whether the state is to keep the loss of every position."""
    variation: Variation | None = None
    """What moves how the probe varies along the scan, once it moves."""

    def parameters(self, positions: Positions | None) -> list[Parameter]:
        """Return what moves beside object and probe, in the order of a scan in one piece."""
        return [parameter for parameter in (positions, self.background, self.variation) if parameter is not None]

    def begun(self, state: solver.State, part: Field) -> solver.State:
        """Return the state of a tile with a first value of everything that moves."""
        extra = dict(state.extra)
        if self.background is not None and self.background.name not in extra:
            extra[self.background.name] = no_background(state, part.model)
        if self.variation is not None and self.variation.name not in extra:
            # Weights begin with random numbers: those of the scan.
            value = self.variation.start(state.probe, part.scan_positions)
            extra[self.variation.name] = self.variation.some(value, part.where)
        return replace(state, extra=extra)


def tile_gradients(
    state: solver.State, batch: Batch, untie: bool, part: Field, positions: Positions | None
) -> dict[str, Any]:
    """Return the state of a tile and what it adds: ``halo`` in the overlaps, ``total`` over all tiles, ``own``."""
    state = solver.untied(state, part.model.slices, part.model.weights) if untie else state
    parameters = batch.parameters(positions)
    state = batch.begun(state, part)
    losses = None
    if batch.last_losses:
        losses = state.extra.get(LAST_LOSSES, np.zeros(len(part.where))).copy()
        state = replace(state, extra={**state.extra, LAST_LOSSES: losses})
    sums = part.gradients(state, batch.share.of(part), parameters, losses)
    over = {p.name: p.over_parts(state.extra[p.name], sums.extra[p.name]) for p in parameters}
    total = {"probe": sums.probe, "loss": sums.loss, "positions": sums.positions, "extra": over}
    own = {p.name: sums.extra[p.name] for p in parameters if not p.shared}
    halo = {"phase": sums.phase, "illumination": sums.illumination}
    return {"state": state, "halo": halo, "total": total, "own": own}


def tile_untied(state: solver.State, part: Field) -> solver.State:
    """Return the state of a tile with a layer for every slice."""
    return solver.untied(state, part.model.slices, part.model.weights)


def tile_totals(work: dict[str, Any], rule: solver.Rule, halo: dict[str, Array]) -> dict[str, Any]:
    """Return what a tile adds to the sums over all tiles, and the largest numbers of its window."""
    sums = solver.Gradients(halo["phase"], work["total"]["probe"], halo["illumination"], 0.0, 0)
    peak, largest = float(halo["illumination"].max()), rule.largest(work["state"], sums)
    return {"total": work["total"], "peak": peak, "largest": largest}


def tile_along(
    work: dict[str, Any], sums: dict[str, Any], rule: solver.Rule, halo: dict[str, Array], owned: Array
) -> dict[str, Any]:
    """Return what a tile adds to the length of a step of ``rule``, of the pixels that are its own."""
    found = rule.along(
        solver.Gradients(halo["phase"], work["total"]["probe"], halo["illumination"], 0.0, 0), sums["peak"], owned
    )
    return {"total": {"along": found}, "peak": 0.0, "largest": 0.0}


def tiles_together(some: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the totals of several tiles together."""
    most = {name: max(each[name] for each in some) for name in ("peak", "largest")}
    return {"total": sum_trees([each["total"] for each in some]), **most}


def tile_update(
    work: dict[str, Any],
    sums: dict[str, Any],
    batch: Batch,
    halo: dict[str, Array],
    part: Field,
    positions: Positions | None,
) -> solver.State:
    """Return the state of a tile after the step that all tiles take."""
    total, extra = sums["total"], {}
    parameters = batch.parameters(positions)
    for parameter in parameters:
        over = total["extra"][parameter.name]
        extra[parameter.name] = over if parameter.shared else {**work["own"][parameter.name], "over_parts": over}
    gradients = solver.Gradients(
        halo["phase"], total["probe"], halo["illumination"], total["loss"], total["positions"], extra
    )
    slices = part.model.slices
    known = {"peak_illumination": sums["peak"], "largest": sums["largest"], "along": total.get("along")}
    state = work["state"]
    state = solver.update(
        state, gradients, batch.rule, batch.update_probe, slices=slices, parameters=parameters, **known
    )
    state = state if batch.regularise is None else batch.regularise(state, batch.epoch)
    return solver.orthogonal_modes(state) if batch.last else state


def tiles_epoch_loss(sums: Sequence[dict[str, Any]]) -> float:
    """Return the loss per pattern as met in the batches of an epoch."""
    totals = [each["total"] for each in sums]
    return float(sum(total["loss"] for total in totals) / sum(total["positions"] for total in totals))


def tile_curvature(state: solver.State, part: Field) -> Array:
    """Return the curvature of the loss in every position of a tile."""
    moved = state.extra.get(Positions.name)
    model = part.model
    if moved is not None:
        model = replace(model, grid=moved_grid(model.grid, backend.to_host(moved)))
    return seen_curvature(state, model)


def usual_curvature(curvatures: Sequence[Array]) -> float:
    """Return the median of the curvature over all positions."""
    return float(np.median(np.concatenate([backend.to_host(each)[:, (0, 1), (0, 1)] for each in curvatures])))


def tile_positions(curvature: Array, usual: float, keep_affine: bool, part: Field) -> Positions:
    """Return what moves the positions of a tile."""
    return Positions(part.told_angstrom, curvature, keep_affine=keep_affine, usual_curvature=usual)


def tile_with_positions(state: solver.State, positions: Positions) -> solver.State:
    """Return the state with displacements of the positions, zero where they begin to move."""
    moved = state.extra.get(Positions.name)
    moved = positions.start(positions.curvature) if moved is None else moved
    return replace(state, extra={**state.extra, Positions.name: moved})


def tile_illumination(state: solver.State, part: Field) -> Array:
    """Return the illumination of a tile's window by its own positions."""
    moved = state.extra.get(Positions.name)
    grid = part.model.grid if moved is None else moved_grid(part.model.grid, backend.to_host(moved))
    return solver.illumination(state.probe, grid)


def tile_misfits(state: solver.State, part: Field, positions: Positions | None) -> np.ndarray:
    """Return the loss of every position of a tile: as met in the last epoch, if all were."""
    if LAST_LOSSES in state.extra:
        met: np.ndarray = state.extra[LAST_LOSSES]
        return met
    return part.misfits(state, [*_BESIDE, *([] if positions is None else [positions])])


def tile_held_out(state: solver.State, part: Field, positions: Positions | None) -> dict[str, float]:
    """Return the loss of the positions of a tile that are held out, and their number."""
    held = np.flatnonzero(part.members < 0)
    parameters: list[Parameter] = [*_BESIDE, *([] if positions is None else [positions])]
    return {"loss": float(part.misfits(state, parameters, held)[held].sum()), "positions": float(len(held))}


def tile_owned(state: solver.State, windows: Sequence[Rectangle], number: int) -> Array:
    """Return the phase of a tile, real, zero where a tile before it holds the same pixels."""
    return state.phase.real * owned_pixels(windows, number, state.phase)


def owned_pixels(windows: Sequence[Window], number: int, like: Array) -> Array:
    """Return one, else zero where a window before number ``number`` holds the same pixels, (Y, X) of that window."""
    found = array_namespace(like).ones(window_shape(windows[number]), dtype=real_dtype(like))
    for other in windows[:number]:
        common = intersection(windows[number], other)
        if common is not None:
            y, x = (slice(c[0] - w[0], c[1] - w[0]) for c, w in zip(common, windows[number], strict=True))
            found[y, x] = 0
    return found


def tile_flattened(
    state: solver.State, weight: float, phase: Array, window: Rectangle, wide: Rectangle
) -> solver.State:
    """Return the state of a tile behind the step of the total variation of ``phase``, in the window ``wide``."""
    y, x = (slice(w[0] - o[0], w[1] - o[0]) for w, o in zip(window, wide, strict=True))
    smooth = flattened(phase, weight)[:, y, x]
    return replace(state, phase=state.phase + (smooth - state.phase.real))


def no_background(state: solver.State, model: solver.Model) -> Array:
    """Return the background to begin with, (qy, qx)."""
    shape = model.detector_yx or model.grid.window_yx
    return array_namespace(state.probe).zeros(shape, dtype=real_dtype(state.probe))


def tile_tree(state: solver.State, positions: Positions | None, best: solver.State | None = None) -> dict[str, Any]:
    """Return the state of a tile as plain dicts and arrays, with the curvature that moves its positions."""
    curvature = None if positions is None else positions.curvature
    return {**state.tree(), "curvature": curvature, "best": None if best is None else best.tree()}


def tile_state(tree: dict[str, Any]) -> solver.State:
    """Return the state that :func:`tile_tree` was made of."""
    return solver.State(**{name: value for name, value in tree.items() if name not in ("curvature", "best")})


def tile_best(tree: dict[str, Any]) -> solver.State:
    """Return the best state that :func:`tile_tree` was told."""
    return solver.State(**tree["best"])


def tile_saved_positions(tree: dict[str, Any], keep_affine: bool, part: Field) -> Positions:
    """Return what moves the positions of a tile, from a checkpoint: its curvature has its floor already."""
    return Positions(part.told_angstrom, tree["curvature"], keep_affine=keep_affine, usual_curvature=0.0)
