"""How fast ``watch`` catches up with a file that is there already, beside what its parts take alone in the same run."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.geometry import Detector, Optics
from stemtomo.io.frames import create
from stemtomo.io.shards import ShardCodec, build
from stemtomo.kernels.masks import frame_sums
from stemtomo.pipeline.config import QuicklookSettings
from stemtomo.pipeline.lookup import detectors
from stemtomo.pipeline.references import parse_configuration
from stemtomo.pipeline.watch import watch
from tests.benchmarks.measure import Row, rate_row

SCAN, DETECTOR = (64, 96), (256, 256)
OPTICS, PIXEL = {"energy_kev": 300, "semiangle_mrad": 21}, 0.01


def counted(dtype: str, electrons_per_pixel: float) -> np.ndarray:
    """Return one shard row of frames (y, x, ky, kx); noise that repeats along x."""
    rng = np.random.default_rng(0)
    tile = rng.poisson(electrons_per_pixel, size=(8, 8, *DETECTOR)).astype(dtype)
    return np.tile(tile, (32 // 8, SCAN[1] // 8, 1, 1))


def write(path: Path, frames: np.ndarray) -> int:
    """Write the scan that repeats ``frames``; return its bytes."""
    with path.open("wb") as file:
        for _ in range(SCAN[0] // len(frames)):
            file.write(frames.data)
    return path.stat().st_size


def rates(path: Path, dtype: str, size: int, threads: int) -> tuple[float, float]:
    """Follow ``path`` into a new store; return GB per second of wall time and of processor time."""
    configuration = parse_configuration(
        {
            "series": {"name": "s"},
            "input": {"path": str(path), "dtype": dtype, "axes": ["y", "x", "ky", "kx"], "shape": [*SCAN, *DETECTOR]},
            "optics": OPTICS,
            "scan": {"step_angstrom": 0.5},
            "detector": {"pixel_inv_angstrom": PIXEL},
            "tilts": {"theta_deg": [0.0]},
        }
    )
    store = path.with_suffix(f".{threads}.zarr")
    shutil.rmtree(store, ignore_errors=True)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in watch(path, store, configuration, executor=ThreadExecutor(threads)):
        pass
    result = size / 1e9 / (time.perf_counter() - wall), size / 1e9 / (time.process_time() - cpu)
    shutil.rmtree(store)
    return result


def floors(folder: Path, path: Path, frames: np.ndarray) -> dict[str, float]:
    """Return GB per processor second of what cannot be spared: reading into a buffer in use, sums, and the codec."""
    tile = np.ascontiguousarray(frames[:8, :8])
    eyes = detectors(Optics(300e3, 21e-3), Detector(DETECTOR, PIXEL), QuicklookSettings())
    codec = ShardCodec.of(create(folder, (32, 32, *DETECTOR), frames.dtype, 32))
    assert codec is not None
    work = {
        "sums": lambda: frame_sums(tile, eyes[0], eyes[1].labels),
        "codec": lambda: build(codec, [(0, 0, tile)]),
    }
    found = {name: tile.nbytes / 1e9 / _thread_seconds(step) for name, step in work.items()}
    buffer, copy = np.empty(path.stat().st_size // 8 * 8, np.uint8), np.empty(64 << 20, np.uint8)

    def read() -> None:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer.data[: 8 << 20]):
                pass

    found["read"] = path.stat().st_size / 1e9 / _thread_seconds(read)
    found["memcpy"] = copy.nbytes / 1e9 / _thread_seconds(lambda: np.copyto(copy, buffer[: copy.size]))
    return found


def disk_rate(folder: Path, size: int = 64 << 20) -> float:
    """Return GB per second of wall time of writing incompressible bytes in pieces of 8 MiB, each on the disk."""
    piece = np.random.default_rng(0).bytes(8 << 20)
    began = time.perf_counter()
    with (folder / "disk").open("wb") as file:
        for _ in range(size // len(piece)):
            file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    (folder / "disk").unlink()
    return size / 1e9 / (time.perf_counter() - began)


def catch_up_rows() -> list[Row]:
    """Measure catch-up on counted frames of 8 and 16 bits with one and two workers."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        disk = disk_rate(folder)
        for dtype, electrons in (("<u2", 0.05), ("<u2", 5.0), ("u1", 0.05)):
            frames, path = counted(dtype, electrons), folder / "frames.raw"
            size = write(path, frames)
            rates(path, dtype, size, 2)  # compiled code, page cache
            found = floors(folder / dtype.strip("<"), path, frames)
            bound = 1 / sum(1 / found[part] for part in ("read", "sums", "codec"))
            work = f"{np.dtype(dtype).name}, {electrons:g} e/pixel"
            for threads in (1, 2):
                wall, cpu = max(rates(path, dtype, size, threads) for _ in range(2))
                rows.append(Row("watch", f"{work}, {threads} workers", wall, "GB/s wall"))
                rows.append(rate_row("watch", f"{work}, {threads} workers", cpu, "GB/CPU s", bound))
            rows += [Row("watch", f"{work}: {part} alone", rate, "GB/CPU s") for part, rate in found.items()]
            shutil.rmtree(folder / dtype.strip("<"))
        rows.append(Row("watch", "disk, fsync every 8 MiB, incompressible", disk, "GB/s wall"))
    return rows


def _thread_seconds(step: Callable[[], object]) -> float:
    step()
    costs = []
    for _ in range(3):
        began = time.thread_time()
        step()
        costs.append(time.thread_time() - began)
    return min(costs)
