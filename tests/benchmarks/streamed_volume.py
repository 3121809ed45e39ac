"""Tomography of a volume that two small workers hold in files: time per iteration, memory, beside the floor."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from stemtomo.distributed.cluster import ClientExecutor
from stemtomo.geometry import TiltSeries
from stemtomo.io.provenance import Provenance
from stemtomo.io.store import Store
from stemtomo.pipeline.config import TomographySettings
from stemtomo.pipeline.tomography import plan_tomography, tomography
from tests.benchmarks.measure import Row, print_result
from tests.benchmarks.tomography import ANGLES_DEG, floor_seconds
from tests.benchmarks.two_workers import WORKERS, measure, two_workers


class Laps:
    """Wall time of every iteration."""

    def __init__(self) -> None:
        self.times = [0.0]

    def start(self, stage: str, total: int, unit: str = "") -> None:
        """Begin."""

    def advance(self, n: int = 1, **numbers: float) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    def finish(self, stage: str) -> None:
        """End."""


def store_of(folder: Path, edge: int) -> Store:
    """Return a store of 36 projections of a ball with some columns, aligned."""
    series = TiltSeries.from_degrees(ANGLES_DEG)
    grid = np.arange(edge, dtype=np.float32) - edge // 2
    radius = grid[:, None] ** 2 + grid**2
    ball = 2 * np.sqrt(np.maximum((0.4 * edge) ** 2 - radius, 0))
    texture = 1 + 0.2 * np.random.default_rng(0).random((len(series), edge, edge), dtype=np.float32)
    dims, none = ("tilt", "y", "x"), np.zeros(len(series))
    angles = {f"{name}_deg": (("tilt",), none) for name in ("phi", "psi")}
    angles["theta_deg"] = (("tilt",), np.array(ANGLES_DEG, float))
    images = (1e-3 * ball * texture).astype(np.float32)
    attrs = {"pixel_angstrom": 0.35, "sigma_rad_per_volt_angstrom": 6.5e-4}
    dataset = xr.Dataset({"phase": (dims, images), "valid": (dims, np.ones(images.shape, bool)), **angles}, attrs=attrs)
    store = Store.create(folder / "s.zarr", "streamed")
    store.write("projections", dataset, Provenance.start("projections", {}))
    shifts = {f"shift_{axis}_angstrom": (("tilt",), none) for axis in "xy"}
    aligned = xr.Dataset({**shifts, "score": (("tilt",), none)}, attrs={"wholly_in_view": True})
    store.write("alignment", aligned, Provenance.start("align", {}))
    return store


def streamed(
    edge: int, limit_mib: int, iterations: int, folder: str | None = None, method: str = "fista"
) -> dict[str, Any]:
    """Reconstruct ``edge``^3 on two workers of ``limit_mib`` each; return what it took and what was planned."""
    # Validated: the method comes from the command line.
    settings = TomographySettings.model_validate(
        {"method": method, "iterations": iterations, "refine_shifts": False, "stream": "always", "tv_weight_rad": 1e-4}
    )
    with tempfile.TemporaryDirectory(dir=folder) as name, two_workers(limit_mib) as client:
        store, laps = store_of(Path(name), edge), Laps()
        planned = plan_tomography(store, settings, WORKERS, WORKERS * (limit_mib << 20))
        executor = ClientExecutor(client)
        found = measure(client, lambda: tomography(store, settings, executor=executor, progress=laps))
        loss = store.read("volume")["loss"].values.tolist()
    return {
        **found,
        "tasks": planned.tasks,
        "planned_mb": planned.bytes_per_worker(WORKERS) / 1e6,
        "planned_s": planned.seconds,
        "iteration_s": float(np.median(np.diff(laps.times[2:]))),
        "loss": loss,
    }


def streamed_rows(edge: int = 512, limit_mib: int = 2048, iterations: int = 4) -> list[Row]:
    """Return the figures as rows."""
    found, work = streamed(edge, limit_mib, iterations), f"{edge}^3, 36 tilts, 2 workers of {limit_mib} MiB"
    small = 256 if edge > 256 else edge
    floor = floor_seconds(small)
    floor = None if floor is None else floor * (edge / small) ** 3
    return [
        Row("streamed volume", work, found["peak_rss_mb"], "MB peak of a worker", found["planned_mb"]),
        Row("streamed volume", work, found["spilled_bytes"] + found["paused"], "bytes spilled, or paused"),
        Row("streamed volume", work, found["cpu_s"], f"CPU s, {iterations} iterations and the step length"),
        Row("streamed volume", work, found["iteration_s"], "s wall per iteration", floor and floor / WORKERS),
        Row("streamed volume", work, found["loss"][-1], "loss"),
    ]


if __name__ == "__main__":
    print_result(streamed(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), method=[*sys.argv, "fista"][4]))
