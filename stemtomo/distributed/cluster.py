"""The executor of a Dask cluster."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from stemtomo.distributed.executor import Executor, Handle, Place, same
from stemtomo.distributed.memory import Usage, usage
from stemtomo.distributed.trees import find, replace

if TYPE_CHECKING:
    from distributed import Client


class ClientExecutor(Executor):
    """Runs tasks on the workers of a :class:`distributed.Client`.

    Every value is made by a task whose arguments the scheduler keeps, so that the values of a lost worker are
    computed again from the last checkpoint or from the data.

    Parameters
    ----------
    among
        Addresses of the workers that tasks prefer; all unless given. Others take over when these are lost.
    """

    def __init__(self, client: Client, among: Sequence[str] = ()) -> None:
        from stemtomo.distributed.allocator import KeepBuffers
        from stemtomo.distributed.revival import Revival

        self.client, self.among = client, tuple(among)
        if among:
            return  # a group of a cluster whose executor has done the rest
        client.register_plugin(KeepBuffers(), name=KeepBuffers.name)
        client.register_plugin(Revival(), name=Revival.name)

    @property
    def workers(self) -> int:
        """Number of threads of all workers, at least one."""
        return max(1, sum(self._threads().values()))

    @property
    def members(self) -> int:
        """Number of workers."""
        return max(1, len(self._threads()))

    def groups(self, count: int) -> list[Executor]:
        """Return executors of groups of workers, runs of neighbours in the order of their addresses."""
        addresses = sorted(self._threads())
        count = max(1, min(count, len(addresses)))
        if count == 1:
            return [self]
        bounds = [len(addresses) * index // count for index in range(count + 1)]
        return [ClientExecutor(self.client, addresses[a:b]) for a, b in itertools.pairwise(bounds)]

    def _threads(self) -> dict[str, int]:
        """Return the threads of the workers that live, by their addresses."""
        found = self.client.nthreads()
        mine = {address: found[address] for address in self.among if address in found}
        return mine or dict(found)

    def places(self, count: int) -> tuple[Place, ...]:
        """Return worker addresses in runs of neighbours, in proportion to the workers' threads."""
        slots = [address for address, threads in sorted(self._threads().items()) for _ in range(threads)]
        if not slots:  # a cluster that is still growing
            return (None,) * count
        return tuple(slots[index * len(slots) // count] for index in range(count))

    def submit_at(self, place: Place, function: Callable[..., Any], /, *args: Any, urgent: bool = False) -> Handle:
        """Submit ``function(*args)``, preferring the worker ``place`` as long as it lives."""
        preferred = list(self.among) if place is None else [place]
        where: dict[str, Any] = {"workers": preferred, "allow_other_workers": True} if preferred else {}
        return self.client.submit(function, *args, pure=False, priority=int(urgent), **where)

    def gather(self, handles: Any) -> Any:
        """Fetch the values of the handles nested in ``handles``."""
        from distributed import Future

        values = iter(self.client.gather(list(find(handles, Future))))
        return replace(handles, Future, lambda _: next(values))

    def broadcast(self, value: Any) -> Handle:
        """Return a handle of ``value``.

        The value travels inside a task: scattered data would be lost for good with the workers that hold it.
        """
        return self.submit_at(None, same, value)

    def usage(self) -> Usage:
        """Return the sum of processor seconds and the largest memory over this process and the workers."""
        everyone = [usage(), *self.client.run(usage).values()]
        return Usage(sum(each.cpu_seconds for each in everyone), max(each.peak_rss_mb for each in everyone))

    def _wait_any(self, handles: Sequence[Handle]) -> None:
        from distributed import wait

        with self.client.as_current():
            wait(handles, return_when="FIRST_COMPLETED")
