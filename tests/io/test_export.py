"""Atoms survive a round trip through text, and other programs read the text."""

from __future__ import annotations

import os
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase.data import chemical_symbols

from stemtomo.errors import FormatError
from stemtomo.io.export import SYMBOLS, read_atoms, write_xyz

POSITIONS = np.array([[0.0, 1.5, -2.25], [3.0, 4.0, 5.0], [-1e3, 0.000001, 7.0]])
DATA = Path(os.environ.get("STEMTOMO_DATA", Path(__file__).parents[3] / "shared" / "data"))


def test_symbols_are_those_of_the_periodic_table() -> None:
    assert list(SYMBOLS) == chemical_symbols[: len(SYMBOLS)]
    assert SYMBOLS[79] == "Au"


def test_written_atoms_come_back_here_and_in_ase(tmp_path: Path) -> None:
    path = tmp_path / "atoms.xyz"
    write_xyz(path, POSITIONS, ["Cu", "Au", "Au"], {"intensity": np.array([1.0, 2.5, 3.0])}, {"rmsd_pm": 12.5})
    positions, species = read_atoms(path)
    np.testing.assert_allclose(positions, POSITIONS, atol=1e-6)
    assert species == ["Cu", "Au", "Au"]
    atoms = ase.io.read(path, format="extxyz")
    np.testing.assert_allclose(atoms.positions, POSITIONS, atol=1e-6)
    assert atoms.get_chemical_symbols() == species
    np.testing.assert_allclose(atoms.arrays["intensity"], [1, 2.5, 3])
    assert float(atoms.info["rmsd_pm"]) == 12.5


def test_plain_and_reordered_xyz(tmp_path: Path) -> None:
    path = tmp_path / "plain.xyz"
    path.write_text("2\na comment\nSi 1 2 3\nO 4 5 6\n\n")
    positions, species = read_atoms(path)
    assert (positions.tolist(), species) == ([[1, 2, 3], [4, 5, 6]], ["Si", "O"])
    path.write_text('1\nLattice="1 0 0" Properties=id:I:1:pos:R:3:species:S:1\n7 1 2 3 Si\n')
    positions, species = read_atoms(path)
    assert (positions.tolist(), species) == ([[1, 2, 3]], ["Si"])


def test_known_atoms_from_archives(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", atoms_xyz_A=POSITIONS, atomic_numbers=np.array([29, 79, 14], "u1"), other=1)
    positions, species = read_atoms(tmp_path / "a.npz")
    np.testing.assert_array_equal(positions, POSITIONS)
    assert species == ["Cu", "Au", "Si"]
    np.savez(tmp_path / "b.npz", gt_atoms_A=POSITIONS)
    assert read_atoms(tmp_path / "b.npz")[1] == ["X"] * 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first line should be the number of atoms"),
        ("-1\n\n", "first line should be the number of atoms"),
        ("two\n\n", "first line should be the number of atoms"),
        ("2\n\nSi 1 2 3\n", "ends after 1 of 2 atoms"),
        ("1\n\nSi 1 2 3\nSi 1 2 3\n", "goes on after its 1 atoms"),
        ("1\n\nSi 1 two 3\n", "line 3: 'Si 1 two 3' is not a symbol and x, y, z"),
        ("1\n\nSi 1 2\n", "line 3"),
        ("1\n\nSi 1 2 nan\n", "1 of 1 atoms have no finite position, the first is atom 0"),
        ("0\n\n", r"shape \(0, 3\)"),
    ],
)
def test_bad_xyz_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text(text)
    with pytest.raises(FormatError, match=message):
        read_atoms(tmp_path / "a.xyz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"positions": POSITIONS}, "holds positions; known atoms are expected as atoms_xyz_A or gt_atoms_A"),
        ({"atoms_xyz_A": POSITIONS[:, :2]}, r"the positions have shape \(3, 2\), expected \(n, 3\)"),
        ({"atoms_xyz_A": np.zeros(3)}, r"the positions have shape \(3,\), expected \(n, 3\)"),
        ({"atoms_xyz_A": POSITIONS, "atomic_numbers": np.array([1, 2])}, "3 positions, but 2 atomic_numbers"),
        (
            {"atoms_xyz_A": POSITIONS, "atomic_numbers": np.array([1, 2, 300])},
            "holds 300, expected whole numbers 0 to 103",
        ),
    ],
)
def test_bad_archives_are_named(arrays: dict, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(FormatError, match=message):
        read_atoms(tmp_path / "a.npz")


def test_missing_foreign_and_unwritable(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file of known atoms"):
        read_atoms(tmp_path / "a.xyz")
    (tmp_path / "a.cif").write_text("data_")
    with pytest.raises(FormatError, match=r"'\.cif' is not known; give atoms as \.xyz or \.npz"):
        read_atoms(tmp_path / "a.cif")
    (tmp_path / "a.npz").write_bytes(b"PK")
    with pytest.raises(FormatError, match=r"cannot be read as \.npz"):
        read_atoms(tmp_path / "a.npz")
    with pytest.raises(FormatError, match=r"3 positions, but .*'species': 2"):
        write_xyz(tmp_path / "b.xyz", POSITIONS, ["Cu", "Au"])
    with pytest.raises(FormatError, match="'gold atom' cannot be written as XYZ"):
        write_xyz(tmp_path / "b.xyz", POSITIONS, ["Cu", "Au", "gold atom"])
    assert not (tmp_path / "b.xyz").exists()


@pytest.mark.skipif(not (DATA / "cuau_tilt/truth.npz").exists(), reason="no reference data (set STEMTOMO_DATA)")
def test_the_known_atoms_of_the_reference_data() -> None:
    positions, species = read_atoms(DATA / "cuau_tilt/truth.npz")
    assert positions.shape == (297, 3)
    assert set(species) == {"Cu", "Au"}
    positions, species = read_atoms(DATA / "np1_asi208/ground_truth.npz")
    assert positions.shape == (208, 3)
    assert set(species) == {"X"}
