"""A crystal of a million atoms in a volume on the disc: traced, classified, its order and its strain found."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from scipy.ndimage import gaussian_filter

from stemtomo.algorithms.atoms.classification import classify
from stemtomo.algorithms.atoms.tracing import Region, TracedAtoms, TracingRules, trace_blocks
from stemtomo.distributed import peak_rss_mb
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.pipeline.order import order
from stemtomo.pipeline.settings.analysis import OrderSettings, StrainSettings
from stemtomo.pipeline.strain import strain
from tests.benchmarks.measure import Row, cost_row

CELL, VOXEL, WIDTH = 4.0, 0.6, 0.7
#: Strain along x of the whole crystal, displacement of every atom (rms per axis), share of heavy atoms.
STRAIN, RATTLE, HEAVY = 0.005, 0.05, 0.5
_BLOCK, _CHUNK = 128, 64


def crystal(cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Return positions (atom, 3) in Å of a cube of fcc with ``cells`` along each edge, and which atoms are heavy."""
    rng = np.random.default_rng(0)
    corner = np.stack(np.meshgrid(*(np.arange(cells),) * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    basis = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    sites = ((corner[:, None] + basis).reshape(-1, 3) - cells / 2) * CELL
    sites[:, 0] *= 1 + STRAIN
    return sites + rng.normal(0, RATTLE, sites.shape), rng.random(len(sites)) < HEAVY


def write_volume(path: Path, positions: np.ndarray, intensity: np.ndarray) -> zarr.Array:
    """Draw atoms as Gaussians into a Zarr array (z, y, x), slab by slab."""
    count = int(2 * np.ceil(np.abs(positions).max() / VOXEL)) + 12
    volume = zarr.create_array(path, shape=(count,) * 3, chunks=(_CHUNK,) * 3, dtype="f4")
    index = positions[:, ::-1] / VOXEL + count // 2
    lowest = np.floor(index).astype(int)
    part = index - lowest
    margin = 6
    for start in range(0, count, _CHUNK):
        first, last = max(start - margin, 0), min(start + _CHUNK + margin, count)
        near = (lowest[:, 0] >= first) & (lowest[:, 0] + 1 < last)
        slab = np.zeros((last - first, count, count), np.float32)
        for corner in np.ndindex(2, 2, 2):
            weight = np.prod(np.where(corner, part[near], 1 - part[near]), axis=1)
            z, y, x = (lowest[near] + corner).T
            np.add.at(slab, (z - first, y, x), (weight * intensity[near]).astype(np.float32))
        # A hat between voxels has the variance 1/6 of a voxel.
        drawn = gaussian_filter(slab, np.sqrt((WIDTH / VOXEL) ** 2 - 1 / 6), mode="constant", truncate=5)
        volume[start : start + _CHUNK] = drawn[start - first : start - first + _CHUNK]
    return volume


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return what ``work`` returns, and its processor and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    return result, time.process_time() - cpu, time.perf_counter() - wall


def traced(volume: zarr.Array, workers: ThreadExecutor) -> TracedAtoms:
    """Return the atoms of ``volume``, one block for each of ``workers`` at a time."""

    def read(region: Region) -> np.ndarray:
        return np.asarray(volume[region])

    def run(function: Callable[[Any], Any], items: Any) -> list[Any]:
        results = dict(workers.map_bounded(function, items, window=workers.workers))
        return [results[index] for index in range(len(results))]

    rules = TracingRules(minimum_distance_angstrom=2.4, smoothing_angstrom=0.3)
    return trace_blocks(volume.shape, read, VOXEL, rules, block_voxels=_BLOCK, run=run)


def million_rows(cells: int = 63) -> list[Row]:
    """Trace, classify, order and strain of a crystal of 4 ``cells``³ atoms, on two threads."""
    positions, heavy = crystal(cells)
    workers = ThreadExecutor(2)
    name = f"{len(positions)} atoms"
    with tempfile.TemporaryDirectory() as folder:
        volume = write_volume(Path(folder) / "volume.zarr", positions, np.where(heavy, 2.0, 1.0))
        before = peak_rss_mb()
        atoms, *trace = timed(lambda: traced(volume, workers))
    classes, *classified = timed(lambda: classify(atoms.integrated, 2))
    species = np.array(["Cu", "Au"])[classes.labels]
    given = (atoms.positions, species)
    ordered, *ordering = timed(lambda: order(given, OrderSettings(chemical=False), executor=workers))
    asked = StrainSettings(crystal="fcc", a_angstrom=CELL)
    strained, *straining = timed(lambda: strain(given, asked, executor=workers))
    rows = [cost_row("million", f"{name}: found, of all", len(atoms) / len(positions), "share")]
    rows.append(cost_row("million", f"{name}: heavy, of all", float(classes.labels.mean() / heavy.mean()), "share"))
    rows.append(cost_row("million", f"{name}: crystalline", ordered["crystalline_share"], "share"))
    rows.append(cost_row("million", f"{name}: strain along x", strained["mean_strain"]["xx"], "1"))
    stages = {"trace": trace, "classify": classified, "order": ordering, "strain": straining}
    for stage, (cpu, wall) in stages.items():
        rows += [cost_row("million", f"{stage}", cpu, "CPU s"), cost_row("million", f"{stage}", wall, "wall s")]
    rows.append(cost_row("million", "peak memory before tracing", before, "MB"))
    rows.append(cost_row("million", "peak memory", peak_rss_mb(), "MB"))
    return rows
