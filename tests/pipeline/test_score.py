"""Scores of the atoms in a store against a file of known ones."""

import numpy as np
import pytest
import xarray as xr

from stemtomo.errors import ConfigurationError, FormatError, StoreError
from stemtomo.io.provenance import Provenance
from stemtomo.io.store import Store
from stemtomo.pipeline.config import ScoreSettings
from stemtomo.pipeline.score import score
from stemtomo.pipeline.specimen import Specimen, core_shell_nanoparticle, write_specimen


@pytest.fixture(scope="module")
def specimen():
    return core_shell_nanoparticle(4, 14.0)


@pytest.fixture
def truth(tmp_path, specimen):
    write_specimen(tmp_path / "truth.xyz", specimen)
    return ScoreSettings(truth=tmp_path / "truth.xyz")


def store_with_atoms(path, positions, species, classes):
    count = len(positions)
    dataset = xr.Dataset(
        {
            **{name: ("atom", positions[:, i]) for i, name in enumerate("xyz")},
            "species": ("atom", species),
            **{name: ("atom", np.ones(count)) for name in ("intensity", "width_angstrom", "fit_residual")},
        },
        attrs={"classes": classes},
    )
    store = Store.create(path, "test")
    store.write("atoms", dataset, Provenance.start("find_atoms", {}))
    return store


def symbols(specimen):
    return np.where(specimen.atomic_numbers == 79, "Au", "Cu")


def test_a_shifted_incomplete_model_is_scored(tmp_path, specimen, truth):
    positions = specimen.positions[3:] + np.array([0.2, -0.1, 0.3])
    positions[:, 2] += np.where(np.arange(len(positions)) % 2, 0.05, -0.05)
    positions = np.concatenate([positions, [[30.0, 30, 30]]])
    species = np.append(symbols(specimen)[3:], "Au")
    species[0] = "Cu" if species[0] == "Au" else "Au"
    store = store_with_atoms(tmp_path / "s.zarr", positions, species, ["Cu", "Au"])
    numbers = score(store, truth)
    count = len(specimen)
    assert numbers["recall"] == pytest.approx((count - 3) / count)
    assert numbers["precision"] == pytest.approx((count - 3) / (count - 2))
    assert (numbers["missing"], numbers["extra"], numbers["matched"]) == (3, 1, count - 3)
    assert numbers["rmsd_pm"] == pytest.approx(5.0, rel=1e-3)
    assert numbers["rmsd_x_pm"] == pytest.approx(0, abs=1e-3)
    assert numbers["species_accuracy"] == pytest.approx((count - 4) / (count - 3))
    assert numbers["species_names"] == ["Cu", "Au"]
    assert np.sum(numbers["confusion"]) == count - 3
    assert not numbers["mirrored_is_better"]
    pairs = store.read("score")
    np.testing.assert_allclose(np.abs(pairs["deviation_z"].values), 0.05, atol=1e-3)


def test_numbered_classes_stand_for_the_species_in_order_of_atomic_number(tmp_path, specimen, truth):
    labels = (specimen.atomic_numbers == 79).astype(np.int64)
    store = store_with_atoms(tmp_path / "s.zarr", specimen.positions, labels, ["0", "1"])
    assert score(store, truth)["species_accuracy"] == 1


def test_without_classes_to_compare_there_is_no_accuracy(tmp_path, specimen, truth):
    store = store_with_atoms(tmp_path / "s.zarr", specimen.positions, np.zeros(len(specimen), np.int64), ["0"])
    numbers = score(store, truth)
    assert numbers["species_accuracy"] is None
    assert numbers["recall"] == 1


def test_a_mirrored_model_is_named_but_scored_as_it_is(tmp_path, specimen, truth):
    mirrored = specimen.positions * np.array([1, 1, -1])
    store = store_with_atoms(tmp_path / "s.zarr", mirrored, symbols(specimen), ["Cu", "Au"])
    numbers = score(store, truth)
    assert numbers["recall"] < 0.7
    assert numbers["mirrored_recall"] == 1
    assert numbers["mirrored_is_better"]
    assert "sign of the tilt angles is probably reversed" in numbers["note"]


def test_a_changed_truth_is_scored_again(tmp_path, specimen, truth):
    store = store_with_atoms(tmp_path / "s.zarr", specimen.positions, symbols(specimen), ["Cu", "Au"])
    assert score(store, truth)["known"] == len(specimen)
    write_specimen(truth.truth, Specimen(specimen.positions[:50], specimen.atomic_numbers[:50]))
    assert score(store, truth)["known"] == 50


def test_missing_truth_and_atoms_are_said(tmp_path, truth):
    store = Store.create(tmp_path / "s.zarr", "test")
    with pytest.raises(ConfigurationError, match=r"score\.truth is not given"):
        score(store)
    with pytest.raises(FormatError, match="no such file of known atoms"):
        score(store, ScoreSettings(truth=tmp_path / "nothing.xyz"))
    with pytest.raises(StoreError, match="atoms has not been made"):
        score(store, truth)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3\nx\nAu 0 0 0\n", "ends after 1 of 3 atoms"),
        ("1\nx\nAu 0 zero 0\n", "line 3: 'Au 0 zero 0' is not a symbol and x, y, z"),
        ("1\nx\nQq 0 0 0\n", "'Qq' is not a chemical symbol"),
        ("", "is not XYZ"),
    ],
)
def test_a_broken_truth_is_refused(tmp_path, specimen, text, message):
    store = store_with_atoms(tmp_path / "s.zarr", specimen.positions, symbols(specimen), ["Cu", "Au"])
    (tmp_path / "bad.xyz").write_text(text)
    with pytest.raises(FormatError, match=message):
        score(store, ScoreSettings(truth=tmp_path / "bad.xyz"))
