"""Acquisitions for tests: frames, a configuration for them, and files that grow when a clock says so."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.io.store import Store
from stemtomo.pipeline.config import Configuration
from stemtomo.pipeline.ingest import ingest, open_input
from stemtomo.pipeline.references import parse_configuration
from stemtomo.pipeline.watch import Partial, watch
from tests.clock import ScriptedClock
from tests.io.cases import counts, digest

SHAPE = (3, 40, 20, 16, 16)
ANGLES = (-30.0, 0.5, 30.0)
FRAME_BYTES = 16 * 16 * 2
TILT_BYTES = 40 * 20 * FRAME_BYTES
SHARD_MIB = 8 * 8 * FRAME_BYTES / 2**20


def frames(seed: int = 0) -> np.ndarray:
    """Counts (tilt, y, x, ky, kx) in which every pixel differs from its neighbours."""
    return counts(SHAPE, seed=seed) + np.uint16(1)


def configuration(
    path: Path, files: Any = "scan_{theta_deg}.raw", *, tilts: int = 3, angles: tuple[float, ...] = ANGLES, **told: Any
) -> Configuration:
    """Configuration of raw files; ``told`` are keys of [watch] and, as ``input_...``, of [input]."""
    per_file = {"axes": ["y", "x", "ky", "kx"], "shape": list(SHAPE[1:])}
    series = {"axes": ["tilt", "y", "x", "ky", "kx"], "shape": [tilts, *SHAPE[1:]]}
    section = {"path": str(path), "dtype": "<u2", **(series if files is None else {**per_file, "files": files})}
    section |= {name[6:]: told.pop(name) for name in list(told) if name.startswith("input_")}
    sections = {name: told.pop(name) for name in list(told) if isinstance(told[name], dict)}
    return parse_configuration(
        {
            "series": {"name": "s"},
            "input": {key: value for key, value in section.items() if value is not None},
            "optics": {"energy_kev": 300, "semiangle_mrad": 21},
            "scan": {"step_angstrom": 0.5},
            "detector": {"pixel_inv_angstrom": 0.2},
            "tilts": {"theta_deg": list(angles[:tilts])},
            "ingest": {"shard_mib": SHARD_MIB, **sections.pop("ingest", {})},
            "watch": {"poll_s": 1.0, "deadline_s": 20.0, "settle_s": 3.0, "publish_s": 5.0, **told},
            **sections,
        }
    )


def follow(
    config: Configuration, store: Path, steps: Iterable[Callable[[], object]] = (), workers: int = 2
) -> tuple[list[Partial], dict[str, Any]]:
    """Watch while ``steps`` happen; return the reports and the numbers at the end."""
    reports = watch(config.input.path, store, config, clock=ScriptedClock(steps), executor=ThreadExecutor(workers))
    got = []
    while True:
        try:
            got.append(next(reports))
        except StopIteration as end:
            return got, end.value


def appended(path: Path, data: bytes, sizes: Iterable[int]) -> list[Callable[[], object]]:
    """Steps that append ``data`` to ``path`` in pieces of ``sizes`` bytes, and the rest in the end."""

    def write(piece: bytes) -> None:
        with path.open("ab") as file:
            file.write(piece)

    edges = np.minimum(np.append(np.cumsum([0, *sizes]), len(data)), len(data)).tolist()
    pieces = [data[start:stop] for start, stop in itertools.pairwise(edges) if stop > start]
    return [lambda piece=piece: write(piece) for piece in pieces]


def ingested(config: Configuration, path: Path) -> dict[str, str]:
    """Digest of a store that a plain ingest of the finished files makes."""
    source = open_input(config.input, config.scan.shape, config.theta_deg())
    store = Store.create(path, "s")
    scan, detector = config.to_scan(source.shape[1:3]), config.to_detector(source.shape[3:])
    ingest(store, source, config.to_optics(), scan, detector, config.to_tilts(), config.ingest)
    return tilts_of(digest(path))


def tilts_of(found: dict[str, str]) -> dict[str, str]:
    """Return what a digest says of frames, geometry and marks: not of the quicklook, which ingest does not make."""
    return {name: value for name, value in found.items() if name.startswith("tilt/")}
