"""Series that are larger than the memory: what is submitted, and what workers hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.pipeline.quicklook import quicklook
from tests.pipeline.test_quicklook import make_store


class Counting(ThreadExecutor):
    submitted = 0

    def submit_at(self, *args: Any, **kwargs: Any) -> Any:
        self.submitted += 1
        return super().submit_at(*args, **kwargs)


def test_tasks_count_shards_and_not_frames(tmp_path: Path) -> None:
    counts = {}
    for edge in (8, 16):
        frames = np.random.default_rng(0).poisson(4, (1, 3 * edge, 2 * edge, 8, 8)).astype("u2")
        executor = Counting(2)
        quicklook(make_store(tmp_path / f"{edge}.zarr", frames, edge), executor=executor)
        counts[edge] = executor.submitted
    assert counts[8] == counts[16] <= 4 * 6  # six shards of 64 or 256 frames


@pytest.mark.heavy
def test_two_workers_take_a_series_of_ten_times_their_memory() -> None:
    from tests.benchmarks.two_workers import out_of_core

    found = out_of_core(640)
    assert found["series"]["bytes"] >= 10 * 2 * 640 * 2**20
    assert found["series"]["difference"] == 0
    for stage in ("ingest", "quicklook"):
        assert found[stage]["peak_rss_mb"] < 0.8 * 640 * 2**20 / 1e6  # where a worker pauses
        assert (found[stage]["spilled_bytes"], found[stage]["paused"]) == (0, 0)
