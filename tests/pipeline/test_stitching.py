"""Tiles on their own, put together: nothing shows at their seams that noise does not show everywhere."""

from dataclasses import replace

import numpy as np
import pytest

from stemtomo.algorithms.ptychography.adaptive import Geometry
from stemtomo.algorithms.ptychography.seams import seam_lines, seams
from stemtomo.distributed import executor
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.geometry import Detector, Scan
from stemtomo.pipeline.config import PtychographySettings
from stemtomo.pipeline.mistilt import Found
from stemtomo.pipeline.ptychography import grid_of, ptychography
from stemtomo.pipeline.tile_layout import Room, layout_of
from stemtomo.pipeline.tiled_ptychography import load_patterns, make_field, start_state
from tests.pipeline import scanned
from tests.pipeline.scanned import make_scan
from tests.pipeline.test_tiled_ptychography import KillWorkers, Stop, StopAfter

SCAN, DETECTOR = Scan((56, 56), (0.6, 0.6)), Detector((32, 32), 1 / 16.0)
SETTINGS = PtychographySettings(epochs=20, probe_update_start_epoch=3)
STITCHED = SETTINGS.model_copy(update={"tile_mode": "stitch", "tiles": (3, 3)})
SMALL = {"epochs": 6, "settling_epochs": 2, "batches": 4, "stitch_polish_epochs": 2, "stitch_halo": 3}


def true_phase(seed=2):
    """Return the phase (y, x) that :func:`make_scan` draws."""
    shape = grid_of(SCAN, DETECTOR).shape_yx
    rng, found = np.random.default_rng(seed), np.zeros(shape)
    y, x = np.indices(shape)
    for row, column in rng.uniform(0, 1, size=(60, 2)) * np.array(shape):
        found += 0.5 * np.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * 1.2**2))
    return found


def reconstructed(path, seed=2):
    """Return the phases untiled and stitched, where they are seen; the truth; the seams."""
    store = make_scan(path, SCAN, DETECTOR, seed=seed)
    found = []
    for settings in (SETTINGS, STITCHED):
        ptychography(store, settings, executor=ThreadExecutor(1))
        found.append(store.read("ptychography/000").load())
    lit = found[0]["illumination"].values
    seen = lit > 0.5 * np.median(lit[lit > 0.1 * lit.max()])
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    inside = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    layout = layout_of(store, 0, STITCHED, Room(2**34))
    lines = seam_lines([tile.window for tile in layout.tiles()])
    moved = [[line - first for line in each] for each, first in zip(lines, (rows[0], columns[0]), strict=True)]
    phases = [each["phase_sum"].values[inside].astype(float) for each in found]
    return *phases, true_phase(seed)[inside], moved


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return reconstructed(tmp_path_factory.mktemp("scan") / "scan.zarr")


def test_stitched_tiles_are_the_scan_in_one_piece(pictures):
    untiled, stitched, truth, lines = pictures
    assert np.corrcoef(untiled.ravel(), stitched.ravel())[0, 1] >= 0.999
    noise = (untiled - truth - (untiled - truth).mean()).std()
    assert seams(stitched, *lines, untiled).difference_rms <= 0.1 * noise
    assert seams(stitched, *lines, untiled, without_ramp=True).difference_rms <= 0.1 * noise


def test_the_error_to_the_truth_is_not_larger_at_seams(pictures):
    untiled, stitched, truth, lines = pictures
    one, other = (seams(picture, *lines, truth) for picture in (untiled, stitched))
    assert other.difference_ratio <= 1.005 * one.difference_ratio
    assert other.difference_rms <= 1.005 * one.difference_rms
    assert other.step_ratio <= 1.01 * one.step_ratio


@pytest.mark.heavy
def test_seams_of_other_scans_with_other_noise_are_not_worse(tmp_path):
    ratios, sizes = [], []
    for seed in (11, 12, 13):
        untiled, stitched, truth, lines = reconstructed(tmp_path / f"{seed}.zarr", seed)
        noise = (untiled - truth - (untiled - truth).mean()).std()
        assert np.corrcoef(untiled.ravel(), stitched.ravel())[0, 1] >= 0.999
        assert seams(stitched, *lines, untiled).difference_rms <= 0.1 * noise
        one, other = (seams(picture, *lines, truth) for picture in (untiled, stitched))
        ratios.append(other.difference_ratio / one.difference_ratio)
        sizes.append(other.difference_rms / one.difference_rms)
    # Of one scan either is what a difference of 7 % of the noise happens to do to its error: a percent, of both signs.
    assert np.mean(ratios) <= 1.01
    assert np.mean(sizes) <= 1.02


def test_there_is_no_peak_at_the_period_of_the_tiles(pictures):
    untiled, stitched, _, lines = pictures
    assert seams(stitched, *lines).period_peak <= max(3, 1.1 * seams(untiled, *lines).period_peak)


def small(path, name, **changes):
    store = make_scan(path / f"{name}.zarr")
    settings = STITCHED.model_copy(update={**SMALL, "tiles": (2, 2), **changes})
    return store, settings


def test_a_run_that_was_stopped_continues_to_the_same_bits(tmp_path):
    changes = {"checkpoint_every": 1, "refine_positions_from_epoch": 2}
    store, settings = small(tmp_path, "undisturbed", **changes)
    ptychography(store, settings, executor=ThreadExecutor(2))
    expected = store.read("ptychography/000").load()
    for epochs in (2, 5):
        store, settings = small(tmp_path, f"stopped-{epochs}", **changes)
        with pytest.raises(Stop):
            ptychography(store, settings, executor=ThreadExecutor(2), progress=StopAfter(epochs))
        ptychography(store, settings, executor=ThreadExecutor(1))
        found = store.read("ptychography/000").load()
        for name in ("object", "probe", "loss", "loss_map", "position_x"):
            np.testing.assert_array_equal(found[name].values, expected[name].values)


def test_a_cluster_gives_the_bits_of_threads_from_the_store(tmp_path, client):
    found = []
    for name, workers in (("threads", ThreadExecutor(2)), ("cluster", executor(client))):
        store, settings = small(tmp_path, name, frames="store")
        ptychography(store, settings, executor=workers)
        found.append(store.read("ptychography/000").load())
    for name in ("object", "probe", "loss"):
        np.testing.assert_array_equal(found[0][name].values, found[1][name].values)


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_killed_workers_change_no_bit_of_stitched_tiles(tmp_path, client):
    store, settings = small(tmp_path, "undisturbed", checkpoint_every=1, tiles=(2, 1))
    ptychography(store, settings, executor=ThreadExecutor(2))
    expected = store.read("ptychography/000").load()
    store, settings = small(tmp_path, "killed", checkpoint_every=1, tiles=(2, 1))
    # While loading, while tiles are on their own, after the blend, and when all epochs are done.
    ptychography(store, settings, executor=executor(client), progress=KillWorkers(client, {0, 2, 4, 6}))
    found = store.read("ptychography/000").load()
    for name in ("object", "probe", "loss", "loss_map"):
        np.testing.assert_array_equal(found[name].values, expected[name].values)


def test_the_result_knows_that_the_cut_matters_to_it():
    assert "tiles" in STITCHED.how() ^ STITCHED.HOW
    assert {"tiles", "stitch_halo", "stitch_meet_epochs"} <= SETTINGS.how()


def test_tiles_with_wide_halos_start_from_their_own_window(tmp_path):
    """Tiles beside one another may begin at the same position of the scan."""
    store = make_scan(tmp_path / "s.zarr", Scan((8, 40), (1.1, 1.1)), scanned.DETECTOR)
    settings = PtychographySettings(slices=3, slice_thickness_angstrom=10.0, detector_padding=0.0, tiles=(1, 5))
    layout = replace(layout_of(store, 0, settings, Room(2**33)), halo=8)
    tiles = layout.tiles()
    assert tiles[0].where[0] == tiles[1].where[0]
    shape = layout.grid().shape_yx
    phase = np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape)
    found = Found(Geometry(np.zeros(2), 10.0), np.ones((1, 16, 16), np.complex64), phase, np.zeros((1, 3)))
    for index, tile in enumerate(tiles):
        field = make_field(load_patterns(index, layout), layout, found, index)
        (y0, y1), (x0, x1) = tile.window
        np.testing.assert_array_equal(start_state(field, found, layout).phase, phase[:, y0:y1, x0:x1])
