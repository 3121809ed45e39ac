"""The patterns of a tile in joint tomography: only its own are read, and bad pixels of the detector tell nothing."""

import numpy as np
import pytest
import xarray as xr

from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.errors import FormatError, StoreError
from stemtomo.geometry import Detector, Optics, Scan, TiltSeries
from stemtomo.io.provenance import Provenance
from stemtomo.io.store import Store
from stemtomo.pipeline.config import JointSettings
from stemtomo.pipeline.joint import joint, plan_joint
from stemtomo.pipeline.joint_parts import tilts_of
from stemtomo.pipeline.joint_patterns import load_tile, tile_counted

DETECTOR = Detector((12, 12), 1 / 4.8)
SCAN = Scan((16, 8), (1.2, 1.2), periodic=True)
OPTICS = Optics(energy_ev=300e3, semiangle_rad=21e-3, aberrations={"C10": 100.0})
SHORT = JointSettings(
    single_slice_epochs=1,
    sweeps=1,
    settling_sweeps=1,
    accelerated_epochs=1,
    batches=2,
    tiles=2,
    slice_thickness_angstrom=4.8,
)


def patterns(seed):
    """Counts about a bright disc, (16, 8, 12, 12)."""
    row, column = np.indices((12, 12)) - 6
    disc = 40.0 * (row**2 + column**2 < 12) + 1
    return np.random.default_rng(seed).poisson(disc, (16, 8, 12, 12)).astype(np.uint16)


def make_store(path, counts):
    """Make a store whose tilts are ``counts``, each in two shards of 8 x 8 positions."""
    store = Store.create(path, "two shards")
    store.declare_tilts(len(counts))
    for index, pose in enumerate(TiltSeries.from_degrees([-20.0, 25.0][: len(counts)])):
        store.create_tilt(index, (16, 8, 12, 12), np.uint16, OPTICS, SCAN, DETECTOR, pose, shard_positions=8)
        for shard in (0, 1):
            store.write_frames(index, 8 * shard, 0, counts[index][8 * shard : 8 * shard + 8])
        store.record_frames(index, [0, 1])
        store.complete_tilt(index, Provenance.start("ingest", {"tilt": index}))
    store.complete_tilts(Provenance.start("ingest", {}))
    return store


def calibrated(store, bad):
    attrs = {"found": {}, "metadata": {}, "difference": {}, "undetermined": {}}
    for index in range(store.tilt_count):
        dataset = xr.Dataset({"bad_pixels": (("ky", "kx"), bad)}, attrs=attrs)
        store.write(f"calibration/{index:03d}", dataset, Provenance.start("calibrate", {"of": index}))


def potential(store, **more):
    joint(store, SHORT.model_copy(update=more), executor=ThreadExecutor(1))
    return store.read("joint")["potential"].values


@pytest.mark.parametrize("resident", [True, False])
def test_a_tile_reads_no_shard_but_its_own(tmp_path, resident):
    counts = patterns(0)
    store = make_store(tmp_path / "s.zarr", [counts])
    settings = SHORT.model_copy(update={"resident": resident})
    (tilt,) = tilts_of(store, settings)
    shards = sorted(file for file in (store.path / "tilt" / "000" / "frames" / "c").rglob("*") if file.is_file())
    assert len(shards) == 2
    shards[1].write_bytes(b"not a shard")
    found = tile_counted(load_tile((tilt, 0), settings))
    assert found["positions"] == 64
    np.testing.assert_array_equal(found["pattern"], np.roll(counts[:8].sum(axis=(0, 1)), (-6, -6), axis=(0, 1)))
    with pytest.raises(StoreError):
        tile_counted(load_tile((tilt, 1), settings))


@pytest.mark.parametrize("asked", [{"resident": True}, {"resident": False}, {"resident": False, "tiles": 3}])
def test_the_plan_counts_the_bytes_that_are_read(tmp_path, monkeypatch, asked):
    store = make_store(tmp_path / "s.zarr", [patterns(0), patterns(1)])
    read = []
    untouched = Store.read_pieces

    def counting(self, *where):
        for piece in untouched(self, *where):
            read.append(piece[2].nbytes)
            yield piece

    monkeypatch.setattr(Store, "read_pieces", counting)
    settings = SHORT.model_copy(update=asked)
    joint(store, settings, executor=ThreadExecutor(1))
    planned = plan_joint(store, settings)
    assert sum(read) == planned.bytes_read
    assert planned.resident_bytes == (2 * patterns(0).nbytes if settings.resident else 0)


def test_what_lies_on_bad_pixels_makes_no_difference(tmp_path):
    clean = [patterns(0), patterns(1)]
    spoilt = [counts.copy() for counts in clean]
    bad = np.zeros((12, 12), np.uint8)
    bad[5, 6], bad[0, 3], bad[6, 5], bad[6, 6] = 2, 1, 1, 2
    for counts in spoilt:
        counts[..., bad > 0] = np.random.default_rng(7).integers(0, 60_000, (16, 8, 4))
    stores = [make_store(tmp_path / f"{name}.zarr", told) for name, told in (("clean", clean), ("spoilt", spoilt))]
    unmasked = potential(stores[0])
    for store in stores:
        calibrated(store, bad)
    masked = potential(stores[0])
    assert np.abs(masked - unmasked).max() > 1e-3 * unmasked.max()
    np.testing.assert_array_equal(potential(stores[1]), masked)
    assert stores[1].read("joint").attrs["masked_pixels"] == [4, 4]
    # Their neighbours say how many electrons fall on them.
    probes = [store.read("joint")["probe"].values for store in stores]
    np.testing.assert_array_equal(*probes)
    electrons = np.square(np.abs(probes[0])).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(electrons, [counts.sum() / 128 for counts in clean], rtol=0.03)
    np.testing.assert_array_equal(potential(stores[0], mask_bad_pixels=False), unmasked)


def test_a_pattern_without_electrons_is_named(tmp_path):
    counts = patterns(0)
    counts[9, 3] = 0
    store = make_store(tmp_path / "s.zarr", [counts])
    with pytest.raises(FormatError, match="the first at scan position 75"):
        joint(store, SHORT, executor=ThreadExecutor(1))


def test_patterns_of_many_electrons_are_compared_as_if_they_had_the_most_that_count(tmp_path):
    """The object does not depend on how many there are, from as many on as are told."""
    few = [patterns(seed) for seed in (0, 1)]
    electrons = float(np.mean(few)) * 144
    many = [counts * np.uint16(50) for counts in few]
    volumes = [
        potential(make_store(tmp_path / f"{n}.zarr", counts), precision="double", most_electrons=most)
        for n, (counts, most) in enumerate([(few, electrons / 2), (many, electrons / 2), (many, 1e9)])
    ]
    np.testing.assert_allclose(volumes[1], volumes[0], rtol=0, atol=1e-6 * volumes[0].max())  # as stored
    assert np.abs(volumes[2] - volumes[0]).max() > 1e-3 * volumes[0].max()
