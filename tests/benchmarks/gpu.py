"""A GPU against one core of the host: ``python -m tests.benchmarks.gpu [FILE.json]`` prints a table, writes JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from stemtomo import backend
from stemtomo.algorithms.imaging.virtual import virtual_weights
from stemtomo.algorithms.ptychography import solver
from stemtomo.kernels import atoms
from stemtomo.kernels.masks import frame_sums
from stemtomo.physics.projection import backproject, project
from tests.benchmarks import ptychography, streaming, tomography
from tests.benchmarks.measure import Row, cost_row, machine, table


def seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    """Return the wall seconds of the fastest of ``repeats`` calls, the device's queue emptied, after one to warm up."""
    import cupy

    work()
    times = []
    for _ in range(repeats):
        cupy.cuda.Device().synchronize()
        began = time.perf_counter()
        work()
        cupy.cuda.Device().synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


def on_device(state: solver.State, model: solver.Model) -> tuple[solver.State, solver.Model]:
    """Return vacuum, the probe and the model in the memory of the GPU."""
    propagators = tuple(backend.to_device(propagator) for propagator in model.propagators)
    there = solver.Model(model.grid, propagators, model.loss, model.kind)
    return solver.State.start(there, backend.to_device(state.probe)), there


def ptychography_rows() -> list[Row]:
    """Measure an epoch of each of the benchmarked tilts; the floor is its FFTs alone, by cuFFT."""
    rows = []
    for name, conditions in (("1 slice", ptychography.SINGLE_SLICE), ("6 slices", ptychography.SIX_SLICES)):
        state, model = ptychography.prepare(conditions)
        counts, batches = ptychography.simulated_counts(state, model), conditions.batches
        begin, there = on_device(state, model)
        patterns = backend.to_device(counts)
        for count in (batches, 1):
            spent = seconds(lambda b=begin, m=there, p=patterns, n=count: ptychography.solve(b, m, p, n, 1))
            host = seconds(lambda s=state, m=model, c=counts, n=count: ptychography.solve(s, m, c, n, 1), 1)
            work = f"{name}, {count} batches"
            rows.append(cost_row("ptychography, GPU", work, spent, "s/epoch", _cufft_floor(model)))
            rows.append(Row("ptychography, one core", work, host, "s/epoch"))
    return rows


def kernel_rows(edge: int = 256) -> list[Row]:
    """Measure projector, masks and atoms on both."""
    where = tomography.geometry(edge, 1.0)
    volume = np.random.default_rng(0).random((edge,) * 3, dtype=np.float32)
    frames = np.random.default_rng(0).poisson(2.0, size=(16, 64, 128, 128)).astype(np.uint16)
    weights = virtual_weights(streaming.OPTICS, streaming.DETECTOR)
    table_of_atoms = np.random.default_rng(0).uniform(20, edge - 20, (4, 20000)).astype(np.float32)
    table_of_atoms[2:] = np.array([[1.0], [1.5]])
    rows, whole, image_window = [], where.whole_volume, where.whole_image
    for name, place in (("GPU", backend.to_device), ("one core", np.asarray)):
        there, shots, masks, image = map(place, (volume, frames, weights, np.zeros((edge, edge), np.float32)))
        parameters = [place(np.ascontiguousarray(column)) for column in table_of_atoms]
        images = project(where, there, whole, image_window)
        per = 1e9 / (len(where) * edge**3)
        works: dict[str, tuple[Callable[[], Any], float, str]] = {
            "project": (lambda v=there: project(where, v, whole, image_window), per, "ns/voxel-angle"),
            "back-project": (lambda i=images: backproject(where, i, image_window, whole), per, "ns/voxel-angle"),
            "masks": (lambda f=shots, w=masks: frame_sums(f, w), 1e9 / frames.nbytes, "s/GB"),
            "atoms": (lambda i=image, p=parameters: atoms.render(i, *p, 8), 1e9 / 20000, "ns/atom"),
        }  # fmt: skip
        rows += [Row(work, name, seconds(call, 2) * scale, unit) for work, (call, scale, unit) in works.items()]
    return rows


def benchmark() -> list[Row]:
    """Measure everything that runs on a GPU."""
    return ptychography_rows() + kernel_rows()


def _cufft_floor(model: solver.Model) -> float:
    transforms = ptychography.transforms(model)
    batch = min(transforms, backend.DEVICE_TOGETHER_BYTES // (8 * int(np.prod(model.grid.window_yx))))
    waves = backend.to_device(np.ones((batch, *model.grid.window_yx), np.complex64))
    return seconds(lambda: backend.fft2(waves)) * transforms / batch


if __name__ == "__main__":
    found = benchmark()
    print(table(found))
    if len(sys.argv) > 1:
        record = {"machine": machine(), "rows": [row._asdict() for row in found]}
        Path(sys.argv[1]).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
