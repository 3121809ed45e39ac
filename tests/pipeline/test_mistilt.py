"""Mistilt and thickness from outside: a store in, the geometry and an upright object out."""

import numpy as np
import pytest
from pydantic import ValidationError

from stemtomo.algorithms.ptychography import adaptive
from stemtomo.algorithms.ptychography.adaptive import Geometry, Stack
from stemtomo.algorithms.ptychography.windows import object_grid
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.geometry import Detector, Optics, Scan, TiltSeries
from stemtomo.io.provenance import Provenance
from stemtomo.io.store import Store
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.physics.probe import probe_wave
from stemtomo.pipeline.config import PtychographySettings
from stemtomo.pipeline.ptychography import ptychography
from tests import mistilted
from tests.data import needs

SCAN, DETECTOR = Scan((10, 10), (0.6, 0.6)), Detector((48, 48), 1 / (48 * 0.32))
OPTICS = Optics(300e3, 22e-3, {"C10": 100.0})
TILT_RAD, THICKNESS, SLICES = np.array([6e-3, -3e-3]), 25.0, 4


def write(path, counts, optics, scan, detector):
    """Write one tilt of patterns (position, ky, kx), zero frequency first, to a new store."""
    store = Store.create(path, "mistilted")
    store.declare_tilts(1)
    shape = (*scan.shape_yx, *detector.shape_yx)
    store.create_tilt(0, shape, np.uint16, optics, scan, detector, next(iter(TiltSeries.from_degrees((0.0,)))))
    store.write_frames(0, 0, 0, np.fft.fftshift(counts, axes=(1, 2)).reshape(shape).astype(np.uint16))
    store.record_frames(0, [0])
    store.complete_tilt(0, Provenance.start("ingest", {"tilt": 0}))
    store.complete_tilts(Provenance.start("ingest", {}))
    return store


@pytest.fixture(scope="module")
def crystal(tmp_path_factory):
    """Columns that lean by 6 and -3 mrad, the same in every slice; C1 told for the middle of the stack."""
    grid = object_grid(SCAN.positions(), DETECTOR.shape_yx, DETECTOR.object_pixel_angstrom_yx)
    stack = Stack(grid, wavelength_angstrom(300e3), SLICES, -(SLICES - 1) / 2)
    y, x = (0.32 * (np.indices(grid.shape_yx)[axis] - grid.shape_yx[axis] // 2) for axis in (0, 1))
    lattice = np.cos(2 * np.pi * x / 2.8) + np.cos(2 * np.pi * y / 2.8)
    phase = (0.3 * np.exp(4 * (lattice - 2))).astype(np.complex64)[None]
    probe = probe_wave(OPTICS, DETECTOR.shape_yx, grid.pixel_angstrom_yx, intensity=1e6)[None]
    expected = adaptive.patterns(phase, probe, Geometry(TILT_RAD, THICKNESS), stack, np.arange(100))
    counts = np.random.default_rng(0).poisson(expected)
    return write(tmp_path_factory.mktemp("mistilt") / "a.zarr", counts, OPTICS, SCAN, DETECTOR), phase[0].real


def test_the_stage_finds_and_keeps_the_geometry(crystal):
    store, phase = crystal
    settings = PtychographySettings(
        slices=SLICES,
        slice_thickness_angstrom=0.8 * THICKNESS,
        object="complex",
        detector_padding=0.0,
        refine_mistilt=True,
        refine_thickness=True,
        mistilt_patterns=100,
        epochs=2,
        settling_epochs=1,
        probe_update_start_epoch=9,
        electrons_per_pattern=1e6,
    )
    numbers = ptychography(store, settings, executor=ThreadExecutor(1))
    np.testing.assert_allclose(numbers["mistilt_mrad"][0], [6, -3], atol=0.15)
    assert numbers["thickness_angstrom"][0] == pytest.approx(100.0, abs=1.0)
    result = store.read("ptychography/000").compute()
    assert result.attrs["mistilt_mrad"] == numbers["mistilt_mrad"][0]
    assert result.attrs["slice_thickness_angstrom"] == pytest.approx(numbers["thickness_angstrom"][0] / SLICES)
    assert result["mistilt_x_mrad"][-1] == pytest.approx(numbers["mistilt_mrad"][0][0])
    assert result["object"].shape[0] == SLICES
    # Columns stand where they pass the middle of the specimen, straight: no shift is fitted here.
    inner = (slice(22, -22), slice(22, -22))
    assert np.corrcoef(result["phase_sum"].values[inner].ravel(), phase[inner].ravel())[0, 1] > 0.9
    assert ptychography(store, settings, executor=ThreadExecutor(1))["computed"] == 0


def test_a_tilt_cannot_be_looked_for_in_two_slices():
    with pytest.raises(ValidationError, match="at least 3 slices"):
        PtychographySettings(slices=2, slice_thickness_angstrom=10.0, refine_mistilt=True)


def test_positions_come_back_with_the_affine_map_of_the_scan(crystal, tmp_path):
    store, _ = crystal
    frames = store.frames(0)[:].reshape(100, *DETECTOR.shape_yx)
    wrong = Scan(SCAN.shape_yx, SCAN.step_angstrom_yx, rotation_rad=0.01)  # told turned by 10 mrad
    other = write(tmp_path / "b.zarr", np.fft.ifftshift(frames, axes=(1, 2)), OPTICS, wrong, DETECTOR)
    settings = PtychographySettings(
        slices=SLICES,
        slice_thickness_angstrom=THICKNESS,
        object="complex",
        mistilt_mrad=(6.0, -3.0),
        epochs=24,
        settling_epochs=12,
        refine_positions_from_epoch=6,
        refine_scan_affine=True,
        probe_update_start_epoch=99,
        electrons_per_pattern=1e6,
    )
    numbers = ptychography(other, settings, executor=ThreadExecutor(1))
    result = other.read("ptychography/000")
    assert numbers["mistilt_mrad"][0] == pytest.approx([6, -3])
    assert result["position_x"].shape == (100,)
    assert len(numbers["loss"][0]) == 24
    assert np.isfinite(list(result.attrs["scan_affine"]["scale_xy"])).all()
    # The specimen has no orientation that the data know: only what is no rotation of all may not have moved.
    assert result.attrs["scan_affine"]["jitter_rms_pm"] < 5


@needs(mistilted.NAME)
@pytest.mark.heavy
def test_strontium_titanate_off_zone_from_a_store(tmp_path):
    specimen = mistilted.load()
    store = write(tmp_path / "sto.zarr", specimen.counts, specimen.optics, specimen.scan, specimen.detector)
    thickness = float(specimen.truth["thickness_A"])
    settings = PtychographySettings(
        slices=6,
        slice_thickness_angstrom=1.2 * thickness / 6,
        object="complex",
        detector_padding=0.33,
        c1_at="entrance",
        refine_mistilt=True,
        refine_thickness=True,
        epochs=4,
        settling_epochs=2,
        probe_update_start_epoch=9,
        electrons_per_pattern=specimen.electrons,
    )
    numbers = ptychography(store, settings, executor=ThreadExecutor(1))
    assert np.abs(np.array(numbers["mistilt_mrad"][0]) - specimen.truth["mistilt_mrad"]).max() < 0.2
    assert numbers["thickness_angstrom"][0] == pytest.approx(thickness, abs=1.0)
    result = store.read("ptychography/000")
    found = mistilted.score(result["phase_sum"].values, result.attrs["pixel_angstrom"][0], specimen)
    assert found["r"] > 0.99
    assert found["r_blur"] > 0.997
