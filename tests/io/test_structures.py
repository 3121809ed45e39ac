"""Tables of atoms go out and come back; ASE reads what is written."""

import ase.io
import numpy as np
import pyarrow.parquet
import pytest
import xarray as xr

from stemtomo.errors import FormatError, StoreError
from stemtomo.io.structures import read_structure, table, write_structure


@pytest.fixture
def atoms():
    rng = np.random.default_rng(0)
    data = table(rng.uniform(-9, 9, (30, 3)), np.array(["Cu", "Au", "Pt"] * 10))
    data["order"] = xr.Variable("atom", rng.random(30), {"units": "1"})
    data["width_angstrom"] = xr.Variable("atom", rng.random(30), {"units": "Å"})
    return data


def positions(data):
    return np.stack([data[axis].values for axis in "xyz"], axis=1)


@pytest.mark.parametrize(("ending", "tolerance"), [("xyz", 1e-6), ("pdb", 6e-4), ("parquet", 0)])
def test_atoms_come_back(tmp_path, atoms, ending, tolerance):
    path = tmp_path / f"atoms.{ending}"
    write_structure(path, atoms)
    found = read_structure(path)
    np.testing.assert_allclose(positions(found), positions(atoms), atol=tolerance)
    assert found["species"].values.tolist() == atoms["species"].values.tolist()


def test_parquet_keeps_every_column_and_its_unit(tmp_path, atoms):
    write_structure(tmp_path / "atoms.parquet", atoms)
    found = read_structure(tmp_path / "atoms.parquet")
    np.testing.assert_array_equal(found["width_angstrom"], atoms["width_angstrom"])
    assert found["width_angstrom"].attrs["units"] == "Å"


def test_a_cif_has_the_distances_and_elements(tmp_path, atoms):
    write_structure(tmp_path / "atoms.cif", atoms)
    for found in (positions(read_structure(tmp_path / "atoms.cif")), ase.io.read(tmp_path / "atoms.cif").positions):
        np.testing.assert_allclose(found - found[0], positions(atoms) - positions(atoms)[0], atol=1e-6)


def test_extended_xyz_is_read_by_ase_with_its_columns(tmp_path, atoms):
    write_structure(tmp_path / "atoms.xyz", atoms)
    other = ase.io.read(tmp_path / "atoms.xyz")
    np.testing.assert_allclose(other.arrays["order"], atoms["order"], atol=1e-6)


def test_numbered_classes_keep_their_number(tmp_path, atoms):
    numbered = atoms.assign(species=("atom", np.tile([0, 1], 15), {"units": "1"}))
    write_structure(tmp_path / "atoms.xyz", numbered)
    other = ase.io.read(tmp_path / "atoms.xyz")
    assert set(other.get_chemical_symbols()) == {"X"}
    np.testing.assert_array_equal(other.arrays["class"], np.tile([0, 1], 15))


def test_bad_files_are_refused(tmp_path, atoms):
    with pytest.raises(FormatError, match="no such file"):
        read_structure(tmp_path / "absent.cif")
    (tmp_path / "bad.cif").write_text("nothing")
    with pytest.raises(FormatError, match=r"bad\.cif"):
        read_structure(tmp_path / "bad.cif")
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    with pytest.raises(FormatError, match=r"bad\.parquet"):
        read_structure(tmp_path / "bad.parquet")
    for number, column in enumerate((["one", "two"], [1.0, None])):
        path = tmp_path / f"{number}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"x": column, "y": [0.0, 1.0], "z": [0.0, 1.0]}), path)
        with pytest.raises(FormatError, match=rf"{number}\.parquet: holds no atom, or atoms without a finite position"):
            read_structure(path)
    with pytest.raises(FormatError, match="endings"):
        write_structure(tmp_path / "atoms.docx", atoms)


@pytest.mark.parametrize("ending", ["xyz", "cif", "pdb", "parquet"])
def test_what_cannot_be_written_is_named_and_leaves_nothing(tmp_path, atoms, ending):
    with pytest.raises(StoreError, match=rf"absent/atoms\.{ending}: cannot be written"):
        write_structure(tmp_path / f"absent/atoms.{ending}", atoms)
    (tmp_path / f"folder.{ending}").mkdir()
    with pytest.raises(StoreError, match=rf"folder\.{ending}: cannot be written \(Is a directory\)"):
        write_structure(tmp_path / f"folder.{ending}", atoms)
    assert [path.name for path in tmp_path.iterdir()] == [f"folder.{ending}"]
