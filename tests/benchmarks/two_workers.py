"""Ingest and quicklook of a series ten times larger than the memory of two Dask workers, and what these two hold."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from stemtomo.distributed import peak_rss_mb
from stemtomo.distributed.cluster import ClientExecutor
from stemtomo.distributed.memory import cpu_seconds
from stemtomo.geometry import Detector, Optics, Scan, TiltSeries
from stemtomo.io.series import SeriesOfFiles
from stemtomo.io.sources import open_frames
from stemtomo.io.store import Store
from stemtomo.pipeline.config import IngestSettings, QuicklookSettings
from stemtomo.pipeline.ingest import ingest
from stemtomo.pipeline.quicklook import quicklook
from tests.benchmarks.measure import Row

SCAN, DETECTOR = Scan((64, 64), (1.0, 1.0)), Detector((256, 256), 0.01)
OPTICS = Optics(300e3, 21e-3, {"C10": 200.0})
TILT_BYTES = 64 * 64 * 256 * 256 * 2
WORKERS = 2


class Held:
    """The largest managed, spilled and paused state of the workers while something runs, polled."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self.spilled, self.paused = 0, False

    def _poll(self) -> None:
        while not self._ended.wait(0.5):
            for worker in self._client.scheduler_info(n_workers=-1)["workers"].values():
                spilled = worker["metrics"].get("spilled_bytes", {})
                self.spilled = max(self.spilled, spilled.get("memory", 0), spilled.get("disk", 0))
                self.paused |= worker["status"] == "paused"

    def __enter__(self) -> Held:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


@contextmanager
def two_workers(limit_mib: int) -> Iterator[Any]:
    """Yield the client of two processes of one thread and ``limit_mib`` each."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=WORKERS,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
            memory_limit=limit_mib << 20,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def series(folder: Path, tilts: int) -> SeriesOfFiles:
    """Return a series whose tilts are all the same file: counted electrons, 0.05 in a pixel."""
    path = folder / "tilt.raw"
    rows = np.random.default_rng(0).poisson(0.05, (2, 64, 256, 256)).astype(np.uint16).tobytes()
    with path.open("wb") as file:
        for _ in range(32):
            file.write(rows)
    one = open_frames(path, dtype="uint16", axes=("y", "x", "ky", "kx"), shape=(*SCAN.shape_yx, *DETECTOR.shape_yx))
    return SeriesOfFiles((one,) * tilts)


def measure(client: Any, work: Callable[[], Any]) -> dict[str, float]:
    """Do ``work``; return wall and processor seconds and what the workers held: peaks, spilled bytes, pauses."""
    before, began = client.run(cpu_seconds), time.perf_counter()
    with Held(client) as held:
        work()
    wall, after = time.perf_counter() - began, client.run(cpu_seconds)
    return {
        "wall_s": wall,
        "cpu_s": sum(after.values()) - sum(before.values()),
        "peak_rss_mb": max(client.run(peak_rss_mb).values()),
        "spilled_bytes": held.spilled,
        "paused": float(held.paused or any("aus" in str(line) for line in client.get_worker_logs().values())),
    }


def out_of_core(limit_mib: int, times: float = 10.0) -> dict[str, dict[str, float]]:
    """Take a series of ``times`` the memory of both workers through ingest and quicklook."""
    tilts = int(np.ceil(times * WORKERS * (limit_mib << 20) / TILT_BYTES))
    poses = TiltSeries.from_degrees(np.linspace(-60, 60, tilts).tolist())
    with tempfile.TemporaryDirectory() as name, two_workers(limit_mib) as client:
        source, path, executor = series(Path(name), tilts), Path(name) / "s.zarr", ClientExecutor(client)
        geometry = (OPTICS, SCAN, DETECTOR, poses)
        settings = IngestSettings(shard_mib=32)
        found = {"ingest": measure(client, lambda: ingest(path, source, *geometry, settings, executor=executor))}
        store = Store.open(path, "r+")
        found["quicklook"] = measure(client, lambda: quicklook(store, QuicklookSettings(), executor=executor))
        counts = [float(store.read(f"quicklook/{n:03d}")["total_counts"].sum()) for n in (0, tilts - 1)]
    found["series"] = {"bytes": float(tilts * TILT_BYTES), "difference": abs(counts[0] - counts[1])}
    return found


def two_worker_rows(limit_mib: int = 512) -> list[Row]:
    """Return the figures as rows."""
    found = out_of_core(limit_mib)
    size = found.pop("series")["bytes"]
    rows = []
    for stage, numbers in found.items():
        work = f"{size / 1e9:.1f} GB, 2 workers of {limit_mib} MiB: {stage}"
        rows.append(Row("two workers", work, numbers["peak_rss_mb"], "MB peak of a worker"))
        rows.append(Row("two workers", work, size / 1e9 / numbers["cpu_s"], "GB/CPU s"))
        rows.append(Row("two workers", work, numbers["wall_s"], "s wall"))
        rows.append(Row("two workers", work, numbers["spilled_bytes"] + numbers["paused"], "bytes spilled, or paused"))
    return rows
