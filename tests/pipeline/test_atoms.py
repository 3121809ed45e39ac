"""From the volume in a store to its atoms."""

import numpy as np
import pytest
import xarray as xr

from stemtomo.algorithms.atoms.scoring import match_atoms
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.errors import ConfigurationError, StoreError
from stemtomo.geometry import TiltSeries
from stemtomo.io.provenance import Provenance
from stemtomo.io.store import Store
from stemtomo.pipeline.atoms import find_atoms, plan_row
from stemtomo.pipeline.config import AtomSettings
from stemtomo.pipeline.simulate import SimulationSettings
from stemtomo.pipeline.specimen import Specimen, core_shell_nanoparticle
from stemtomo.pipeline.tracing import block_edge, memory_of_task

VOXEL = 0.5
TRACED = AtomSettings(refine=False)


def store_with_volume(path, specimen, run=0, factor=1.0):
    """Return a store whose volume holds the atoms of ``specimen`` as Gaussians, heavy ones three times as bright."""
    count = 52
    axis = (np.arange(count) - count // 2) * VOXEL
    bells = [np.exp(-0.5 * ((axis - specimen.positions[:, i, None]) / 0.45) ** 2) for i in range(3)]
    brightness = factor * np.where(specimen.atomic_numbers == 79, 300.0, 100.0)
    potential = np.einsum("az,ay,ax->zyx", bells[2] * brightness[:, None], bells[1], bells[0], optimize=True)
    store = Store.open(path, "r+") if path.exists() else Store.create(path, "test")
    dataset = xr.Dataset(
        {"potential": (("z", "y", "x"), potential.astype(np.float32)), "loss": ("iteration", np.zeros(2))},
        attrs={"voxel_angstrom": VOXEL},
    )
    store.write("volume", dataset, Provenance.start("tomography", {"run": run}))
    return store


def with_projections(store, specimen, noise=0.0, count=80, pixel=0.4):
    """Write projections of the atoms as Gaussians of 160 or 400 V Å³ into ``store``, and the tilts they belong to."""
    sigma = 6.526e-4
    tilts = TiltSeries.from_degrees(list(range(-60, 61, 20)))
    settings = SimulationSettings()
    store.declare_tilts(len(tilts))
    axis = (np.arange(count) - count // 2) * pixel
    images = []
    for index, pose in enumerate(tilts):
        store.create_tilt(index, (8, 8, 8, 8), np.uint16, settings.optics, settings.scan, settings.detector, pose)
        seen = specimen.positions @ pose.rotation
        x, y = (np.exp(-0.5 * ((axis - seen[:, i, None]) / 0.3) ** 2) for i in (0, 1))
        strength = sigma * np.where(specimen.atomic_numbers == 79, 400, 160) / (2 * np.pi * 0.3**2)
        images.append(np.einsum("ay,ax,a->yx", y, x, strength))
    phase = np.stack(images) + np.random.default_rng(0).normal(0, noise, (len(images), count, count))
    angles = np.degrees([pose.theta_rad for pose in tilts])
    dataset = xr.Dataset(
        {
            "phase": (("tilt", "y", "x"), phase.astype(np.float32)),
            "valid": (("tilt", "y", "x"), np.ones(phase.shape, bool)),
            "theta_deg": ("tilt", angles),
            "phi_deg": ("tilt", 0 * angles),
            "psi_deg": ("tilt", 0 * angles),
        },
        attrs={"pixel_angstrom": pixel, "sigma_rad_per_volt_angstrom": sigma},
    )
    store.write("projections", dataset, Provenance.start("projections", {}))


def with_joint(store, specimen, noise):
    """Write a joint volume of the atoms into ``store``, whose projections are noisy."""
    with_projections(store, specimen, noise, 52, VOXEL)
    projections, volume = store.read("projections").load(), store.read("volume").load()
    count = projections.sizes["tilt"]
    dataset = xr.Dataset(
        {
            "potential": volume["potential"],
            "loss": ("epoch", np.zeros(2)),
            "projection": (("tilt", "y", "x"), projections["phase"].values),
            "probe": (("tilt", "mode", "probe_y", "probe_x"), np.ones((count, 1, 8, 8), np.complex64)),
            "shift_x_angstrom": ("tilt", np.zeros(count)),
            "shift_y_angstrom": ("tilt", np.zeros(count)),
            **{name: projections[name] for name in ("theta_deg", "phi_deg", "psi_deg")},
        },
        attrs={"voxel_angstrom": VOXEL, "sigma_rad_per_volt_angstrom": 6.526e-4},
    )
    dataset["potential"].values[:] = np.maximum(dataset["potential"].values, 0)
    store.write("joint", dataset, Provenance.start("joint", {"noise": noise}))


def rmsd(store, specimen):
    atoms = store.read("atoms")
    found = np.stack([atoms[name].values for name in "xyz"], axis=-1)
    match = match_atoms(found, specimen.positions, 0.75)
    assert (match.recall, match.precision) == (1, 1)
    return match.rmsd_angstrom


@pytest.fixture(scope="module")
def specimen():
    return core_shell_nanoparticle(4, 14.0)


@pytest.fixture
def store(tmp_path, specimen):
    return store_with_volume(tmp_path / "s.zarr", specimen)


def test_positions_and_species_are_in_the_store(store, specimen):
    numbers = find_atoms(store, AtomSettings(refine=False, species=("Cu", "Au")))
    atoms = store.read("atoms")
    found = np.stack([atoms[name].values for name in "xyz"], axis=-1)
    match = match_atoms(found, specimen.positions, 0.75)
    assert (match.recall, match.precision) == (1, 1)
    assert match.rmsd_angstrom < 0.05
    expected = np.where(specimen.atomic_numbers == 79, "Au", "Cu")[match.truth]
    np.testing.assert_array_equal(atoms["species"].values.astype(object)[match.found], expected)
    assert numbers["atoms"] == len(specimen)
    assert numbers["species"] == {"Cu": int((expected == "Cu").sum()), "Au": int((expected == "Au").sum())}
    assert numbers["class_intensity_v_angstrom3"]["Au"] > 2 * numbers["class_intensity_v_angstrom3"]["Cu"]
    assert atoms["x"].attrs["units"] == "Å"
    assert atoms["intensity"].attrs["units"] == "V Å^3"


def test_the_heavier_element_is_the_brighter_class_in_whatever_order_they_are_named(store):
    one = find_atoms(store, AtomSettings(refine=False, species=("Cu", "Au")))["species"]
    other = find_atoms(store, AtomSettings(refine=False, species=("Au", "Cu")))["species"]
    assert one == other


def test_classes_without_names_are_numbered(store, specimen):
    numbers = find_atoms(store, AtomSettings(refine=False, species=2))
    assert set(numbers["species"]) == {"0", "1"}
    assert numbers["species"]["1"] == int((specimen.atomic_numbers == 79).sum())
    assert store.read("atoms")["species"].dtype.kind == "i"


def test_it_works_again_only_when_something_changed(tmp_path, specimen):
    path = tmp_path / "s.zarr"
    store = store_with_volume(path, specimen)
    find_atoms(store, TRACED)
    mark = store.provenance("atoms")
    find_atoms(store, TRACED)
    assert store.provenance("atoms") == mark
    find_atoms(store, AtomSettings(refine=False, species=2))
    assert store.fingerprint("atoms") != mark["fingerprint"]
    find_atoms(store, TRACED)
    assert store.fingerprint("atoms") == mark["fingerprint"]
    store = store_with_volume(path, specimen, run=1)
    find_atoms(store, TRACED)
    assert store.fingerprint("atoms") != mark["fingerprint"]


def test_no_volume_and_no_atoms_are_said(tmp_path, specimen):
    with pytest.raises(StoreError, match="volume has not been made; run the stage 'tomography'"):
        find_atoms(Store.create(tmp_path / "empty.zarr", "empty"))
    with pytest.raises(ConfigurationError, match="no atom was found"):
        find_atoms(store_with_volume(tmp_path / "dark.zarr", specimen, factor=0.0), TRACED)


def test_refinement_places_atoms_by_the_projections_and_not_by_the_volume(tmp_path, specimen):
    # The volume has been stretched along z, as by a missing wedge; the projections are those of the true atoms.
    stretched = Specimen(specimen.positions * np.array([1, 1, 1.02]), specimen.atomic_numbers)
    store = store_with_volume(tmp_path / "s.zarr", stretched)
    with_projections(store, specimen)
    traced = find_atoms(store, AtomSettings(refine=False, species=("Cu", "Au")))
    before = rmsd(store, specimen)
    refined = find_atoms(store, AtomSettings(species=("Cu", "Au")))
    assert before > 0.05
    assert rmsd(store, specimen) < 0.005
    assert (traced["refinement"], refined["refinement"]) == ("not asked for", "done")
    assert refined["species"] == traced["species"]
    assert refined["explained_variance"] > 0.99
    # Phase per Å² of the projections over the interaction parameter.
    assert refined["class_intensity_v_angstrom3"]["Au"] == pytest.approx(400, rel=0.01)


def test_projections_that_the_atoms_do_not_explain_leave_the_traced_positions(tmp_path, specimen):
    store = store_with_volume(tmp_path / "s.zarr", specimen)
    with_projections(store, specimen, noise=5.0)
    numbers = find_atoms(store, AtomSettings(species=("Cu", "Au")))
    assert numbers["refinement"].startswith("failed: ")
    assert numbers["explained_variance"] is None
    assert rmsd(store, specimen) < 0.05


def test_a_specimen_that_goes_on_beyond_the_field_is_not_refined(tmp_path, specimen):
    store = store_with_volume(tmp_path / "s.zarr", specimen)
    with_projections(store, specimen)
    names = ("shift_x_angstrom", "shift_y_angstrom", "score")
    alignment = xr.Dataset({name: ("tilt", np.zeros(7)) for name in names}, attrs={"wholly_in_view": False})
    store.write("alignment", alignment, Provenance.start("align", {}))
    numbers = find_atoms(store, AtomSettings(species=("Cu", "Au")))
    assert numbers["refinement"] == "left out: atoms beyond the field of view are in the projections"


def test_missing_projections_are_said_before_anything_runs(store):
    with pytest.raises(StoreError, match="projections has not been made"):
        find_atoms(store)


def test_a_volume_of_another_alignment_is_not_refined_with_the_one_of_now(tmp_path, specimen):
    store = store_with_volume(tmp_path / "s.zarr", specimen)
    with_projections(store, specimen)
    volume = store.read("volume").load()
    store.write("volume", volume, Provenance.start("tomography", {}, {"alignment": "the one before"}))
    with pytest.raises(StoreError, match=r"volume was made from another alignment .* run the stage 'tomography' again"):
        find_atoms(store, AtomSettings(species=("Cu", "Au")))


def test_species_must_be_elements_named_once(store):
    with pytest.raises(ConfigurationError, match="'Xx' is not a chemical symbol"):
        find_atoms(store, AtomSettings(refine=False, species=("Cu", "Xx")))
    with pytest.raises(ConfigurationError, match="name each element once"):
        find_atoms(store, AtomSettings(refine=False, species=("Cu", "Cu")))


def test_the_plan_reads_the_volume_once():
    assert plan_row((52, 52, 52)).bytes_read == 4 * 52**3


@pytest.mark.parametrize("species", [("Cu", "Au"), 2])
def test_blocks_and_profiles_give_the_same_atoms_and_species(tmp_path, specimen, species):
    store = store_with_volume(tmp_path / "whole.zarr", specimen)
    settings = AtomSettings(refine=False, species=species)
    find_atoms(store, settings)
    whole = store.read("atoms").load()
    asked = settings.model_copy(update={"block_voxels": 19, "reclassify_radius_angstrom": 8.0})
    find_atoms(store, asked)
    blocks = store.read("atoms").load()
    for name in ("x", "y", "z", "intensity"):
        np.testing.assert_allclose(blocks[name].values, whole[name].values, rtol=1e-7, atol=1e-9)
    np.testing.assert_array_equal(blocks["species"].values, whole["species"].values)
    assert blocks["confidence"].values.mean() > 0.99


def test_what_is_fainter_than_all_species_is_no_atom(tmp_path, specimen):
    store = store_with_volume(tmp_path / "s.zarr", specimen)
    numbers = find_atoms(store, AtomSettings(refine=False, species=1, non_atoms=True))
    assert numbers["atoms"] == int((specimen.atomic_numbers == 79).sum())


def test_blocks_have_the_memory_of_the_workers_not_that_of_the_client():
    class Workers(ThreadExecutor):
        class client:
            @staticmethod
            def scheduler_info(n_workers):
                return {"workers": {name: {"nthreads": 2, "memory_limit": 4 << 30} for name in "ab"}}

    assert memory_of_task(Workers(4)) == 2 << 30
    assert block_edge((2000, 2000, 2000), AtomSettings(), 2 << 30) < block_edge((2000,) * 3, AtomSettings(), 64 << 30)


@pytest.mark.parametrize(("noise", "added"), [(0.002, 1), (0.06, 0)])
def test_noise_in_the_projections_of_a_joint_volume_leaves_the_traced_atoms_as_many(tmp_path, specimen, noise, added):
    fewer = Specimen(specimen.positions[1:], specimen.atomic_numbers[1:], "one is missing")
    store = store_with_volume(tmp_path / "s.zarr", fewer)
    with_joint(store, specimen, noise)
    quick = {"refine_iterations": 20, "completion_rounds": 2, "uncertainty": False}
    numbers = find_atoms(store, AtomSettings(species=("Cu", "Au"), volume="joint", **quick))
    assert (numbers["added"], numbers["removed"]) == (added, 0)
    assert ("none added" in numbers["refinement"]) == (added == 0)
