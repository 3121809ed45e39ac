from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import traceback
import weakref
from typing import Any, NamedTuple

import numpy as np
import pytest

from stemtomo.distributed import Executor, executor
from stemtomo.distributed.cluster import ClientExecutor
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.errors import FormatError


def add(a: float, b: float = 0.0) -> float:
    return a + b


def total_of(nest: dict[str, Any]) -> float:
    return sum(nest["list"]) + nest["deep"]["tuple"][0][1]


def fail(value: float) -> float:
    raise FormatError(f"frame {value} is truncated")


def sleep_then(index: int, seconds: float) -> int:
    time.sleep(seconds)
    return index


def inner_sum(count: int) -> tuple[int, str, int]:
    inner = executor()
    handles = [inner.submit(add, index, 1) for index in range(count)]
    return inner.workers, type(inner).__name__, sum(inner.gather(handles))


class Pair(NamedTuple):
    one: float
    other: float


class Big:
    """A value that can be watched."""


def test_import_of_the_engine_leaves_dask_alone() -> None:
    code = (
        "import sys, stemtomo.distributed as d; e = d.executor(); assert e.gather(e.submit(abs, -2)) == 2; "
        "assert 'distributed' not in sys.modules and 'dask' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_another_thread_may_just_be_importing_dask() -> None:
    code = (
        "import threading; from stemtomo.distributed import executor\n"
        "thread = threading.Thread(target=__import__, args=('distributed',)); thread.start()\n"
        "while thread.is_alive(): executor()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_executor_is_the_given_client_else_the_active_one_else_threads(client: Any) -> None:
    assert isinstance(executor(), ThreadExecutor)
    assert isinstance(executor(client), ClientExecutor)
    with client.as_current():
        active = executor()
        assert isinstance(active, ClientExecutor)
        assert active.client is client
        assert active.workers == 2


def test_thread_count_is_what_the_process_may_use() -> None:
    assert 1 <= ThreadExecutor().workers <= len(os.sched_getaffinity(0))


def test_handles_nested_in_arguments_reach_the_function_as_values(workers: Executor) -> None:
    one, two = workers.submit(add, 1.0), workers.submit(add, 1.0, b=1.0)
    nest = workers.submit(total_of, {"list": [one, two, 4], "deep": {"tuple": ((0, two),)}})
    keyword = workers.submit(add, 1.0, b=nest)
    assert workers.gather({"a": (one, [two, nest]), "b": keyword, "c": "plain"}) == {
        "a": (1, [2, 9]),
        "b": 10,
        "c": "plain",
    }


def test_broadcast_value_and_nested_handles_are_values_in_tasks(workers: Executor) -> None:
    shared = workers.broadcast({"list": [1, workers.submit(add, 1, 1)], "deep": {"tuple": ((0, 5),)}})
    assert workers.gather(workers.submit(total_of, shared)) == 8


def test_exception_keeps_its_type_text_and_traceback_through_dependent_tasks(workers: Executor) -> None:
    last = workers.submit(add, workers.submit(fail, 7), 1)
    with pytest.raises(FormatError, match="frame 7 is truncated") as caught:
        workers.gather([last])
    assert "fail" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert workers.gather(workers.submit(add, 1, 1)) == 2


def test_wait_returns_when_all_have_ended_failed_or_not(workers: Executor) -> None:
    handles = [workers.submit(fail, 1), workers.submit(sleep_then, 1, 0.1), workers.submit(add, 1)]
    workers.wait(handles)
    assert all(handle.done() for handle in handles)


def test_as_completed_yields_every_index_once(workers: Executor) -> None:
    handles = [workers.submit(add, index, 10) for index in range(7)]
    assert dict(workers.as_completed(handles)) == {index: index + 10 for index in range(7)}


def test_map_bounded_yields_in_completion_order(workers: Executor) -> None:
    workers.gather([workers.submit(sleep_then, 0, 0.0) for _ in range(4)])
    results = list(workers.map_bounded(add, [5, 6, 7], 1))
    assert dict(results) == {0: 6, 1: 7, 2: 8}
    slow_first = [index for index, _ in ThreadExecutor(2).map_bounded(sleep_then, [0, 1], 0.0)]
    assert sorted(slow_first) == [0, 1]
    order = [value for _, value in ThreadExecutor(2).map_bounded(time_then, [(0, 0.3), (1, 0.0)])]
    assert order == [1, 0]


def time_then(item: tuple[int, float]) -> int:
    return sleep_then(*item)


def test_map_bounded_keeps_at_most_a_window_of_results() -> None:
    pool = ThreadExecutor(2)
    alive: list[weakref.ref[Big]] = []
    lock = threading.Lock()

    def make(_: int) -> Big:
        value = Big()
        with lock:
            alive.append(weakref.ref(value))
        return value

    for _, value in pool.map_bounded(make, range(50), window=3):
        with lock:
            assert sum(ref() is not None for ref in alive) <= 3 + 1
        del value
    assert len(alive) == 50


def test_map_bounded_raises_the_task_error_and_drops_the_rest() -> None:
    pool = ThreadExecutor(1)
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 1:
            raise FormatError("bad tilt")
        return item

    with pytest.raises(FormatError, match="bad tilt"):
        list(pool.map_bounded(work, range(100), window=2))
    assert len(begun) <= 4


def test_dropped_handles_are_freed_and_what_nobody_awaits_is_not_run() -> None:
    pool = ThreadExecutor(1)
    value = Big()
    alive = weakref.ref(value)
    handle = pool.submit(lambda held: held, value)
    chained = pool.submit(lambda held: 1, handle)
    assert pool.gather(chained) == 1
    del value, handle, chained
    pool.gather(pool.submit(add, 1, 1))
    gc.collect()
    assert alive() is None

    gate = threading.Event()
    ran: list[int] = []
    first = pool.submit(gate.wait)
    dropped = pool.submit(ran.append, 1)
    kept = pool.submit(ran.append, 2)
    del dropped
    gate.set()
    pool.gather([first, kept])
    assert ran == [2]


def test_released_values_leave_the_cluster(client: Any) -> None:
    cluster = executor(client)
    handle = cluster.submit(np.zeros, 1 << 20)
    cluster.gather(cluster.submit(np.sum, handle))
    assert handle.key in client.who_has()
    key = handle.key
    del handle
    deadline = time.monotonic() + 5
    while key in client.who_has() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert key not in client.who_has()


def nested(*args: Any) -> Any:
    return args


@pytest.mark.parametrize("on_cluster", [False, True])
def test_one_message_of_tasks_takes_handles_of_before_and_of_itself_at_any_depth(client: Any, on_cluster: bool) -> None:
    workers = executor(client) if on_cluster else ThreadExecutor(1)
    before, together = workers.submit(add, 1, 1), workers.together()
    inside = together.submit(add, before, 1)
    plain = {"list": [1, (2, Pair(3, 4))]}
    nest = {"list": [before, [inside]], "deep": (inside, Pair(before, 5)), "plain": plain}
    found = workers.gather(together.send([together.submit(nested, nest, [nest["deep"], 6], plain, inside), inside]))
    deep = (3, Pair(2, 5))
    expected = ({"list": [2, [3]], "deep": deep, "plain": plain}, [deep, 6], plain, 3)
    assert found == [expected, 3]
    assert type(found[0][0]["deep"][1]) is Pair
    assert type(found[0][2]["list"][1][1]) is Pair


def address(*_: Any) -> str:
    from distributed import get_worker

    return str(get_worker().address)


def test_tasks_that_go_together_run_where_they_are_told(client: Any) -> None:
    places = sorted(client.nthreads())
    together = ClientExecutor(client).together()
    handles = [together.submit_at(place, address, index, urgent=index > 2) for index, place in enumerate(places * 3)]
    last = together.submit_at(places[1], address, handles)
    assert client.gather(together.send([*handles, last])) == [*places * 3, places[1]]


def test_tasks_that_go_together_are_made_of_public_parts_of_dask(client: Any) -> None:
    """What a release of Dask has to keep for them: it says here what is missing, not in a run."""
    from dask import annotate
    from dask.task_spec import GraphNode, List, Task, TaskRef
    from distributed import Future

    assert issubclass(Future, TaskRef)
    inner = Task("inner", add, 1, 2)
    outer = Task("outer", nested, List(TaskRef("inner"), 5), Task(None, add, TaskRef("inner"), 1))
    assert isinstance(outer, GraphNode)
    workers = {key: list(client.nthreads()) for key in ("inner", "outer")}
    with annotate(workers=workers.get, priority={"inner": 1, "outer": 0}.get, allow_other_workers=True):
        (found,) = client.get({"inner": inner, "outer": outer}, ["outer"], sync=False)
    assert found.result() == ([3, 5], 4)


def test_thread_tasks_may_wait_for_tasks_that_wait() -> None:
    pool = ThreadExecutor(1)
    handle = pool.broadcast(0)
    for _ in range(200):
        handle = pool.submit(add, handle, 1)
    assert pool.gather(handle) == 200


def test_executor_inside_a_task_is_one_thread_of_that_task(workers: Executor) -> None:
    assert workers.gather([workers.submit(inner_sum, 3) for _ in range(4)]) == [(1, "ThreadExecutor", 6)] * 4


def test_usage_counts_processor_time_of_all_processes(workers: Executor) -> None:
    usage = workers.usage()
    assert usage.cpu_seconds > 0
    assert 10 < usage.peak_rss_mb < 1e5
