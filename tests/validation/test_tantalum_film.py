"""A piece of an amorphous tantalum film, measured: its published atoms are found with one blind threshold."""

from functools import partial

import numpy as np
import pytest
import xarray as xr

from stemtomo.algorithms.atoms.scoring import match_atoms
from stemtomo.algorithms.atoms.tracing import TracingRules, region_of, trace_blocks
from stemtomo.geometry import TiltSeries
from stemtomo.io.provenance import Provenance
from stemtomo.io.store import Store
from stemtomo.pipeline.alignment import align
from stemtomo.pipeline.config import AlignmentSettings, TomographySettings
from stemtomo.pipeline.simulate import SimulationSettings
from stemtomo.pipeline.tomography import tomography
from tests.data import FOLDER, needs

VOXEL = 0.3216
#: The published list ends one and a half voxels before the faces of the box.
RULES = TracingRules(smoothing_angstrom=0.4, minimum_distance_angstrom=1.75, margin_angstrom=1.5 * VOXEL)


def scored(volume):
    found = trace_blocks(volume.shape, partial(region_of, volume), VOXEL, RULES)
    with np.load(FOLDER / "ta_film_area22" / "reference.npz") as data:
        match = match_atoms(found.positions, data["atoms_A"], 1.0)
    f1 = 2 * match.recall * match.precision / (match.recall + match.precision)
    print(f"recall {match.recall:.3f} precision {match.precision:.3f} F1 {f1:.3f} {100 * match.rmsd_angstrom:.1f} pm")
    return match, f1


@needs("ta_film_area22")
def test_the_atoms_of_the_published_volume_are_found():
    with np.load(FOLDER / "ta_film_area22" / "reference.npz") as data:
        volume = np.ascontiguousarray(data["recon"].transpose(2, 1, 0))
    match, f1 = scored(volume)
    assert match.recall >= 0.86
    assert match.precision >= 0.90
    assert f1 >= 0.92
    assert 100 * match.rmsd_angstrom <= 24


def measured_store(path):
    """Return a store with the measured projections, as if the stage projections had made them."""
    with np.load(FOLDER / "ta_film_area22" / "projections.npz") as data:
        phi, theta, psi = data["tilt_euler_zyx_deg"].T
        phase = data["proj"].transpose(2, 1, 0).astype(np.float32)
    store, settings = Store.create(path, "tantalum"), SimulationSettings()
    tilts = TiltSeries.from_degrees(theta, phi, psi)
    store.declare_tilts(len(tilts))
    for index, pose in enumerate(tilts):
        store.create_tilt(index, (8, 8, 8, 8), np.uint16, settings.optics, settings.scan, settings.detector, pose)
    angles = {"theta_deg": ("tilt", theta), "phi_deg": ("tilt", phi), "psi_deg": ("tilt", psi)}
    dims = ("tilt", "y", "x")
    arrays = {"phase": (dims, phase), "valid": (dims, np.ones(phase.shape, bool)), **angles}
    attrs = {"pixel_angstrom": VOXEL, "sigma_rad_per_volt_angstrom": 1.0}
    store.write("projections", xr.Dataset(arrays, attrs=attrs), Provenance.start("projections", {}))
    align(store, AlignmentSettings(enabled=False))
    return store


@pytest.mark.heavy
@pytest.mark.timeout(1500)
@needs("ta_film_area22")
def test_they_are_found_in_our_own_volume(tmp_path):
    store = measured_store(tmp_path / "ta.zarr")
    settings = TomographySettings(iterations=30, extended=True, depth_angstrom=140 * VOXEL, refine_shifts=False)
    print(tomography(store, settings))
    match, f1 = scored(store.read("volume")["potential"].values)
    assert match.recall >= 0.86
    assert match.precision >= 0.90
    assert f1 >= 0.90
    assert 100 * match.rmsd_angstrom <= 28
