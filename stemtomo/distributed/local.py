"""A cluster on this machine for as long as work may take: Dask's histories, made for its dashboard, are left out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import dask
from distributed import Client, LocalCluster
from distributed.spans import SpansSchedulerExtension

# Profiles of what workers do (kept for an hour), tasks of past computations, and the latest messages and transitions,
# with all that a message carried.
_SHORT = {
    "distributed.worker.profile.enabled": False,
    "distributed.diagnostics.computations.max-history": 1,
    "distributed.admin.low-level-log-length": 100,
}
#: Time that workers have to end.
_PATIENCE_S = 30


class NoSpans(SpansSchedulerExtension):
    """Keeps nothing: Dask's own keeps the groups of tasks of every computation for as long as the scheduler lives."""

    def observe_tasks(self, *_: Any, **__: Any) -> dict[Any, dict[str, Any]]:
        """Assign the tasks to no span."""
        return {}

    def heartbeat(self, *_: Any) -> None:
        """Drop the metrics of spans that a worker sends; those of the scheduler as a whole go another way."""


@contextmanager
def local_cluster(workers: int) -> Iterator[Client]:
    """Start ``workers`` processes of one thread each; their client is the active one inside."""
    with dask.config.set(_SHORT):
        cluster = LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None)
        try:
            cluster.scheduler.extensions["spans"] = NoSpans(cluster.scheduler)
            with Client(cluster) as client:
                yield client
        finally:
            # A busy machine may be slow to end a worker, whose nanny then kills it; the work is done by now.
            with suppress(TimeoutError):
                cluster.close(timeout=_PATIENCE_S)
