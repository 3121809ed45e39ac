"""How frames are cut: chunks and shards that fit scans and detectors of any size."""

from __future__ import annotations

import numpy as np
import pytest

from stemtomo.io.schema import frame_shards, shard_positions_for


@pytest.mark.parametrize(
    ("scan", "shards"),
    [((800, 800), (32, 32)), ((24, 24), (24, 24)), ((20, 100), (24, 32)), ((5, 3), (5, 3)), ((33, 8), (32, 8))],
)
def test_shards_cover_at_most_the_scan_and_hold_whole_chunks(scan: tuple[int, int], shards: tuple[int, int]) -> None:
    assert frame_shards((*scan, 16, 16)) == (*shards, 16, 16)


def test_a_shard_of_a_large_detector_is_smaller() -> None:
    limit = 128 * 2**20
    assert shard_positions_for((256, 256), np.dtype("u2"), limit) == 32
    assert shard_positions_for((576, 576), np.dtype("u2"), limit) == 8 * 1  # 32 x 32 would be 680 MB, 16 x 16 170 MB
    assert shard_positions_for((256, 256), np.dtype("f4"), limit) == 16
