"""The verb in tiles: from the store and back, out of core, through checkpoints, on threads and on a cluster."""

import errno
import os
import signal

import numpy as np
import pytest
import xarray as xr

from stemtomo.distributed import Checkpoint, executor
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.errors import StoreError
from stemtomo.io.provenance import Provenance
from stemtomo.pipeline import tile_fields
from stemtomo.pipeline.config import PtychographySettings
from stemtomo.pipeline.ptychography import ptychography
from tests.pipeline.scanned import SCAN, make_scan

SETTINGS = PtychographySettings(
    epochs=6,
    settling_epochs=2,
    batches=4,
    probe_modes=2,
    probe_update_start_epoch=1,
    refine_positions_from_epoch=4,
    slices=2,
    slice_thickness_angstrom=20.0,
    checkpoint_every=2,
)
NAMES = ("object", "probe", "phase_sum", "illumination", "loss", "loss_map", "position_x", "position_y")


def reconstructed(tmp_path, name, workers=None, missing=(), **changes):
    store = make_scan(tmp_path / f"{name}.zarr", missing=missing)
    settings = SETTINGS.model_copy(update=changes)
    numbers = ptychography(store, settings, executor=workers or ThreadExecutor(2))
    assert numbers["computed"] == 1
    assert not list(store.checkpoint_path("ptychography/000").glob("step-*"))
    return store.read("ptychography/000").load()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return reconstructed(tmp_path_factory.mktemp("whole"), "whole", tiles="auto")


def assert_same(found, expected, tolerance=1e-5):
    for name in NAMES:
        one, other = found[name].values, expected[name].values
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= tolerance * np.abs(other).max(), name


def test_a_scan_that_fits_is_reconstructed_in_one_piece(whole):
    assert "tiles" not in whole.attrs
    assert whole["loss_map"].shape == SCAN.shape_yx
    assert whole["loss_map"].values.mean() == pytest.approx(whole["loss"].values[-1], rel=1e-6)


@pytest.mark.parametrize("tiles", [(2, 2), (3, 1), (9, 9)])
def test_tiles_write_what_one_piece_writes(tmp_path, whole, tiles):
    found = reconstructed(tmp_path, "tiles", tiles=tiles)
    assert_same(found, whole)
    assert set(found.variables) == set(whole.variables)
    assert set(found.attrs) - set(whole.attrs) == {"tiles"}


def test_patterns_read_from_the_store_give_the_same(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(tile_fields, "GROUP_BYTES", 20 * 16 * 16 * 2)
    assert_same(reconstructed(tmp_path, "streamed", tiles=(2, 1), frames="store"), whole)


def test_missing_positions_have_no_tile_and_no_loss(tmp_path):
    missing = [(0, 18 * 9)]
    one = reconstructed(tmp_path, "one", missing=missing)
    found = reconstructed(tmp_path, "tiles", missing=missing, tiles=(3, 3))
    assert_same(found, one)
    assert not found["loss_map"].values[:9].any()
    assert (found["loss_map"].values[9:] > 0).all()


def test_a_search_for_the_mistilt_starts_all_tiles_alike(tmp_path):
    changes = {"slices": 3, "refine_mistilt": True, "mistilt_iterations": 2, "epochs": 2, "settling_epochs": 0}
    changes |= {"refine_positions_from_epoch": 1}
    for patterns in (1024, 64):
        one = reconstructed(tmp_path, f"one-{patterns}", mistilt_patterns=patterns, **changes)
        found = reconstructed(tmp_path, f"tiles-{patterns}", mistilt_patterns=patterns, tiles=(2, 2), **changes)
        assert found.attrs["mistilt_mrad"] == pytest.approx(one.attrs["mistilt_mrad"], abs=1e-4)
        assert_same(found, one, 1e-4)


def test_batches_of_blocks_do_not_depend_on_the_cut(tmp_path):
    one = reconstructed(tmp_path, "one", batch_block=4, tiles=(1, 1))
    assert_same(reconstructed(tmp_path, "many", batch_block=4, tiles=(3, 3), frames="store"), one)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "slice_thickness_angstrom": (10.0, 30.0),
            "rule": "lsqml",
            "probe_variations": 1,
            "probe_variations_from_epoch": 2,
        },
        {"rule": "lbfgs", "settling_epochs": 2},
        {"kz_filter": 0.2, "vacuum_percentile": 10.0, "notch_scan_raster": True, "object": "complex"},
    ],
)
def test_what_sums_over_the_whole_object_is_the_same_in_tiles(tmp_path, changes):
    one = reconstructed(tmp_path, "one", **changes)
    found = reconstructed(tmp_path, "tiles", tiles=(2, 2), **changes)
    assert set(found.variables) == set(one.variables)
    assert_same(found, one)
    for name in set(found.variables) & {"variation_weights"}:
        assert np.abs(found[name].values - one[name].values).max() < 1e-3 * np.abs(one[name].values).max()


def test_the_noise_floor_knows_of_bad_pixels_and_blur(tmp_path):
    bad = np.zeros((16, 16), np.uint8)
    bad[6:10, 7:10] = 2  # in the disc, where electrons are
    attrs = {"found": {}, "metadata": {}, "difference": {}, "undetermined": {}}
    found = []
    for name, tiles in (("one", "auto"), ("tiles", (2, 2))):
        store = make_scan(tmp_path / f"{name}.zarr")
        dataset = xr.Dataset({"bad_pixels": (("ky", "kx"), bad)}, attrs=attrs)
        store.write("calibration/000", dataset, Provenance.start("calibrate", {}))
        settings = SETTINGS.model_copy(update={"epochs": 2, "tiles": tiles, "detector_blur_px": 0.7})
        ptychography(store, settings, executor=ThreadExecutor(1))
        found.append(store.read("ptychography/000").attrs)
    assert found[1]["masked_pixels"] == found[0]["masked_pixels"] == 12
    assert found[1]["noise_floor"] == pytest.approx(found[0]["noise_floor"], rel=1e-5)


def test_a_cluster_gives_the_bits_of_threads(tmp_path, client):
    threads = reconstructed(tmp_path, "threads", tiles=(2, 2), epochs=3)
    cluster = reconstructed(tmp_path, "cluster", executor(client), tiles=(2, 2), epochs=3)
    for name in NAMES:
        np.testing.assert_array_equal(threads[name].values, cluster[name].values)


class Stop(Exception):
    pass


class StopAfter:
    """Progress that raises after some epochs: a run that was killed there."""

    def __init__(self, epochs):
        self.left = epochs

    def start(self, stage, total, unit=""):
        pass

    def advance(self, n=1, **numbers):
        self.left -= 1 if "loss" in numbers else 0
        if self.left == 0:
            raise Stop

    def finish(self, stage):
        pass


@pytest.mark.parametrize("epochs", [3, 5])
def test_a_run_that_was_stopped_continues_to_the_same_bits(tmp_path, epochs):
    store = make_scan(tmp_path / "stopped.zarr")
    settings = SETTINGS.model_copy(update={"tiles": (2, 2)})
    with pytest.raises(Stop):
        ptychography(store, settings, executor=ThreadExecutor(2), progress=StopAfter(epochs))
    mark = Checkpoint(store.checkpoint_path("ptychography/000")).directory
    assert [path.name for path in mark.glob("step-*")] == [f"step-{epochs // 2 * 2:08d}"]
    # The choice of tiles is free the second time; the checkpoint decides.
    ptychography(store, settings.model_copy(update={"tiles": "auto", "frames": "store"}), executor=ThreadExecutor(1))
    found = store.read("ptychography/000").load()
    undisturbed = reconstructed(tmp_path, "undisturbed", tiles=(2, 2), frames="store")
    assert found.attrs["tiles"] == [2, 2]
    for name in ("object", "probe", "loss", "position_x"):
        assert np.abs(found[name].values - undisturbed[name].values).max() < 1e-5


class KillWorkers:
    """Progress that kills one of two workers: while patterns are loaded, between epochs, while the result is written.

    It kills the one that has been there for longer, once both are there. Now and then a nanny of Distributed says that
    it restarts its worker and starts no process: another worker is asked for then.
    """

    def __init__(self, client, epochs):
        self.client, self.epochs, self.done, self.seen = client, epochs, 0, []

    def wait_for_both(self):
        try:
            self.client.wait_for_workers(2, timeout=60)
        except TimeoutError:
            self.client.cluster.scale(len(self.client.cluster.workers) + 1)
            self.client.wait_for_workers(2, timeout=600)

    def kill(self):
        self.wait_for_both()
        pids = self.client.run(os.getpid)
        self.seen = [one for one in self.seen if one in pids] + sorted(set(pids) - set(self.seen))
        os.kill(pids[self.seen.pop(0)], signal.SIGKILL)

    def start(self, stage, total, unit=""):
        if "tiles" in stage and 0 in self.epochs:
            self.kill()

    def advance(self, n=1, **numbers):
        self.done += "loss" in numbers
        if "loss" in numbers and self.done in self.epochs:
            self.kill()

    def finish(self, stage):
        pass


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_killed_workers_change_no_bit_of_the_result(tmp_path, client):
    expected = reconstructed(tmp_path, "undisturbed", tiles=(2, 1))
    store = make_scan(tmp_path / "killed.zarr")
    settings = SETTINGS.model_copy(update={"tiles": (2, 1)})
    # While loading, before the first checkpoint, after a later one, and when all epochs are done.
    killer = KillWorkers(client, {0, 1, 5, 6})
    ptychography(store, settings, executor=executor(client), progress=killer)
    found = store.read("ptychography/000").load()
    for name in NAMES:
        np.testing.assert_array_equal(found[name].values, expected[name].values)


def test_a_full_disk_at_a_checkpoint_is_said_and_the_one_before_it_continues(tmp_path, monkeypatch):
    from stemtomo.distributed import checkpoint

    store = make_scan(tmp_path / "full.zarr")
    settings = SETTINGS.model_copy(update={"tiles": (2, 2)})
    write = checkpoint.write_tree

    def until_the_disk_is_full(file, tree):
        if "step-00000004" in file.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, tree)

    monkeypatch.setattr(checkpoint, "write_tree", until_the_disk_is_full)
    with pytest.raises(StoreError, match=r"No space left on device.*The one before it is untouched"):
        ptychography(store, settings, executor=ThreadExecutor(2))
    folder = store.checkpoint_path("ptychography/000")
    assert [path.name for path in folder.glob("step-*")] == ["step-00000002"]
    monkeypatch.setattr(checkpoint, "write_tree", write)
    counting = StopAfter(99)
    ptychography(store, settings, executor=ThreadExecutor(2), progress=counting)
    assert counting.left == 99 - 4  # epochs 3 to 6
    found = store.read("ptychography/000").load()
    expected = reconstructed(tmp_path, "undisturbed", tiles=(2, 2))
    for name in NAMES:
        np.testing.assert_array_equal(found[name].values, expected[name].values)
