"""The executor of one process: a pool of threads that runs a task when its inputs are ready."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from stemtomo.distributed.cgroup import available_cpus
from stemtomo.distributed.executor import TASK_THREAD, Executor, Handle, Place, same
from stemtomo.distributed.memory import Usage, usage
from stemtomo.distributed.trees import find, replace

HERE = "here"


class ThreadExecutor(Executor):
    """A pool of ``threads`` threads, by default one per processor that this process may use.

    NumPy, FFTs and the numba kernels release the interpreter lock and run on one thread each, so that parts are what
    runs in parallel. A task whose handle nobody holds any more is not run.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = available_cpus() if threads is None else max(1, threads)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix=TASK_THREAD)
        self._ready: deque[weakref.ref[_TaskHandle]] = deque()
        self._lock = threading.Lock()

    @property
    def workers(self) -> int:
        """Number of threads."""
        return self._threads

    def places(self, count: int) -> tuple[Place, ...]:
        """Return ``count`` times the one place there is."""
        return (HERE,) * count

    def threads_at(self, place: Place) -> int:
        """Return the number of threads."""
        return self._threads

    def submit_at(self, place: Place, function: Callable[..., Any], /, *args: Any, urgent: bool = False) -> Handle:
        """Submit ``function(*args)``; all places are the same."""
        handle = _TaskHandle(function, args)
        waiting = weakref.ref(handle)
        inputs = set(find(args, Future))
        # The extra count keeps the task back until every input has been asked to report.
        handle.missing = len(inputs) + 1
        for item in inputs:
            item.add_done_callback(lambda _: self._input_ready(waiting, first=True))
        self._input_ready(waiting, first=urgent)
        return handle

    def gather(self, handles: Any) -> Any:
        """Return the values of the handles nested in ``handles``."""
        return _resolve(handles)

    def broadcast(self, value: Any) -> Handle:
        """Return a handle of ``value``."""
        if next(find(value, Future), None) is not None:
            return self.submit_at(HERE, same, value)
        handle: Future[Any] = Future()
        handle.set_result(value)
        return handle

    def usage(self) -> Usage:
        """Return what this process has used."""
        return usage()

    def _default_window(self) -> int:
        return self._threads

    def _wait_any(self, handles: Sequence[Handle]) -> None:
        wait(handles, return_when=FIRST_COMPLETED)

    def _input_ready(self, waiting: weakref.ref[_TaskHandle], first: bool) -> None:
        handle = waiting()
        if handle is None:
            return
        with self._lock:
            handle.missing -= 1
            if handle.missing:
                return
            # A task that an input has set free uses, and so frees, what was just made: it goes before new work.
            if first:
                self._ready.appendleft(waiting)
            else:
                self._ready.append(waiting)
        self._pool.submit(self._run_next)

    def _run_next(self) -> None:
        with self._lock:
            handle = self._ready.popleft()()
        if handle is not None:
            handle.run()


class _TaskHandle(Future[Any]):
    """The result of a call, and the call itself until it has run.

    The pool and the inputs know it by weak reference only, and it holds its inputs: whoever holds the last handle of
    a chain of tasks holds the chain, and dropping it drops all that nobody else waits for.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        super().__init__()
        self.call: tuple[Callable[..., Any], tuple[Any, ...]] | None = (function, args)
        self.missing = 0

    def run(self) -> None:
        """Run the call, once its inputs are ready, and let go of them."""
        if self.call is None:
            return
        function, args = self.call
        self.call = None
        try:
            args = _resolve(args)
            value = function(*args)
        except BaseException as error:  # the handle carries it to whoever gathers
            self.set_exception(error)
            self = None  # type: ignore[assignment]  # the traceback holds this frame, and must not hold the handle
        else:
            del args
            self.set_result(value)


def _resolve(nest: Any) -> Any:
    return replace(nest, Future, Future.result)
