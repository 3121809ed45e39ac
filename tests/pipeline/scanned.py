"""A scan of several shards in a store, for tests of tiles."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np

from stemtomo.algorithms.ptychography import solver
from stemtomo.algorithms.ptychography.positions import moved_grid
from stemtomo.geometry import Detector, Optics, Pose, Scan
from stemtomo.io.provenance import Provenance
from stemtomo.io.store import Store
from stemtomo.physics.probe import probe_wave
from stemtomo.pipeline.config import PtychographySettings
from tests.pipeline.series import build_model

DETECTOR = Detector((16, 16), 1 / 8.0)
SCAN = Scan((20, 18), (1.1, 1.1))
OPTICS = Optics(energy_ev=300e3, semiangle_rad=21e-3, aberrations={"C10": 60.0})


def make_scan(
    path: Path, scan: Scan = SCAN, detector: Detector = DETECTOR, electrons: float = 4e3, missing=(), seed: int = 2
) -> Store:
    """Write one tilt in shards of 8 x 8 positions, some of which may be missing, with jittered positions."""
    store = Store.create(path, "scan")
    store.declare_tilts(1)
    model = build_model(scan, detector, OPTICS, PtychographySettings())
    rng = np.random.default_rng(seed)
    y, x = np.indices(model.grid.shape_yx)
    phase = np.zeros(model.grid.shape_yx, np.float32)
    for row, column in rng.uniform(0, 1, size=(60, 2)) * np.array(phase.shape):
        phase += 0.5 * np.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * 1.2**2))
    pixel = model.grid.pixel_angstrom_yx
    probe = probe_wave(OPTICS, detector.shape_yx, pixel, plane_z_angstrom=0, intensity=electrons)
    model = replace(model, grid=moved_grid(model.grid, 0.05 * rng.normal(size=(scan.count, 2))))
    patterns = solver.patterns(solver.State(phase[None], probe[None]), model, np.arange(scan.count))
    counts = rng.poisson(np.fft.fftshift(patterns, axes=(-2, -1))).astype(np.uint16)
    frames = counts.reshape(*scan.shape_yx, *detector.shape_yx)
    store.create_tilt(0, frames.shape, np.uint16, OPTICS, scan, detector, Pose(0.0), shard_positions=8)
    corners = itertools.product(range(0, scan.shape_yx[0], 8), range(0, scan.shape_yx[1], 8))
    for number, (top, left) in enumerate(corners):
        store.write_frames(0, top, left, frames[top : top + 8, left : left + 8])
        store.record_frames(0, range(number + 1))
    if missing:
        store.close_source(0, {}, missing)
    store.complete_tilt(0, Provenance.start("ingest", {"tilt": 0}))
    store.complete_tilts(Provenance.start("ingest", {}))
    return store
