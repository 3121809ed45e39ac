"""A series opens as a tree that is lazy and says its dims, units and size, however large it is."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from stemtomo.errors import StoreError
from stemtomo.io.provenance import Provenance
from stemtomo.io.store import Store
from stemtomo.io.tree import open as open_series
from tests.io.cases import counts, experiment


def series(path: Path, shape: tuple[int, int, int, int, int], complete: int) -> Store:
    """A store of ``shape`` whose frames are all zero, so that no shard has a file."""
    optics, scan, detector, tilts = experiment(shape)
    store = Store.create(path, "particle")
    store.declare_tilts(shape[0])
    for index, pose in enumerate(tilts):
        array = store.create_tilt(index, shape[1:], "u2", optics, scan, detector, pose)
        if index < complete:
            rows, columns = (-(-count // edge) for count, edge in zip(array.shape[:2], array.shards[:2], strict=True))
            store.record_frames(index, range(rows * columns))
            store.complete_tilt(index, Provenance.start("ingest", {}))
    return store


def quicklook(shape_yx: tuple[int, int], shape_k: tuple[int, int]) -> xr.Dataset:
    images = ("total_counts", "bright_field", "dark_field", "com_x", "com_y")
    variables = {name: (("y", "x"), np.ones(shape_yx, "f4")) for name in images}
    return xr.Dataset({**variables, "mean_pattern": (("ky", "kx"), np.ones(shape_k, "f4"))})


def test_three_terabytes_open_in_a_moment_and_say_what_they_are(tmp_path: Path) -> None:
    store = series(tmp_path / "large.zarr", (36, 800, 800, 256, 256), complete=36)
    began = time.perf_counter()
    tree = open_series(store.path)
    text, html = repr(tree), tree._repr_html_()
    assert time.perf_counter() - began < 5
    for said in (
        "3.02 TB",
        "36 of 36 complete",
        "(y 800, x 800, ky 256, kx 256) uint16 [counts]",
        "in Å",
        "in 1/Å",
        "in counts",
    ):
        assert said in text, said
        assert said in html, said
    frames = tree["tilt/007/frames"]
    assert frames.dims == ("y", "x", "ky", "kx")
    assert frames.chunks[0][0] == frames.chunks[1][0] == 32
    assert sum(node.ds["frames"].nbytes for node in tree["tilt"].children.values()) == 36 * 800**2 * 256**2 * 2
    assert not list(store.path.rglob("c"))  # there was nothing to read


def test_only_complete_tilts_and_results_are_in_the_tree(tmp_path: Path) -> None:
    store = series(tmp_path / "part.zarr", (3, 9, 10, 4, 5), complete=2)
    store.write("quicklook/001", quicklook((9, 10), (4, 5)), Provenance.start("quicklook", {}))
    store.write("score", xr.Dataset(attrs=dict.fromkeys(("recall", "precision", "rmsd_pm", "species_accuracy"), 1.0)),
                Provenance.start("score", {}))  # fmt: skip
    tree = open_series(store.path)
    assert list(tree.children) == ["tilt", "quicklook", "score"]
    assert list(tree["tilt"].children) == ["000", "001"]
    assert list(tree["quicklook"].children) == ["001"]
    assert tree.attrs["tilts"] == "2 of 3 complete"
    assert tree.attrs["results"] == "quicklook, score"
    assert tree["score"].attrs["recall"] == 1.0


def test_an_empty_store_opens(tmp_path: Path) -> None:
    tree = open_series(Store.create(tmp_path / "empty.zarr", "empty").path)
    assert tree.attrs["tilts"] == "0 of 0 complete"
    assert tree.attrs["results"] == "none"


def test_coordinates_are_scan_positions_and_spatial_frequencies(tmp_path: Path) -> None:
    shape = (1, 9, 10, 4, 5)
    store = series(tmp_path / "s.zarr", shape, complete=1)
    frames = open_series(store.path)["tilt/000/frames"]
    _, scan, detector, _ = experiment(shape)
    # origin "pixel": index n // 2 is the rotation centre
    np.testing.assert_allclose(frames["y"], (np.arange(9) - 4) * scan.step_angstrom_yx[0])
    np.testing.assert_allclose(frames["x"], (np.arange(10) - 5) * scan.step_angstrom_yx[1])
    np.testing.assert_allclose(frames["ky"], (np.arange(4) - 1.5) * detector.pixel_inv_angstrom)
    np.testing.assert_allclose(frames["kx"], (np.arange(5) - 2.0) * detector.pixel_inv_angstrom)
    assert [frames[dim].attrs["units"] for dim in frames.dims] == ["Å", "Å", "1/Å", "1/Å"]


def test_opening_reads_no_frames_and_computing_does(tmp_path: Path) -> None:
    store = series(tmp_path / "s.zarr", (1, 9, 10, 4, 5), complete=0)
    frames = counts((9, 10, 4, 5))
    store.write_frames(0, 0, 0, frames)
    store.record_frames(0, {0})
    store.complete_tilt(0, Provenance.start("ingest", {}))
    shard = store.path / "tilt/000/frames/c/0/0/0/0"
    kept = shard.read_bytes()
    shard.write_bytes(b"not a shard")
    tree = open_series(store.path)
    repr(tree)
    shard.write_bytes(kept)
    np.testing.assert_array_equal(tree["tilt/000/frames"].values, frames)
    assert float(tree["tilt/000/frames"].sum()) == frames.sum()


def test_a_missing_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"nothing\.zarr: no such store"):
        open_series(tmp_path / "nothing.zarr")
