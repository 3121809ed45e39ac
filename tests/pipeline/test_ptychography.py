import numpy as np
import pytest

from stemtomo.algorithms.ptychography.phase import centred
from stemtomo.distributed.executor import executor
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.errors import ConfigurationError, FormatError, StoreError
from stemtomo.geometry import Detector, Scan
from stemtomo.io.provenance import Provenance
from stemtomo.io.store import Store
from stemtomo.pipeline.config import ProjectionSettings, PtychographySettings
from stemtomo.pipeline.projections import projections
from stemtomo.pipeline.ptychography import grid_of, load_counts, plan_ptychography, ptychography
from tests.io.cases import digest
from tests.pipeline.series import DETECTOR, OPTICS, SCAN, make_series, true_phase

SETTINGS = PtychographySettings(epochs=12, settling_epochs=6)


@pytest.fixture(scope="module")
def reconstructed(tmp_path_factory):
    store = make_series(tmp_path_factory.mktemp("ptychography") / "tiny.zarr")
    numbers = ptychography(store, SETTINGS, executor=ThreadExecutor(2))
    return store, numbers


def test_the_phases_of_all_tilts_come_out_on_one_grid_with_vacuum_at_zero(reconstructed):
    store, _ = reconstructed
    numbers = projections(store, ProjectionSettings())
    result = store.read("projections").compute()
    assert result["phase"].shape == (3, 30, 34)  # 10 x 1.2 Å and 11 x 1.2 Å on pixels of 0.4 Å, rounded up to even
    for tilt in range(3):
        truth = centred(true_phase((64, 64), tilt), (30, 34))
        phase, valid = result["phase"].values[tilt], result["valid"].values[tilt]
        assert np.corrcoef(phase[valid], truth[valid])[0, 1] > 0.95
        assert abs(np.median(phase[valid & (truth < 0.01)])) < 0.02
    assert min(numbers["observed_fraction"]) > 0.9
    assert result.attrs["sigma_rad_per_volt_angstrom"] == pytest.approx(6.526e-4, rel=1e-3)


def test_the_loss_falls_to_what_counting_noise_leaves(reconstructed):
    _, numbers = reconstructed
    for losses, floor in zip(numbers["loss"], numbers["noise_floor"], strict=True):
        assert losses[-1] < losses[0]
        assert losses[-1] == pytest.approx(floor, rel=0.15)


def test_what_is_there_is_not_computed_again_and_changed_settings_are(reconstructed):
    store, _ = reconstructed
    before = digest(store.path)
    assert ptychography(store, SETTINGS)["computed"] == 0
    assert digest(store.path) == before
    changed = SETTINGS.model_copy(update={"epochs": 2})
    copy = make_series(store.path.parent / "copy.zarr", tilts=1)
    assert ptychography(copy, SETTINGS)["computed"] == 1
    assert ptychography(copy, changed)["computed"] == 1


def test_threads_and_a_cluster_give_the_same_bits(reconstructed, client):
    store, _ = reconstructed
    other = make_series(store.path.parent / "cluster.zarr")
    ptychography(other, SETTINGS, executor=executor(client))
    for tilt in range(3):
        group = f"ptychography/{tilt:03d}"
        for name in ("object", "probe", "loss", "phase_sum", "illumination"):
            np.testing.assert_array_equal(store.read(group)[name].values, other.read(group)[name].values)


def test_patterns_are_rolled_to_the_corner(reconstructed):
    store, _ = reconstructed
    counts = load_counts(store, 0)
    assert counts.dtype == np.uint16
    assert counts[:, 0, 0].mean() > 10 * counts[:, 16, 16].mean()


def test_a_pattern_without_electrons_is_named(tmp_path):
    store = Store.create(tmp_path / "blank.zarr", "blank")
    store.declare_tilts(1)
    frames = np.ones((*SCAN.shape_yx, *DETECTOR.shape_yx), np.uint16)
    frames[2, 3] = 0
    pose = make_series(tmp_path / "tiny.zarr", tilts=1).pose(0)
    store.create_tilt(0, frames.shape, np.uint16, OPTICS, SCAN, DETECTOR, pose)
    store.write_frames(0, 0, 0, frames)
    store.record_frames(0, [0])
    store.complete_tilt(0, Provenance.start("ingest", {}))
    with pytest.raises(
        FormatError, match=r"tilt 0 has 1 patterns without a single electron, the first at scan position 25"
    ):
        ptychography(store, SETTINGS)


@pytest.mark.parametrize("electrons", [2e3, 2e5])
def test_a_dose_that_the_counts_contradict_is_refused(tmp_path, electrons):
    store = make_series(tmp_path / "tiny.zarr", tilts=1, electrons=2e4)
    with pytest.raises(ConfigurationError, match=r"electrons_per_pattern is 2.*, but tilt 0 counts 2"):
        ptychography(store, SETTINGS.model_copy(update={"electrons_per_pattern": electrons}))


def test_a_store_without_frames_says_so(tmp_path):
    with pytest.raises(StoreError, match="ingest"):
        projections(Store.create(tmp_path / "empty.zarr", "empty"))


def test_a_periodic_specimen_needs_whole_pixels():
    with pytest.raises(ConfigurationError, match="whole pixels"):
        grid_of(Scan((8, 8), (0.45, 0.4), periodic=True), Detector((8, 8), 1 / 3.3))


def test_the_plan_knows_the_frames(reconstructed):
    store, _ = reconstructed
    row = plan_ptychography(store, SETTINGS)
    assert row.tasks == 3
    assert row.bytes_read == 3 * 110 * 32 * 32 * 2
    assert row.bytes_per_task > 110 * 32 * 32 * 2
