"""Ptychography in tiles: scans larger than the memory of two workers, two workers against one, the cost of a step."""

from __future__ import annotations

import itertools
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from stemtomo.algorithms.ptychography import solver
from stemtomo.algorithms.ptychography.windows import object_grid
from stemtomo.distributed.cluster import ClientExecutor
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.geometry import Detector, Optics, Pose, Scan
from stemtomo.io.provenance import Provenance
from stemtomo.io.store import Store
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.physics.probe import probe_wave
from stemtomo.physics.propagation import fresnel_propagator
from stemtomo.pipeline.config import PtychographySettings
from stemtomo.pipeline.ptychography import ptychography
from stemtomo.pipeline.tile_cost import Rates, estimate
from stemtomo.pipeline.tile_layout import Room, chosen
from tests.benchmarks.measure import Row, cost_row, cpu_seconds, rate_row
from tests.benchmarks.two_workers import measure, two_workers

OPTICS = Optics(300e3, 21e-3, {"C10": 200.0})
STEP_ANGSTROM, PIXEL_ANGSTROM, SHARD = 0.8, 0.2, 32
#: Two epochs: one of eight batches, one of all positions.
SETTINGS = PtychographySettings(
    epochs=2, settling_epochs=1, batches=8, probe_update_start_epoch=0, frames="store", batch_block=8
)


def detector_of(pixels: int) -> Detector:
    """Return a detector of ``pixels`` x ``pixels`` whose objects have pixels of 0.2 Å."""
    return Detector((pixels, pixels), 1 / (pixels * PIXEL_ANGSTROM))


def make_store(path: Path, positions: int, pixels: int) -> Store:
    """Write a scan of ``positions`` x ``positions`` patterns of one probe in vacuum with counting noise.

    One shard of patterns stands for all: what they show does not change what they cost.
    """
    scan, detector = Scan((positions, positions), (STEP_ANGSTROM, STEP_ANGSTROM)), detector_of(pixels)
    pixel = detector.object_pixel_angstrom_yx
    probe = probe_wave(OPTICS, detector.shape_yx, pixel, intensity=20.0 * pixels)
    mean = np.fft.fftshift(np.abs(np.fft.fft2(probe, norm="ortho")) ** 2)
    counts = np.random.default_rng(0).poisson(mean, (SHARD, SHARD, pixels, pixels)).astype(np.uint16)
    counts[..., pixels // 2, pixels // 2] += 1
    store = Store.create(path, "scan")
    store.declare_tilts(1)
    shape = (positions, positions, pixels, pixels)
    store.create_tilt(0, shape, np.uint16, OPTICS, scan, detector, Pose(0.0), shard_positions=SHARD)
    corners = itertools.product(range(0, positions, SHARD), range(0, positions, SHARD))
    for y, x in corners:
        store.write_frames(0, y, x, counts[: positions - y, : positions - x])
    store.record_frames(0, range(math.ceil(positions / SHARD) ** 2))
    store.complete_tilt(0, Provenance.start("ingest", {}))
    store.complete_tilts(Provenance.start("ingest", {}))
    return store


def patterns_per_cpu_second(pixels: int, count: int = 1024, slices: int = 1, seconds: float = 0.0) -> float:
    """Return the patterns per processor second that the engine works on when they are in memory.

    The best of three epochs, or the mean of ``seconds``: what a core gives while its neighbour works, too.
    """
    detector = detector_of(pixels)
    edge = math.isqrt(count)
    grid = object_grid(Scan((edge, edge), (STEP_ANGSTROM, STEP_ANGSTROM)).positions(), (pixels, pixels), (0.2, 0.2))
    gap = fresnel_propagator((pixels, pixels), grid.pixel_angstrom_yx, wavelength_angstrom(300e3), 20.0)
    model = solver.Model(grid, (gap,) * (slices - 1), "anscombe", "phase")
    probe = probe_wave(OPTICS, detector.shape_yx, detector.object_pixel_angstrom_yx, intensity=20.0 * pixels)
    counts = np.random.default_rng(0).poisson(1.0, (edge * edge, pixels, pixels)).astype(np.uint16)
    state = solver.State.start(model, probe)

    def epoch() -> None:
        sums = solver.gradients(state, model, counts, np.arange(len(counts)))
        solver.update(state, sums, solver.Nesterov())

    if not seconds:
        return len(counts) / cpu_seconds(epoch)
    epoch()
    epochs, began, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        epoch()
        epochs += 1
    return epochs * len(counts) / (time.process_time() - cpu)


def reconstruct(
    client: Any, folder: Path, positions: int, pixels: int, tiles: Any, frames: str, epochs: int = 2
) -> dict[str, float]:
    """Return what some epochs of a scan in tiles cost the workers."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        store = make_store(Path(name) / "scan.zarr", positions, pixels)
        settings = SETTINGS.model_copy(update={"tiles": tiles, "frames": frames, "epochs": epochs})
        return measure(client, lambda: ptychography(store, settings, executor=ClientExecutor(client)))


def out_of_core_rows(positions: int = 256, pixels: int = 288, limit_mib: int = 1536, more: int = 0) -> list[Row]:
    """Return the figures of a scan in the store (10.9 GB as given) that two workers reconstruct within their memory.

    With ``more`` epochs a second run says what an epoch costs without the start and the end.
    """
    size, costs = positions**2 * pixels**2 * 2, []
    with tempfile.TemporaryDirectory() as name, two_workers(limit_mib) as client:
        # The engine in memory, on the same workers at the same time: what they share, they share in both.
        ClientExecutor(client)  # which lets workers keep their buffers
        addresses = list(client.nthreads())
        options = {"seconds": 15.0, "pure": False}
        alone = [client.submit(patterns_per_cpu_second, pixels, 256, workers=[a], **options) for a in addresses]
        floor = float(np.mean(client.gather(alone)))
        for epochs in (2, 2 + more) if more else (2,):
            costs.append(reconstruct(client, Path(name), positions, pixels, "auto", "store", epochs))
    found = costs[0]
    work = f"{size / 1e9:.2f} GB of frames, 2 workers of {limit_mib} MiB"
    # The patterns are read twice more: once to count electrons, once for the map of the loss.
    with_ends = 2 * positions**2 / found["cpu_s"]
    rows = [
        Row("tiles", f"{work}, 2 epochs", found["peak_rss_mb"], "MB peak of a worker"),
        rate_row("tiles", f"{work}, 2 epochs, start and end", with_ends, "patterns/CPU s", floor),
        Row("tiles", f"{work}, 2 epochs", found["wall_s"], "s wall"),
        Row("tiles", f"{work}, 2 epochs", found["spilled_bytes"] + found["paused"], "bytes spilled, or paused"),
    ]
    if more:
        rate = more * positions**2 / (costs[1]["cpu_s"] - found["cpu_s"])
        rows.append(rate_row("tiles", f"{work}, an epoch", rate, "patterns/CPU s", floor))
    return rows


def scaling_rows(positions: int = 64, pixels: int = 256, more: int = 4) -> list[Row]:
    """Return the seconds of one worker over those of two for the same epochs: the efficiency.

    What a worker does once, such as loading kernels, is in both of two runs, and not in their difference.
    """
    from distributed import Client, LocalCluster

    costs = []
    for workers in (1, 2):
        options = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None}
        with (
            tempfile.TemporaryDirectory() as name,
            LocalCluster(**options) as cluster,
            Client(cluster, set_as_default=False) as client,
        ):
            shared = (client, Path(name), positions, pixels, (2, 1), "memory")
            first, last = reconstruct(*shared, epochs=2), reconstruct(*shared, epochs=2 + more)
            costs.append({unit: last[unit] - first[unit] for unit in ("cpu_s", "wall_s")})
    work = f"{positions} x {positions} positions, {pixels} pixels, 2 tiles, {more} epochs"
    cpu, wall = costs[0]["cpu_s"] / costs[1]["cpu_s"], costs[0]["wall_s"] / (2 * costs[1]["wall_s"])
    return [
        Row("tiles", f"{work}: CPU s of 1 worker over those of 2", cpu, "efficiency"),
        Row("tiles", f"{work}: wall s of 1 worker over twice those of 2", wall, "efficiency"),
    ]


def overhead_rows(tiles: tuple[int, int] = (4, 2), batches: int = 8, more: int = 10) -> list[Row]:
    """Return what a step of a tile costs beside its patterns: tiles so small that there is little else.

    What threads of one process take for the same steps is the computation; the rest of what scheduler, client and
    workers take is the price of the cluster.
    """
    steps, costs, alone = math.prod(tiles) * batches * more, [], []
    told = {"tiles": tiles, "frames": "memory", "batch_block": 1, "batches": batches, "settling_epochs": 0}
    with tempfile.TemporaryDirectory() as name, two_workers(1024) as client:
        store = make_store(Path(name) / "scan.zarr", 32, 16)
        for epochs in (2, 2, 2 + more):  # the first run compiles and loads
            settings = SETTINGS.model_copy(update={**told, "epochs": epochs, "seed": len(costs)})
            own, wall = time.process_time(), time.perf_counter()
            workers = measure(
                client, lambda settings=settings: ptychography(store, settings, executor=ClientExecutor(client))
            )
            costs.append((time.process_time() - own, workers["cpu_s"], time.perf_counter() - wall))
    with tempfile.TemporaryDirectory() as name:
        store = make_store(Path(name) / "scan.zarr", 32, 16)
        for epochs in (2, 2, 2 + more):
            settings = SETTINGS.model_copy(update={**told, "epochs": epochs, "seed": len(alone)})
            own = time.process_time()
            ptychography(store, settings, executor=ThreadExecutor(1))
            alone.append(time.process_time() - own)
    own, workers, wall = (1e3 * (last - first) / steps for first, last in zip(costs[1], costs[2], strict=True))
    compute = 1e3 * (alone[2] - alone[1]) / steps
    work = f"a step of one of {math.prod(tiles)} tiles, 2 workers"
    return [
        Row("tiles", f"{work}: scheduler and client", own, "CPU ms"),
        Row("tiles", f"{work}: workers", workers, "CPU ms"),
        Row("tiles", f"{work}: its computation, on a thread of one process", compute, "CPU ms"),
        Row(
            "tiles", f"{work}: scheduler, client and workers beside the computation", own + workers - compute, "CPU ms"
        ),
        Row("tiles", f"{work}: everything", wall, "wall ms"),
    ]


def benchmark() -> list[Row]:
    """Return the figures at a tenth of the size: minutes."""
    return [*out_of_core_rows(128, 128, 640, more=8), *scaling_rows(), *overhead_rows(), *overhead_rows((2, 1))]


def cluster_rows(pattern_s: float | None = None, task_s: float = 5e-4) -> list[Row]:
    """Return hours of the series of 36 tilts of 800 x 800 positions over workers: the cost model, nothing is run.

    The costs of a pattern are those of a core of this machine unless given; each worker is one core.
    """
    scan, detector = Scan((800, 800), (0.2275, 0.2275)), detector_of(128)
    settings = PtychographySettings(slices=5, slice_thickness_angstrom=28.0, detector_padding=0.0, epochs=60)
    pattern_s = 1 / patterns_per_cpu_second(128, 256, settings.slices) if pattern_s is None else pattern_s
    rows = []
    for workers in (8, 16, 36, 64, 128, 256, 512):
        choice = chosen(scan, detector, 2, (32, 32), settings, Room(4 << 30, workers), 36)
        assert choice is not None
        found = estimate(settings, choice, workers, Rates(pattern_s, task_s))
        ideal = scan.count * settings.epochs * pattern_s / workers * 36 / 3600
        work = f"36 x 800 x 800, {workers} workers, {choice.tiles_yx[0]} x {choice.tiles_yx[1]} tiles"
        rows.append(cost_row("tiles, cost model", work, 36 * found.seconds / 3600, "h", ideal))
    return rows
