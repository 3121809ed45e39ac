"""A volume larger than the memory: its blocks lie in files, and an iteration reads and writes each of them once.

The state of a part is then the names of two files, its last two iterates. Every iteration is a checkpoint: the files of
the last two stay, and whatever is lost with a worker is computed again from them. Where the volume is smoothed, every
block is written twice: after its gradient step, from where its neighbours read the rows beside theirs, and smoothed.
"""

from __future__ import annotations

import functools
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np

from stemtomo import backend
from stemtomo.algorithms import total_variation
from stemtomo.algorithms.tomography import solver
from stemtomo.distributed import Checkpoint, Executor, Handle, Parts
from stemtomo.distributed.checkpoint import Mark, read_state, write_state
from stemtomo.distributed.windows import overlapping
from stemtomo.errors import ConfigurationError
from stemtomo.physics.projection import TiltGeometry, Window, backproject, render
from stemtomo.pipeline.config import ResourceSettings, TomographySettings
from stemtomo.pipeline.descent import Blocks, Descent, Iterate, smoothed_inside, useful_blocks, voxel_scales
from stemtomo.pipeline.plan import worker_limits

METHODS = ("fista", "fista_tv", "resire", "sirt", "cgls", "wbp")
"""Those whose volume can lie in files; genfire transforms all of it at once."""
_ROWS, _FEWER_ROWS = 32, 16
"""Rows along y of a block, which share the weights of the projector, and where these would take too much memory."""
_BLOCK_BYTES = 1 << 28
_PART_OF_MEMORY = 0.6  # beyond, a Dask worker begins to spill


@dataclass(frozen=True)
class FileBlock:
    """The last two iterates of a block, (z, y, x) each, in files; ``None`` for one of zeros."""

    window: Window
    volume: str | None = None
    previous: str | None = None

    def read(self) -> solver.Block:
        """Return the block in memory, on the GPU where there is one."""
        volume = self.array(self.volume)
        return {"volume": volume, "previous": volume if self.previous == self.volume else self.array(self.previous)}

    def coefficients(self) -> np.ndarray:
        """Return the last iterate in host memory."""
        return backend.to_host(self.array(self.volume))

    def array(self, path: str | None) -> backend.Array:
        """Return what lies at ``path``, zeros for ``None``."""
        if path is not None:
            return read_state(path)
        place = backend.to_device if backend.gpu_available() else np.asarray
        return place(np.zeros([stop - start for start, stop in self.window], np.float32))


@dataclass(frozen=True)
class FileBlocks(Blocks):
    """Blocks of which a worker has only one in memory."""

    def project(self, function: Any, parts: Parts, geometry: TiltGeometry) -> Handle:
        """Return the sum of ``function(state, geometry, window, image, support)`` over the blocks, whole images."""
        return super().project(functools.partial(_with_block, function), parts, geometry)


@dataclass(frozen=True)
class StreamedDescent(Descent):
    """The gradient methods over blocks in the files of ``checkpoint``, which keeps two steps."""

    checkpoint: Checkpoint | None = None
    rays: Handle | None = None
    """Images of ones whose back-projections give the factors of the voxels (SIRT); they are made anew at every step."""

    def begin(self) -> Iterate:
        """Return the last iterate in the files; the empty volume if there is none."""
        mark = self._files.latest()
        return self.start() if mark is None else self._at(mark)

    def start(self) -> Iterate:
        """Return the empty volume."""
        executor = self.blocks.executor
        blocks = Parts.create(executor, FileBlock, self.blocks.windows, beside=self.blocks.supports)
        control = self.steer(self.blocks.project(solver.project_block, blocks, self.geometry), None)
        return Iterate(blocks, control, self.geometry, np.zeros((len(self.geometry), 6)), [])

    def advanced(self, state: Iterate) -> tuple[Parts, Handle]:
        """Return the blocks after one step, written, and their projections."""
        blocks, views = self.blocks, self.blocks.footprints(state.geometry)
        paths = [str(path) for path in self._files.begin(len(state.losses) + 1, len(blocks.windows) + 1)[:-1]]
        residuals = state.blocks.cut(blocks.executor.submit(getitem, state.control, "residual"), views)
        beta = blocks.executor.submit(getitem, state.control, "beta")
        rays = [None] * len(views) if self.rays is None else state.blocks.cut(self.rays, views)
        columns = (blocks.windows, views, residuals, blocks.supports, rays)
        if self.tv_weight:
            rough = [_rough(path) for path in paths]
            free = replace(self.constraint, positive=False)
            written = state.blocks.map(_rough_step, state.geometry, free, beta, self.step, each=(*columns, rough))
            stepped = self._smoothed_files(state, written, views, paths)
        else:
            stepped = state.blocks.map(_step, state.geometry, self.constraint, beta, self.step, each=(*columns, paths))
        images = stepped.pick("images").sum_into(state.geometry.image_shape, views)
        return stepped.pick("block"), images

    def _smoothed_files(self, state: Iterate, written: Parts, views: list[Window], paths: list[str]) -> Parts:
        """Return the blocks after the proximal step of the total variation, which reads rows of neighbours."""
        blocks, wide = self.blocks, self.wide_windows()
        near = overlapping(blocks.windows, wide)
        where = [[blocks.windows[index] for index in sources] for sources in near]
        around = [[written.handles[index] for index in sources] for sources in near]
        weight = self.tv_weight * self.step
        columns = (blocks.windows, wide, where, around, views, blocks.supports, paths)
        return state.blocks.map(_smooth_step, state.geometry, weight, self.constraint.positive, each=columns)

    def iterate(self, state: Iterate, iteration: int) -> Iterate:
        """Return the next iterate, of which nothing but what is in files has a history."""
        executor, files = self.blocks.executor, self._files
        found = super().iterate(state, iteration)
        stored: list[FileBlock] = found.blocks.gather()
        path = files.begin(iteration, len(stored) + 1)[-1]
        size = executor.gather(executor.submit(write_state, str(path), found.control))
        shared = {key: value for key, value in self.saved(found).items() if key != "control"}
        mark = files.commit(iteration, [*(os.path.getsize(block.volume or "") for block in stored), size], shared)
        for block in stored:
            Path(_rough(block.volume or "")).unlink(missing_ok=True)
        return self._at(mark, stored)

    def file_blocks(self, state: Iterate) -> tuple[FileBlock, ...]:
        """Return where the volume lies."""
        return tuple(state.blocks.gather())

    def _at(self, mark: Mark, stored: list[FileBlock] | None = None) -> Iterate:
        executor = self.blocks.executor
        if stored is None:
            stored = [self._found(mark, index) for index in range(len(self.blocks.windows))]
        blocks = Parts.create(executor, itself, stored, beside=self.blocks.supports)
        control = executor.submit(read_state, str(mark.parts[-1]))
        return self.resumed(blocks, {**mark.shared, "control": control})

    def _found(self, mark: Mark, index: int) -> FileBlock:
        path = mark.parts[index]
        before = self._files.directory / f"step-{mark.step - 1:08d}" / path.name
        previous = str(before) if before.is_file() else None
        return FileBlock(self.blocks.windows[index], str(path), previous)

    @property
    def _files(self) -> Checkpoint:
        assert self.checkpoint is not None
        return self.checkpoint


def streams(settings: TomographySettings, voxels: int, tilts: int, pixels: int, memory_bytes: int) -> bool:
    """Whether a volume of ``voxels`` goes through files.

    Parameters
    ----------
    pixels
        Of one projection.
    memory_bytes
        Of all workers together.
    """
    if settings.stream != "auto" or settings.method not in METHODS:
        return settings.stream == "always"
    held = voxels * 20 + tilts * pixels * 41  # two iterates and a step of all blocks at once; see the plan
    return held > _PART_OF_MEMORY * memory_bytes


def block_count(voxels: int, tilts: int, rows: int, workers: int) -> int:
    """Slabs that a streamed volume is cut into: small ones, yet not thinner than the projector likes."""
    thin = voxels // rows * _ROWS * 20 > _BLOCK_BYTES
    return max(min(workers, rows), min(useful_blocks(voxels, tilts), rows // (_FEWER_ROWS if thin else _ROWS)), 1)


def passes(method: str, blocks: int, rows: int) -> tuple[float, int]:
    """Return how often an iteration of ``method`` reads and writes the volume of ``rows`` along y."""
    if method == "cgls":
        return 4, 3
    if method == "fista_tv":
        return 3 + 2 * total_variation.REACH * (blocks - 1) / rows, 2
    return 2, 1


def rendered(stored: list[FileBlock], degree: int, width_px: float, scale: float) -> Any:
    """Return the values at the voxels' centres, times ``scale``: a lazy (dask) array of the blocks' slabs."""
    import dask
    import dask.array

    reach = 1 + int(np.ceil(4 * width_px))
    slabs = []
    for block in stored:
        (_, depth), (start, stop), (_, width) = block.window
        around = [other for other in stored if other.window[1][0] < stop + reach and other.window[1][1] > start - reach]
        values = dask.delayed(_rendered, pure=False)(around, (start, stop), degree, width_px, scale)
        slabs.append(dask.array.from_delayed(values, (depth, stop - start, width), np.float32))
    return dask.array.concatenate(slabs, axis=1)


def _rendered(around: list[FileBlock], rows: tuple[int, int], degree: int, width_px: float, scale: float) -> np.ndarray:
    first = around[0].window[1][0]
    volume = render(np.concatenate([block.coefficients() for block in around], axis=1), degree, width_px)
    return volume[:, rows[0] - first : rows[1] - first] * volume.dtype.type(scale)


def back_projected(blocks: Blocks, images: Handle, geometry: TiltGeometry, files: Checkpoint) -> Parts:
    """Return the back-projections of ``images`` as blocks in ``files``."""
    views, executor = blocks.footprints(geometry), blocks.executor
    parts = Parts.create(executor, FileBlock, blocks.windows, beside=blocks.supports)
    paths = [str(path) for path in files.begin(1, len(blocks.windows))]
    columns = (blocks.windows, views, parts.cut(images, views), blocks.supports, paths)
    return parts.map(_back_to_file, geometry, each=columns)


def _back_to_file(
    state: FileBlock,
    geometry: TiltGeometry,
    window: Window,
    image: Window,
    images: backend.Array,
    support: backend.Array | None,
    path: str,
) -> FileBlock:
    write_state(path, backproject(geometry, images, image, window, support))
    return replace(state, volume=path, previous=path)


def _with_block(function: Callable[..., Any], state: FileBlock, *rest: Any) -> Any:
    return function(state.read(), *rest)


def itself(state: Any) -> Any:
    """Return ``state``: the part of what is known already."""
    return state


def _rough(path: str) -> str:
    """Return where a block waits for its smoothing that will then be at ``path``."""
    return f"{path}.rough.npy"


def _rough_step(
    state: FileBlock,
    geometry: TiltGeometry,
    constraint: solver.Constraint,
    beta: float,
    step: float,
    window: Window,
    image: Window,
    residual: backend.Array,
    support: backend.Array | None,
    rays: backend.Array | None,
    path: str,
) -> str:
    """Write the block after its gradient step, before any smoothing, to ``path``, of which rows can be read."""
    assert rays is None  # SIRT does not smooth
    block = solver.descend(state.read(), geometry, constraint, beta, step, window, image, residual, support)
    partial = f"{path}.{uuid.uuid4().hex}.npy"
    np.save(partial, backend.to_host(block["volume"]))
    os.replace(partial, path)
    return path


def _smooth_step(
    state: FileBlock,
    geometry: TiltGeometry,
    weight: float,
    positive: bool,
    window: Window,
    wide: Window,
    where: list[Window],
    around: list[str],
    image: Window,
    support: backend.Array | None,
    path: str,
) -> dict[str, Any]:
    """Write the smoothed block to ``path``; return its names and its projections in ``image``."""
    (start, stop), rows = wide[1], []
    for each, rough in zip(where, around, strict=True):
        first, last = each[1]
        rows.append(np.load(rough, mmap_mode="r")[:, max(start, first) - first : min(stop, last) - first])
    values = np.concatenate(rows, axis=1)
    place = backend.to_device if backend.gpu_available() else np.asarray
    volume = smoothed_inside(place(values), weight, positive, window, wide)
    write_state(path, volume)
    images = solver.project_block({"volume": volume, "previous": volume}, geometry, window, image, support)
    return {"block": replace(state, volume=path, previous=state.volume), "images": images}


def _step(
    state: FileBlock,
    geometry: TiltGeometry,
    constraint: solver.Constraint,
    beta: float,
    step: float,
    window: Window,
    image: Window,
    residual: backend.Array,
    support: backend.Array | None,
    rays: backend.Array | None,
    path: str,
) -> dict[str, Any]:
    """Write the block after one step to ``path``; return its names and its projections in ``image``."""
    scale = None if rays is None else voxel_scales(window, geometry, image, rays, support)
    block = solver.descend(state.read(), geometry, constraint, beta, step, window, image, residual, support, scale)
    write_state(path, block["volume"])
    images = solver.project_block(block, geometry, window, image, support)
    return {"block": replace(state, volume=path, previous=state.volume), "images": images}


def require_streamable(settings: TomographySettings) -> None:
    """Refuse a method that needs the whole volume in memory where files were asked for."""
    if settings.stream == "always" and settings.method not in METHODS:
        raise ConfigurationError(
            f"tomography.method = {settings.method!r} cannot keep its volume in files; "
            f"take one of {', '.join(METHODS)}, or stream = 'never'"
        )


def require_room(cube_bytes: int, worker_bytes: int) -> None:
    """Refuse a Fourier iteration whose padded cube does not fit the one worker that holds it."""
    if cube_bytes > worker_bytes:
        raise ConfigurationError(
            "tomography.method = 'genfire' holds its padded volume, "
            f"{cube_bytes / 2**30:.3g} GiB, on one worker, which has {worker_bytes / 2**30:.3g} GiB; "
            "take a smaller tomography.oversampling, a larger worker, or one of "
            f"{', '.join(METHODS)}, whose volume may be larger than the memory"
        )


def memory_of(executor: Executor, memory_gib: float | None = None) -> int:
    """Return the bytes of memory of all workers of ``executor`` together, or ``memory_gib`` if given."""
    limit, workers, _ = worker_limits(executor, ResourceSettings(memory_gib=memory_gib))
    return limit * workers


def memory_of_one(executor: Executor, memory_gib: float | None = None) -> int:
    """Return the bytes of memory of one worker of ``executor``, of which ``memory_gib`` is that of all, if given."""
    return worker_limits(executor, ResourceSettings(memory_gib=memory_gib))[0]
