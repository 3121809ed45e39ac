"""The first look: each number is a plain sum over all frames, however they are cut and wherever they are read."""

import dask
import numpy as np
import pytest
import xarray as xr

import stemtomo
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.errors import ConfigurationError, FormatError, StoreError
from stemtomo.geometry import Detector, Optics, Pose, Scan
from stemtomo.io.frames import shard_regions
from stemtomo.io.provenance import Provenance
from stemtomo.io.store import Store
from stemtomo.pipeline import lookup
from stemtomo.pipeline.config import QuicklookSettings
from stemtomo.pipeline.quicklook import plan_quicklook, quicklook

SCAN, DETECTOR = (20, 35), (16, 12)
OPTICS = Optics(energy_ev=300e3, semiangle_rad=0.021)


def make_store(path, frames, shard_positions=8):
    """Store ``frames`` (tilt, y, x, ky, kx)."""
    store = Store.create(path, "test")
    store.declare_tilts(len(frames))
    for index, tilt in enumerate(frames):
        scan = Scan(tilt.shape[:2], (1.0, 1.0))
        detector = Detector(tilt.shape[2:], 0.2)
        pose = Pose(theta_rad=0.1 * index)
        array = store.create_tilt(
            index, tilt.shape, tilt.dtype, OPTICS, scan, detector, pose, shard_positions=shard_positions
        )
        regions = dict(shard_regions(array))
        for y0, y1, x0, x1 in regions.values():
            store.write_frames(index, y0, x0, tilt[y0:y1, x0:x1])
        store.record_frames(index, regions)
        store.complete_tilt(index, Provenance.start("ingest", {}, {}).finish())
    store.complete_tilts(Provenance.start("ingest", {}, {}))
    return store


@pytest.fixture(scope="module")
def frames():
    return np.random.default_rng(0).poisson(4, size=(2, *SCAN, *DETECTOR)).astype(np.uint16)


@pytest.fixture
def store(tmp_path, frames):
    return make_store(tmp_path / "test.zarr", frames)


def test_every_image_is_the_plain_sum_it_is_named_after(store, frames):
    numbers = quicklook(store)
    k_y, k_x = np.meshgrid((np.arange(16) - 8) * 0.2, (np.arange(12) - 6) * 0.2, indexing="ij")
    radius = np.hypot(k_y, k_x)
    disc = 0.021 / 0.0196875
    for index, tilt in enumerate(frames.astype(float)):
        result = store.read(f"quicklook/{index:03d}")
        total = tilt.sum(axis=(2, 3))
        np.testing.assert_allclose(result["mean_pattern"], tilt.mean(axis=(0, 1)), rtol=1e-6)
        np.testing.assert_allclose(result["total_counts"], total)
        np.testing.assert_allclose(result["bright_field"], tilt[:, :, radius < disc + 0.1].sum(axis=2))
        np.testing.assert_allclose(result["dark_field"], tilt[:, :, radius >= 1.1 * disc].sum(axis=2))
        np.testing.assert_allclose(result["com_x"], (tilt * k_x).sum(axis=(2, 3)) / total, atol=1e-5)
        np.testing.assert_allclose(result["com_y"], (tilt * k_y).sum(axis=(2, 3)) / total, atol=1e-5)
        assert result["com_x"].attrs["units"] == "1/Å"
        assert numbers["mean_counts"][index] == pytest.approx(total.mean())


def test_the_bright_field_stack_and_the_maximum_are_plain_too(store, frames):
    quicklook(store, QuicklookSettings(superpixels=20))
    result = store.read("quicklook/001")
    stack, tilt = result["bright_field_stack"].values, frames[1]
    np.testing.assert_array_equal(result["maximum_pattern"], tilt.max(axis=(0, 1)))
    # 0.2 1/Å per pixel and a disc of 1.067 1/Å hold 89 pixels: blocks of 2 x 2, the one at the beam from 7 to 8.
    middle = int(np.argmin(np.hypot(result["superpixel_kx"].values + 0.1, result["superpixel_ky"].values + 0.1)))
    np.testing.assert_array_equal(stack[..., middle], tilt[:, :, 7:9, 5:7].sum(axis=(2, 3)))
    assert float(result["superpixel_pixels"][middle]) == 4
    assert "bright_field_stack" not in _without_stack(store)


def _without_stack(store):
    quicklook(store, QuicklookSettings(superpixels=0))
    return store.read("quicklook/000")


def test_a_lazy_look_is_the_same_look_and_reads_each_block_once(store, frames, monkeypatch):
    quicklook(store)
    looks = []
    monkeypatch.setattr(lookup, "BlockLook", lambda *a, look=lookup.BlockLook: looks.append(1) or look(*a))
    lazy = quicklook(stemtomo.open(store.path)["tilt/001"].to_dataset())
    assert all(dask.is_dask_collection(lazy[name].data) for name in store.read("quicklook/001") if name in _BLOCKWISE)
    assert not looks
    computed, kept = lazy.compute(), store.read("quicklook/001")
    assert len(looks) == 15  # shards of the tilt
    for name in kept.data_vars:
        np.testing.assert_allclose(computed[name], kept[name], rtol=1e-6, err_msg=str(name))
        assert computed[name].attrs["units"] == kept[name].attrs["units"]
    assert computed["com_x"].coords["x"].attrs["units"] == "Å"


def test_a_lazy_look_leaves_out_positions_without_a_frame(tmp_path, frames):
    cut = frames.copy()
    cut[1].reshape(-1, *DETECTOR)[300:350] = 0
    store = make_store(tmp_path / "gaps.zarr", cut)
    store.close_source(1, {}, [(300, 350)])
    numbers = quicklook(store)
    there = frames[1].reshape(-1, *DETECTOR)[np.r_[:300, 350:700]]
    assert numbers["mean_counts"][1] == pytest.approx(there.sum(axis=(1, 2)).mean(), rel=1e-6)
    lazy, kept = quicklook(stemtomo.open(store.path)["tilt/001"].to_dataset()).compute(), store.read("quicklook/001")
    np.testing.assert_array_equal(lazy["valid"], store.valid(1))
    np.testing.assert_allclose(lazy["mean_pattern"], kept["mean_pattern"], rtol=1e-6)
    recorded = frames[1].reshape(-1, *DETECTOR)[np.r_[:300, 350:700]]
    np.testing.assert_allclose(lazy["mean_pattern"], recorded.mean(axis=0), rtol=1e-6)


_BLOCKWISE = ("mean_pattern", "maximum_pattern", "total_counts", "dark_field", "com_x", "bright_field_stack")


def test_a_lazy_look_at_plain_frames_needs_optics_and_whole_patterns(frames):
    plain = xr.DataArray(frames[0], dims=("y", "x", "ky", "kx"))
    with pytest.raises(ConfigurationError, match="optics="):
        quicklook(plain)
    told = {"optics": OPTICS, "detector": Detector(DETECTOR, 0.2)}
    np.testing.assert_array_equal(quicklook(plain, **told)["total_counts"], frames[0].sum(axis=(2, 3)))
    with pytest.raises(FormatError, match="rechunk"):
        quicklook(plain.chunk(ky=4), **told)
    with pytest.raises(FormatError, match="dims"):
        quicklook(plain.rename(y="tilt"), **told)


def test_the_result_does_not_depend_on_how_frames_are_cut(tmp_path, frames):
    cut = make_store(tmp_path / "cut.zarr", frames[:1], shard_positions=8)  # 15 shards
    whole = make_store(tmp_path / "whole.zarr", frames[:1], shard_positions=40)  # 1 shard
    quicklook(cut)
    quicklook(whole, executor=ThreadExecutor(1))
    one, other = cut.read("quicklook/000"), whole.read("quicklook/000")
    for name in one.data_vars:
        np.testing.assert_array_equal(one[name], other[name], err_msg=str(name))


def test_a_second_look_computes_nothing_and_other_settings_look_again(store):
    first = quicklook(store)
    again = quicklook(store)
    assert (first["computed"], again["computed"]) == (2, 0)
    assert again["mean_counts"] == first["mean_counts"]
    assert quicklook(store, QuicklookSettings(dark_field_fraction=1.2))["computed"] == 2


def test_frames_of_real_numbers_are_looked_at_too(tmp_path, frames):
    store = make_store(tmp_path / "real.zarr", frames[:1].astype(np.float32) * 1e-6)
    assert quicklook(store)["mean_counts"][0] == pytest.approx(frames[0].sum() / 700 * 1e-6, rel=1e-6)


def test_progress_counts_tilts(store):
    calls = []

    class Watcher:
        def start(self, stage, total, unit=""):
            calls.append((stage, total, unit))

        def advance(self, n=1, **numbers):
            calls.append(n)

        def finish(self, stage):
            calls.append(stage)

    quicklook(store, progress=Watcher())
    assert calls == [("quicklook", 2, "tilt"), 0, 1, 1, "quicklook"]


def test_the_plan_reads_every_byte_once(store, frames):
    plan = plan_quicklook(store)
    assert plan.bytes_read == frames.nbytes
    lean = plan_quicklook(store, QuicklookSettings(superpixels=0))
    assert lean.bytes_per_task < frames.nbytes
    assert plan.bytes_written - lean.bytes_written == 2 * 4 * 150 * 20 * 35
    assert not (store.path / "quicklook").exists()


def test_empty_frames_and_missing_frames_are_refused(tmp_path, frames):
    empty = make_store(tmp_path / "empty.zarr", np.zeros((1, 8, 8, 16, 12), np.uint16))
    with pytest.raises(ConfigurationError, match="all frames of tilt 0 are empty"):
        quicklook(empty)
    store = Store.create(tmp_path / "part.zarr", "part")
    store.declare_tilts(1)
    store.create_tilt(0, (8, 8, 16, 12), "u2", OPTICS, Scan((8, 8), (1, 1)), Detector(DETECTOR, 0.2), Pose(0.0))
    with pytest.raises(StoreError, match="incomplete"):
        quicklook(store)
