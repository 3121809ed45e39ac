"""The cluster of ``--workers`` forgets what is done."""

from __future__ import annotations

import gc

from distributed import default_client, wait
from distributed.scheduler import TaskGroup

from stemtomo.distributed.local import local_cluster

WAVES = 15


def test_nothing_of_finished_work_stays_in_the_scheduler() -> None:
    with local_cluster(1) as client:
        assert default_client() is client
        scheduler = client.cluster.scheduler
        for wave in range(WAVES):
            futures = [client.submit(pow, number, wave, pure=False) for number in range(4)]
            assert client.gather(futures) == [number**wave for number in range(4)]
            wait(futures)
            del futures
            client.sync(_forgotten, scheduler)
        gc.collect()
        # Other tests' clusters may have left groups of their own.
        groups = [each for each in gc.get_objects() if isinstance(each, TaskGroup) and each.name.startswith("pow")]
        assert len(groups) <= 2  # of the last wave or two; Dask as it comes keeps one of every wave
        assert not scheduler.tasks


async def _forgotten(scheduler: object) -> None:
    import asyncio

    while scheduler.tasks:  # type: ignore[attr-defined]
        await asyncio.sleep(0.01)
