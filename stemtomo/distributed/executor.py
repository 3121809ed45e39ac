"""Where tasks run: on the active Dask client, else on a pool of threads. The engine calls both in the same way."""

from __future__ import annotations

import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from stemtomo.distributed.interruption import stop_here
from stemtomo.distributed.memory import Usage

if TYPE_CHECKING:
    from distributed import Client

Handle: TypeAlias = Any
"""A value that is being computed, or lies on a worker. It lives as long as somebody holds the handle."""

Place: TypeAlias = str | None
"""Where a part lives; ``None`` leaves the choice to the scheduler."""

TASK_THREAD = "stemtomo-task"


class Executor(ABC):
    """Runs functions on threads or on a cluster; results stay where they were made until they are gathered.

    Tasks are deterministic functions of their arguments that never change them: a value is shared between tasks, and
    a task whose result was lost with its worker is run again.
    """

    @property
    @abstractmethod
    def workers(self) -> int:
        """Number of tasks that run at the same time."""

    @abstractmethod
    def places(self, count: int) -> tuple[Place, ...]:
        """Return a place for each of ``count`` parts; neighbours in the list share a worker as far as possible."""

    def threads_at(self, place: Place) -> int:
        """Return how many tasks run at the same time at ``place``, at least one."""
        return 1

    @property
    def members(self) -> int:
        """Number of workers: processes of a cluster, or the one process of threads."""
        return 1

    def groups(self, count: int) -> list[Executor]:
        """Return executors of up to ``count`` groups of the workers, alike in size, which share none.

        Each is for a thread of its own of the caller. Threads of one process are one group.
        """
        return [self]

    @abstractmethod
    def submit_at(self, place: Place, function: Callable[..., Any], /, *args: Any, urgent: bool = False) -> Handle:
        """Submit ``function(*args)`` to ``place``; ``urgent`` tasks go first (sums, which free what they sum)."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Handle:
        """Submit ``function(*args, **kwargs)``; it runs once every handle among its arguments is ready.

        Handles may be nested in lists, tuples and dicts; the function sees their values.
        """
        if kwargs:
            return self.submit_at(None, _call, function, args, kwargs)
        return self.submit_at(None, function, *args)

    def together(self) -> Executor:
        """Return an executor that keeps what is submitted to it for one message, :meth:`send`; for a single thread.

        This one where a task is no message.
        """
        return self

    def send(self, handles: Any) -> Any:
        """Submit what :meth:`together` kept; return the same nest of handles, which alone outlive it."""
        return handles

    @abstractmethod
    def gather(self, handles: Any) -> Any:
        """Wait for the handles nested in ``handles`` and return the same nest of values.

        A task's exception is raised here with its own type and traceback.
        """

    @abstractmethod
    def broadcast(self, value: Any) -> Handle:
        """Return a handle of ``value``, sent to each worker that needs it at most once."""

    @abstractmethod
    def usage(self) -> Usage:
        """Return the processor seconds of all processes at work, and the largest resident memory among them."""

    @abstractmethod
    def _wait_any(self, handles: Sequence[Handle]) -> None:
        """Wait until at least one of ``handles`` has ended."""

    def wait(self, handles: Iterable[Handle]) -> None:
        """Wait until all ``handles`` have ended, in whatever way."""
        pending = list(handles)
        while pending := [handle for handle in pending if not handle.done()]:
            self._wait_any(pending)

    def as_completed(self, handles: Iterable[Handle]) -> Iterator[tuple[int, Any]]:
        """Yield ``(index, value)`` of each handle as its task ends."""
        pending = dict(enumerate(handles))
        try:
            while pending:
                yield from self._ended(pending)
        finally:
            pending.clear()

    def map_bounded(
        self, function: Callable[..., Any], items: Iterable[Any], *shared: Any, window: int | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Yield ``(index, function(item, *shared))`` in the order in which the tasks end.

        At most ``window`` tasks are submitted and not yet yielded at any time, so that a long list of items (tilts)
        neither fills the queue nor the memory with results that nobody has taken yet. Closing the iterator drops
        the tasks that have not begun.

        Parameters
        ----------
        window
            Default: twice the number of tasks that a cluster runs at once; the number of threads without one.
        """
        window = self._default_window() if window is None else max(1, window)
        source = enumerate(items)
        pending: dict[int, Handle] = {}
        try:
            while True:
                stop_here("what is finished is kept")
                while len(pending) < window and (following := next(source, None)) is not None:
                    pending[following[0]] = self.submit_at(None, function, following[1], *shared)
                if not pending:
                    return
                yield from self._ended(pending, limit=1)
        finally:
            pending.clear()

    def _default_window(self) -> int:
        return 2 * self.workers

    def _ended(self, pending: dict[int, Handle], limit: int | None = None) -> Iterator[tuple[int, Any]]:
        """Wait for some of ``pending``, then remove and yield those that have ended, at most ``limit`` of them."""
        self._wait_any(list(pending.values()))
        for index in [index for index, handle in pending.items() if handle.done()][:limit]:
            yield index, self.gather(pending.pop(index))


def executor(client: Client | None = None) -> Executor:
    """Return the executor of ``client``, else of the active Dask client, else a pool of threads.

    Inside a task (of either kind) it is a single thread of that task: what a task cuts into parts runs there one after
    another, and workers are neither oversubscribed nor blocked by waiting for each other.
    """
    from stemtomo.distributed.cluster import ClientExecutor
    from stemtomo.distributed.threads import ThreadExecutor

    if client is None and _inside_task():
        return ThreadExecutor(1)
    client = _active_client() if client is None else client
    return ThreadExecutor() if client is None else ClientExecutor(client)


def same(value: Any) -> Any:
    """Return ``value``: the task that makes a value known to the workers."""
    return value


def _inside_task() -> bool:
    if threading.current_thread().name.startswith(TASK_THREAD):
        return True
    if "distributed" not in sys.modules:
        return False
    import distributed  # waits for another thread that is still importing it

    try:
        distributed.get_worker()
    except ValueError:
        return False
    return True


def _active_client() -> Client | None:
    # Importing distributed takes most of a second; where nobody has imported it there is no client either.
    if "distributed" not in sys.modules:
        return None
    import distributed

    try:
        return distributed.default_client()
    except ValueError:
        return None


def _call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)
