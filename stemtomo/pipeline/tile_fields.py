"""What a tile of a scan holds fixed, and where its patterns are: in memory, or in the store and read chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from stemtomo import backend
from stemtomo.algorithms.ptychography import solver
from stemtomo.algorithms.ptychography.misfit import misfit
from stemtomo.algorithms.ptychography.parameters import Parameter
from stemtomo.algorithms.ptychography.positions import Positions
from stemtomo.algorithms.ptychography.tiles import Rectangle
from stemtomo.backend import Array
from stemtomo.io.store import Store
from stemtomo.kernels import electrons

#: Patterns that are expanded from the store are worked on when they are this many bytes.
GROUP_BYTES = 16 << 20


class Patterns(Protocol):
    """The patterns of a tile; positions are numbers within it."""

    def groups(self, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, Array]]:
        """Yield runs of ``wanted`` positions with their patterns (position, qy, qx), zero frequency first."""
        ...

    def sums(self) -> np.ndarray:
        """Return the counts of every position, (position,) float64."""
        ...


@dataclass(frozen=True)
class Resident:
    """Patterns that are held, as they were recorded."""

    counts: Array
    """(position, qy, qx), zero frequency first."""

    def groups(self, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, Array]]:
        """Yield ``wanted`` at once."""
        if len(wanted):
            yield wanted, self.counts if len(wanted) == len(self.counts) else self.counts[wanted]

    def sums(self) -> np.ndarray:
        """Return the counts of every position, (position,) float64."""
        return backend.to_host(self.counts.sum(axis=(1, 2), dtype=np.float64))


@dataclass(frozen=True)
class Streamed:
    """Patterns that stay in the store; the next ones are expanded while the last ones are worked on.

    Parameters
    ----------
    scan
        The rectangle of the tile.
    flat
        (position,) flat indices into the scan, ascending.
    """

    path: Path
    tilt: int
    scan: Rectangle
    flat: np.ndarray

    def groups(self, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, Array]]:
        """Yield ``wanted`` in groups of about :data:`GROUP_BYTES`; the thread that reads ends with the iterator."""
        reader = self._read(wanted)
        with ThreadPoolExecutor(1, thread_name_prefix="stemtomo-read") as ahead:
            pending = ahead.submit(next, reader, None)
            while (group := pending.result()) is not None:
                pending = ahead.submit(next, reader, None)
                yield group[0], backend.to_device(group[1]) if backend.gpu_available() else group[1]

    def sums(self) -> np.ndarray:
        """Return the counts of every position, (position,) float64: of patterns as they lie in the store."""
        found = np.zeros(len(self.flat))
        for numbers, some in self._stored(np.arange(len(found))):
            found[numbers] = _counts_of(some)
        return found

    def read(self) -> np.ndarray:
        """Return all patterns (position, qy, qx), zero frequency first, in host memory."""
        store = Store.open(self.path)
        shape = (len(self.flat), *store.detector(self.tilt).shape_yx)
        counts = np.empty(shape, store.frames(self.tilt).dtype)
        for numbers, some in self._read(np.arange(len(counts))):
            counts[numbers] = some
        return counts

    def resident(self) -> Resident:
        """Return the patterns in memory, that of the GPU where there is one."""
        counts = self.read()
        return Resident(backend.to_device(counts) if backend.gpu_available() else counts)

    def _stored(self, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield positions and their patterns, chunk by chunk as they are in the store."""
        store = Store.open(self.path)
        frames = store.frames(self.tilt)
        number = np.full(frames.shape[:2], -1)
        number.ravel()[self.flat[wanted]] = wanted
        for y, x, piece in self._pieces(store, frames.shards or frames.chunks, number):
            inside = number[y : y + piece.shape[0], x : x + piece.shape[1]]
            if inside.min() >= 0:
                yield inside.ravel(), piece.reshape(-1, *piece.shape[2:])
            else:
                yield inside[inside >= 0], piece[inside >= 0]

    def _read(self, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        centre = Store.open(self.path).detector(self.tilt).centre_yx
        numbers: list[np.ndarray] = []
        buffers, size = _Buffers(), 0
        for where, some in self._stored(wanted):
            buffers.add(some, centre)
            numbers.append(where)
            size += some.nbytes
            if size >= GROUP_BYTES:
                yield np.concatenate(numbers), buffers.taken()
                numbers, size = [], 0
        if size:
            yield np.concatenate(numbers), buffers.taken()

    def _pieces(self, store: Store, shard: Sequence[int], number: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        (y0, y1), (x0, x1) = self.scan
        for y in range(y0 - y0 % shard[0], y1, shard[0]):
            for x in range(x0 - x0 % shard[1], x1, shard[1]):
                asked = number[y : y + shard[0], x : x + shard[1]] >= 0
                if asked.any():
                    yield from store.read_pieces(self.tilt, y, x, asked)


@dataclass(frozen=True)
class Field:
    """What a tile holds fixed.

    Parameters
    ----------
    model
        Its positions on its window of the object.
    where
        (position,) their numbers among the recorded positions of the scan.
    members
        (position,) what a batch is made of, their own number or that of their block; -1 for those held out.
    told_angstrom
        (position, 2), x and y, where the scan has them.
    scan_positions
        Recorded positions of the whole scan.
    """

    model: solver.Model
    where: np.ndarray
    members: np.ndarray
    told_angstrom: np.ndarray
    patterns: Patterns
    scan_positions: int = 0

    def gradients(
        self,
        state: solver.State,
        wanted: np.ndarray,
        parameters: Sequence[Parameter],
        losses: np.ndarray | None = None,
    ) -> solver.Gradients:
        """Return the sums over the positions ``wanted`` of the tile; ``losses`` (position,) takes the loss of each."""
        if isinstance(self.patterns, Resident):
            return solver.gradients(state, self.model, self.patterns.counts, wanted, parameters, losses)
        groups = ((numbers, counts, np.arange(len(numbers))) for numbers, counts in self.patterns.groups(wanted))
        return solver.gradients_of(state, self.model, groups, parameters, losses)

    def misfits(
        self, state: solver.State, parameters: Sequence[Parameter], wanted: np.ndarray | None = None
    ) -> np.ndarray:
        """Return the loss of every position of the tile, (position,) float64; zero beside those ``wanted``."""
        found = np.zeros(len(self.where))
        there = [parameter for parameter in parameters if parameter.name in state.extra]
        for numbers, counts in self.patterns.groups(np.arange(len(self.where)) if wanted is None else wanted):
            model = self._some(numbers)
            for parameter in there:
                model = parameter.model_at(parameter.some(state.extra[parameter.name], numbers), model)
            beside = [parameter for parameter in there if parameter.name != Positions.name]
            extra = {parameter.name: parameter.some(state.extra[parameter.name], numbers) for parameter in beside}
            found[numbers] = misfit(replace(state, extra=extra), model, counts, beside)
        return found

    def _some(self, numbers: np.ndarray) -> solver.Model:
        grid = self.model.grid
        return replace(self.model, grid=replace(grid, corners=grid.corners[numbers], shifts_px=grid.shifts_px[numbers]))


class _Buffers:
    """Two arrays of patterns in turn: one is filled while the other one is worked on.

    New arrays would be made of new pages, which the kernel clears: a third of what a copy costs.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = [np.empty((0, 0, 0))] * 2
        self._filled, self._turn = 0, 0

    def add(self, some: np.ndarray, centre_yx: tuple[float, float]) -> None:
        """Add patterns (position, ky, kx), rolled until the zero frequency is at [0, 0]."""
        count, height, width = some.shape
        y, x = round(centre_yx[0]) % height, round(centre_yx[1]) % width
        for into, one in zip(self._room(count, some), some, strict=True):
            # Each quadrant is copied once, which np.roll does not do.
            into[: height - y, : width - x], into[height - y :, : width - x] = one[y:, x:], one[:y, x:]
            into[: height - y, width - x :], into[height - y :, width - x :] = one[y:, :x], one[:y, :x]
        self._filled += count

    def taken(self) -> np.ndarray:
        """Return what was added; it holds until the next one but one is begun."""
        found = self._arrays[self._turn][: self._filled]
        self._filled, self._turn = 0, 1 - self._turn
        return found

    def _room(self, count: int, like: np.ndarray) -> np.ndarray:
        array, wanted = self._arrays[self._turn], self._filled + count
        if wanted > len(array):
            larger = np.empty((wanted, *like.shape[1:]), like.dtype)
            larger[: self._filled] = array[: self._filled] if self._filled else 0
            self._arrays[self._turn] = array = larger
        return array[self._filled : wanted]


def _counts_of(patterns: np.ndarray) -> np.ndarray:
    """Return the sum of every pattern, (position,)."""
    flat = patterns.reshape(len(patterns), -1)
    if flat.dtype.kind == "u":
        return np.array([electrons.total(one) for one in flat], np.float64)
    return np.asarray(flat.sum(axis=1, dtype=np.float64))
