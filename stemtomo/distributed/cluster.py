"""The executor of a Dask cluster."""

from __future__ import annotations

import itertools
import uuid
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

    def threads_at(self, place: Place) -> int:
        """Return the threads of the worker ``place``; one if it is gone."""
        return self._threads().get(place or "", 1)

    def submit_at(self, place: Place, function: Callable[..., Any], /, *args: Any, urgent: bool = False) -> Handle:
        """Submit ``function(*args)``, preferring the worker ``place`` as long as it lives."""
        preferred = list(self.among) if place is None else [place]
        where: dict[str, Any] = {"workers": preferred, "allow_other_workers": True} if preferred else {}
        return self.client.submit(function, *args, pure=False, priority=int(urgent), **where)

    def together(self) -> Executor:
        """Return an executor that keeps what is submitted to it for one message."""
        return _Together(self.client, self.among)

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


class _Together(ClientExecutor):
    """Keeps tasks until they are sent as one graph.

    Scheduler and client then deal with one message, and with the results that are asked for; what lies between these
    is told to nobody and is dropped as soon as it has been used. Handles are references to keys until they are sent.
    """

    def __init__(self, client: Client, among: Sequence[str]) -> None:
        self.client, self.among = client, tuple(among)
        self._tasks: dict[str, Any] = {}
        self._workers: dict[str, list[str]] = {}
        self._priorities: dict[str, int] = {}

    def submit_at(self, place: Place, function: Callable[..., Any], /, *args: Any, urgent: bool = False) -> Handle:
        """Keep ``function(*args)`` for ``place``."""
        from dask.task_spec import Task, TaskRef

        key = f"{getattr(function, '__name__', 'task')}-{uuid.uuid4()}"
        self._tasks[key] = Task(key, function, *(_argument(arg) for arg in args))
        self._workers[key] = list(self.among) if place is None else [place]
        self._priorities[key] = int(urgent)
        return TaskRef(key)

    def send(self, handles: Any) -> Any:
        """Submit what was kept and return futures in the place of ``handles``."""
        import dask
        from dask.highlevelgraph import HighLevelGraph
        from dask.task_spec import TaskRef
        from distributed import Future

        wanted = list({ref.key: ref for ref in find(handles, TaskRef) if not isinstance(ref, Future)})
        # A plain dict would be hashed task by task; of a graph of layers nothing but its name is.
        graph = HighLevelGraph.from_collections(f"together-{uuid.uuid4()}", self._tasks, dependencies=())
        # Called by the scheduler with the key of every task.
        told: dict[str, Any] = {"workers": self._workers.get, "priority": self._priorities.get}
        with dask.annotate(**told, allow_other_workers=True):
            futures = dict(zip(wanted, self.client.get(graph, wanted, sync=False), strict=True))
        self._tasks, self._workers, self._priorities = {}, {}, {}
        return replace(handles, TaskRef, lambda ref: futures.get(ref.key, ref))


def _argument(value: Any) -> Any:
    """Return ``value`` as an argument of a task of a graph, with references to keys in the place of handles."""
    from dask.task_spec import GraphNode, List, Task, TaskRef

    if isinstance(value, TaskRef):
        return TaskRef(value.key)  # of a future, the key alone
    if isinstance(value, dict):
        values = _argument(list(value.values()))
        return Task(None, _keyed, tuple(value), values) if isinstance(values, GraphNode) else value
    if not isinstance(value, list | tuple):
        return value
    found = [_argument(each) for each in value]
    if not any(isinstance(each, GraphNode | TaskRef) for each in found):
        return value
    if isinstance(value, list):
        return List(*found)
    return Task(None, type(value) if hasattr(value, "_fields") else _tuple, *found)


def _keyed(keys: tuple[Any, ...], values: list[Any]) -> dict[Any, Any]:
    return dict(zip(keys, values, strict=True))


def _tuple(*values: Any) -> tuple[Any, ...]:
    return values
