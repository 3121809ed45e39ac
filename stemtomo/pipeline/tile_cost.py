"""How long tiles take: a cost model whose two constants a short measurement on a worker tells."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from stemtomo import backend
from stemtomo.algorithms.ptychography import solver
from stemtomo.algorithms.ptychography.windows import object_grid
from stemtomo.distributed import Executor
from stemtomo.geometry import Detector, Optics, Scan
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.physics.probe import probe_wave
from stemtomo.physics.propagation import fresnel_propagator
from stemtomo.pipeline.config import PtychographySettings
from stemtomo.pipeline.solving import alone_epochs, epochs_of
from stemtomo.pipeline.tile_need import Choice

#: Tasks of the tiles of a thread in a step beside their strips, and the most sides that they send strips to.
_TASKS, _SIDES = 2, 4
#: Tasks of a tile on its own from one meeting to the next, and of a meeting beside those of pairs, which are three.
_TASKS_ALONE, _TASKS_MEETING, _TASKS_PAIR = 3, 6, 3
#: Patterns of a measurement, in each of its two runs.
_PATTERNS = 128


@dataclass(frozen=True)
class Rates:
    """What a worker and a scheduler can do.

    Parameters
    ----------
    pattern_s
        Seconds in which a thread of a worker sums the gradients of one pattern.
    task_s
        Seconds that the scheduler is busy with one task.
    bytes_per_s
        That a worker receives from its neighbours.
    """

    pattern_s: float
    task_s: float = 5e-4
    bytes_per_s: float = 1e9


@dataclass(frozen=True)
class Estimate:
    """What the tiles of one tilt take."""

    seconds: float
    steps: int
    tasks: int
    bytes_moved: int
    busy: float
    """Share of the time in which the workers compute."""


def estimate(settings: PtychographySettings, choice: Choice, threads: int, rates: Rates, groups: int = 1) -> Estimate:
    """Return what one tilt takes on ``threads`` threads of a group of workers, beside ``groups`` - 1 other groups.

    A step lasts as long as the slowest of what runs beside each other: the patterns of the tiles of a thread, or the
    tasks that the scheduler hands out to all groups; and the strips, which have to wait for the patterns. Tiles that
    are stitched are on their own first, and meet.
    """
    batches = () if settings.mistilt_map_smoothing_angstrom is not None else epochs_of(settings)[1]
    batches += (1,) * (settings.epochs - len(batches))  # of a search, every iteration takes all patterns
    tiles = math.prod(choice.tiles_yx)
    slots = min(tiles, threads)
    remote = 0 if threads == 1 else min(_SIDES, slots - 1)
    per_step = slots * (_TASKS + remote) + 1
    seconds = working = 0.0
    tasks = moved = 0
    if choice.need.alone is not None:
        alone = alone_epochs(settings, len(batches))
        seconds, working, tasks, moved = _on_their_own(settings, choice, slots, rates, groups, alone)
        batches = batches[alone:]
    for count in batches:
        compute = math.ceil(tiles / slots) * (choice.need.positions / count) * rates.pattern_s
        strips = choice.need.strips / slots / rates.bytes_per_s
        seconds += count * (max(compute, groups * per_step * rates.task_s) + strips)
        working += count * compute
    steps = sum(batches)
    tasks, moved = tasks + steps * per_step, moved + steps * choice.need.strips
    return Estimate(seconds, steps, tasks, moved, working / seconds)


def meetings_of(settings: PtychographySettings, alone: int) -> tuple[int, int]:
    """Return how often tiles meet that are on their own for ``alone`` epochs, and the runs of epochs of a tile."""
    every, checkpoint = settings.stitch_meet_epochs, settings.checkpoint_every
    ends = [epoch for epoch in range(1, alone) if epoch % every == 0 or epoch % checkpoint == 0]
    return sum(epoch % every == 0 for epoch in ends) + 1, len(ends) + 1


def meeting_seconds(settings: PtychographySettings, positions: int, pattern_s: float) -> float:
    """Return how long a tile computes at a meeting: its illumination, by all of its ``positions`` and by its own.

    A position takes two of the 4 slices + 2 transforms of its gradients; none on pixels, which is not reckoned with.
    """
    return 2 * positions * pattern_s * 2 / (4 * settings.slices + 2)


def _on_their_own(
    settings: PtychographySettings, choice: Choice, slots: int, rates: Rates, groups: int, epochs: int
) -> tuple[float, float, int, int]:
    """Return seconds, those in which workers compute, tasks and bytes until tiles are joined, with the probe's fit."""
    alone, tiles = choice.need.alone, math.prod(choice.tiles_yx)
    assert alone is not None
    meetings, runs = meetings_of(settings, epochs)
    turns = math.ceil(tiles / slots)
    # The probe is fitted to the middle of the scan by one thread while the others wait.
    fit = min(settings.stitch_probe_positions**2, tiles * choice.need.positions) * settings.epochs * rates.pattern_s
    compute = turns * epochs * alone.positions * rates.pattern_s
    compute += turns * meetings * meeting_seconds(settings, alone.positions, rates.pattern_s)
    tasks = runs * tiles * _TASKS_ALONE + meetings * (tiles * _TASKS_MEETING + alone.pairs * _TASKS_PAIR)
    strips = meetings * alone.bytes_moved / slots / rates.bytes_per_s
    seconds = fit + compute + strips + groups * tasks * rates.task_s
    return seconds, compute + fit / slots, tasks, meetings * alone.bytes_moved


def measured(executor: Executor, detector: Detector, optics: Optics, settings: PtychographySettings) -> Rates:
    """Return the rates of ``executor``: seconds on one of its workers, on patterns of counting noise."""
    seconds = executor.gather(executor.submit(measure_pattern, detector, optics, settings))
    return Rates(float(seconds), measure_task(executor))


def measure_pattern(detector: Detector, optics: Optics, settings: PtychographySettings) -> float:
    """Return the seconds per pattern of the engine, where this is run."""
    edge, shape, pixel = math.isqrt(_PATTERNS), detector.shape_yx, detector.object_pixel_angstrom_yx
    grid = object_grid(Scan((edge, edge), (4.3 * pixel[0], 4.3 * pixel[1])).positions(), shape, pixel)
    gap = settings.mean_slice_angstrom
    propagator = fresnel_propagator(shape, pixel, wavelength_angstrom(optics.energy_ev), gap)
    probe = probe_wave(optics, shape, pixel, plane_z_angstrom=0.0, intensity=1e3)
    counts = np.random.default_rng(0).poisson(1.0, (edge * edge, *shape)).astype(np.uint16)
    place = backend.to_device if backend.gpu_available() else np.asarray
    modes = place(np.stack([probe] * settings.probe_modes))
    gaps = (place(propagator),) * (settings.slices - 1)
    model = solver.Model(grid, gaps, settings.loss, settings.object)
    state, frames, seconds = solver.State.start(model, modes), place(counts), []
    for _ in range(2):  # kernels are compiled in the first run
        began = time.perf_counter()
        solver.gradients(state, model, frames, np.arange(len(counts)))
        seconds.append(time.perf_counter() - began)
    return seconds[-1] / len(counts)


def measure_task(executor: Executor, steps: int = 50) -> float:
    """Return the seconds of a task that does nothing, in pairs that each wait for the pair before."""
    before = [executor.submit(_nothing) for _ in range(2)]
    executor.gather(before)
    began = time.perf_counter()
    for _ in range(steps):
        before = [executor.submit(_nothing, *before) for _ in range(2)]
    executor.gather(before)
    return (time.perf_counter() - began) / (2 * steps)


def _nothing(*_: Any) -> None:
    return None
