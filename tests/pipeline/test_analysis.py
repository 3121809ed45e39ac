"""The analyses as users call them: from Python and the command line, on files and on stores."""

import json

import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

import stemtomo
from stemtomo.cli import app
from stemtomo.errors import ConfigurationError
from stemtomo.io.provenance import Provenance
from stemtomo.io.store import Store
from stemtomo.io.structures import read_structure
from stemtomo.pipeline.settings.analysis import LatticeSettings, OrderSettings, StrainSettings
from tests.algorithms.atoms.crystalline import angle_deg, fcc, polar, spinel, strained, turned
from tests.data import FOLDER, needs

STRAIN = np.diag([0.005, -0.003, 0.002])
MATRIX = strained(STRAIN, turned())


@pytest.fixture(scope="module")
def crystal():
    """Positions and species of a strained L1_0 crystal of 1,500 atoms with a few vacancies."""
    rng = np.random.default_rng(0)
    sites = fcc(3.85, 15.0)
    species = np.where(np.rint(2 * sites[:, 2] / 3.85).astype(int) % 2 == 0, "Fe", "Pt")
    kept = rng.random(len(sites)) > 0.03
    positions = sites[kept] @ MATRIX.T + rng.normal(0, 0.03, (kept.sum(), 3))
    return positions, species[kept], int((~kept).sum())


@pytest.fixture
def store(tmp_path, crystal):
    positions, species, _ = crystal
    count = len(positions)
    store = Store.create(tmp_path / "fept.zarr", "fept")
    columns = {axis: ("atom", positions[:, i]) for i, axis in enumerate("xyz")}
    numbers = {name: ("atom", np.ones(count)) for name in ("intensity", "width_angstrom", "fit_residual")}
    data = xr.Dataset({**columns, "species": ("atom", species), **numbers}, attrs={"classes": ["Fe", "Pt"]})
    store.write("atoms", data, Provenance.start("find_atoms", {}))
    return store


def test_order_of_a_store_is_kept_and_not_computed_twice(store):
    numbers = stemtomo.order(store)
    first = store.provenance("order")
    assert stemtomo.order(store) == numbers
    assert store.provenance("order") == first
    assert store.read("order")["phase"].sizes["atom"] == numbers["atoms"]
    (grain,) = numbers["chemical"]["grains"]
    assert grain["phase"].startswith("L1_0")
    assert grain["atoms"] > 0.8 * numbers["atoms"]
    assert numbers["crystalline_share"] > 0.9
    assert 2.9 < numbers["cutoff_angstrom"] < 3.8  # shells at 2.72 and 3.85 Å


def test_blocks_give_the_same_order(crystal):
    positions = np.concatenate([crystal[0], crystal[0] + [60, 0, 0]])
    species = np.tile(crystal[1], 2)
    whole, cut = (
        stemtomo.order((positions, species), OrderSettings(cutoff_angstrom=3.3, atoms_per_block=size))
        for size in (100_000, 1000)
    )
    assert cut["mean_order"] == pytest.approx(whole["mean_order"], abs=1e-6)
    assert [g["atoms"] for g in cut["chemical"]["grains"]] == [g["atoms"] for g in whole["chemical"]["grains"]]


def test_lattice_and_strain_of_a_store(store, crystal, tmp_path):
    found = stemtomo.lattice(store, LatticeSettings(crystal="fcc", a_angstrom=3.85))
    rotation, strain = polar(MATRIX)
    assert angle_deg(np.array(found["rotation"]), rotation) < 0.05
    np.testing.assert_allclose(found["strain"], strain, atol=5e-4)
    assert abs(found["missing"] - crystal[2]) <= 2
    assert store.read("lattice").sizes["site"] == found["sites"]
    out = tmp_path / "strain.parquet"
    local = stemtomo.strain(store, StrainSettings(crystal="fcc", a_angstrom=3.85), out=out)
    for name, (i, j) in {"xx": (0, 0), "yy": (1, 1), "zz": (2, 2), "xy": (0, 1)}.items():
        assert local["mean_strain"][name] == pytest.approx(strain[i, j], abs=5e-4)
    assert local["resolution_angstrom"] == pytest.approx(9.42, abs=0.01)
    assert local["unassigned"] == 0
    mean = stemtomo.strain(store, StrainSettings(crystal="fcc", a_angstrom=3.85, reference="mean"))
    assert abs(mean["mean_strain"]["xx"]) < 2e-4
    columns = read_structure(out)
    assert columns["strain_xx"].mean() == pytest.approx(local["mean_strain"]["xx"], abs=1e-9)
    assert set(np.unique(columns["species"])) == {"Fe", "Pt"}


def gaussians(positions, weights, widths, count, voxel):
    """Return atoms as Gaussians of standard deviations ``widths`` x, y, z on a cube of ``count`` voxels."""
    volume = np.zeros((count,) * 3)
    grid = (np.arange(count) - count // 2) * voxel
    for place, weight in zip(positions, weights, strict=True):
        cut, factor = [], []
        for p, w in zip(place, widths, strict=True):
            near = slice(*np.searchsorted(grid, [p - 4 * w, p + 4 * w]))
            cut.append(near)
            factor.append(np.exp(-0.5 * ((grid[near] - p) / w) ** 2))
        volume[cut[2], cut[1], cut[0]] += weight * np.einsum("z,y,x->zyx", *factor[::-1])
    return volume


def test_spinel_in_a_volume_blurred_by_the_missing_wedge():
    rng = np.random.default_rng(1)
    sites, symbols = spinel(13.0)
    ideal = sites @ MATRIX.T
    cobalt = symbols == "Co"
    vacant = cobalt & (rng.random(len(sites)) < 0.05)
    moved = ideal + rng.normal(0, 0.1 / np.sqrt(3), ideal.shape)
    weights = np.where(cobalt, 27.0, 8.0)
    # Resolutions (full width at half maximum) of 0.7 Å across and 2.0 Å along the wedge.
    widths = np.array([0.7, 0.7, 2.0]) / 2.3548
    volume = gaussians(moved[~vacant], weights[~vacant], widths, 118, 0.4)
    volume += rng.normal(0, 0.02 * volume.max(), volume.shape)
    settings = LatticeSettings(
        crystal="spinel", a_angstrom=8.08, crystal_species=("Co", "O"), sites=("Co",), source="volume"
    )
    found = stemtomo.lattice("synthetic", settings, volume=(volume, 0.4))
    rotation, strain = polar(MATRIX)
    assert angle_deg(np.array(found["rotation"]), rotation) < 0.05
    np.testing.assert_allclose(found["strain"], strain, atol=5e-4)
    np.testing.assert_allclose(found["blur_angstrom"], widths, rtol=0.12)
    assert abs(found["missing"] - vacant.sum()) <= 0.1 * vacant.sum() + 1
    assert found["occupied"] == pytest.approx((cobalt & ~vacant).sum(), rel=0.02)
    assert found["displacement"]["rms_distance_angstrom"] == pytest.approx(0.1, rel=0.2)
    assert found["displacement"]["missing_wedge_axis"] == "z"


@needs("metallic_glass_models")
@pytest.mark.heavy
def test_scores_of_the_published_redeterminations():
    with np.load(FOLDER / "metallic_glass_models" / "models.npz") as models:
        known = (models["final_atoms_A"].astype(float), models["final_types"].astype(str))
        found = models["traced_vox_1p7e4"] * 0.347
    numbers = stemtomo.score_atoms(found, known, match_radius_angstrom=1.5)
    assert numbers["matched"] == pytest.approx(17_922, abs=6)  # published: nearest, here one to one
    assert numbers["rmsd_pm"] == pytest.approx(20.82, rel=0.01)
    assert numbers["species_accuracy"] is None


def test_species_are_scored_where_both_sides_have_them(crystal):
    positions, species, _ = crystal
    wrong = species.copy()
    wrong[:15] = np.where(species[:15] == "Fe", "Pt", "Fe")
    numbers = stemtomo.score_atoms((positions[5:] + 0.3, wrong[5:]), (positions, species))
    assert numbers["precision"] == 1
    assert numbers["missing"] == 5
    assert numbers["species_accuracy"] == pytest.approx(1 - 10 / (len(species) - 5))


def test_the_commands(store, tmp_path):
    run = CliRunner()
    source, numbers = str(store.path), tmp_path / "numbers.json"
    fcc_set = ["--set", "crystal=fcc", "--set", "a_angstrom=3.85"]
    for command in (
        ["atoms", source, "--out", str(tmp_path / "atoms.xyz")],
        ["order", str(tmp_path / "atoms.xyz"), "--set", "cutoff_angstrom=3.3"],
        ["lattice", source, *fcc_set],
        ["strain", source, *fcc_set, "--out", str(tmp_path / "strain.xyz")],
        ["track", source, str(tmp_path / "atoms.xyz"), "--set", "cutoff_angstrom=3.3"],
    ):
        done = run.invoke(app, [*command, "--json", str(numbers)])
        assert done.exit_code == 0, done.output
        assert json.loads(numbers.read_text())
    assert store.read("tracking").attrs["events"][0]["kind"] == "persistence"
    failed = run.invoke(app, ["strain", source])
    assert failed.exit_code == 2
    assert "a_angstrom" in failed.output


def test_what_cannot_be_done_is_said(crystal):
    positions, _, _ = crystal
    with pytest.raises(ConfigurationError, match="two species"):
        stemtomo.order(positions, OrderSettings(chemical=True))
    with pytest.raises(ConfigurationError, match="not a known structure"):
        stemtomo.strain(positions, StrainSettings(crystal="quasi", a_angstrom=4.0))


def test_another_crystal_under_the_name_of_a_file_is_registered_anew(store, tmp_path):
    from ase.build import bulk

    settings, found = LatticeSettings(crystal=str(tmp_path / "cell.cif")), []
    for edge in (3.85, 3.90):
        bulk("Pt", "fcc", a=edge, cubic=True).write(tmp_path / "cell.cif")
        found.append(stemtomo.lattice(store, settings)["strain"][0][0])
    assert found[0] - found[1] == pytest.approx(0.05 / 3.9, rel=0.1)
