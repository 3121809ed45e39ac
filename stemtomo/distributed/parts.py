"""Parts: states that stay on their workers, stepped by pure functions, summed over all or over neighbours."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any, NamedTuple

from stemtomo.distributed.checkpoint import Checkpoint, Mark, read_state, write_state
from stemtomo.distributed.executor import Executor, Handle, Place
from stemtomo.distributed.trees import Tree, sum_trees, tree_bytes
from stemtomo.distributed.windows import (
    Window,
    assemble,
    bounding_window,
    checked,
    cut,
    full_window,
    intersection,
    overlapping,
)

FAN_IN = 4
"""Values that one task of a tree sum adds; a worker holds at most this many inputs and their sum."""

BROADCAST_BYTES = 1 << 16
"""Shared arguments above this size are sent once instead of with every task."""


@dataclass(frozen=True)
class Parts:
    """The states of all parts, each on its worker.

    Every method returns new parts or a handle at once, without waiting and without changing these parts. Functions
    given to it must not change their arguments, must depend on nothing else, and must be importable by a worker.

    Parameters
    ----------
    executor
        Where the parts live.
    handles
        The state of each part.
    places
        The worker that each part prefers.
    """

    executor: Executor
    handles: tuple[Handle, ...]
    places: tuple[Place, ...]

    @classmethod
    def create(
        cls,
        executor: Executor,
        build: Callable[..., Any],
        specs: Sequence[Any],
        *shared: Any,
        beside: Parts | None = None,
    ) -> Parts:
        """Build one part per spec, ``build(spec, *shared)``, on its worker.

        Parameters
        ----------
        specs
            One small description per part, in an order that puts neighbours next to each other.
        shared
            Further arguments, values or handles, the same for every part.
        beside
            Parts, as many, on whose workers the new ones are to live.
        """
        specs = list(specs)
        if not specs:
            raise ValueError("no specs were given: at least one part is needed")
        places = executor.places(len(specs)) if beside is None else beside.places
        if len(places) != len(specs):
            raise ValueError(f"{len(specs)} parts cannot live beside {len(places)} parts; give as many")
        shared = _sent_once(executor, shared)
        pairs = zip(places, specs, strict=True)
        return cls(executor, tuple(executor.submit_at(place, build, spec, *shared) for place, spec in pairs), places)

    def __len__(self) -> int:
        return len(self.handles)

    def map(self, function: Callable[..., Any], *shared: Any, each: Sequence[Parts | Sequence[Any]] = ()) -> Parts:
        """Return the parts ``function(state, *shared, *each_i)``.

        Parameters
        ----------
        shared
            Values or handles, the same for every part.
        each
            Parts or sequences of values with one item per part.
        """
        columns = [item.handles if isinstance(item, Parts) else list(item) for item in each]
        for column in columns:
            if len(column) != len(self):
                raise ValueError(f"each has {len(column)} items for {len(self)} parts; give one per part")
        shared = _sent_once(self.executor, shared)
        rows = zip(self.places, self.handles, *columns, strict=True)
        handles = (self.executor.submit_at(place, function, state, *shared, *items) for place, state, *items in rows)
        return Parts(self.executor, tuple(handles), self.places)

    def pick(self, key: Hashable) -> Parts:
        """Return the parts ``state[key]``."""
        return self.map(getitem, key)

    def gather(self) -> list[Any]:
        """Wait for all parts and return their states."""
        return list(self.executor.gather(list(self.handles)))

    def sum(self) -> Handle:
        """Return a handle of the sum of all states: trees (dict, tuple, list) of arrays and scalars.

        The order of the additions is fixed by the order of the parts alone, so that threads and clusters of any size
        give the same bits. A part whose state is ``None`` contributes nothing.
        """
        return self.reduce(sum_trees)

    def sum_into(self, shape: Sequence[int], windows: Sequence[Window]) -> Handle:
        """Return a handle of the sum of rectangles in a larger array, in an order fixed by the parts alone.

        Parameters
        ----------
        shape
            Trailing axes of the result: (y, x) of a projection, (z, y, x) of a volume.
        windows
            Where in ``shape`` each part's arrays, (..., *window shape), lie; they may overlap.

        Returns
        -------
        Handle of a tree of arrays (..., *shape); zero where no part reaches. A part may contribute ``None``.
        """
        nodes = list(zip(checked(windows, len(self)), self.handles, strict=True))
        target = full_window(shape)
        if any(intersection(target, window) != window for window, _ in nodes if _pixels(window)):
            raise ValueError(f"a window reaches beyond the shape {tuple(shape)}")
        while True:
            groups = _groups(nodes)
            nodes = [self._assembled(target if len(groups) == 1 else None, group) for group in groups]
            if len(nodes) == 1:
                return nodes[0][1]

    def reduce(self, combine: Callable[[list[Any]], Any], fan_in: int = FAN_IN) -> Handle:
        """Return a handle of ``combine`` of the states, ``fan_in`` at a time, in an order fixed by the parts alone.

        ``combine`` takes a list of states, or of what it returned for them.
        """
        nodes = list(self.handles)
        while True:
            nodes = [self.executor.submit_at(None, combine, group, urgent=True) for group in _groups(nodes, fan_in)]
            if len(nodes) == 1:
                return nodes[0]

    def halo_sum(self, windows: Sequence[Window], of: Hashable = None) -> Parts:
        """Return, for each part, the sum over all parts of what lies in its window.

        Every part that holds a pixel gets the same bits there: contributions are added in the order of the parts.

        Parameters
        ----------
        windows
            Where each part's arrays, (..., *window shape), lie in a common index space of 1 to 3 axes.
        of
            Entry of the states that holds the arrays, where they hold other things too: saves a task per part.
        """
        return self.exchange(windows, windows, beside=self, of=of)

    def exchange(
        self, windows: Sequence[Window], onto: Sequence[Window], beside: Parts | None = None, of: Hashable = None
    ) -> Parts:
        """Return new parts, each with the sum over all of these parts of what lies in its window of ``onto``.

        Overlaps are cut where they lie and travel from worker to worker.

        Parameters
        ----------
        windows
            Where the arrays of these parts lie.
        onto
            One window for each part of the result; a window that no part reaches is refused.
        beside
            Parts on whose workers the result is to live.
        of
            Entry of the states that holds the arrays; the states themselves unless given.
        """
        windows, onto = checked(windows, len(self)), checked(onto, len(onto))
        places = self.executor.places(len(onto)) if beside is None else beside.places
        if len(places) != len(onto):
            raise ValueError(f"{len(onto)} windows cannot live beside {len(places)} parts; give as many")
        sources = overlapping(windows, onto)
        strips = self._strips(windows, onto, places, sources, of)
        handles = []
        for index, (place, target) in enumerate(zip(places, onto, strict=True)):
            if not sources[index] and _pixels(target):
                raise ValueError(f"window {index}, {target}, overlaps no part: there is nothing to sum")
            if not sources[index]:
                sources[index] = [0]  # an empty window takes the leading axes of any part
            whole = ((source, (windows[source], self.handles[source], of)) for source in sources[index])
            pieces = [strips.get((source, _where(place, index)), own) for source, own in whole]
            where, values, entries = zip(*pieces, strict=True)
            args = (target, where, values) if of is None else (target, where, values, entries)
            handles.append(self.executor.submit_at(place, assemble, *args))
        return Parts(self.executor, tuple(handles), places)

    def cut(self, array: Handle | Tree, windows: Sequence[Window]) -> Parts:
        """Return, beside these parts, the rectangle ``windows[i]`` of one array (or tree of arrays) for each part.

        It is the adjoint of :meth:`sum_into`; windows count from the first pixel of the array's trailing axes.
        """
        (array,) = _sent_once(self.executor, (array,))
        # The array is large and in one place: rectangles are cut there and travel, not the array.
        handles = (self.executor.submit_at(None, cut, array, window) for window in checked(windows, len(self)))
        return Parts(self.executor, tuple(handles), self.places)

    def save(self, checkpoint: Checkpoint, step: int, shared: Tree = None) -> Saved:
        """Write all states and ``shared`` as the checkpoint of ``step`` and return what was saved, read back.

        Waits for the states. The returned parts begin a new history: a lost worker's state comes from the file, not
        from a repetition of all steps. Go on with them, and carry nothing else over: what the next step needs is
        either in the states, in ``shared``, or does not change.

        Parameters
        ----------
        shared
            A tree of arrays, scalars, strings and handles of such.

        Raises
        ------
        StoreError
            If the checkpoint cannot be written (no room, no permission). The previous one stays valid.
        """
        paths = checkpoint.begin(step, len(self))
        written = [
            self.executor.submit_at(place, write_state, str(path), handle, urgent=True)
            for place, path, handle in zip(self.places, paths, self.handles, strict=True)
        ]
        try:
            sizes = self.executor.gather(written)
            mark = checkpoint.commit(step, sizes, self.executor.gather(shared))
        except Exception:
            self.executor.wait(written)  # a worker that is still writing would leave its file behind
            checkpoint.discard(step)
            raise
        return _read_back(self.executor, mark)

    @classmethod
    def load(cls, executor: Executor, checkpoint: Checkpoint) -> Saved | None:
        """Return the last complete checkpoint, or ``None`` if there is none."""
        mark = checkpoint.latest()
        return None if mark is None else _read_back(executor, mark)

    def _assembled(self, target: Window | None, nodes: Sequence[tuple[Window, Handle]]) -> tuple[Window, Handle]:
        windows, handles = zip(*nodes, strict=True)
        target = bounding_window(windows) if target is None else target
        return target, self.executor.submit_at(None, assemble, target, windows, handles, urgent=True)

    def _strips(
        self,
        windows: Sequence[Window],
        onto: Sequence[Window],
        places: Sequence[Place],
        sources: Sequence[Sequence[int]],
        of: Hashable,
    ) -> dict[tuple[int, Any], tuple[Window, Handle, Hashable]]:
        """Cut, for each part and each other worker, the smallest rectangle that all its neighbours there need."""
        wanted: dict[tuple[int, Any], list[Window]] = {}
        for index, (place, target) in enumerate(zip(places, onto, strict=True)):
            for source in sources[index]:
                common = intersection(windows[source], target)
                if common is not None and (place is None or place != self.places[source]):
                    wanted.setdefault((source, _where(place, index)), []).append(common)
        strips: dict[tuple[int, Any], tuple[Window, Handle, Hashable]] = {}
        for (source, where), pieces in wanted.items():
            strip = bounding_window(pieces)
            args = (strip, (windows[source],), (self.handles[source],), (of,))
            cut_there = self.executor.submit_at(self.places[source], assemble, *args, urgent=True)
            strips[source, where] = (strip, cut_there, None)
        return strips


class Saved(NamedTuple):
    """A checkpoint that was written or found: the step, the parts and the shared state to go on with."""

    step: int
    parts: Parts
    shared: Tree


def _read_back(executor: Executor, mark: Mark) -> Saved:
    return Saved(mark.step, Parts.create(executor, read_state, [str(path) for path in mark.parts]), mark.shared)


def _sent_once(executor: Executor, values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(executor.broadcast(value) if tree_bytes(value) > BROADCAST_BYTES else value for value in values)


def _groups(items: Sequence[Any], size: int = FAN_IN) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _pixels(window: Window) -> bool:
    return all(start < stop for start, stop in window)


def _where(place: Place, index: int) -> Any:
    """Identify the worker of part ``index``; parts without a place are each on their own."""
    return index if place is None else place
