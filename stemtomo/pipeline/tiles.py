"""Ptychography in tiles on the engine: the same steps as of a scan in one piece, to rounding.

A step: every tile sums its gradients over its share of a batch; gradients and illumination of the object are summed in
the overlaps of windows, those of the probe and the loss over all tiles; then every tile takes the same step on its
window. Batches, random numbers and the order of every sum are those of the scan, however it is cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from stemtomo import backend
from stemtomo.algorithms.ptychography import solver
from stemtomo.algorithms.ptychography.positions import Positions, moved_grid, seen_curvature
from stemtomo.algorithms.ptychography.tiles import Rectangle, batch_of
from stemtomo.backend import Array
from stemtomo.distributed import Checkpoint, Executor, Handle, Parts
from stemtomo.distributed.trees import sum_trees
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

    def steps(self, epoch: int) -> Iterator[Batch]:
        """Yield the steps of an epoch."""
        count = min(self.batches[epoch], self.members)
        for number in range(count):
            share = Share(number, self.batches[epoch], self.members, self.seed + epoch)
            moves_probe, last = epoch >= self.probe_start, number + 1 == count
            yield Batch(share, self.rules[epoch], moves_probe, epoch, self.regularise, last)


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
class Share:
    """The members that take a step: batch ``number`` of ``batches``, as ``seed`` shuffles the ``members``."""

    number: int
    batches: int
    members: int
    seed: int

    def of(self, part: Field) -> np.ndarray:
        """Return which positions of a tile take the step."""
        return np.flatnonzero(batch_of(self.members, self.batches, self.seed)[part.members] == self.number)


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
        steps = list(schedule.steps(epoch))
        moving = now.positions if now.positions is not None else [None] * len(now.states)
        work, sums = now.states.map(tile_gradients, steps[0], not schedule.tied, each=[self.fields, moving]), []
        for step, following in itertools.zip_longest(steps, steps[1:]):
            # Two messages per tile: its halo, and one small value; what lies on a worker already is not moved.
            halos = work.halo_sum(self.windows, of="halo")
            sums.append(work.map(tile_totals, each=[halos]).reduce(tiles_together))
            function, more = (tile_update, ()) if following is None else (tile_step, (following,))
            work = work.map(function, sums[-1], step, *more, each=[halos, self.fields, moving])
        loss = float(self.executor.gather(self.executor.submit(tiles_epoch_loss, sums)))
        return Standing(work, now.positions, [*now.losses, loss])

    def save(self, now: Standing, checkpoint: Checkpoint) -> Standing:
        """Write ``now`` as a checkpoint and return it as read back: the history of tasks begins anew."""
        moving = now.positions if now.positions is not None else [None] * len(now.states)
        return self.save_trees(now.states.map(tile_tree, each=[moving]), now.losses, checkpoint)

    def save_trees(self, trees: Parts, losses: Sequence[float], checkpoint: Checkpoint) -> Standing:
        """Write the states ``trees`` of all tiles, as of :func:`tile_tree`, and return them as a standing."""
        return self._read(trees.save(checkpoint, len(losses), {**self.kept, "losses": np.array(losses)}))

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


def tile_gradients(
    state: solver.State, batch: Batch, untie: bool, part: Field, positions: Positions | None
) -> dict[str, Any]:
    """Return the state of a tile and what it adds: ``halo`` in the overlaps, ``total`` over all tiles, ``own``."""
    state = solver.untied(state, part.model.slices) if untie else state
    parameters = [] if positions is None else [positions]
    sums = part.gradients(state, batch.share.of(part), parameters)
    over = {p.name: p.over_parts(state.extra[p.name], sums.extra[p.name]) for p in parameters}
    total = {"probe": sums.probe, "loss": sums.loss, "positions": sums.positions, "extra": over}
    own = {p.name: sums.extra[p.name] for p in parameters if not p.shared}
    halo = {"phase": sums.phase, "illumination": sums.illumination}
    return {"state": state, "halo": halo, "total": total, "own": own}


def tile_totals(work: dict[str, Any], halo: dict[str, Array]) -> dict[str, Any]:
    """Return what a tile adds to the sums over all tiles, and the largest illumination of its window."""
    return {"total": work["total"], "peak": float(halo["illumination"].max())}


def tiles_together(some: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the totals of several tiles together."""
    return {"total": sum_trees([each["total"] for each in some]), "peak": max(each["peak"] for each in some)}


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
    parameters = [] if positions is None else [positions]
    for parameter in parameters:
        over = total["extra"][parameter.name]
        extra[parameter.name] = over if parameter.shared else {**work["own"][parameter.name], "over_parts": over}
    gradients = solver.Gradients(
        halo["phase"], total["probe"], halo["illumination"], total["loss"], total["positions"], extra
    )
    slices = part.model.slices
    state = solver.update(work["state"], gradients, batch.rule, batch.update_probe, sums["peak"], slices, parameters)
    state = state if batch.regularise is None else batch.regularise(state, batch.epoch)
    return solver.orthogonal_modes(state) if batch.last else state


def tile_step(
    work: dict[str, Any],
    sums: dict[str, Any],
    batch: Batch,
    following: Batch,
    halo: dict[str, Array],
    part: Field,
    positions: Positions | None,
) -> dict[str, Any]:
    """Do :func:`tile_update`, then :func:`tile_gradients` of the ``following`` batch, in one task."""
    state = tile_update(work, sums, batch, halo, part, positions)
    return tile_gradients(state, following, False, part, positions)


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
