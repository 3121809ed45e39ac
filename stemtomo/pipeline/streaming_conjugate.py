"""Conjugate gradients over blocks in files: two passes over the blocks per iteration, each a checkpoint.

The first pass turns the direction of every block, now that the norm of the whole gradient is known, and projects it;
the second goes along it, and finds the next gradient. Three files a block: the volume, the direction, the gradient.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any

import numpy as np

from stemtomo import backend
from stemtomo.algorithms.tomography import conjugate
from stemtomo.distributed import Checkpoint, Handle, Parts
from stemtomo.distributed.checkpoint import Mark, read_state, write_state
from stemtomo.physics.projection import TiltGeometry, Window
from stemtomo.pipeline.descent import Blocks, Iterate
from stemtomo.pipeline.streaming import FileBlock, itself

FILES = 3
"""Of every block."""


@dataclass(frozen=True)
class ConjugateBlock:
    """Volume, direction and gradient of a block, (z, y, x) each, in files; ``None`` for one of zeros."""

    window: Window
    volume: str | None = None
    direction: str | None = None
    gradient: str | None = None

    def array(self, path: str | None) -> backend.Array:
        """Return what lies at ``path``, on the GPU where there is one."""
        return FileBlock(self.window).array(path)


@dataclass(frozen=True)
class StreamedConjugate:
    """Conjugate gradients over blocks in the files of ``checkpoint``."""

    blocks: Blocks
    geometry: TiltGeometry
    checkpoint: Checkpoint

    def begin(self) -> Iterate:
        """Return the last iterate in the files; the empty volume if there is none."""
        mark = self.checkpoint.latest()
        return self.start() if mark is None else self._at(mark)

    def start(self) -> Iterate:
        """Return the empty volume and its gradient."""
        blocks, executor = self.blocks, self.blocks.executor
        empty = Parts.create(executor, ConjugateBlock, blocks.windows, beside=blocks.supports)
        control = executor.submit(conjugate.begin, blocks.measured)
        paths = [str(path) for path in self.checkpoint.begin(0, len(blocks.windows))]
        views = blocks.footprints(self.geometry)
        residuals = empty.cut(executor.submit(getitem, control, "residual"), views)
        found = empty.map(_first, self.geometry, each=(blocks.windows, views, residuals, blocks.supports, paths))
        return self._ahead(found, control, [])

    def iterate(self, state: Iterate, iteration: int) -> Iterate:
        """Return the next iterate, of which nothing but what is in files has a history."""
        blocks, executor, count = self.blocks, self.blocks.executor, len(self.blocks.windows)
        paths = [str(path) for path in self.checkpoint.begin(iteration, FILES * count + 1)]
        volumes, directions, gradients = (paths[k * count : (k + 1) * count] for k in range(FILES))
        views = blocks.footprints(self.geometry)
        squared, before = (executor.submit(getitem, state.control, key) for key in ("ahead", "squared"))
        columns = (blocks.windows, views, blocks.supports, directions)
        turned = state.blocks.map(_turned, self.geometry, squared, before, each=columns)
        images = turned.pick("images").sum_into(self.geometry.image_shape, views)
        control = executor.submit(conjugate.advance, images, squared, state.control, blocks.measured)
        step = executor.submit(getitem, control, "step")
        residuals = state.blocks.cut(executor.submit(getitem, control, "residual"), views)
        rest = (blocks.windows, views, residuals, blocks.supports, volumes, gradients)
        moved = turned.pick("block").map(_moved, self.geometry, step, each=rest)
        loss = executor.gather(executor.submit(getitem, control, "loss"))
        found = self._ahead(moved, control, [*state.losses, float(loss)])
        stored: list[ConjugateBlock] = found.blocks.gather()
        size = executor.gather(executor.submit(write_state, paths[-1], found.control))
        mark = self.checkpoint.commit(
            iteration, [*map(os.path.getsize, paths[:-1]), size], {"losses": np.array(found.losses)}
        )
        return self._at(mark, stored)

    def file_blocks(self, state: Iterate) -> tuple[FileBlock, ...]:
        """Return where the volume lies."""
        return tuple(FileBlock(block.window, block.volume, block.volume) for block in state.blocks.gather())

    def _ahead(self, found: Parts, control: Handle, losses: list[float]) -> Iterate:
        """Return the iterate whose control knows the squared norm of the gradient, too."""
        ahead = self.blocks.executor.submit(_with_ahead, control, found.pick("squared").sum())
        return Iterate(found.pick("block"), ahead, self.geometry, np.zeros((len(self.geometry), 6)), losses)

    def _at(self, mark: Mark, stored: list[ConjugateBlock] | None = None) -> Iterate:
        windows, executor = self.blocks.windows, self.blocks.executor
        if stored is None:
            files = np.array([str(path) for path in mark.parts[:-1]]).reshape(FILES, len(windows)).T
            stored = [ConjugateBlock(window, *map(str, names)) for window, names in zip(windows, files, strict=True)]
        blocks = Parts.create(executor, itself, stored, beside=self.blocks.supports)
        control = executor.submit(read_state, str(mark.parts[-1]))
        losses = [float(loss) for loss in mark.shared["losses"]]
        return Iterate(blocks, control, self.geometry, np.zeros((len(self.geometry), 6)), losses)


def _with_ahead(control: conjugate.Control, squared: float) -> dict[str, Any]:
    return {**control, "ahead": squared}


def _first(
    state: ConjugateBlock,
    geometry: TiltGeometry,
    window: Window,
    image: Window,
    residual: backend.Array,
    support: backend.Array | None,
    path: str,
) -> dict[str, Any]:
    """Write the gradient of an empty block."""
    empty = state.array(None)
    return _with_gradient(
        state,
        {"volume": empty, "direction": empty, "gradient": empty},
        geometry,
        window,
        image,
        residual,
        support,
        path,
    )


def _turned(
    state: ConjugateBlock,
    geometry: TiltGeometry,
    squared: float,
    before: float,
    window: Window,
    image: Window,
    support: backend.Array | None,
    path: str,
) -> dict[str, Any]:
    """Write the next direction of a block; return its names and the projections of the direction in ``image``."""
    direction, gradient = state.array(state.direction), state.array(state.gradient)
    block = conjugate.turn({"volume": direction, "direction": direction, "gradient": gradient}, squared, before)
    write_state(path, block["direction"])
    images = conjugate.project_direction(block, geometry, window, image, support)
    return {"block": replace(state, direction=path), "images": images}


def _moved(
    state: ConjugateBlock,
    geometry: TiltGeometry,
    step: float,
    window: Window,
    image: Window,
    residual: backend.Array,
    support: backend.Array | None,
    volume_path: str,
    gradient_path: str,
) -> dict[str, Any]:
    """Write a block after the step along its direction, and its gradient there."""
    volume, direction = state.array(state.volume), state.array(state.direction)
    block = conjugate.travel({"volume": volume, "direction": direction, "gradient": direction}, step)
    write_state(volume_path, block["volume"])
    state = replace(state, volume=volume_path)
    return _with_gradient(state, block, geometry, window, image, residual, support, gradient_path)


def _with_gradient(
    state: ConjugateBlock,
    block: conjugate.Block,
    geometry: TiltGeometry,
    window: Window,
    image: Window,
    residual: backend.Array,
    support: backend.Array | None,
    path: str,
) -> dict[str, Any]:
    found = conjugate.gradient(block, geometry, window, image, residual, support)
    write_state(path, found["gradient"])
    return {"block": replace(state, gradient=path), "squared": conjugate.squared_norm(found)}
