"""The store keeps what was written, shows only what is complete, and refuses what would damage it."""

from __future__ import annotations

import errno
import json
import pickle
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

from stemtomo.errors import StoreError
from stemtomo.io.provenance import Provenance
from stemtomo.io.store import Store
from tests.io.cases import counts, experiment

SHAPE = (2, 40, 70, 6, 4)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "series.zarr", "series")


def add_tilt(store: Store, index: int, shape: tuple[int, ...] = SHAPE, dtype: str = "u2") -> zarr.Array:
    optics, scan, detector, tilts = experiment(shape)
    store.declare_tilts(len(tilts))
    return store.create_tilt(index, shape[1:], dtype, optics, scan, detector, tilts[index], source={"file": "a"})


def fill(store: Store, index: int, frames: np.ndarray) -> None:
    for y0 in range(0, frames.shape[0], 32):
        for x0 in range(0, frames.shape[1], 32):
            store.write_frames(index, y0, x0, frames[y0 : y0 + 32, x0 : x0 + 32])
    store.record_frames(index, range(-(-frames.shape[0] // 32) * -(-frames.shape[1] // 32)))
    store.complete_tilt(index, Provenance.start("ingest", {}))


def alignment(count: int = 3, value: float = 0.5) -> xr.Dataset:
    names = ("shift_x_angstrom", "shift_y_angstrom", "score")
    return xr.Dataset({name: ("tilt", np.full(count, value)) for name in names}, attrs={"method": "common_line"})


def atoms(count: int = 3) -> xr.Dataset:
    names = ("x", "y", "z", "intensity", "width_angstrom", "fit_residual")
    columns = {name: ("atom", np.arange(count) * 1.5) for name in names}
    return xr.Dataset({**columns, "species": ("atom", np.array(["Cu", "Au", "Au"][:count]))})


def test_geometry_of_every_tilt_comes_back(store: Store) -> None:
    optics, scan, detector, tilts = experiment(SHAPE)
    for index in range(2):
        add_tilt(store, index)
    again = pickle.loads(pickle.dumps(Store.open(store.path)))
    for index in range(2):
        assert again.optics(index).energy_ev == pytest.approx(optics.energy_ev, rel=1e-15)
        assert again.optics(index).semiangle_rad == pytest.approx(optics.semiangle_rad, rel=1e-15)
        assert dict(again.optics(index).aberrations) == dict(optics.aberrations)
        assert again.scan(index) == scan
        assert again.detector(index) == detector
        np.testing.assert_allclose(again.pose(index).rotation, tilts[index].rotation, atol=1e-15)
    np.testing.assert_allclose(again.tilt_series().rotations, tilts.rotations, atol=1e-15)
    assert (again.tilt_count, again.name) == (2, "series")


@pytest.mark.parametrize("codec", ["auto", "lz4", "zstd"])
def test_frames_are_sharded_zarr_v3(codec: str, store: Store) -> None:
    store.create_tilt(0, SHAPE[1:], "u2", *experiment(SHAPE)[:3], experiment(SHAPE)[3][0], codec=codec)
    metadata = json.loads((store.path / "tilt/000/frames/zarr.json").read_text())
    sharding = metadata["codecs"][0]["configuration"]
    assert metadata["dimension_names"] == ["y", "x", "ky", "kx"]
    assert metadata["chunk_grid"]["configuration"]["chunk_shape"] == [32, 32, 6, 4]
    assert sharding["chunk_shape"] == [8, 8, 6, 4]
    last, check = sharding["codecs"][-2:]
    assert check == {"name": "crc32c"}
    if codec == "auto":
        assert last["name"] == "stemtomo.electrons"
    else:  # every Zarr reader understands these
        level = {"lz4": 5, "zstd": 1}[codec]
        expected = {"cname": codec, "clevel": level, "shuffle": "bitshuffle", "typesize": 2, "blocksize": 0}
        assert (last["name"], last["configuration"]) == ("blosc", expected)
    assert metadata["attributes"]["units"] == "counts"
    frames = counts(SHAPE[1:])
    fill(store, 0, frames)
    np.testing.assert_array_equal(zarr.open_group(str(store.path), mode="r")["tilt/000/frames"][:], frames)


def test_frames_written_by_many_tasks_come_back(store: Store) -> None:
    frames = counts(SHAPE[1:])
    add_tilt(store, 1)
    regions = [(y, x) for y in range(0, 40, 32) for x in range(0, 70, 32)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda at: store.write_frames(1, *at, frames[at[0] : at[0] + 32, at[1] : at[1] + 32]), regions))
    np.testing.assert_array_equal(store.frames(1, require_complete=False)[:], frames)


@pytest.mark.parametrize(
    ("y0", "x0", "shape"),
    [
        (8, 0, (32, 32)),
        (0, 0, (8, 32)),
        (0, 0, (40, 70)),
        (32, 0, (32, 32)),
        (64, 0, (8, 32)),
        (0, 64, (32, 32)),
        (-32, 0, (32, 32)),
    ],
)
def test_a_write_that_is_not_one_whole_shard_is_refused(store: Store, y0: int, x0: int, shape: tuple[int, int]) -> None:
    add_tilt(store, 0)
    with pytest.raises(StoreError, match="not one whole shard"):
        store.write_frames(0, y0, x0, np.zeros((*shape, 6, 4), "u2"))


def test_frames_of_another_dtype_are_refused(store: Store) -> None:
    add_tilt(store, 0)
    with pytest.raises(StoreError, match="float32, the frames are uint16"):
        store.write_frames(0, 0, 0, np.zeros((32, 32, 6, 4), "f4"))


def test_an_unfinished_tilt_says_how_far_it_is(store: Store) -> None:
    add_tilt(store, 0)
    store.record_frames(0, {0, 1, 5})
    assert Store.open(store.path).recorded_frames(0) == {0, 1, 5}
    with pytest.raises(StoreError, match="tilt 0 is incomplete, 3 of 6 shards"):
        store.frames(0)
    with pytest.raises(StoreError, match="3 of 6 shards"):
        store.complete_tilt(0, Provenance.start("ingest", {}))
    with pytest.raises(StoreError, match=r"tilts \[0, 1\] of 2 are not complete"):
        store.complete_tilts(Provenance.start("ingest", {}))


def test_a_tilt_made_twice_keeps_its_frames_and_takes_new_geometry(store: Store) -> None:
    optics, scan, detector, tilts = experiment(SHAPE)
    frames = counts(SHAPE[1:])
    for index in range(2):
        add_tilt(store, index)
        fill(store, index, frames)
    store.complete_tilts(Provenance.start("ingest", {"energy": 200}))
    add_tilt(store, 0)
    assert store.fingerprint("tilt") is not None  # nothing changed
    store.create_tilt(0, SHAPE[1:], "u2", optics, scan, detector, tilts[1], source={"file": "a"})
    assert store.pose(0).theta_rad == pytest.approx(tilts[1].theta_rad)
    assert store.fingerprint("tilt") is None
    assert store.fingerprint("tilt/000") is None
    assert store.recorded_frames(0) == set(range(6))
    np.testing.assert_array_equal(store.frames(0, require_complete=False)[:], frames)


@pytest.mark.parametrize(
    ("shape", "dtype", "source"), [((40, 70, 6, 5), "u2", "a"), (SHAPE[1:], "u1", "a"), (SHAPE[1:], "u2", "b")]
)
def test_a_tilt_is_not_continued_with_other_frames(store: Store, shape: tuple, dtype: str, source: str) -> None:
    add_tilt(store, 0)
    optics, scan, detector, tilts = experiment(SHAPE)
    with pytest.raises(StoreError, match="ingest into another store"):
        store.create_tilt(0, shape, dtype, optics, scan, detector, tilts[0], source={"file": source})


def test_a_result_comes_back_lazy_with_units_and_without_its_mark(store: Store) -> None:
    provenance = Provenance.start("find_atoms", {"threshold": 0.25}, {"volume": "abc"})
    store.write("atoms", atoms(), provenance)
    result = Store.open(store.path).read("atoms")
    assert list(result) == ["x", "y", "z", "species", "intensity", "width_angstrom", "fit_residual"]
    assert result["z"].chunks is not None
    assert result["z"].attrs["units"] == "Å"
    assert result["species"].values.tolist() == ["Cu", "Au", "Au"]
    np.testing.assert_array_equal(result["x"].values, [0, 1.5, 3])
    assert "complete" not in result.attrs
    assert store.is_complete("atoms", provenance.fingerprint)
    assert not store.is_complete("atoms", Provenance.start("find_atoms", {"threshold": 0.3}).fingerprint)
    mark = store.provenance("atoms")
    assert mark is not None
    assert mark["inputs"] == {"volume": "abc"}
    assert mark["wall_s"] >= 0
    assert mark["peak_rss_mb"] > 10


def test_a_result_is_replaced_as_a_whole(store: Store) -> None:
    store.write(
        "alignment",
        alignment(5, 1.0).assign(extra=("tilt", np.zeros(5), {"units": "Å"})),
        Provenance.start("align", {}),
    )
    store.write("alignment", alignment(3, 2.0), Provenance.start("align", {"enabled": True}))
    result = store.read("alignment").load()
    assert "extra" not in result
    assert result["score"].values.tolist() == [2.0, 2.0, 2.0]
    assert {path.name for path in store.path.iterdir()} == {"alignment", "zarr.json"}


def test_many_tasks_write_results_side_by_side(store: Store) -> None:
    images = ("total_counts", "bright_field", "dark_field", "com_x", "com_y")

    def write(index: int) -> None:
        result = xr.Dataset({name: (("y", "x"), np.full((2, 3), index)) for name in images})
        result["mean_pattern"] = (("ky", "kx"), np.zeros((2, 2)))
        Store.open(store.path, "r+").write(f"quicklook/{index:03d}", result, Provenance.start("quicklook", {}))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))
    assert store.members("quicklook") == [f"quicklook/{index:03d}" for index in range(40)]
    assert all(store.read(member)["com_x"].values[0, 0] == int(member[-3:]) for member in store.members("quicklook"))
    assert {path.name for path in store.path.iterdir()} == {"quicklook", "zarr.json"}


def test_a_result_of_another_input_is_told_from_one_of_the_input_that_is_there(store: Store) -> None:
    store.write("alignment", alignment(), Provenance.start("align", {}, {"projections": "of before"}))
    store.require_current("alignment", "projections_half")  # no record of it
    with pytest.raises(StoreError, match=r"alignment was made from another projections than .* run the stage 'align'"):
        store.require_current("alignment", "projections")


def test_a_result_without_its_mark_is_not_there(store: Store) -> None:
    with pytest.raises(StoreError, match="volume has not been made; run the stage 'tomography'"):
        store.read("volume")
    store.write("alignment", alignment(), Provenance.start("align", {}))
    metadata = store.path / "alignment/zarr.json"
    content = json.loads(metadata.read_text())
    del content["attributes"]["complete"]
    metadata.write_text(json.dumps(content))
    assert store.fingerprint("alignment") is None
    with pytest.raises(StoreError, match="alignment is not complete; run the stage 'align'"):
        store.read("alignment")


def test_a_failed_write_leaves_the_old_result_and_nothing_else(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write("alignment", alignment(3, 1.0), Provenance.start("align", {}))
    before = {path.relative_to(store.path) for path in store.path.rglob("*")}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zarr.Array, "__setitem__", full)
    monkeypatch.setattr(zarr.Array, "set_basic_selection", full)
    monkeypatch.setattr("stemtomo.io.nodes.sync_tree", full)
    with pytest.raises(
        StoreError, match=r"alignment: the disk is full .* 72 B needed for this write, .*B free; make room"
    ):
        store.write("alignment", alignment(3, 2.0), Provenance.start("align", {"enabled": False}))
    assert store.read("alignment")["score"].values.tolist() == [1.0] * 3
    assert {path.relative_to(store.path) for path in store.path.rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.drop_vars("score"), "lacks the variables score"),
        (lambda d: d.rename(tilt="angle"), r"dims \('angle',\), expected \('tilt',\)"),
        (lambda d: d.assign(score=d["score"].astype(complex)), "dtype complex128, expected real"),
        (lambda d: d.assign(shift_x_angstrom=d["score"].assign_attrs(units="nm")), "is in nm, expected Å"),
        (lambda d: d.assign(other=d["score"]), "other is not in the schema and has no attrs"),
    ],
)
def test_a_result_that_does_not_follow_the_schema_is_refused(store: Store, change: object, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        store.write("alignment", change(alignment()), Provenance.start("align", {}))
    assert not (store.path / "alignment").exists()


def test_missing_attributes_and_unknown_groups_are_named(store: Store) -> None:
    with pytest.raises(StoreError, match="lacks the attributes recall, precision, rmsd_pm, species_accuracy"):
        store.write("score", xr.Dataset(), Provenance.start("score", {}))
    with pytest.raises(StoreError, match="'volumes' is not a group of a store"):
        store.fingerprint("volumes")
    with pytest.raises(StoreError, match="give quicklook/NNN"):
        store.write("quicklook", xr.Dataset(), Provenance.start("quicklook", {}))
    with pytest.raises(StoreError, match=r"read with frames\(index\)"):
        store.read("tilt/000")


def test_info_sums_up_every_group(store: Store) -> None:
    add_tilt(store, 0)
    fill(store, 0, counts(SHAPE[1:]))
    store.write("atoms", atoms(), Provenance.start("find_atoms", {}))
    rows = {row["group"]: row for row in store.info()}
    assert (rows["tilt"]["done"], rows["tilt"]["expected"]) == (1, 2)
    assert rows["tilt"]["arrays"] == ["frames (y 40, x 70, ky 6, kx 4) uint16 [counts]"]
    assert rows["tilt"]["size_bytes"] == 40 * 70 * 24 * 2
    assert rows["atoms"]["done"] == 1
    assert "x (atom 3) float64 [Å]" in rows["atoms"]["arrays"]
    assert (rows["volume"]["done"], rows["volume"]["arrays"]) == (0, [])
    json.dumps(list(rows.values()))


def test_what_is_not_a_store_of_ours_is_named(tmp_path: Path, store: Store) -> None:
    with pytest.raises(StoreError, match="no such store; ingest"):
        Store.open(tmp_path / "nothing.zarr")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="folder: is not a stemtomo store"):
        Store.open(tmp_path / "folder")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="file: is not a stemtomo store"):
        Store.open(tmp_path / "file")
    zarr.create_group(str(tmp_path / "other.zarr"))
    with pytest.raises(StoreError, match=r"other\.zarr: is not a stemtomo store"):
        Store.open(tmp_path / "other.zarr")
    with pytest.raises(StoreError, match="there is a store already"):
        Store.create(store.path, "again")
    with pytest.raises(StoreError, match="something that is not a store already"):
        Store.create(tmp_path / "file", "again")
    with pytest.raises(StoreError, match="a store cannot be made here"):
        Store.create(tmp_path / "file" / "series.zarr", "below a file")


def test_a_newer_schema_is_refused_and_an_unfinished_creation_continued(tmp_path: Path, store: Store) -> None:
    metadata = store.path / "zarr.json"
    content = json.loads(metadata.read_text())
    content["attributes"]["stemtomo_schema"] = 2
    metadata.write_text(json.dumps(content))
    with pytest.raises(StoreError, match=r"has store schema 2, this stemtomo .* reads up to 1; update stemtomo"):
        Store.open(store.path)
    killed = tmp_path / "killed.zarr"
    killed.mkdir()
    (killed / ".zarr.json.abc.partial").write_text('{"zarr_')
    assert Store.create(killed, "killed").name == "killed"


def test_torn_metadata_is_named_not_a_traceback_from_json(store: Store) -> None:
    add_tilt(store, 0)
    metadata = store.path / "tilt/000/zarr.json"
    metadata.write_text(metadata.read_text()[:100])
    with pytest.raises(StoreError, match=r"tilt/000/zarr\.json: is not Zarr v3 metadata .* remove .*tilt/000"):
        store.pose(0)


def test_the_advice_on_torn_metadata_keeps_the_frames(store: Store) -> None:
    add_tilt(store, 0)
    for group, advice in (("tilt", "remove this file, keep what lies beside it"), ("", "write the file again as docs")):
        metadata = store.path / group / "zarr.json"
        whole = metadata.read_text()
        metadata.write_text(whole[:20])
        with pytest.raises(StoreError, match=advice):
            Store.open(store.path).tilt_count  # noqa: B018
        metadata.write_text('{"zarr_format": 3, "node_type": "group", "attributes": []}')
        with pytest.raises(StoreError, match=advice):
            Store.open(store.path).tilt_count  # noqa: B018
        metadata.write_text(whole)
    (store.path / "tilt" / "zarr.json").unlink()
    add_tilt(store, 0)
    assert store.recorded_frames(0) == set()
    said = (
        '{"zarr_format": 3, "node_type": "group", "attributes": {"stemtomo_schema": 1, "name": "NAME", "created": ""}}'
    )
    assert f"`{said}`" in (Path(__file__).parents[2] / "docs/store.md").read_text(encoding="utf-8")
    (store.path / "zarr.json").write_text(said)
    assert (Store.open(store.path).name, Store.open(store.path).tilt_count) == ("NAME", 2)


def test_a_store_opened_for_reading_is_not_written(store: Store) -> None:
    reader = Store.open(store.path)
    with pytest.raises(StoreError, match="was opened for reading"):
        reader.write("alignment", alignment(), Provenance.start("align", {}))
    with pytest.raises(StoreError, match="mode 'r\\+'"):
        add_tilt(reader, 0)


def test_a_file_system_that_takes_no_more_is_a_store_error(store: Store) -> None:
    """The kernel's own refusal: no file may grow beyond 4 kB, less than a shard of random counts takes."""
    add_tilt(store, 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(
            StoreError, match=r"frames: the disk is full .* 49\.2 kB needed .* free; make room and run again"
        ):
            store.write_frames(0, 0, 0, counts((32, 32, 6, 4)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.recorded_frames(0) == set()
    assert not list(store.path.rglob("*.partial"))


def test_forbidden_writing_is_a_store_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    add_tilt(store, 0)

    def forbidden(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "replace", forbidden)
    with pytest.raises(StoreError, match=r"writing is not allowed \(Permission denied\); .* needed, .* free"):
        store.record_frames(0, {1})
    monkeypatch.undo()
    assert store.recorded_frames(0) == set()
