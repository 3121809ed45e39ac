"""Small experiments and a fingerprint of folders, shared by the tests of io and ingest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from stemtomo.geometry import Detector, Optics, Pose, Scan, TiltSeries

OPTICS = Optics(
    energy_ev=200e3, semiangle_rad=0.021, aberrations={"C10": -150.0, "C30": 1e4}, defocus_plane_z_angstrom=-12
)
#: Not compared: when and at what cost.
VOLATILE = {"created", "time_utc", "wall_s", "cpu_s", "peak_rss_mb"}


def experiment(shape: tuple[int, int, int, int, int]) -> tuple[Optics, Scan, Detector, TiltSeries]:
    """Geometry of frames of ``shape`` (tilt, y, x, ky, kx)."""
    scan = Scan(shape[1:3], (0.5, 0.4), rotation_rad=0.3, origin="pixel", periodic=True)
    detector = Detector(shape[3:], 0.05, beam_centre_px_yx=(1.5, 2.0))
    tilts = TiltSeries(tuple(Pose(0.1 * i - 0.3, 0.01 * i, -0.02 * i, (0.1, -0.2)) for i in range(shape[0])))
    return OPTICS, scan, detector, tilts


def counts(shape: tuple[int, ...], dtype: str = "<u2", seed: int = 0) -> np.ndarray:
    """Frames in which every pixel can be told from its neighbours."""
    return np.random.default_rng(seed).integers(0, 200, shape).astype(dtype)


def digest(root: Path) -> dict[str, str]:
    """SHA-256 of every file under ``root``; of metadata without the times and costs of the run that wrote it."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            if path.name == "zarr.json":
                data = json.dumps(_steady(json.loads(data))).encode()
            found[str(path.relative_to(root))] = hashlib.sha256(data).hexdigest()
    return found


def _steady(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _steady(value) for key, value in content.items() if key not in VOLATILE}
    return content
