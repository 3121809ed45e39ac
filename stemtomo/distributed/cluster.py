"""The executor of a Dask cluster."""

from __future__ import annotations

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
    """

    def __init__(self, client: Client) -> None:
        from stemtomo.distributed.revival import Revival

        self.client = client
        client.register_plugin(Revival(), name=Revival.name)

    @property
    def workers(self) -> int:
        """Number of threads of all workers, at least one."""
        return max(1, sum(self.client.nthreads().values()))

    def places(self, count: int) -> tuple[Place, ...]:
        """Return worker addresses in runs of neighbours, in proportion to the workers' threads."""
        slots = [address for address, threads in sorted(self.client.nthreads().items()) for _ in range(threads)]
        if not slots:  # a cluster that is still growing
            return (None,) * count
        return tuple(slots[index * len(slots) // count] for index in range(count))

    def submit_at(self, place: Place, function: Callable[..., Any], /, *args: Any, urgent: bool = False) -> Handle:
        """Submit ``function(*args)``, preferring the worker ``place`` as long as it lives."""
        where: dict[str, Any] = {} if place is None else {"workers": [place], "allow_other_workers": True}
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
        return self.client.submit(same, value, pure=False)

    def usage(self) -> Usage:
        """Return the sum of processor seconds and the largest memory over this process and the workers."""
        everyone = [usage(), *self.client.run(usage).values()]
        return Usage(sum(each.cpu_seconds for each in everyone), max(each.peak_rss_mb for each in everyone))

    def _wait_any(self, handles: Sequence[Handle]) -> None:
        from distributed import wait

        with self.client.as_current():
            wait(handles, return_when="FIRST_COMPLETED")
