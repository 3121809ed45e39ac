"""Quicklook of warm 16-bit frames on one core, beside LiberTEM on the same file in the same run.

LiberTEM is taken from this Python if it can be imported, else from the Python that ``LIBERTEM_PYTHON`` names: its
dependencies are many, and none of this package's.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.geometry import Detector, Optics, Scan, TiltSeries
from stemtomo.io.layout import check_values
from stemtomo.io.sources import FrameSource, open_frames
from stemtomo.io.store import Store
from stemtomo.io.transfer import piece_regions
from stemtomo.pipeline.config import QuicklookSettings
from stemtomo.pipeline.ingest import ingest
from stemtomo.pipeline.lookup import BlockLook, detectors
from stemtomo.pipeline.quicklook import quicklook
from tests.benchmarks.measure import Row, cpu_seconds, rate_row

SHAPE = (64, 96, 192, 192)
SIZE_GB = 2e-9 * SHAPE[0] * SHAPE[1] * SHAPE[2] * SHAPE[3]
OPTICS, DETECTOR = Optics(300e3, 21e-3, {"C10": 200.0}), Detector(SHAPE[2:], 0.0133)


def write(path: Path) -> None:
    """Write frames of few electrons; the noise repeats after two lines of the scan."""
    ky, kx = np.indices(SHAPE[2:]) - SHAPE[2] // 2
    mean = 0.5 * (np.hypot(ky, kx) < 80) + 0.01
    lines = np.random.default_rng(0).poisson(mean, size=(2, SHAPE[1], *SHAPE[2:])).astype("<u2").tobytes()
    with path.open("wb") as file:
        for _ in range(SHAPE[0] // 2):
            file.write(lines)


def peer(path: Path) -> dict[str, Any] | None:
    """Return what LiberTEM reaches on ``path``; ``None`` where it is not installed."""
    python = sys.executable if importlib.util.find_spec("libertem") else os.environ.get("LIBERTEM_PYTHON")
    if python is None:
        return None
    script = Path(__file__).with_name("libertem_peer.py")
    command = [python, str(script), str(path), *map(str, SHAPE)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def look_at_file(source: FrameSource, settings: QuicklookSettings) -> None:
    """Take the quicklook of ``source`` block by block, as ``watch`` does, without storing the frames."""
    weights, blocks = detectors(OPTICS, DETECTOR, settings)
    for y in range(0, SHAPE[0], 32):
        for x in range(0, SHAPE[1], 32):
            region = (y, y + 32, x, x + 32)
            look = BlockLook(region, weights, blocks.labels)
            for y0, y1, x0, x1 in piece_regions(source, region):
                block = source.read(0, y0, y1, x0, x1)
                check_values(block, source.where, 0, y0, x0)
                look.add(y0, x0, block)
            look.result()


def first_look_rows() -> list[Row]:
    """Measure the looks; the floor is a plain sum of every frame, read in the same pieces."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "frames.raw"
        write(path)
        source = open_frames(path, dtype="<u2", axes=("y", "x", "ky", "kx"), shape=SHAPE)

        def plain() -> None:
            for y in range(0, SHAPE[0], 8):
                source.read(0, y, y + 8, 0, 16).sum(axis=(2, 3), dtype=np.uint32)

        floor = SIZE_GB * 16 / SHAPE[1] / cpu_seconds(plain)
        rows = []
        for superpixels in (0, 150):
            settings = QuicklookSettings(superpixels=superpixels)
            rate = SIZE_GB / cpu_seconds(lambda settings=settings: look_at_file(source, settings), 2)
            what = f"6 images, mean and maximum{f', {superpixels} superpixels' if superpixels else ''}"
            rows.append(rate_row("first look", f"raw file: {what}", rate, "GB/CPU s", floor))
        store, tilts = Path(folder) / "s.zarr", TiltSeries.from_degrees([0.0])
        ingest(store, source, OPTICS, Scan(SHAPE[:2], (1.0, 1.0)), DETECTOR, tilts, executor=ThreadExecutor(1))
        fractions = iter((1.01, 1.02, 1.03, 1.04))

        def stored() -> None:  # other settings make the stage do its work again
            settings = QuicklookSettings(bright_field_fraction=next(fractions))
            quicklook(Store.open(store, "r+"), settings, executor=ThreadExecutor(1))

        rate = SIZE_GB / cpu_seconds(stored, 2)
        rows.append(rate_row("first look", "store: the same, with 150 superpixels", rate, "GB/CPU s", floor))
        found = peer(path)
    if found is None:
        return [*rows, Row("first look", "LiberTEM: absent (not importable, no LIBERTEM_PYTHON)", 0.0, "GB/CPU s")]
    name = f"LiberTEM {found['version']}, inline"
    return rows + [Row("first look", f"{name}: {what}", rate, "GB/CPU s") for what, rate in found["rates"].items()]
