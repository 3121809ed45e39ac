"""Tiled ptychography is ptychography: any cut gives what the scan in one piece gives, to rounding."""

import functools
from dataclasses import replace

import numpy as np
import pytest

from stemtomo.algorithms.ptychography import solver
from stemtomo.algorithms.ptychography.model import start_modes
from stemtomo.algorithms.ptychography.positions import Positions, moved_grid
from stemtomo.algorithms.ptychography.regularisation import blurred_along_beam
from stemtomo.algorithms.ptychography.tiles import cut_scan, rectangles
from stemtomo.algorithms.ptychography.windows import object_grid
from stemtomo.distributed import Parts, executor
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.geometry import Optics, Scan
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.physics.probe import probe_wave
from stemtomo.physics.propagation import fresnel_propagator
from stemtomo.pipeline.config import PtychographySettings
from stemtomo.pipeline.solving import Tilt, solve_tilt
from stemtomo.pipeline.tile_fields import Field, Resident
from stemtomo.pipeline.tiles import Schedule, TiledRun

SCAN = Scan((12, 12), (1.1, 1.1))
WINDOW, PIXEL = (16, 16), (0.5, 0.5)
OPTICS = Optics(energy_ev=300e3, semiangle_rad=21e-3, aberrations={"C10": 60.0})
DOUBLE, SINGLE = np.dtype(np.complex128), np.dtype(np.complex64)
BATCHES = 4
SHORT, LONG = 13, 50
POSITIONS_SHARE = 0.6
RULE = solver.Nesterov(0.8, 0.1, 0.5, 0.1, 1.0)
CUTS = {
    "1x1": rectangles((12, 12), (1, 1)),
    "2x2": rectangles((12, 12), (2, 2)),
    "3x3": rectangles((12, 12), (3, 3)),
    "4x4": rectangles((12, 12), (4, 4)),
    "rows of one": rectangles((12, 12), (12, 1)),
    "uneven": [((0, 1), (0, 5)), ((0, 1), (5, 12)), ((1, 12), (0, 9)), ((1, 12), (9, 10)), ((1, 12), (10, 12))],
}


@functools.cache
def experiment(dtype):
    """A scan of jittered positions with two modes, two slices and counting noise; all the same for every cut."""
    grid = object_grid(SCAN.positions(), WINDOW, PIXEL)
    propagator = fresnel_propagator(WINDOW, PIXEL, wavelength_angstrom(300e3), 25.0, dtype=dtype)
    model = solver.Model(grid, (propagator,), "anscombe", "phase")
    rng = np.random.default_rng(0)
    y, x = np.indices(grid.shape_yx)
    phase = np.zeros((2, *grid.shape_yx))
    for layer in phase:
        for centre in rng.uniform(0.1, 0.9, size=(40, 2)) * np.array(grid.shape_yx):
            layer += 0.5 * np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / (2 * 1.2**2))
    probe = start_modes(probe_wave(OPTICS, WINDOW, PIXEL, intensity=2e4, dtype=dtype), 2, 0.1)
    jitter = 0.05 * rng.normal(size=(SCAN.count, 2))
    true = replace(model, grid=moved_grid(grid, jitter))
    truth = solver.State(phase.astype(np.zeros(0, dtype).real.dtype), probe)
    counts = rng.poisson(solver.patterns(truth, true, np.arange(SCAN.count))).astype(np.uint16)
    return model, start_modes(probe_wave(OPTICS, WINDOW, PIXEL, intensity=2e4, dtype=dtype), 2), counts


@functools.cache
def untiled(dtype, epochs=SHORT):
    model, probe, counts = experiment(dtype)
    first = round(POSITIONS_SHARE * epochs)
    settings = PtychographySettings(
        epochs=epochs,
        settling_epochs=0,
        batches=BATCHES,
        step=RULE.step,
        probe_step=RULE.probe_step,
        momentum=RULE.momentum,
        damping=RULE.damping,
        refine_positions_from_epoch=first,
        probe_update_start_epoch=3,
    )
    tilt = Tilt(model, counts, SCAN.positions(), width_slices=0.4, tied=False, seed=7)
    solved = solve_tilt(tilt, solver.State.start(model, probe), settings)
    return solved.state, solved.model, solved.losses


def blurred(state, epoch):
    return replace(state, phase=blurred_along_beam(state.phase, 0.4))


def build_field(tile, dtype):
    model, _, counts = experiment(dtype)
    local = replace(model, grid=tile.grid)
    return Field(local, tile.where, tile.where, SCAN.positions()[tile.where], Resident(counts[tile.where]))


def start_state(field, probe):
    return solver.State.start(field.model, probe)


def tiled_run(workers, cut, dtype, epochs=SHORT):
    model, _, _ = experiment(dtype)
    tiles = cut_scan(model.grid, SCAN.shape_yx, np.arange(SCAN.count), CUTS[cut], margin_px=2)
    fields = Parts.create(workers, build_field, tiles, dtype)
    first = round(POSITIONS_SHARE * epochs)
    schedule = Schedule([RULE] * epochs, [BATCHES] * epochs, SCAN.count, 3, 7, positions_from=first, regularise=blurred)
    return tiles, TiledRun(workers, fields, [tile.window for tile in tiles], schedule)


def started(run, dtype):
    return run.start(start_state, experiment(dtype)[1])


def worst_difference(tiles, states, whole):
    """Largest difference of transmission, probe (relative) and positions (in pixels), between tiles and one piece."""
    objects, probes, moved = [], [], []
    for tile, state in zip(tiles, states, strict=True):
        (y0, y1), (x0, x1) = tile.window
        expected = np.exp(1j * whole.phase[:, y0:y1, x0:x1])
        objects.append(np.abs(np.exp(1j * state.phase) - expected).max())
        probes.append(np.abs(state.probe - whole.probe).max() / np.abs(whole.probe).max())
        moved.append(np.abs(state.extra[Positions.name] - whole.extra[Positions.name][tile.where]).max() / PIXEL[0])
    return max(objects), max(probes), max(moved)


def assert_same_as_untiled(workers, cut, dtype, tolerance, epochs=SHORT):
    whole, _, losses = untiled(dtype, epochs)
    tiles, run = tiled_run(workers, cut, dtype, epochs)
    now = run.solve(started(run, dtype))
    transmission, probe, position = worst_difference(tiles, now.states.gather(), whole)
    assert max(transmission, probe, position) < tolerance
    np.testing.assert_allclose(now.losses, losses, rtol=tolerance)


def test_the_reconstruction_in_one_piece_moves_positions_and_its_loss_falls():
    state, _, losses = untiled(DOUBLE)
    assert losses[-1] < 0.85 * losses[0]
    assert 0.01 < np.sqrt((state.extra[Positions.name] ** 2).mean()) < 0.1
    assert len(state.probe) == 2


@pytest.mark.parametrize("cut", CUTS)
def test_tiles_agree_with_one_piece_after_52_updates_in_double_precision(cut):
    assert_same_as_untiled(ThreadExecutor(2), cut, DOUBLE, 1e-12)


@pytest.mark.parametrize("cut", ["2x2", "uneven"])
def test_tiles_agree_with_one_piece_after_52_updates_in_single_precision(cut):
    assert_same_as_untiled(ThreadExecutor(2), cut, SINGLE, 1e-5)


def test_tiles_on_a_cluster_agree_with_one_piece_and_bit_for_bit_with_threads(client):
    whole, _, _ = untiled(DOUBLE, 3)
    states = []
    for workers in (executor(client), ThreadExecutor(2)):
        tiles, run = tiled_run(workers, "2x2", DOUBLE, epochs=3)
        states.append(run.solve(started(run, DOUBLE)).states.gather())
    assert max(worst_difference(tiles, states[0], whole)) < 1e-12
    for one, other in zip(*states, strict=True):
        np.testing.assert_array_equal(one.phase, other.phase)
        np.testing.assert_array_equal(one.probe, other.probe)


@pytest.mark.heavy
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("where", ["threads", "cluster"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(DOUBLE, 1e-12), (SINGLE, 1e-5)])
def test_every_cut_agrees_with_one_piece_after_50_epochs(where, dtype, tolerance, cut, client):
    workers = executor(client) if where == "cluster" else ThreadExecutor(2)
    assert_same_as_untiled(workers, cut, dtype, tolerance, LONG)


class Counting(ThreadExecutor):
    """Threads under the names of as many workers, so that parts exchange strips; counts the tasks."""

    tasks = 0

    def places(self, count):
        return tuple(f"worker {index * self.workers // count}" for index in range(count))

    def threads_at(self, place):
        return 1

    def submit_at(self, place, function, /, *args, urgent=False):
        self.tasks += 1
        return super().submit_at(place, function, *args, urgent=urgent)


@pytest.mark.parametrize(("workers", "tasks"), [(1, 0.2), (4, 1.0), (16, 5.2)])
def test_a_step_is_a_handful_of_tasks_for_the_tiles_of_a_thread(workers, tasks):
    counted = []
    for epochs in (1, 2):
        counting = Counting(workers)
        _, run = tiled_run(counting, "4x4", SINGLE, epochs=epochs)
        batches = [BATCHES * (4 if epoch else 1) for epoch in range(epochs)]
        run = replace(run, schedule=replace(run.schedule, batches=batches, positions_from=None))
        run.solve(started(run, SINGLE))
        counted.append(counting.tasks)
    # An epoch has one task more for each tile, and a few for all.
    assert (counted[1] - counted[0] - 16 - 4) / (4 * BATCHES * 16) <= tasks


@pytest.mark.parametrize("threads", [1, 3])
def test_bundles_of_tiles_give_the_bits_of_tiles_on_their_own(threads):
    states = []
    for workers in (Counting(16), Bundled(threads)):
        _, run = tiled_run(workers, "4x4", SINGLE, epochs=2)
        states.append(run.solve(started(run, SINGLE)).states.gather())
    for one, other in zip(*states, strict=True):
        np.testing.assert_array_equal(one.phase, other.phase)
        np.testing.assert_array_equal(one.probe, other.probe)


class Bundled(Counting):
    """Five workers of some threads."""

    def __init__(self, threads):
        super().__init__(5)
        self.threads = threads

    def threads_at(self, place):
        return self.threads
