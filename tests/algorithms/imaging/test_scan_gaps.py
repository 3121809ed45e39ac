"""Positions without a frame: rows of a stopped scan are cut off, gaps are filled with what is beside them."""

import numpy as np

from stemtomo.algorithms.imaging.scan_gaps import fill_gaps, whole_part


def test_what_is_mostly_missing_at_the_rim_is_cut_off():
    valid = np.ones((10, 8), bool)
    assert whole_part(valid) == (slice(0, 10), slice(0, 8))
    valid[7, 3:] = valid[8:] = False  # a scan that stopped in its eighth row
    valid[:, 0] = False
    valid[4] = False  # a row in the middle stays: the scan goes on after it
    assert whole_part(valid) == (slice(0, 7), slice(1, 8))
    assert whole_part(np.zeros((3, 3), bool)) == (slice(0, 3), slice(0, 3))


def test_gaps_take_what_is_beside_them_and_nothing_else_changes():
    y, x = np.indices((12, 14))
    ramp = np.stack([3.0 * x + 2 * y, np.full(x.shape, 7.0)], axis=-1)
    valid = np.ones(x.shape, bool)
    valid[5, 6] = valid[8:10, 2] = False
    filled = fill_gaps(np.where(valid[..., None], ramp, 1e6), valid)
    np.testing.assert_array_equal(filled[valid], ramp[valid])
    np.testing.assert_allclose(filled, ramp, atol=0.3)  # steps of 3 and 2: the plane around a point has its mean
    valid[:, 7:] = False
    np.testing.assert_allclose(fill_gaps(ramp, valid)[3, 13], ramp[valid].mean(axis=0))
    assert fill_gaps(ramp, np.ones(x.shape, bool)) is ramp
