"""The verb projections: what is stored raw and filtered, where the noise is learnt, and what is said of it."""

import numpy as np
import pytest
import xarray as xr

from stemtomo.algorithms.imaging.denoising import bm3d_installed
from stemtomo.errors import ConfigurationError
from stemtomo.geometry import Detector, Optics, Scan, TiltSeries
from stemtomo.io.provenance import Provenance
from stemtomo.io.store import Store
from stemtomo.pipeline.config import ProjectionSettings
from stemtomo.pipeline.projections import plan_row, projections
from tests.algorithms.imaging.lattices import coloured, filled, lattice, psnr

SCAN = Scan((24, 24), (2.0, 2.0))
DETECTOR = Detector((8, 8), 1 / (8 * 0.4))
OPTICS = Optics(energy_ev=300e3, semiangle_rad=21e-3)
SHAPE = (120, 120)
NOISE_RAD = 0.05


def particle(seed):
    """Return a crystalline particle in vacuum, 0.5 rad high, and coloured noise."""
    return 0.5 * lattice(SHAPE, radius=34), coloured(SHAPE, NOISE_RAD, 0.15, seed)[0]


def phase_of_tilts(path, phases, slices=1):
    """Store ``phases`` (y, x) as the ptychography of a tilt each, in ``slices`` equal slices, with a ramp on top."""
    store = Store.create(path, "phases")
    store.declare_tilts(len(phases))
    y, x = np.indices(SHAPE)
    for index, (phase, pose) in enumerate(zip(phases, TiltSeries.from_degrees(range(len(phases))), strict=True)):
        frames = (*SCAN.shape_yx, *DETECTOR.shape_yx)
        store.create_tilt(index, frames, np.uint16, OPTICS, SCAN, DETECTOR, pose)
        store.write_frames(index, 0, 0, np.ones(frames, np.uint16))
        store.record_frames(index, [0])
        store.complete_tilt(index, Provenance.start("ingest", {}))
        tilted = phase + 0.8 + 0.003 * y - 0.002 * x
        dataset = xr.Dataset(
            {
                "object": (("slice", "y", "x"), np.exp(1j * np.stack([tilted / slices] * slices))),
                "phase_sum": (("y", "x"), tilted),
                "illumination": (("y", "x"), np.ones(SHAPE)),
                "probe": (("probe_y", "probe_x"), np.ones((8, 8), complex)),
                "loss": (("epoch",), np.ones(1)),
            },
            attrs={"pixel_angstrom": [0.4, 0.4]},
        )
        store.write(f"ptychography/{index:03d}", dataset, Provenance.start("ptychography", {}))
    store.complete_tilts(Provenance.start("ingest", {}))
    return store


def test_without_filters_there_is_one_stack(tmp_path):
    truth, noise = particle(0)
    store = phase_of_tilts(tmp_path / "s.zarr", [truth + noise])
    numbers = projections(store)
    result = store.read("projections")
    assert "phase_raw" not in result
    assert "notes" not in numbers
    assert np.abs(result["phase"][0].values - truth - noise).max() < 0.02
    assert result.attrs["phase_residues"] == [0]


def test_raw_and_filtered_lie_side_by_side(tmp_path):
    images = [particle(seed) for seed in range(2)]
    store = phase_of_tilts(tmp_path / "s.zarr", [truth + noise for truth, noise in images])
    projections(store)
    unfiltered = store.read("projections")["phase"].values
    settings = ProjectionSettings(denoise="lowrank", fourier_sparsity=4.0, column_width_angstrom=0.8)
    numbers = projections(store, settings)
    result = store.read("projections")
    np.testing.assert_array_equal(result["phase_raw"].values, unfiltered)
    for tilt, (truth, _) in enumerate(images):
        gain = psnr(truth, result["phase"][tilt].values) - psnr(truth, unfiltered[tilt])
        assert gain > 5
        assert numbers["noise_rad"][tilt] == pytest.approx(NOISE_RAD, rel=0.15)
        assert numbers["noise_source"][tilt].startswith("vacuum")
        assert result["phase"][tilt].values.mean() == pytest.approx(unfiltered[tilt].mean(), abs=2e-3)
    assert any("compare with phase_raw" in note for note in numbers["notes"])
    again = projections(store, settings)
    assert again == numbers
    projections(store, ProjectionSettings())
    np.testing.assert_array_equal(store.read("projections")["phase"].values, unfiltered)


def test_the_sparsity_constraint_alone_keeps_the_mean_and_the_vacancy(tmp_path):
    _, noise = particle(3)
    truth = 0.5 * lattice(SHAPE, occupied=0, radius=34)
    store = phase_of_tilts(tmp_path / "s.zarr", [truth + noise])
    told = {"sparsity_keep_inv_angstrom": 0.075, "column_width_angstrom": 0.8}
    numbers = projections(store, ProjectionSettings(fourier_sparsity=4.0, **told))
    result = store.read("projections")
    raw, filtered = result["phase_raw"][0].values, result["phase"][0].values
    assert filtered.mean() == pytest.approx(raw.mean(), abs=1e-6)
    assert psnr(truth, filtered) > psnr(truth, raw) + 3
    assert 0 < numbers["protected_fraction"][0] < 0.5
    assert filled(filtered, truth, 0.5) < 0.2
    assert numbers["kept_fraction"][0] < 0.2


def test_noise_that_is_not_there_to_be_learnt_is_an_error(tmp_path):
    film = lattice(SHAPE) + 0.05 * np.random.default_rng(0).normal(size=SHAPE)
    store = phase_of_tilts(tmp_path / "s.zarr", [film])
    with pytest.raises(ConfigurationError, match="too little vacuum"):
        projections(store, ProjectionSettings(denoise="lowrank", noise="vacuum"))
    with pytest.raises(ConfigurationError, match="no half scans"):
        projections(store, ProjectionSettings(denoise="lowrank", noise="halves"))
    assert projections(store, ProjectionSettings(denoise="lowrank"))["noise_source"] == [
        "white, from the finest detail"
    ]


def test_half_scans_tell_the_noise_of_a_film(tmp_path):
    film = 0.3 * lattice(SHAPE)
    first, second = (film + coloured(SHAPE, 0.03 * 2**0.5, 0.15, seed)[0] for seed in (1, 2))
    store = phase_of_tilts(tmp_path / "s.zarr", [(first + second) / 2])
    pair = {"first": (("y", "x"), first), "second": (("y", "x"), second + 0.4)}
    dataset = xr.Dataset(pair, attrs={"pixel_angstrom": [0.4, 0.4]})
    store.write("half_scans/000", dataset, Provenance.start("half_scans", {}))
    numbers = projections(store, ProjectionSettings(denoise="lowrank"))
    assert numbers["noise_source"] == ["half sets"]
    assert numbers["noise_rad"][0] == pytest.approx(0.03, rel=0.1)


def test_phases_of_a_thick_object_are_unwrapped_from_its_slices(tmp_path):
    y, x = np.indices(SHAPE)
    thick = 9.0 * np.exp(-((y - 60) ** 2 + (x - 60) ** 2) / 500)
    store = phase_of_tilts(tmp_path / "s.zarr", [thick], slices=2)
    settings = ProjectionSettings(background="level")
    projections(store, settings)
    stored = store.read("projections")["phase"].values
    projections(store, settings.model_copy(update={"phase": "unwrapped"}))
    unwrapped = store.read("projections")
    np.testing.assert_allclose(unwrapped["phase"].values, stored, atol=1e-4)
    depth = unwrapped["depth_phase"].values
    assert depth.shape == (1, 2)
    assert depth[0, 0] == pytest.approx(depth[0, 1], rel=1e-6)
    assert depth[0, 0] > 0.2


@pytest.mark.skipif(not bm3d_installed(), reason="the package bm3d (non-commercial use) is not installed")
def test_the_licence_of_bm3d_is_said(tmp_path):
    truth, noise = particle(0)
    store = phase_of_tilts(tmp_path / "s.zarr", [truth + noise])
    numbers = projections(store, ProjectionSettings(denoise="auto"))
    assert any("non-commercial use only" in note for note in numbers["notes"])
    assert store.provenance("projections")["configuration"]["denoise"] == "bm3d"
    assert psnr(truth, store.read("projections")["phase"][0].values) > psnr(truth, truth + noise) + 3


def test_auto_takes_the_free_filter_where_bm3d_is_absent(tmp_path, monkeypatch):
    monkeypatch.setattr("stemtomo.pipeline.phase_filters.bm3d_installed", lambda: False)
    monkeypatch.setattr("stemtomo.algorithms.imaging.denoising.bm3d_installed", lambda: False)
    store = phase_of_tilts(tmp_path / "s.zarr", [sum(particle(0))])
    projections(store, ProjectionSettings(denoise="auto"))
    assert store.provenance("projections")["configuration"]["denoise"] == "lowrank"
    with pytest.raises(ConfigurationError, match="non-commercial"):
        projections(store, ProjectionSettings(denoise="bm3d"))


def test_the_plan_knows_of_two_stacks():
    plain, filtered = (plan_row(SCAN, DETECTOR, 3, ProjectionSettings(denoise=kind)) for kind in ("none", "lowrank"))
    assert filtered.bytes_written == 9 * 3 * 120 * 120
    assert filtered.bytes_written > plain.bytes_written
