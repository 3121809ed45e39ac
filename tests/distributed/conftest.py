from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from stemtomo.distributed import Executor, executor
from stemtomo.distributed.threads import ThreadExecutor


@pytest.fixture(scope="session")
def client() -> Iterator[Any]:
    """Client of two worker processes of one thread each."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture(params=["threads", "cluster"])
def workers(request: pytest.FixtureRequest) -> Executor:
    """Each kind of executor in turn: what holds for one must hold for the other."""
    if request.param == "threads":
        return ThreadExecutor(2)
    return executor(request.getfixturevalue("client"))
