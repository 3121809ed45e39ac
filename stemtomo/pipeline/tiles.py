"""Ptychography in tiles on the engine: the same steps as of a scan in one piece, to rounding.

A step: every tile sums its gradients over its share of a batch; gradients and illumination of the object are summed in
the overlaps of windows, those of the probe and the loss over all tiles; then every tile takes the same step on its
window. Batches, random numbers and the order of every sum are those of the scan, however it is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from stemtomo import backend
from stemtomo.algorithms.ptychography import solver
from stemtomo.algorithms.ptychography.positions import Positions, moved_grid, seen_curvature
from stemtomo.algorithms.ptychography.tiles import Rectangle, batch_of
from stemtomo.backend import Array
from stemtomo.distributed import Checkpoint, Executor, Handle, Parts
from stemtomo.pipeline.tile_fields import Field


@dataclass(frozen=True)
class Schedule:
    """What happens when.

    Parameters
    ----------
    rules, batches
        One per epoch.
    members
        What batches are made of: the number of recorded positions, or of blocks of them.
    probe_start
        First epoch that moves the probe.
    positions_from, affine_from
        First epochs that move the positions, and let the scan change its affine shape; ``None`` for never.
    tied
        The slices stay tied.
    regularise
        Called after every update with the state and the epoch, pixel by pixel of the object alone.
    """

    rules: Sequence[solver.Rule]
    batches: Sequence[int]
    members: int
    probe_start: int = 0
    seed: int = 0
    tied: bool = False
    positions_from: int | None = None
    affine_from: int | None = None
    regularise: Callable[[solver.State, int], solver.State] | None = None

    @property
    def epochs(self) -> int:
        """Number of epochs."""
        return len(self.rules)


@dataclass(frozen=True)
class Standing:
    """Where a reconstruction in tiles stands after an epoch."""

    states: Parts
    """A :class:`~stemtomo.algorithms.ptychography.model.State` on the window of each tile."""
    positions: Parts | None = None
    """What moves the positions of each tile, once they move."""
    losses: list[float] = field(default_factory=list)
    """Per pattern, as met in each epoch."""


@dataclass(frozen=True)
class _Batch:
    """One step: which members of which epoch take it, by which rule, and what moves."""

    number: int
    batches: int
    members: int
    seed: int
    rule: solver.Rule
    update_probe: bool
    epoch: int
    regularise: Callable[[solver.State, int], solver.State] | None


@dataclass(frozen=True)
class TiledRun:
    """What all epochs of one reconstruction share.

    Parameters
    ----------
    fields
        A :class:`~stemtomo.pipeline.tile_fields.Field` per tile, on the worker that is to work on it.
    windows
        The window of the object that each tile sees.
    kept
        What a checkpoint keeps beside the tiles and the losses.
    """

    executor: Executor
    fields: Parts
    windows: Sequence[Rectangle]
    schedule: Schedule
    kept: dict[str, Any] = field(default_factory=dict)

    def start(self, build: Callable[..., solver.State], *shared: Any) -> Standing:
        """Return the first standing: the states ``build(field, *shared)``."""
        return Standing(self.fields.map(build, *shared))

    def solve(
        self,
        now: Standing,
        *,
        checkpoint: Checkpoint | None = None,
        checkpoint_every: int = 5,
        on_epoch: Callable[[int, float], None] | None = None,
    ) -> Standing:
        """Run the epochs after ``now``.

        Parameters
        ----------
        checkpoint
            Where to keep the standing every ``checkpoint_every`` epochs.
        on_epoch
            Called after every epoch with its number and its loss per pattern.
        """
        for epoch in range(len(now.losses), self.schedule.epochs):
            now = self.epoch(now, epoch)
            if on_epoch is not None:
                on_epoch(epoch, now.losses[-1])
            done = epoch + 1
            if checkpoint and done % checkpoint_every == 0 and done < self.schedule.epochs:
                now = self.save(now, checkpoint)
        return now

    def epoch(self, now: Standing, epoch: int) -> Standing:
        """Return the standing after one pass over all patterns; waits for its loss."""
        schedule = self.schedule
        now = self._with_positions(now, epoch)
        states, totals = now.states, []
        if not schedule.tied:
            states = states.map(tile_untied, each=[self.fields])
        moving = now.positions if now.positions is not None else [None] * len(states)
        members, count = schedule.members, schedule.batches[epoch]
        for number in range(min(count, members)):
            seed, refine = schedule.seed + epoch, epoch >= schedule.probe_start
            batch = _Batch(number, count, members, seed, schedule.rules[epoch], refine, epoch, schedule.regularise)
            states, total = self._step(states, moving, batch)
            totals.append(total)
        states = states.map(solver.orthogonal_modes)
        loss = float(self.executor.gather(self.executor.submit(tile_epoch_loss, totals)))
        return Standing(states, now.positions, [*now.losses, loss])

    def save(self, now: Standing, checkpoint: Checkpoint) -> Standing:
        """Write ``now`` as a checkpoint and return it as read back: the history of tasks begins anew."""
        moving = now.positions if now.positions is not None else [None] * len(now.states)
        trees = now.states.map(tile_tree, each=[moving])
        shared = {**self.kept, "losses": np.array(now.losses)}
        return self._read(trees.save(checkpoint, len(now.losses), shared))

    def resumed(self, checkpoint: Checkpoint) -> Standing | None:
        """Return the standing of the last complete checkpoint, ``None`` if there is none."""
        saved = Parts.load(self.executor, checkpoint)
        return None if saved is None else self._read(saved)

    def illumination(self, now: Standing, shape_yx: tuple[int, int]) -> Handle:
        """Return a handle of the sum of |probe|² over all positions, (Y, X) of the whole object."""
        return now.states.map(tile_illumination, each=[self.fields]).sum_into(shape_yx, self.windows)

    def misfits(self, now: Standing) -> Parts:
        """Return the loss of every position of each tile, (position,)."""
        moving = now.positions if now.positions is not None else [None] * len(now.states)
        return now.states.map(tile_misfits, each=[self.fields, moving])

    def _step(self, states: Parts, moving: Any, batch: _Batch) -> tuple[Parts, Handle]:
        local = states.map(tile_gradients, batch, each=[self.fields, moving])
        halos = local.pick("halo").halo_sum(self.windows)
        total = local.pick("total").sum()
        peak = self.executor.submit(max, list(halos.map(tile_peak).handles))
        states = states.map(tile_update, total, peak, batch, each=[local.pick("own"), halos, self.fields, moving])
        return states, total

    def _with_positions(self, now: Standing, epoch: int) -> Standing:
        free = epoch == self.schedule.affine_from
        if not free and epoch != self.schedule.positions_from:
            return now
        curvatures = now.states.map(tile_curvature, each=[self.fields])
        usual = self.executor.submit(usual_curvature, list(curvatures.handles))
        positions = curvatures.map(tile_positions, usual, free, each=[self.fields])
        return replace(now, states=now.states.map(tile_with_positions, each=[positions]), positions=positions)

    def _read(self, saved: Any) -> Standing:
        states = Parts(self.executor, saved.parts.handles, self.fields.places)
        epoch = saved.step
        first = self.schedule.positions_from
        positions = None
        if first is not None and epoch > first:
            free = self.schedule.affine_from is not None and epoch > self.schedule.affine_from
            positions = states.map(tile_saved_positions, free, each=[self.fields])
        losses = [float(loss) for loss in saved.shared["losses"]]
        return Standing(states.map(tile_state), positions, losses)


# -- tasks, under the names that a dashboard shows ---------------------------------------------------------------------


def tile_gradients(state: solver.State, batch: _Batch, part: Field, positions: Positions | None) -> dict[str, Any]:
    """Return what a tile adds: to its neighbours' windows, to the sums over all tiles, and what stays its own."""
    wanted = np.flatnonzero(batch_of(batch.members, batch.batches, batch.seed)[part.members] == batch.number)
    parameters = [] if positions is None else [positions]
    sums = part.gradients(state, wanted, parameters)
    over = {p.name: p.over_parts(state.extra[p.name], sums.extra[p.name]) for p in parameters}
    total = {"probe": sums.probe, "loss": sums.loss, "positions": sums.positions, "extra": over}
    own = {p.name: sums.extra[p.name] for p in parameters if not p.shared}
    return {"halo": {"phase": sums.phase, "illumination": sums.illumination}, "total": total, "own": own}


def tile_peak(halo: dict[str, Array]) -> float:
    """Return the largest illumination of a tile's window."""
    return float(halo["illumination"].max())


def tile_update(
    state: solver.State,
    total: dict[str, Any],
    peak: float,
    batch: _Batch,
    own: dict[str, Any],
    halo: dict[str, Array],
    part: Field,
    positions: Positions | None,
) -> solver.State:
    """Return the state of a tile after the step that all tiles take."""
    parameters = [] if positions is None else [positions]
    extra = {}
    for parameter in parameters:
        over = total["extra"][parameter.name]
        extra[parameter.name] = over if parameter.shared else {**own[parameter.name], "over_parts": over}
    sums = solver.Gradients(
        halo["phase"], total["probe"], halo["illumination"], total["loss"], total["positions"], extra
    )
    state = solver.update(state, sums, batch.rule, batch.update_probe, peak, part.model.slices, parameters)
    return state if batch.regularise is None else batch.regularise(state, batch.epoch)


def tile_epoch_loss(totals: Sequence[dict[str, Any]]) -> float:
    """Return the loss per pattern as met in the batches of an epoch."""
    return float(sum(total["loss"] for total in totals) / sum(total["positions"] for total in totals))


def tile_untied(state: solver.State, part: Field) -> solver.State:
    """Return the state with a layer per slice."""
    return solver.untied(state, part.model.slices)


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
    """Return the loss of every position of a tile."""
    return part.misfits(state, [] if positions is None else [positions])


def tile_tree(state: solver.State, positions: Positions | None) -> dict[str, Any]:
    """Return the state of a tile as plain dicts and arrays, with the curvature that moves its positions."""
    return {**state.tree(), "curvature": None if positions is None else positions.curvature}


def tile_state(tree: dict[str, Any]) -> solver.State:
    """Return the state that :func:`tile_tree` was made of."""
    return solver.State(**{name: value for name, value in tree.items() if name != "curvature"})


def tile_saved_positions(tree: dict[str, Any], keep_affine: bool, part: Field) -> Positions:
    """Return what moves the positions of a tile, from a checkpoint: its curvature has its floor already."""
    return Positions(part.told_angstrom, tree["curvature"], keep_affine=keep_affine, usual_curvature=0.0)
