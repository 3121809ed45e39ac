"""Bytes per second of what touches every frame, and a series that is larger than the memory it is given.

``python -m tests.benchmarks.streaming FILE TILTS LIMIT_MIB`` is the process with little memory.
"""

from __future__ import annotations

import resource
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from stemtomo.algorithms.imaging.virtual import virtual_weights
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.geometry import Detector, Optics, Scan, TiltSeries
from stemtomo.io.sources import FrameSource, open_frames
from stemtomo.io.store import Store
from stemtomo.kernels.masks import frame_sums
from stemtomo.pipeline.config import IngestSettings, QuicklookSettings
from stemtomo.pipeline.ingest import ingest
from stemtomo.pipeline.quicklook import quicklook
from tests.benchmarks.measure import Row, cpu_seconds, print_result, python, rate_row

DETECTOR = Detector((128, 128), 0.02)
OPTICS = Optics(300e3, 21e-3, {"C10": 200.0})
SCAN = Scan((64, 64), (1.0, 1.0))
TILT_BYTES = 64 * 64 * 128 * 128 * 2
MB = 1e6


def write_frames(path: Path, tilts: int) -> None:
    """Write raw uint16 frames of few electrons, a few rows of positions at a time; the noise repeats."""
    rng = np.random.default_rng(0)
    ky, kx = np.indices(DETECTOR.shape_yx) - 64
    mean = 4.0 * (np.hypot(ky, kx) < 53) + 0.05
    rows = [rng.poisson(mean, size=(2, 64, 128, 128)).astype(np.uint16).tobytes() for _ in range(4)]
    with path.open("wb") as file:
        for number in range(tilts * 32):
            file.write(rows[number % len(rows)])


def source_of(path: Path, tilts: int) -> FrameSource:
    """Open what :func:`write_frames` wrote."""
    return open_frames(path, dtype="uint16", shape=(tilts, *SCAN.shape_yx, *DETECTOR.shape_yx))


def first_look(path: Path, tilts: int, settings: IngestSettings, threads: int) -> dict[str, Any]:
    """Ingest a raw file beside it and take the quick look; return processor seconds and mean counts."""
    executor = ThreadExecutor(threads)
    store_path = path.with_suffix(".zarr")
    series = TiltSeries.from_degrees(np.linspace(-60, 60, tilts).tolist())
    began = time.process_time()
    numbers = ingest(store_path, source_of(path, tilts), OPTICS, SCAN, DETECTOR, series, settings, executor=executor)
    between = time.process_time()
    means = quicklook(Store.open(store_path, "r+"), executor=executor)["mean_counts"]
    return {
        "ingest_cpu_s": between - began,
        "quicklook_cpu_s": time.process_time() - between,
        "mean_counts": means,
        "bytes_stored": numbers["bytes_stored"],
    }


def kernel_rows() -> list[Row]:
    """Measure the one-pass kernel in memory against a plain sum of the same bytes."""
    frames = np.random.default_rng(0).poisson(2.0, size=(16, 64, 128, 128)).astype(np.uint16)
    weights = virtual_weights(OPTICS, DETECTOR)
    rate = frames.nbytes / 1e9 / cpu_seconds(lambda: frame_sums(frames, weights))
    floor = frames.nbytes / 1e9 / cpu_seconds(lambda: frames.sum())
    return [rate_row("quicklook kernel", "16x64 of 128x128 uint16, 6 weights", rate, "GB/CPU s", floor)]


def store_rows(tilts: int = 2) -> list[Row]:
    """Measure ingest, quicklook and reading of frames against plain copies and reads of the same raw bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "frames.raw"
        write_frames(path, tilts)
        size = tilts * TILT_BYTES / 1e9
        copy = size / cpu_seconds(lambda: shutil.copyfile(path, path.with_suffix(".copy")), 1)
        plain = size / cpu_seconds(lambda: [np.fromfile(path, np.uint16, TILT_BYTES // 2) for _ in range(tilts)])
        found = first_look(path, tilts, IngestSettings(), 1)
        store = Store.open(path.with_suffix(".zarr"), "r+")
        # Other settings make the stage do its work again, with imports and compiled code at hand.
        fractions = iter((1.01, 1.02, 1.03))
        look = size / cpu_seconds(
            lambda: quicklook(
                store, QuicklookSettings(bright_field_fraction=next(fractions)), executor=ThreadExecutor(1)
            ),
            2,
        )
        read = size / cpu_seconds(lambda: [store.frames(tilt)[:] for tilt in range(tilts)], 2)
        work = f"{tilts} x 64x64 of 128x128 uint16"
        return [
            rate_row("ingest", work, size / found["ingest_cpu_s"], "GB/CPU s", copy),
            rate_row("quicklook", f"{work}, from the store", look, "GB/CPU s", plain),
            rate_row("read", f"{work}, from the store", read, "GB/CPU s", plain),
            Row("store", work, size * 1e9 / found["bytes_stored"], "bytes in per byte stored"),
        ]


def out_of_core_rows(tilts: int = 16, limit_mib: int = 512) -> list[Row]:
    """Take a series through ingest and quicklook in a process that may hold far less than its frames."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "frames.raw"
        write_frames(path, tilts)
        run = python("tests.benchmarks.streaming", [str(path), str(tilts), str(limit_mib)])
    work = f"{tilts * TILT_BYTES / MB:.0f} MB of frames, private memory limited to {limit_mib * 2**20 / MB:.0f} MB"
    return [
        Row("out of core", work, run.peak_rss_mb, "MB peak"),
        Row("out of core", work, run.cpu_s, "CPU s"),
        Row("out of core", work, run.wall_s, "s wall"),
        Row("out of core", work, float(np.ptp(run.result["mean_counts"])), "spread of mean counts"),
    ]


def benchmark() -> list[Row]:
    """Measure the kernel and the store."""
    return kernel_rows() + store_rows()


def _limited(path: str, tilts: str, limit_mib: str) -> None:
    """Run with the memory that this process may allocate (not the page cache, not files) limited by the kernel."""
    threading.stack_size(1 << 20)  # stacks count as a whole, used or not
    limit = int(limit_mib) << 20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    print_result(first_look(Path(path), int(tilts), IngestSettings(shard_mib=32), 2))


if __name__ == "__main__":
    _limited(*sys.argv[1:])
