import numpy as np
import pytest

from stemtomo.algorithms.ptychography.windows import object_grid, spread_batches
from stemtomo.geometry import Scan


def test_a_window_is_centred_on_its_position_to_a_fraction_of_a_pixel():
    positions = Scan((3, 5), (1.7, 0.9), rotation_rad=0.2).positions()
    grid = object_grid(positions, (16, 20), (0.4, 0.3))
    # The centre of window and object is index n // 2; the position is what corner, centre and remainder add up to.
    y = (grid.corners[:, 0] + 8 - grid.shape_yx[0] // 2 + grid.shifts_px[:, 1]) * 0.4
    x = (grid.corners[:, 1] + 10 - grid.shape_yx[1] // 2 + grid.shifts_px[:, 0]) * 0.3
    np.testing.assert_allclose(np.stack([x, y], axis=1), positions, atol=1e-12)
    assert np.abs(grid.shifts_px).max() <= 0.5


def test_every_window_of_an_open_specimen_lies_within_the_object():
    grid = object_grid(Scan((4, 9), (2.0, 2.0)).positions(), (17, 12), (0.4, 0.4))
    assert grid.corners.min() >= 0
    assert (grid.corners + np.array(grid.window_yx)).max(axis=0)[0] <= grid.shape_yx[0]
    assert (grid.corners + np.array(grid.window_yx)).max(axis=0)[1] <= grid.shape_yx[1]


def test_a_scan_on_the_pixel_grid_shifts_no_probe():
    assert object_grid(Scan((24, 24), (1.6, 1.6)).positions(), (64, 64), (0.4, 0.4)).on_pixels
    assert not object_grid(Scan((24, 24), (1.5, 1.6)).positions(), (64, 64), (0.4, 0.4)).on_pixels


def test_a_periodic_object_is_one_period_and_must_be_whole_pixels():
    scan = Scan((24, 24), (0.4, 0.4), origin="pixel", periodic=True)
    grid = object_grid(scan.positions(), (24, 24), (0.4, 0.4), scan.extent_angstrom_yx)
    assert grid.shape_yx == (24, 24)
    # Scan index n // 2 is the rotation centre: its window starts at pixel 0.
    assert grid.corners[12 * 24 + 12].tolist() == [0, 0]
    with pytest.raises(ValueError, match="whole pixels"):
        object_grid(scan.positions(), (24, 24), (0.35, 0.4), scan.extent_angstrom_yx)


def test_batches_hold_every_position_once():
    batches = spread_batches(101, 8, seed=3)
    assert sorted(np.concatenate(batches).tolist()) == list(range(101))
    assert {len(batch) for batch in batches} == {12, 13}
    assert len(spread_batches(3, 8, seed=0)) == 3
