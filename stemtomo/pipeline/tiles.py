"""Ptychography in tiles on the engine: the same steps as of a scan in one piece, to rounding.

A step: every tile sums its gradients over its share of a batch; gradients and illumination of the object are summed in
the overlaps of windows, those of the probe and the loss over all tiles; then every tile takes the same step on its
window. Batches, random numbers and the order of every sum are those of the scan, however it is cut.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from stemtomo.algorithms.ptychography import solver
from stemtomo.algorithms.ptychography.held_out import Stopping
from stemtomo.algorithms.ptychography.parameters import Background
from stemtomo.algorithms.ptychography.tiles import Rectangle
from stemtomo.algorithms.ptychography.variation import Variation
from stemtomo.algorithms.total_variation import REACH
from stemtomo.distributed import Checkpoint, Executor, Handle, Parts
from stemtomo.distributed.windows import bounding_window, grown
from stemtomo.pipeline.tile_bundles import Bundles
from stemtomo.pipeline.tile_search import Search, settled
from stemtomo.pipeline.tile_steps import (
    Batch,
    Share,
    tile_best,
    tile_curvature,
    tile_flattened,
    tile_held_out,
    tile_illumination,
    tile_misfits,
    tile_owned,
    tile_positions,
    tile_saved_positions,
    tile_state,
    tile_tree,
    tile_untied,
    tile_with_positions,
    tiles_epoch_loss,
    usual_curvature,
)
from stemtomo.pipeline.tile_whole import WholeFilter


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
    positions_from, affine_from, background_from
        First epochs that move the positions, let the scan change its affine shape, and refine the background, one
        number for all pixels if ``uniform_background``; ``None`` for never.
    tied
        The slices stay tied.
    regularise
        Called after every update with the state and the epoch, pixel by pixel of the object alone.
    tv_weight_rad
        Weight of the total variation of each layer, after every epoch.
    patience
        Epochs without a lower loss of the patterns held out that are the last; ``None`` without such patterns.
    variation, variation_from
        How the probe may vary along the scan, and the first epoch that refines it.
    whole
        What is done to the whole object after every epoch.
    search
        What follows the epochs.
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
    background_from: int | None = None
    uniform_background: bool = True
    tv_weight_rad: float = 0.0
    patience: int | None = None
    variation: Variation | None = None
    variation_from: int = 0
    whole: WholeFilter | None = None
    search: Search | None = None

    @property
    def epochs(self) -> int:
        """Number of epochs."""
        return len(self.rules)

    def beside(self, epoch: int) -> tuple[Background | None, Variation | None]:
        """Return what moves background and variation of the probe in an epoch."""
        lit = self.background_from is not None and epoch >= self.background_from
        varied = self.variation if epoch >= self.variation_from else None
        return Background(uniform=self.uniform_background) if lit else None, varied

    def steps(self, epoch: int) -> Iterator[Batch]:
        """Yield the steps of an epoch."""
        count = min(self.batches[epoch], self.members)
        for number in range(count):
            share = Share(number, self.batches[epoch], self.members, self.seed + epoch)
            moves_probe, last = epoch >= self.probe_start, number + 1 == count
            background, varied = self.beside(epoch)
            told = epoch + 1 == self.epochs and self.patience is None and self.search is None
            yield Batch(share, self.rules[epoch], moves_probe, epoch, self.regularise, last, background, told, varied)


@dataclass(frozen=True)
class Standing:
    """Where a reconstruction in tiles stands after an epoch."""

    states: Parts
    """A :class:`~stemtomo.algorithms.ptychography.model.State` on the window of each tile."""
    positions: Parts | None = None
    """What moves the positions of each tile, once they move."""
    losses: list[float] = field(default_factory=list)
    """Per pattern, as met in each epoch."""
    held_out: list[float] = field(default_factory=list)
    """Per pattern held out, after each epoch."""
    best: Parts | None = None
    """The states that the patterns held out like best."""


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

    @functools.cached_property
    def bundles(self) -> Bundles:
        """The tiles as bundles that a thread of a worker works on."""
        return Bundles(self.executor, self.fields.places, self.windows)

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
            if self.over(now):
                break
            now = self.held(self.epoch(now, epoch))
            if on_epoch is not None:
                on_epoch(epoch, now.losses[-1])
            done = epoch + 1
            more = done < self.schedule.epochs or self.schedule.search is not None
            if checkpoint and done % checkpoint_every == 0 and more:
                now = self.save(now, checkpoint)
        now = self._searched(now, on_epoch)
        return now if now.best is None else replace(now, states=now.best)

    def _searched(self, now: Standing, on_epoch: Callable[[int, float], None] | None) -> Standing:
        """Return the standing behind the search over all positions, if there is one."""
        schedule = self.schedule
        if schedule.search is None or self.over(now):
            return now
        rule = schedule.rules[-1] if schedule.rules else solver.Nesterov()
        background, varied = schedule.beside(schedule.epochs - 1)
        share = Share(0, 1, schedule.members, 0)
        batch = Batch(share, rule, False, schedule.epochs, None, False, background, False, varied)
        states = now.states if schedule.tied else now.states.map(tile_untied, each=[self.fields])
        found = replace(now, states=states)

        def follow(states: Parts, loss: float) -> bool:
            nonlocal found
            found = self.held(replace(found, states=states, losses=[*found.losses, loss]))
            if on_epoch is not None:
                on_epoch(len(found.losses) - 1, found.losses[-1])
            return self.over(found)

        ended = settled(
            schedule.search, states, self.fields, self._moving(now), self.bundles, self.windows, batch, follow
        )
        return replace(found, states=ended)

    def over(self, now: Standing) -> bool:
        """Return whether the patterns held out say that it is enough."""
        stopping = self._stopping(now)
        return stopping is not None and stopping.best >= 0 and stopping.over

    def best_epoch(self, now: Standing) -> int:
        """Return the epoch that the patterns held out like best, else the last."""
        stopping = self._stopping(now)
        return len(now.losses) - 1 if stopping is None else stopping.best

    def held(self, now: Standing) -> Standing:
        """Return the standing with the loss of the patterns held out, where there are some."""
        if self.schedule.patience is None:
            return now
        sums = self.executor.gather(now.states.map(tile_held_out, each=[self.fields, self._moving(now)]).sum())
        now = replace(now, held_out=[*now.held_out, float(sums["loss"] / sums["positions"])])
        return replace(now, best=now.states) if self.best_epoch(now) == len(now.held_out) - 1 else now

    def _stopping(self, now: Standing) -> Stopping | None:
        if self.schedule.patience is None:
            return None
        found = Stopping(self.schedule.patience)
        for loss in now.held_out:
            found.tell(loss)
        return found

    def epoch(self, now: Standing, epoch: int) -> Standing:
        """Return the standing after one pass over all patterns; waits for its loss."""
        schedule = self.schedule
        now = self._with_positions(now, epoch)
        steps = list(schedule.steps(epoch))
        moving, bundles, together = self._moving(now), self.bundles, self.executor.together()
        work, sums = bundles.begin(together, now.states, steps[0], not schedule.tied, self.fields, moving), []
        for step, following in itertools.zip_longest(steps, steps[1:]):
            others = bundles.strips(together, work)
            sums.append(bundles.totals(together, work, step.rule, others))
            work = bundles.step(together, work, sums[-1], (step, following), others, self.fields, moving)
        states = self._flattened(bundles.apart(together, work, self.fields.places))
        if schedule.whole is not None:
            states = schedule.whole.applied(states, self.fields, self.windows)
        found = together.send([*states.handles, together.submit(tiles_epoch_loss, sums)])
        states = Parts(self.executor, tuple(found[:-1]), states.places)
        return replace(now, states=states, losses=[*now.losses, float(self.executor.gather(found[-1]))])

    def _flattened(self, states: Parts) -> Parts:
        """Return the states behind the step of the total variation, which looks beyond the window of a tile."""
        weight = self.schedule.tv_weight_rad
        if weight <= 0:
            return states
        windows, numbers = list(self.windows), list(range(len(states)))
        whole = bounding_window(windows)
        wide = [grown(window, REACH, whole) for window in windows]
        # Every pixel comes from one tile: those that share it hold the same value.
        phases = states.map(tile_owned, windows, each=[numbers]).exchange(windows, wide, beside=self.fields)
        return states.map(tile_flattened, weight, each=[phases, windows, wide])

    def save(self, now: Standing, checkpoint: Checkpoint) -> Standing:
        """Write ``now`` as a checkpoint and return it as read back: the history of tasks begins anew."""
        best = now.best if now.best is not None else [None] * len(now.states)
        trees = now.states.map(tile_tree, each=[self._moving(now), best])
        return self.save_trees(trees, now.losses, checkpoint, now.held_out)

    def save_trees(
        self, trees: Parts, losses: Sequence[float], checkpoint: Checkpoint, held_out: Sequence[float] = ()
    ) -> Standing:
        """Write the states ``trees`` of all tiles, as of :func:`tile_tree`, and return them as a standing."""
        shared = {**self.kept, "losses": np.array(losses), "held_out": np.array(held_out)}
        return self._read(trees.save(checkpoint, len(losses), shared))

    def resumed(self, checkpoint: Checkpoint) -> Standing | None:
        """Return the standing of the last complete checkpoint, ``None`` if there is none."""
        saved = Parts.load(self.executor, checkpoint)
        return None if saved is None else self._read(saved)

    def illumination(self, now: Standing, shape_yx: tuple[int, int]) -> Handle:
        """Return a handle of the sum of |probe|² over all positions, (Y, X) of the whole object."""
        return now.states.map(tile_illumination, each=[self.fields]).sum_into(shape_yx, self.windows)

    def misfits(self, now: Standing) -> Parts:
        """Return the loss of every position of each tile, (position,): as met in the last epoch if all were."""
        return now.states.map(tile_misfits, each=[self.fields, self._moving(now)])

    def _moving(self, now: Standing) -> list[Any]:
        return [None] * len(now.states) if now.positions is None else list(now.positions.handles)

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
        losses, held = saved.shared["losses"].tolist(), saved.shared["held_out"].tolist()
        best = states.map(tile_best) if held else None
        return Standing(states.map(tile_state), positions, losses, held, best)
