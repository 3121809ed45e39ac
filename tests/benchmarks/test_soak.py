"""A long-lived cluster keeps nothing of the series that went through it."""

import pytest

from tests.benchmarks.soak import WORKERS, slope_mb, soak


def test_the_slope_is_that_after_the_warm_up():
    loading = [100.0 + 40 * step for step in range(5)]
    assert slope_mb([*loading, *(300 + 0.5 * step for step in range(15))]) == pytest.approx(0.5)


@pytest.mark.heavy
@pytest.mark.timeout(900)  # a minute or two on an idle machine
def test_memory_stays_flat_over_many_small_series(tmp_path):
    looks = soak(20, tmp_path)
    for look in looks:
        assert look.worker_results == 0
        assert look.scheduler_tasks == 0
        assert look.client_futures == 0
    for worker in range(WORKERS):
        held = [look.worker_rss_mb[worker] for look in looks[4:]]  # the first load libraries and compile
        assert slope_mb(held) < 0.6, held  # MB a series; with the profiles of Dask it was 0.8 to 1
