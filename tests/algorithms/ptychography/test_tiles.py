"""Tiles own every position once, their windows hold every pattern, and batches do not depend on the cut."""

import numpy as np
import pytest

from stemtomo.algorithms.ptychography.tiles import batch_of, cut_scan, edges, rectangles
from stemtomo.algorithms.ptychography.windows import object_grid, spread_batches
from stemtomo.geometry import Scan

SCAN = Scan((13, 17), (1.7, 1.3), rotation_rad=0.1)
GRID = object_grid(SCAN.positions(), (16, 20), (0.4, 0.4))
EVERY = np.arange(SCAN.count)


@pytest.mark.parametrize("tiles", [(1, 1), (2, 2), (3, 3), (4, 4), (13, 1), (1, 17), (2, 5)])
@pytest.mark.parametrize("margin", [0, 4])
def test_every_position_has_one_owner_whose_window_holds_its_pattern(tiles, margin):
    found = cut_scan(GRID, SCAN.shape_yx, EVERY, rectangles(SCAN.shape_yx, tiles), margin)
    assert len(found) == tiles[0] * tiles[1]
    np.testing.assert_array_equal(np.sort(np.concatenate([tile.where for tile in found])), EVERY)
    for tile in found:
        (y0, y1), (x0, x1) = tile.window
        assert 0 <= y0 < y1 <= GRID.shape_yx[0]
        assert 0 <= x0 < x1 <= GRID.shape_yx[1]
        assert tile.grid.shape_yx == (y1 - y0, x1 - x0)
        assert tile.grid.corners.min() >= 0
        assert ((tile.grid.corners + np.array([16, 20])) <= tile.grid.shape_yx).all()
        np.testing.assert_array_equal(tile.grid.corners + np.array([y0, x0]), GRID.corners[tile.where])
        rows, columns = np.divmod(tile.where, 17)
        assert ((rows >= tile.scan[0][0]) & (rows < tile.scan[0][1])).all()
        assert ((columns >= tile.scan[1][0]) & (columns < tile.scan[1][1])).all()


def test_tiles_begin_at_shards_and_there_are_no_more_of_them_than_shards():
    assert edges(100, 3, 32) == [0, 32, 64, 100]
    assert edges(100, 9, 32) == [0, 32, 64, 96, 100]
    assert edges(800, 4, 32) == [0, 192, 384, 576, 800]
    assert edges(5, 1) == [0, 5]
    assert rectangles((100, 40), (2, 1), (32, 32)) == [((0, 64), (0, 40)), ((64, 100), (0, 40))]


def test_positions_that_were_not_recorded_have_no_tile():
    recorded = np.flatnonzero(EVERY // 17 >= 5)
    grid = object_grid(SCAN.positions()[recorded], (16, 20), (0.4, 0.4))
    tiles = cut_scan(grid, SCAN.shape_yx, recorded, rectangles(SCAN.shape_yx, (3, 1)))
    assert [tile.scan[0] for tile in tiles] == [(4, 8), (8, 13)]
    np.testing.assert_array_equal(np.concatenate([tile.where for tile in tiles]), np.arange(len(recorded)))


def test_rectangles_that_overlap_or_leave_positions_out_are_refused():
    with pytest.raises(ValueError, match="overlaps another"):
        cut_scan(GRID, SCAN.shape_yx, EVERY, [((0, 13), (0, 9)), ((0, 13), (8, 17))])
    with pytest.raises(ValueError, match="26 recorded positions lie in no tile"):
        cut_scan(GRID, SCAN.shape_yx, EVERY, [((0, 13), (0, 15))])


def test_a_periodic_object_is_seen_whole_by_every_tile():
    scan = Scan((8, 8), (1.6, 1.6), periodic=True)
    grid = object_grid(scan.positions(), (16, 16), (0.4, 0.4), scan.extent_angstrom_yx)
    for tile in cut_scan(grid, scan.shape_yx, np.arange(64), rectangles((8, 8), (2, 2))):
        assert tile.window == ((0, 32), (0, 32))
        assert len(tile.where) == 16


def test_batches_are_those_of_the_whole_scan():
    batches = spread_batches(101, 7, seed=3)
    found = batch_of(101, 7, seed=3)
    for number, members in enumerate(batches):
        np.testing.assert_array_equal(np.flatnonzero(found == number), members)
