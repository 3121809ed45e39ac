"""Tiles that one thread of a worker works on, as one: few tasks and messages for a step of many tiles.

The sums of a step are those of every tile for itself, in the order of the tiles, so that bundling changes no bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any, NamedTuple

from stemtomo.algorithms.ptychography import solver
from stemtomo.backend import Array
from stemtomo.distributed import Executor, Handle, Parts
from stemtomo.distributed.executor import Place
from stemtomo.distributed.windows import Window, assemble, bounding_window, intersection, overlapping, window_shape
from stemtomo.pipeline.tile_fields import Field
from stemtomo.pipeline.tile_steps import (
    Batch,
    owned_pixels,
    tile_along,
    tile_gradients,
    tile_totals,
    tile_update,
    tiles_together,
)

#: Tiles whose totals one task adds: probes, losses and gauges are small.
SMALL_FAN_IN = 16


@dataclass(frozen=True)
class Piece:
    """Where a contribution to the halo of a tile is: in ``source``, the bundle itself if -1, under ``key``."""

    source: int
    key: int
    window: Window
    strip: bool = False
    """Whether it is the strip of a tile on another worker, not the work of the tile."""


@dataclass(frozen=True)
class Halos:
    """How the halos of the tiles of a bundle are put together: a window and its pieces, in the order of the tiles."""

    windows: tuple[Window, ...]
    pieces: tuple[tuple[Piece, ...], ...]
    before: tuple[tuple[Window, ...], ...]
    """Per tile, the windows of tiles before it that overlap its own."""

    def owned(self, number: int, like: Array) -> Array:
        """Return which pixels are those of tile ``number`` of the bundle, (Y, X)."""
        return owned_pixels((*self.before[number], self.windows[number]), len(self.before[number]), like)

    def of(self, number: int, work: Sequence[dict[str, Any]], others: Sequence[Any]) -> dict[str, Array]:
        """Return the sums in the window of tile ``number`` of the bundle over all tiles that reach it."""
        windows, values = [], []
        for piece in self.pieces[number]:
            held = (work if piece.source < 0 else others[piece.source])[piece.key]
            windows.append(piece.window)
            values.append(held if piece.strip else held["halo"])
        found: dict[str, Array] = assemble(self.windows[number], windows, values)
        return found


class Cut(NamedTuple):
    """The rectangle ``window`` of a tile, whose own is ``whole``, number ``place`` of its bundle."""

    tile: int
    place: int
    window: Window
    whole: Window


@dataclass(frozen=True)
class Strips:
    """What one bundle sends to tiles on another worker."""

    cuts: tuple[Cut, ...]

    def holds(self, other: Strips) -> bool:
        """Return whether all of ``other`` lies within these strips."""
        mine = {cut.tile: cut.window for cut in self.cuts}
        return all(
            cut.tile in mine and bounding_window((mine[cut.tile], cut.window)) == mine[cut.tile] for cut in other.cuts
        )

    @property
    def pixels(self) -> int:
        """Number of pixels that are sent."""
        return sum(math.prod(window_shape(cut.window)) for cut in self.cuts)


class Bundles:
    """The tiles of a scan as bundles, one per thread of a worker, in the order of the tiles.

    Its methods submit tasks to the executor that they are given, which may send them together.

    Parameters
    ----------
    places
        The worker of every tile, in runs of neighbours.
    windows
        The window of the object that each tile sees.
    """

    def __init__(self, executor: Executor, places: Sequence[Place], windows: Sequence[Window]) -> None:
        self._windows = windows
        self._tiles = _runs(executor, places)
        self._places = tuple(places[tiles[0]] for tiles in self._tiles)
        self._bundle_of = {tile: number for number, tiles in enumerate(self._tiles) for tile in tiles}
        near = overlapping(windows, windows)
        self._strips, chosen = self._sent(near)
        needs = [self._needs(number, near, chosen) for number in range(len(self._tiles))]
        self._inputs = [inputs for inputs, _ in needs]
        # What tasks are told again and again is sent once.
        self._halos = [executor.broadcast(halos) for _, halos in needs]

    def begin(
        self, to: Executor, states: Parts, batch: Batch, untie: bool, fields: Parts, moving: Sequence[Any]
    ) -> list[Handle]:
        """Return handles of the work of each bundle on its share of the first ``batch`` of an epoch."""
        found = []
        for number, tiles in enumerate(self._tiles):
            fixed = self._fixed(number, fields, moving)
            found.append(
                self._submit(to, number, bundle_gradients, [states.handles[t] for t in tiles], batch, untie, *fixed)
            )
        return found

    def strips(self, to: Executor, work: Sequence[Handle]) -> list[list[Handle]]:
        """Return, for every bundle, handles of what it needs of others."""
        sent = {key: self._submit(to, key[0], bundle_strips, work[key[0]], strips, urgent=True)
                for key, strips in self._strips.items()}  # fmt: skip
        return [[work[key] if isinstance(key, int) else sent[key] for key in inputs] for inputs in self._inputs]

    def totals(self, to: Executor, work: Sequence[Handle], rule: solver.Rule, others: Sequence[list[Handle]]) -> Handle:
        """Return a handle of the sums over all tiles; of a rule whose step is as long as other sums say, with these."""
        lists = [
            self._submit(to, n, bundle_totals, work[n], rule, halos, others[n], urgent=True)
            for n, halos in enumerate(self._halos)
        ]
        sums = self._together(to, lists)
        if not rule.sums_along:
            return sums
        lists = [
            self._submit(to, n, bundle_along, work[n], sums, rule, halos, others[n], urgent=True)
            for n, halos in enumerate(self._halos)
        ]
        return self._submit(to, 0, with_along, sums, self._together(to, lists), urgent=True)

    def step(
        self,
        to: Executor,
        work: Sequence[Handle],
        sums: Handle,
        batches: tuple[Batch, Batch | None],
        others: Sequence[list[Handle]],
        fields: Parts,
        moving: Sequence[Any],
    ) -> list[Handle]:
        """Return handles of every bundle behind a step: its work on the batch that follows, its states at the end."""
        steps, found = Steps(*batches), []
        for number, halos in enumerate(self._halos):
            fixed = self._fixed(number, fields, moving)
            found.append(
                self._submit(to, number, bundle_step, work[number], sums, steps, halos, others[number], *fixed)
            )
        return found

    def each(
        self, to: Executor, function: Any, work: Sequence[Handle], sums: Handle, told: Any, others: Any, fields: Parts
    ) -> list[Handle]:
        """Return handles of ``function(work, halos, sums, told, others, fields)`` of every bundle."""
        return [
            self._submit(to, n, function, work[n], halos, sums, told, others[n], self._fixed(n, fields, ())[0])
            for n, halos in enumerate(self._halos)
        ]

    def apart(self, to: Executor, work: Sequence[Handle], places: Sequence[Place]) -> Parts:
        """Return the items of all bundles as parts of their own."""
        handles = [
            self._submit(to, n, getitem, work[n], index)
            for n, tiles in enumerate(self._tiles)
            for index in range(len(tiles))
        ]
        return Parts(to, tuple(handles), tuple(places))

    def _fixed(self, number: int, fields: Parts, moving: Sequence[Any]) -> tuple[list[Handle], list[Any]]:
        tiles = self._tiles[number]
        return [fields.handles[t] for t in tiles], [moving[t] for t in tiles] if moving else []

    def _submit(self, to: Executor, number: int, function: Any, *args: Any, urgent: bool = False) -> Handle:
        return to.submit_at(self._places[number], function, *args, urgent=urgent)

    def _together(self, to: Executor, lists: Sequence[Handle]) -> Handle:
        """Sum what bundles say of their tiles, sixteen tiles at a time whatever the bundles."""
        count = len(self._windows)
        nodes = []
        for first in range(0, count, SMALL_FAN_IN):
            last = min(first + SMALL_FAN_IN, count)
            begin, end = self._bundle_of[first], self._bundle_of[last - 1]
            args = (list(lists[begin : end + 1]), first - self._tiles[begin][0], last - first)
            nodes.append((begin, self._submit(to, begin, bundles_together, *args, urgent=True)))
        while len(nodes) > 1:
            groups = [nodes[start : start + SMALL_FAN_IN] for start in range(0, len(nodes), SMALL_FAN_IN)]
            nodes = [
                (group[0][0], self._submit(to, group[0][0], tiles_together, [node for _, node in group], urgent=True))
                for group in groups
            ]
        return nodes[0][1]

    def _near(self, one: int, other: int) -> bool:
        """Return whether bundles are on one worker, where nothing has to be sent."""
        place = self._places[one]
        return one == other or (place is not None and place == self._places[other])

    def _sent(
        self, near: list[list[int]]
    ) -> tuple[dict[tuple[int, int], Strips], dict[tuple[int, Any], tuple[int, int]]]:
        """Return what is cut, by bundle and number, and what each worker takes of each bundle."""
        wanted: dict[tuple[int, Any], dict[int, list[Window]]] = {}
        for target, sources in enumerate(near):
            for source in sources:
                one, other = self._bundle_of[source], self._bundle_of[target]
                common = intersection(self._windows[source], self._windows[target])
                if common is not None and not self._near(one, other):
                    wanted.setdefault((one, self._where(other)), {}).setdefault(source, []).append(common)
        cuts: dict[int, list[tuple[Any, Strips]]] = {}
        for (one, where), of in wanted.items():
            first = self._tiles[one][0]
            pieces = [
                Cut(tile, tile - first, bounding_window(some), self._windows[tile]) for tile, some in sorted(of.items())
            ]
            cuts.setdefault(one, []).append((where, Strips(tuple(pieces))))
        found: dict[tuple[int, int], Strips] = {}
        chosen: dict[tuple[int, Any], tuple[int, int]] = {}
        for one, asked in cuts.items():
            kept: list[Strips] = []
            # A corner lies in the strip of a side: that is taken whole, since a task costs more than its bytes.
            for where, strips in sorted(asked, key=lambda item: -item[1].pixels):
                number = next((n for n, other in enumerate(kept) if other.holds(strips)), len(kept))
                kept[number:] = kept[number:] or [strips]
                chosen[one, where] = (one, number)
            found.update({(one, number): strips for number, strips in enumerate(kept)})
        return found, chosen

    def _needs(self, number: int, near: list[list[int]], chosen: dict[Any, tuple[int, int]]) -> tuple[list[Any], Halos]:
        """Return the other bundles, or strips of them, that a bundle needs, and what it does with them."""
        inputs: list[Any] = []
        pieces = []
        for tile in self._tiles[number]:
            found = []
            for source in near[tile]:
                other = self._bundle_of[source]
                index, window = source - self._tiles[other][0], self._windows[source]
                if other == number:
                    found.append(Piece(-1, index, window))
                    continue
                here = self._near(other, number)
                key: Any = other if here else chosen[other, self._where(number)]
                if key not in inputs:
                    inputs.append(key)
                if not here:
                    index, window = source, next(cut.window for cut in self._strips[key].cuts if cut.tile == source)
                found.append(Piece(inputs.index(key), index, window, not here))
            pieces.append(tuple(found))
        tiles = self._tiles[number]
        before = tuple(tuple(self._windows[other] for other in near[tile] if other < tile) for tile in tiles)
        return inputs, Halos(tuple(self._windows[tile] for tile in tiles), tuple(pieces), before)

    def _where(self, number: int) -> Any:
        return number if self._places[number] is None else self._places[number]


@dataclass(frozen=True)
class Steps:
    """A step and the one that follows it, ``None`` behind the last of an epoch."""

    now: Batch
    following: Batch | None


# -- tasks, under the names that a dashboard shows ---------------------------------------------------------------------


def bundle_gradients(
    states: Sequence[solver.State], batch: Batch, untie: bool, fields: Sequence[Field], moving: Sequence[Any]
) -> list[dict[str, Any]]:
    """Return :func:`~stemtomo.pipeline.tile_steps.tile_gradients` of every tile of a bundle."""
    each = zip(states, fields, moving, strict=True)
    return [tile_gradients(state, batch, untie, part, positions) for state, part, positions in each]


def bundle_strips(work: Sequence[dict[str, Any]], strips: Strips) -> dict[int, dict[str, Array]]:
    """Return the strips of tiles, by the number of the tile."""
    return {cut.tile: assemble(cut.window, (cut.whole,), (work[cut.place]["halo"],)) for cut in strips.cuts}


def bundle_totals(
    work: Sequence[dict[str, Any]], rule: solver.Rule, halos: Halos, others: Sequence[Any]
) -> list[dict[str, Any]]:
    """Return :func:`~stemtomo.pipeline.tile_steps.tile_totals` of every tile of a bundle."""
    # Halos are put together here and again for the step: that is cheaper than a result more to keep and to tell of.
    return [tile_totals(each, rule, halos.of(number, work, others)) for number, each in enumerate(work)]


def bundle_along(
    work: Sequence[dict[str, Any]], sums: dict[str, Any], rule: solver.Rule, halos: Halos, others: Sequence[Any]
) -> list[dict[str, Any]]:
    """Return :func:`~stemtomo.pipeline.tile_steps.tile_along` of every tile of a bundle."""
    found = []
    for number, each in enumerate(work):
        halo = halos.of(number, work, others)
        found.append(tile_along(each, sums, rule, halo, halos.owned(number, halo["phase"])))
    return found


def with_along(sums: dict[str, Any], along: dict[str, Any]) -> dict[str, Any]:
    """Return the sums of a step with those that its length is made of."""
    return {**sums, "total": {**sums["total"], **along["total"]}}


def bundles_together(lists: Sequence[Sequence[dict[str, Any]]], skip: int, count: int) -> dict[str, Any]:
    """Return the totals of ``count`` tiles together, behind the first ``skip``."""
    return tiles_together(list(itertools.islice(itertools.chain.from_iterable(lists), skip, skip + count)))


def bundle_step(
    work: Sequence[dict[str, Any]],
    sums: dict[str, Any],
    steps: Steps,
    halos: Halos,
    others: Sequence[Any],
    fields: Sequence[Field],
    moving: Sequence[Any],
) -> list[Any]:
    """Return every tile behind the step that all take: its state, or its work on the batch that follows."""
    found: list[Any] = []
    for number, (each, part, positions) in enumerate(zip(work, fields, moving, strict=True)):
        state = tile_update(each, sums, steps.now, halos.of(number, work, others), part, positions)
        more = steps.following
        found.append(state if more is None else tile_gradients(state, more, False, part, positions))
    return found


def _runs(executor: Executor, places: Sequence[Place]) -> list[tuple[int, ...]]:
    """Cut tiles into runs: as many on each worker as it has threads."""
    found: list[tuple[int, ...]] = []
    for place, run in itertools.groupby(range(len(places)), key=lambda tile: places[tile]):
        tiles = list(run)
        count = len(tiles) if place is None else min(len(tiles), executor.threads_at(place))
        bounds = [len(tiles) * n // count for n in range(count + 1)]
        found += [tuple(tiles[a:b]) for a, b in itertools.pairwise(bounds)]
    return found
