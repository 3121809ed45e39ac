"""Tiles only where a tilt does not fit, as few as fit, from headers alone; what cannot fit is refused with numbers."""

import pytest

from stemtomo.distributed import MemoryPlan
from stemtomo.errors import MemoryPlanError
from stemtomo.geometry import Detector, Scan
from stemtomo.pipeline.config import PtychographySettings
from stemtomo.pipeline.solving import alone_epochs
from stemtomo.pipeline.tile_cost import Rates, estimate, meeting_seconds, meetings_of
from stemtomo.pipeline.tile_layout import Room, chosen, cuts_of, groups_of, layout_of
from stemtomo.pipeline.tile_plan import passes, plan_row
from tests.pipeline.scanned import make_scan

MISSION, DETECTOR = Scan((800, 800), (0.2275, 0.2275)), Detector((128, 128), 1 / 25.6)
FRAMES = 800 * 800 * 128 * 128 * 2
SETTINGS = PtychographySettings(slices=5, slice_thickness_angstrom=28.0, detector_padding=0.0)
GIB = 2**30


def choice(room, **changes):
    return chosen(MISSION, DETECTOR, 2, (32, 32), SETTINGS.model_copy(update=changes), room, tilts=36)


def test_a_tilt_that_fits_a_worker_is_left_in_one_piece():
    assert choice(Room(64 * GIB)) is None
    assert choice(Room(64 * GIB, workers=8)) is None
    assert choice(Room(64 * GIB, threads=2)) is not None


def test_a_tilt_that_does_not_fit_is_spread_over_the_workers_and_held_if_it_fits_them_together():
    found = choice(Room(8 * GIB, workers=4))
    assert found.tiles_yx == (2, 2)
    assert found.resident
    assert 0.25 * FRAMES < found.need.held_patterns < 0.3 * FRAMES
    assert found.need.per_worker(1) < 8 * GIB


def test_what_workers_cannot_hold_together_is_read_from_the_store():
    found = choice(Room(int(1.5 * GIB), workers=2))
    assert not found.resident
    assert found.need.held_patterns == 0
    row = plan_row(MISSION, DETECTOR, 2, 36, SETTINGS, Room(int(1.5 * GIB), workers=2))
    assert row.bytes_per_worker(2, 1) <= 1.5 * GIB
    assert row.bytes_read == 36 * FRAMES * (2 + passes(SETTINGS))


def test_blocks_of_neighbours_are_read_once_in_an_epoch():
    assert passes(SETTINGS.model_copy(update={"batch_block": 8})) == SETTINGS.epochs
    assert passes(SETTINGS) > 4 * SETTINGS.epochs


def test_tiles_that_were_asked_for_are_kept():
    found = choice(Room(64 * GIB), tiles=(3, 7))
    assert found.tiles_yx == (3, 7)
    assert found.resident
    assert not choice(Room(64 * GIB), tiles=(3, 7), frames="store").resident


def test_strips_of_neighbours_are_as_wide_as_a_pattern_and_the_margins():
    two, four = (choice(Room(64 * GIB), tiles=tiles).need.strips for tiles in ((1, 2), (1, 4)))
    assert four == pytest.approx(3 * two, rel=0.02)
    # One seam: as many pixels as the object is high, a pattern and margins wide, twice: gradient and illumination.
    height = 800 * 0.2275 / 0.2 + 128
    assert two == pytest.approx(2 * height * (128 + 8) * (5 * 4 + 4), rel=0.05)


def test_tiles_are_alike_at_shards_if_they_can_be_else_at_chunks():
    assert [y for y, x in cuts_of(MISSION, (5, 1), (32, 32))] == [(y, y + 160) for y in range(0, 800, 160)]
    uneven = [y[1] - y[0] for y, x in cuts_of(MISSION, (16, 1), (32, 32))]
    assert set(uneven) == {48, 56}
    assert len(cuts_of(Scan((20, 18), (1, 1)), (9, 9), (8, 8))) == 9


def test_every_thread_has_a_tile_and_none_waits_for_a_second_one():
    for workers in (2, 6, 36, 64, 100, 512):
        rows, columns = choice(Room(2 * GIB, workers), frames="store").tiles_yx
        assert 0.95 * workers <= rows * columns <= workers


def test_the_cost_model_is_the_patterns_over_the_threads_until_the_scheduler_is_the_limit():
    few, many = (choice(Room(4 * GIB, workers), frames="store") for workers in (16, 400))
    rates = Rates(pattern_s=2e-3, task_s=5e-4, bytes_per_s=1e12)
    alone = MISSION.count * SETTINGS.epochs * 2e-3
    found = estimate(SETTINGS, few, 16, rates)
    assert found.seconds == pytest.approx(alone / 16, rel=0.1)
    assert found.busy > 0.99
    slow = estimate(SETTINGS, many, 400, Rates(2e-3, 5e-3, 1e12))
    assert slow.seconds > 2 * alone / 400
    assert slow.tasks == slow.steps * (400 * 6 + 1)
    search = SETTINGS.model_copy(update={"rule": "lbfgs", "settling_epochs": SETTINGS.epochs})
    assert estimate(search, few, 16, rates).steps == SETTINGS.epochs


def test_what_cannot_fit_is_refused_with_the_number_and_what_would(tmp_path):
    store = make_scan(tmp_path / "scan.zarr")
    settings = PtychographySettings(tiles=(2, 2), frames="memory")
    with pytest.raises(MemoryPlanError, match=r"needs 0\.\d+ GiB on each of 1 worker.*has 0\.03 GiB.*tiles = .auto"):
        layout_of(store, 0, settings, Room(2**25, 1, 2))


def groups(room, tilts=36, **changes):
    settings = SETTINGS.model_copy(update=changes)
    return groups_of(MISSION, DETECTOR, 2, (32, 32), settings, room, tilts, tilts)


def test_tilts_are_spread_before_tiles_are():
    assert groups(Room(6 * GIB, 4)) == 1  # 21 GB of patterns fit four workers together, and not two
    assert groups(Room(6 * GIB, 16)) == 4
    assert groups(Room(6 * GIB, 512)) == 36
    assert groups(Room(6 * GIB, 512), tilts=3) == 3
    # Out of core a worker can do with a tilt of its own; but 28 of 64 would have none in the end.
    assert groups(Room(2 * GIB, 36), frames="store") == 36
    assert groups(Room(2 * GIB, 64), frames="store") == 9


def test_the_plan_of_many_workers_is_that_of_groups():
    def seconds_of(choice, workers, groups):
        return 400.0 / workers

    row = plan_row(MISSION, DETECTOR, 2, 36, SETTINGS, Room(6 * GIB, 16), seconds_of)
    assert row.stage == "ptychography, 2 x 2 tiles"
    assert row.seconds == 9 * 100.0
    assert row.bytes_per_worker(16, 1) <= 6 * GIB
    curve = dict(row.seconds_over_workers)
    assert curve[16] == row.seconds
    assert curve[512] == pytest.approx(400 / 14)
    assert curve[1] == 36 * 400
    assert "ptychography over workers: 1: 4.0 h" in str(MemoryPlan([row]))


def test_stitched_tiles_take_their_halos_meetings_and_the_fit_of_the_probe():
    stitched = SETTINGS.model_copy(update={"tile_mode": "stitch", "stitch_halo": 16})
    exact = choice(Room(4 * GIB, 16), frames="store", tiles=(4, 4))
    found = chosen(MISSION, DETECTOR, 2, (32, 32), stitched.model_copy(update={"frames": "store", "tiles": (4, 4)}),
                   Room(4 * GIB, 16), tilts=36)  # fmt: skip
    assert found.need.positions == exact.need.positions
    assert found.need.strips == exact.need.strips
    inner = max(b - a for (a, b), _ in cuts_of(MISSION, (4, 4), (32, 32)))
    assert found.need.alone.positions == (inner + 32) ** 2
    assert found.need.alone.pairs == 4 * 3 * 2 + 3 * 3 * 2  # sides and corners
    # Of one pair side by side: u is compared once; u, transmission and weight are sent both ways; the probes of two.
    pair = chosen(MISSION, DETECTOR, 2, (32, 32), stitched.model_copy(update={"frames": "store", "tiles": (1, 2)}),
                  Room(64 * GIB, 2), tilts=36)  # fmt: skip
    common = 800 * 0.2275 / 0.2 * (32 * 0.2275 / 0.2 + 128 + 8) + 128 * (32 * 0.2275 / 0.2 + 128 + 8)
    expected = common * ((5 * 4 + 4) + 2 * (5 * 4 + 5 * 8 + 4)) + 2 * 128 * 128 * 8
    assert pair.need.alone.bytes_moved == pytest.approx(expected, rel=0.03)
    assert meetings_of(stitched, 20) == (10, 12)  # after 2, 4 ... 18 and at the end; checkpoints after 5 and 15
    alone = alone_epochs(stitched, SETTINGS.epochs)
    rates = Rates(pattern_s=2e-3, task_s=0.0, bytes_per_s=1e15)
    meetings, polished = meetings_of(stitched, alone)[0], SETTINGS.epochs - alone
    row = estimate(stitched, found, 16, rates)
    own = MISSION.count / 16 * polished * 2e-3
    wider = (inner + 32) ** 2 * alone * 2e-3
    looked = meetings * meeting_seconds(stitched, (inner + 32) ** 2, 2e-3)
    assert row.seconds == pytest.approx(own + wider + looked + 32**2 * SETTINGS.epochs * 2e-3, rel=0.05)
    assert row.bytes_moved == meetings * found.need.alone.bytes_moved + row.steps * found.need.strips
    # A scheduler that takes its time is what tiles on their own are for.
    slow = Rates(2e-3, 0.5, 1e12)
    assert estimate(stitched, found, 16, slow).seconds < 0.7 * estimate(SETTINGS, exact, 16, slow).seconds
