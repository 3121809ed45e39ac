"""208 atoms of amorphous silicon, counted electrons of an independent multislice simulation, through the verbs."""

import numpy as np
import pytest
import xarray as xr

from stemtomo.algorithms.atoms.scoring import match_atoms
from stemtomo.geometry import TiltSeries
from stemtomo.io.provenance import Provenance
from stemtomo.io.store import Store
from stemtomo.pipeline.alignment import align
from stemtomo.pipeline.atoms import find_atoms
from stemtomo.pipeline.config import AlignmentSettings, AtomSettings, TomographySettings
from stemtomo.pipeline.simulate import SimulationSettings
from stemtomo.pipeline.tomography import tomography
from tests.data import FOLDER, needs

PIXEL, SIGMA = 0.195, 6.5e-4


def counted_store(path, member):
    with np.load(FOLDER / "np1_asi208" / "projections.npz") as data:
        phi, theta, psi = data["tilt_euler_zyx_deg"].T
        phase = 0.001 * data[member].transpose(2, 1, 0).astype(np.float32)
    # What the stage projections does: vacuum at zero.
    phase -= phase[:, :, :10].mean()
    store, settings = Store.create(path, "silicon"), SimulationSettings()
    tilts = TiltSeries.from_degrees(theta, phi, psi)
    store.declare_tilts(len(tilts))
    for index, pose in enumerate(tilts):
        store.create_tilt(index, (8, 8, 8, 8), np.uint16, settings.optics, settings.scan, settings.detector, pose)
    dims = ("tilt", "y", "x")
    angles = {"theta_deg": ("tilt", theta), "phi_deg": ("tilt", phi), "psi_deg": ("tilt", psi)}
    arrays = {"phase": (dims, phase), "valid": (dims, np.ones(phase.shape, bool)), **angles}
    attrs = {"pixel_angstrom": PIXEL, "sigma_rad_per_volt_angstrom": SIGMA}
    store.write("projections", xr.Dataset(arrays, attrs=attrs), Provenance.start("projections", {}))
    return store


@pytest.mark.heavy
@needs("np1_asi208")
@pytest.mark.parametrize(
    ("member", "share", "rmsd_pm"), [("proj_1p6e5", 1.0, 4.3), ("proj_1p6e4", 0.99, 13), ("proj_8p0e3", 0.975, 22)]
)
def test_every_silicon_atom_is_found_blind(tmp_path, member, share, rmsd_pm):
    store = counted_store(tmp_path / "s.zarr", member)
    align(store, AlignmentSettings(enabled=False))
    tomography(store, TomographySettings(iterations=60))
    numbers = find_atoms(store)
    atoms = store.read("atoms")
    with np.load(FOLDER / "np1_asi208" / "ground_truth.npz") as data:
        truth = data["gt_atoms_A"]
    match = match_atoms(np.stack([atoms[axis].values for axis in "xyz"], axis=-1), truth, 0.75)
    print(member, match.recall, match.precision, 100 * match.rmsd_angstrom, numbers)
    assert match.recall >= share
    assert match.precision >= share
    assert 100 * match.rmsd_angstrom <= rmsd_pm


@pytest.mark.heavy
@needs("np1_asi208")
@pytest.mark.parametrize(
    ("member", "share", "rmsd_pm"), [("proj_1p6e5", 1.0, 3.6), ("proj_1p6e4", 0.995, 11.9), ("proj_8p0e3", 0.995, 18.4)]
)
def test_traced_atoms_are_close_before_any_refinement(tmp_path, member, share, rmsd_pm):
    store = counted_store(tmp_path / "s.zarr", member)
    align(store, AlignmentSettings(enabled=False))
    # Elements as wide as the noise asks for keep it down; few counts want wider ones.
    width, iterations = (0.5, 30) if member == "proj_1p6e5" else (2.0, 60)
    tomography(store, TomographySettings(iterations=iterations, element_width_px=width))
    find_atoms(store, AtomSettings(refine=False))
    atoms = store.read("atoms")
    with np.load(FOLDER / "np1_asi208" / "ground_truth.npz") as data:
        truth = data["gt_atoms_A"]
    match = match_atoms(np.stack([atoms[axis].values for axis in "xyz"], axis=-1), truth, 0.75)
    print(member, match.recall, match.precision, 100 * match.rmsd_angstrom)
    assert match.recall >= share
    assert match.precision >= share
    assert 100 * match.rmsd_angstrom <= rmsd_pm
