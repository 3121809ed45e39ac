"""A tiny tilt series with known phases, in a store, for tests of the stages that follow ingest."""

from pathlib import Path

import numpy as np

from stemtomo.algorithms.ptychography import solver
from stemtomo.algorithms.ptychography.adaptive import Stack
from stemtomo.geometry import Detector, Optics, Scan, TiltSeries
from stemtomo.io.provenance import Provenance
from stemtomo.io.store import Store
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.physics.probe import probe_wave
from stemtomo.physics.propagation import fresnel_propagator
from stemtomo.pipeline.config import PtychographySettings
from stemtomo.pipeline.ptychography import grid_of, padding_of

DETECTOR = Detector((32, 32), 1 / 12.8)
SCAN = Scan((10, 11), (1.2, 1.2))
OPTICS = Optics(energy_ev=300e3, semiangle_rad=21e-3, aberrations={"C10": 120.0})
ANGLES_DEG = (-40.0, 0.0, 35.0)


def build_model(scan: Scan, detector: Detector, optics: Optics, settings: PtychographySettings) -> solver.Model:
    """Return what patterns of one tilt are simulated with: propagators without any tilt."""
    grid = grid_of(scan, detector, padding_of(scan, settings))
    wavelength, weights = wavelength_angstrom(optics.energy_ev), settings.slice_weights
    distances = Stack(grid, wavelength, settings.slices, weights=weights).distances
    window, pixel, mean = grid.window_yx, grid.pixel_angstrom_yx, settings.mean_slice_angstrom
    gaps = {far: fresnel_propagator(window, pixel, wavelength, far * mean) for far in set(distances)}
    return solver.Model(
        grid,
        [gaps[far] for far in distances],
        settings.loss,
        settings.object,
        detector_yx=detector.shape_yx,
        weights=weights,
    )


def true_phase(shape_yx: tuple[int, int], tilt: int) -> np.ndarray:
    """Phase of a few atoms near the centre, different at each tilt, on a grid centred at n // 2."""
    rng = np.random.default_rng(tilt)
    y, x = (np.indices(shape_yx).T - np.array(shape_yx) // 2).T
    phase = np.zeros(shape_yx)
    for row, column in rng.uniform(-7, 7, size=(12, 2)):
        phase += 0.4 * np.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * 1.3**2))
    return phase


def make_series(path: Path, tilts: int = 3, electrons: float = 2e4) -> Store:
    """Simulate ``tilts`` tilts with Poisson counts and write them, complete, to a new store."""
    store = Store.create(path, "tiny")
    store.declare_tilts(tilts)
    model = build_model(SCAN, DETECTOR, OPTICS, PtychographySettings())
    probe = probe_wave(OPTICS, DETECTOR.shape_yx, model.grid.pixel_angstrom_yx, plane_z_angstrom=0, intensity=electrons)
    series = TiltSeries.from_degrees(ANGLES_DEG[:tilts])
    for index, pose in enumerate(series):
        phase = true_phase(model.grid.shape_yx, index)[None].astype(np.float32)
        state = solver.State(phase, probe[None])
        patterns = solver.patterns(state, model, np.arange(SCAN.count))
        counts = np.random.default_rng(index).poisson(np.fft.fftshift(patterns, axes=(-2, -1))).astype(np.uint16)
        store.create_tilt(index, (*SCAN.shape_yx, *DETECTOR.shape_yx), np.uint16, OPTICS, SCAN, DETECTOR, pose)
        store.write_frames(index, 0, 0, counts.reshape(*SCAN.shape_yx, *DETECTOR.shape_yx))
        store.record_frames(index, [0])
        store.complete_tilt(index, Provenance.start("ingest", {"tilt": index}))
    store.complete_tilts(Provenance.start("ingest", {}))
    return store
