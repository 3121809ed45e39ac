"""Watch on a Dask cluster of two processes: the store that threads make, and one killed worker changes nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client, LocalCluster

from stemtomo.distributed.cluster import ClientExecutor
from stemtomo.io.store import Store
from stemtomo.pipeline.watch import watch
from tests.clock import ScriptedClock
from tests.io.cases import digest
from tests.pipeline.acquisitions import ANGLES, appended, configuration, frames, ingested, tilts_of


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, memory_limit="1GiB"
        ) as cluster,
        Client(cluster, set_as_default=False) as running,
    ):
        yield running


def watched(client: Client, folder: Path, steps: list[Callable[[], Any]]) -> tuple[Any, int]:
    config = configuration(folder / "in")
    reports = list(
        watch(folder / "in", folder / "s.zarr", config, clock=ScriptedClock(steps), executor=ClientExecutor(client))
    )
    return config, reports[-1].frames


def acquisition(folder: Path) -> tuple[np.ndarray, list[Callable[[], Any]]]:
    (folder / "in").mkdir()
    data = frames()
    names = [folder / "in" / f"scan_{angle:g}.raw" for angle in ANGLES]
    interleaved = [appended(names[tilt], data[tilt].tobytes(), [70001] * 5) for tilt in (2, 0)]
    steps = [step for pair in zip(*interleaved, strict=True) for step in pair]
    return data, steps + appended(names[1], data[1].tobytes(), [200000])


@pytest.mark.heavy
def test_two_processes_make_the_store_that_threads_make(tmp_path: Path, client: Client) -> None:
    data, steps = acquisition(tmp_path)
    config, count = watched(client, tmp_path, steps)
    assert count == data.shape[0] * data.shape[1] * data.shape[2]
    assert tilts_of(digest(tmp_path / "s.zarr")) == ingested(config, tmp_path / "plain.zarr")
    looked = Store.open(tmp_path / "s.zarr").read("quicklook/001")
    np.testing.assert_array_equal(looked["total_counts"], data[1].sum(axis=(2, 3)))


def test_a_killed_worker_costs_time_only(tmp_path: Path, client: Client) -> None:
    data, steps = acquisition(tmp_path)
    pids = list(client.run(os.getpid).values())
    steps.insert(6, lambda: os.kill(pids[0], signal.SIGKILL))
    config, count = watched(client, tmp_path, steps)
    assert count == data.shape[0] * data.shape[1] * data.shape[2]
    assert tilts_of(digest(tmp_path / "s.zarr")) == ingested(config, tmp_path / "plain.zarr")
