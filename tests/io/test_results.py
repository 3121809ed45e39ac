"""Results come back as they were written, or the file that keeps them from it is named."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from stemtomo.errors import StoreError
from stemtomo.io.provenance import Provenance
from stemtomo.io.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "series.zarr", "series")


def test_complex_boolean_and_lazy_variables_come_back(store: Store) -> None:
    rng = np.random.default_rng(1)
    volume = xr.Dataset(
        {
            "potential": (("z", "y", "x"), rng.normal(size=(10, 9, 8)).astype("f4")),
            "loss": ("iteration", [3.0, np.nan]),
        },
        attrs={"voxel_angstrom": np.float32(0.5)},
    )
    store.write("volume", volume.chunk({"z": (3, 3, 4), "y": (4, 5)}), Provenance.start("tomography", {}))
    xr.testing.assert_equal(store.read("volume").load(), volume)
    tilts = np.zeros(2)
    stack = xr.Dataset(
        {
            "phase": (("tilt", "y", "x"), rng.normal(size=(2, 5, 4))),
            "valid": (("tilt", "y", "x"), rng.random((2, 5, 4)) > 0.5),
            **dict.fromkeys(("theta_deg", "phi_deg", "psi_deg"), ("tilt", tilts)),
        },
        coords={"y": ("y", np.arange(5) * 0.1, {"units": "Å"})},
        attrs={"pixel_angstrom": 0.1},
    )
    store.write("projections", stack, Provenance.start("projections", {}))
    read = store.read("projections").load()
    assert read["valid"].dtype == bool
    xr.testing.assert_equal(read, stack)


@pytest.mark.parametrize("species", [["Cu", "Au", "Au"] * 20, [0, 1, 1] * 20])
def test_a_flipped_bit_in_a_result_is_named_and_not_used(store: Store, species: list) -> None:
    names = ("x", "y", "z", "intensity", "width_angstrom", "fit_residual")
    columns = {name: ("atom", np.arange(60) * 1.5) for name in names}
    store.write("atoms", xr.Dataset({**columns, "species": ("atom", species)}), Provenance.start("find_atoms", {}))
    for name in ("y", "species"):
        (file,) = (path for path in (store.path / "atoms" / name / "c").rglob("*") if path.is_file())
        whole = file.read_bytes()
        for place in (len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
            result = pickle.loads(pickle.dumps(store.read("atoms")))  # as tasks carry it
            np.testing.assert_array_equal(result["x"].values, np.arange(60) * 1.5)
            with pytest.raises(StoreError, match=f"atoms/{name}: .*run the stage again"):
                result[name].values  # noqa: B018
        file.write_bytes(whole)
    assert store.read("atoms")["species"][[3, 1]].values.tolist() == [species[3], species[1]]
