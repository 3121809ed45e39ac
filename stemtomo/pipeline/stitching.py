"""Tiles on their own: one probe for all, tiles that exchange nothing for whole epochs, then meet and are blended.

For clusters whose network or scheduler is slow. The probe is fitted to the middle of the scan. Every tile, with some
patterns of its neighbours, is then one chain of long tasks. Where tiles meet, what they leave free, and what a probe of
their own would, is solved for over all overlaps (:mod:`~stemtomo.algorithms.ptychography.gauges`), transmissions are
blended with the illumination of the patterns that each tile owns as weights, and every tile goes on with the blend in
its window and the mean of all probes: an additive Schwarz iteration whose tiles are restricted to what they own. A few
exact epochs follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stemtomo import backend
from stemtomo.algorithms.ptychography import gauges, solver
from stemtomo.algorithms.ptychography.gauges import Difference, Gauge
from stemtomo.algorithms.ptychography.positions import Positions, moved_grid
from stemtomo.algorithms.ptychography.tiles import Rectangle, Tile
from stemtomo.backend import Array, array_namespace
from stemtomo.distributed import Checkpoint, Executor, Handle, Parts
from stemtomo.distributed.trees import map_tree
from stemtomo.distributed.windows import intersection
from stemtomo.pipeline.tile_fields import Field
from stemtomo.pipeline.tile_steps import tile_curvature, tile_saved_positions, tile_state, tile_tree
from stemtomo.pipeline.tiles import Schedule

#: What update rules remember of, and what of it is turned with the modes of the probe.
_BLENDED, _LINEAR = ("object", "probe"), ("momentum", "mean")
#: Overlaps are compared where both tiles have this share of their usual illumination; least pixels of their edges.
_LIT, _LEAST_PX = 0.7, 8


@dataclass(frozen=True)
class Apart:
    """Tiles on their own.

    Parameters
    ----------
    fields, tiles
        With the positions of their neighbours that they see, too.
    owned
        Per tile, (position,) bool: which of its positions are its own.
    epochs
        Epochs of the schedule that they are on their own for.
    meet_every
        Epochs after which they meet.
    layers
        Layers of their objects.
    kept
        What a checkpoint keeps beside the tiles and the losses.
    """

    executor: Executor
    fields: Parts
    tiles: Sequence[Tile]
    owned: Sequence[np.ndarray]
    schedule: Schedule
    epochs: int
    meet_every: int
    layers: int
    kept: dict[str, Any]

    def start(self, build: Callable[..., solver.State], *shared: Any) -> Parts:
        """Return the first trees: of the states ``build(field, *shared)``."""
        return self.fields.map(build, *shared).map(tile_tree, None)

    def solve(
        self,
        trees: Parts,
        losses: list[float],
        checkpoint: Checkpoint,
        checkpoint_every: int,
        on_epoch: Callable[[int, float], None],
    ) -> tuple[Parts, list[float]]:
        """Return the trees of the tiles after :attr:`epochs` epochs, and the loss per pattern of each."""
        while (first := len(losses)) < self.epochs:
            last = min(self.epochs, *(first - first % every + every for every in (checkpoint_every, self.meet_every)))
            work = trees.map(tile_alone, self.schedule, first, last, self.meet_every, each=[self.fields])
            trees = work.pick("tree")
            sums = self.executor.gather(work.pick("sums").sum())
            for epoch, (loss, count) in zip(range(first, last), sums, strict=True):
                losses = [*losses, float(loss / count)]
                on_epoch(epoch, losses[-1])
            if last < self.epochs and last % self.meet_every == 0:
                trees = self.met(trees, last)
            if last < self.epochs and last % checkpoint_every == 0:
                trees = trees.save(checkpoint, last, {**self.kept, "losses": np.array(losses)}).parts
                trees = Parts(self.executor, trees.handles, self.fields.places)
        return trees, losses

    def met(self, trees: Parts, epochs: int) -> Parts:
        """Return the trees of the tiles after ``epochs`` with the blend of all in their windows, and one probe.

        Tiles that met an epoch ago have not drifted apart, and no gauges are looked for.
        """
        everything = [np.ones(len(tile.where), bool) for tile in self.tiles]
        return self._blended(trees, [tile.window for tile in self.tiles], everything, epochs)

    def joined(self, trees: Parts, windows: Sequence[Rectangle]) -> Parts:
        """Return the trees of exact tiles with these ``windows`` of the object: all tiles blended."""
        return self._blended(trees, windows, list(self.owned), self.epochs)

    def _blended(self, trees: Parts, windows: Sequence[Rectangle], kept: Sequence[np.ndarray], epochs: int) -> Parts:
        """Return the trees of tiles with these ``windows`` and the positions ``kept`` of each, after ``epochs``."""
        owned, seen = list(self.owned), [tile.window for tile in self.tiles]
        pieces = trees.map(tile_piece, each=[self.fields, owned])
        centres = np.array([[(a + b) / 2 for a, b in window] for window in seen])
        first = self.schedule.positions_from
        moving = first is not None and first < epochs
        apart = self.meet_every > 1 or epochs == self.epochs
        differences = self._differences(pieces, seen) if apart else []
        solved = self.executor.submit(tiles_gauges, differences, centres, self.layers, moving)
        numbers = list(range(len(seen)))
        shares = pieces.map(tile_share, solved, each=[numbers])
        blends = shares.exchange(seen, windows, beside=self.fields)
        probe = trees.map(tile_probe, trees.handles[0], each=[owned]).sum()
        return trees.map(tile_blended, solved, probe, each=[blends, self.fields, list(kept), numbers])

    def _differences(self, pieces: Parts, windows: Sequence[Rectangle]) -> list[Handle]:
        found, submit = [], self.executor.submit_at
        for first, one in enumerate(windows):
            for second in range(first + 1, len(windows)):
                common = intersection(one, windows[second])
                if common is None or min(stop - start for start, stop in common) < _LEAST_PX:
                    continue
                strips = [
                    submit(pieces.places[n], tile_strip, pieces.handles[n], windows[n], common) for n in (first, second)
                ]
                found.append(submit(pieces.places[first], tile_difference, *strips, (first, second), common))
        return found


# -- tasks, under the names that a dashboard shows ---------------------------------------------------------------------


def tile_alone(
    tree: dict[str, Any], schedule: Schedule, first: int, last: int, meet_every: int, part: Field
) -> dict[str, Any]:
    """Return a tile after the epochs from ``first`` to before ``last``, and their losses.

    Its probe moves in the epoch before tiles meet: on its own for longer, each would find a probe for its noise.
    """
    state, positions = tile_state(tree), None
    if tree["curvature"] is not None:
        free = schedule.affine_from is not None and first > schedule.affine_from
        positions = tile_saved_positions(tree, free, part)
    sums = np.zeros((last - first, 2))
    for epoch in range(first, last):
        free = epoch == schedule.affine_from
        if free or epoch == schedule.positions_from:
            positions = Positions(part.told_angstrom, tile_curvature(state, part), keep_affine=free)
            moved = state.extra.get(Positions.name)
            moved = positions.start(positions.curvature) if moved is None else moved
            state = replace(state, extra={**state.extra, Positions.name: moved})
        parameters = [] if positions is None else [positions]
        state = state if schedule.tied else solver.untied(state, part.model.slices, part.model.weights)
        moves_probe = epoch >= schedule.probe_start and (epoch + 1) % meet_every == 0
        for batch in schedule.steps(epoch):
            wanted = batch.share.of(part)
            if not len(wanted):
                continue
            found = part.gradients(state, wanted, parameters)
            state = solver.update(
                state, found, batch.rule, moves_probe, slices=part.model.slices, parameters=parameters
            )
            state = state if batch.regularise is None else batch.regularise(state, epoch)
            sums[epoch - first] += (found.loss, found.positions)
    return {"tree": tile_tree(state, positions), "sums": sums}


def tile_piece(tree: dict[str, Any], part: Field, owned: np.ndarray) -> dict[str, Array]:
    """Return the object of a tile and its illumination, by all its positions and by those that it owns."""
    grid, moved = part.model.grid, tree["extra"].get(Positions.name)
    grid = grid if moved is None else moved_grid(grid, backend.to_host(moved))
    own = replace(grid, corners=grid.corners[owned], shifts_px=grid.shifts_px[owned])
    lit, mine = (solver.illumination(tree["probe"], each) for each in (grid, own))
    xp = array_namespace(lit)
    usual = xp.median(lit[lit > lit.max() / 2])
    return {"u": tree["phase"], "lit": lit, "own": mine, "usual": usual, "memory": _arrays(tree["memory"], "object")}


def tile_strip(piece: dict[str, Array], window: Rectangle, common: Rectangle) -> dict[str, np.ndarray]:
    """Return what a tile has of an overlap, in host memory."""
    y, x = (slice(c[0] - w[0], c[1] - w[0]) for c, w in zip(common, window, strict=True))
    return {
        "u": backend.to_host(piece["u"][:, y, x]).copy(),
        "lit": backend.to_host(piece["lit"][y, x] / piece["usual"]),
    }


def tile_difference(
    one: dict[str, np.ndarray], other: dict[str, np.ndarray], pair: tuple[int, int], common: Rectangle
) -> Difference:
    """Return how two tiles differ in their overlap."""
    lit = np.minimum(one["lit"], other["lit"]).astype(np.float64)
    lit[lit < _LIT] = 0
    return gauges.difference(one["u"], other["u"], lit**2, pair, (common[0][0], common[1][0]))


def tiles_gauges(differences: Sequence[Difference], centres: np.ndarray, layers: int, moving: bool) -> list[Gauge]:
    """Return the gauges of all tiles; positions that do not move leave no translation free."""
    found = gauges.solve(differences, centres, layers)
    return found if moving else [each._replace(shift_px=np.zeros(2)) for each in found]


def tile_share(piece: dict[str, Array], solved: Sequence[Gauge], number: int) -> dict[str, Array]:
    """Return what a tile adds to the blend: weights, weighted u and weighted transmission."""
    shape = piece["u"].shape[1:]
    u = gauges.without(piece["u"], solved[number], np.array(shape) / 2)
    weight = piece["own"] ** 2
    xp = array_namespace(u)
    memory = {name: weight * value for name, value in piece["memory"].items()}
    return {"u": weight * u, "t": weight * xp.exp(1j * u), "weight": weight, "memory": memory}


def tile_probe(tree: dict[str, Any], first: dict[str, Any], owned: np.ndarray) -> dict[str, Any]:
    """Return what a tile adds to the mean probe, as much as it owns patterns, and to what is remembered of it.

    Modes may be turned into each other: they are turned to those of the ``first`` tile.
    """
    count = int(np.count_nonzero(owned))
    turn, memory = gauges.turn_to(tree["probe"], first["probe"]), _arrays(tree["memory"], "probe")
    turned = {name: gauges.turned(value, turn) if name in _LINEAR else value for name, value in memory.items()}
    rounds = {kind: float(each.get("rounds", 0)) for kind, each in tree["memory"].items() if kind in _BLENDED}
    found = {"probe": gauges.turned(tree["probe"], turn), "memory": turned, "rounds": rounds}
    return {"sums": map_tree(lambda value: value * count, found), "positions": count}


def tile_blended(
    tree: dict[str, Any],
    solved: Sequence[Gauge],
    probes: dict[str, Any],
    blend: dict[str, Any],
    part: Field,
    kept: np.ndarray,
    number: int,
) -> dict[str, Any]:
    """Return the tree of a tile with the mean probe, the blend in its window, and the positions ``kept``.

    What update rules remember of object and probe is blended like these.
    """
    xp = array_namespace(blend["weight"])
    weight = xp.where(blend["weight"] > 0, blend["weight"], 1)
    u = gauges.blended(blend["u"] / weight, xp.where(blend["weight"] > 0, blend["t"] / weight, 1))
    extra, curvature = dict(tree["extra"]), tree["curvature"]
    if Positions.name in extra:
        pixel = np.asarray(part.model.grid.pixel_angstrom_yx)
        gauge = (solved[number].shift_px * pixel)[::-1]
        extra[Positions.name] = extra[Positions.name][kept] - backend.to_device_of(gauge, extra[Positions.name])
        curvature = curvature[kept]
    mean = map_tree(lambda value: value / probes["positions"], probes["sums"])
    probe = mean["probe"].astype(tree["probe"].dtype)
    blended = {"object": {name: value / weight for name, value in blend["memory"].items()}, "probe": mean["memory"]}
    memory: dict[str, Any] = {}
    for kind, values in blended.items():
        own = tree["memory"].get(kind)
        if own is not None:
            memory[kind] = {name: value.astype(own[name].dtype) for name, value in values.items()}
            if "rounds" in own:
                memory[kind]["rounds"] = round(mean["rounds"][kind])
    state = solver.orthogonal_modes(solver.State(u.astype(tree["phase"].dtype), probe, extra, memory))
    return {**state.tree(), "curvature": curvature, "best": None}


def _arrays(memory: dict[str, Any], kind: str) -> dict[str, Array]:
    """Return the arrays that an update rule remembers of object or probe."""
    return {name: value for name, value in (memory.get(kind) or {}).items() if name != "rounds"}
