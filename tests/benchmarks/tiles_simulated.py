"""Many workers that are not there: the tasks of tiled steps run through a simulated scheduler, network and workers.

Every task waits for its inputs, then for the one scheduler, then for its worker; results that lie elsewhere travel
first. The graph is that of :class:`~stemtomo.pipeline.tiles.TiledRun`. Its costs are measured here: a pattern on a
core, a task on the scheduler of Distributed, a submission in the client.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stemtomo.distributed.executor import Executor
from stemtomo.distributed.memory import Usage, peak_rss_mb, usage
from stemtomo.distributed.parts import Parts
from stemtomo.geometry import Scan
from stemtomo.pipeline.config import PtychographySettings
from stemtomo.pipeline.solving import alone_epochs, epochs_of, rule_of
from stemtomo.pipeline.tile_bundles import SMALL_FAN_IN
from stemtomo.pipeline.tile_cost import meeting_seconds, meetings_of
from stemtomo.pipeline.tile_layout import Room, chosen, groups_of, with_known_halo
from stemtomo.pipeline.tile_need import Alone
from stemtomo.pipeline.tiles import Schedule, Standing, TiledRun
from tests.benchmarks.measure import Row, cost_row

SCAN, PIXELS, TILTS = Scan((800, 800), (0.2275, 0.2275)), 128, 36
SETTINGS = PtychographySettings(slices=5, slice_thickness_angstrom=28.0, detector_padding=0.0, epochs=60)
STITCHED = SETTINGS.model_copy(update={"tile_mode": "stitch"})


@dataclass(frozen=True)
class Costs:
    """Seconds of a pattern on a core and of a task on the scheduler; of a message, and bytes per second of a link."""

    pattern_s: float
    task_s: float
    latency_s: float = 1e-3
    bytes_per_s: float = 1e9
    #: Scatter of the time that equal work takes on different workers.
    scatter: float = 0.05


@dataclass
class _Task:
    worker: int
    seconds: float
    inputs: Sequence[int]
    out_bytes: float
    waits: int = 0
    after: list[int] = field(default_factory=list)


class Graph:
    """Tasks of steps of one or more groups of tiles."""

    def __init__(self) -> None:
        self.tasks: list[_Task] = []

    def add(self, worker: int, seconds: float, inputs: Sequence[int], out_bytes: float = 0.0) -> int:
        """Add a task and return its number."""
        number = len(self.tasks)
        self.tasks.append(_Task(worker, seconds, inputs, out_bytes, len(inputs)))
        for other in inputs:
            self.tasks[other].after.append(number)
        return number

    def run(self, costs: Costs) -> np.ndarray:
        """Return when each task ends, (task,) in seconds."""
        tasks, ended = self.tasks, np.zeros(len(self.tasks))
        scheduler, workers = 0.0, {task.worker: 0.0 for task in tasks}
        order = itertools.count()
        # Messages to the scheduler: a task that may begin, or one that has ended.
        queue = [(0.0, next(order), n, False) for n, task in enumerate(tasks) if not task.waits]
        heapq.heapify(queue)
        while queue:
            now, _, number, is_end = heapq.heappop(queue)
            scheduler = max(scheduler, now) + costs.task_s / 2
            task = tasks[number]
            if is_end:
                for other in task.after:
                    tasks[other].waits -= 1
                    if not tasks[other].waits:
                        heapq.heappush(queue, (scheduler, next(order), other, False))
                continue
            far = [tasks[n].out_bytes for n in task.inputs if tasks[n].worker != task.worker]
            moved = sum(far) / costs.bytes_per_s + (costs.latency_s if far else 0)
            begin = max(workers[task.worker], scheduler + costs.latency_s)
            workers[task.worker] = ended[number] = begin + moved + task.seconds
            heapq.heappush(queue, (ended[number] + costs.latency_s, next(order), number, True))
        return ended


def steps_of_group(
    graph: Graph, tiles_yx: tuple[int, int], first: int, seconds: Sequence[float], strip_bytes: float, steps: int
) -> list[list[int]]:
    """Add ``steps`` steps of a group whose tile n is on worker ``first`` + n; return the updates of every step."""
    rows, columns = tiles_yx
    places = list(itertools.product(range(rows), range(columns)))
    near = [
        [n for n, (a, b) in enumerate(places) if max(abs(a - y), abs(b - x)) == 1]  # windows reach their neighbours'
        for y, x in places
    ]
    busy, light = np.asarray(seconds), strip_bytes / 2e9
    work = [graph.add(first + n, s, []) for n, s in enumerate(busy)]
    ends = []
    for step in range(steps):
        # A strip for each side; corners lie in those above and below.
        sides = {(n, _side(places[n], places[to])) for n in range(len(work)) for to in near[n]}
        strips = {key: graph.add(first + key[0], light, [work[key[0]]], strip_bytes) for key in sorted(sides)}
        inputs = [
            [work[n], *(strips[other, _side(places[other], places[n])] for other in near[n])] for n in range(len(work))
        ]
        nodes = [graph.add(first + n, light, some, 1e5) for n, some in enumerate(inputs)]
        while True:
            groups = [nodes[n : n + SMALL_FAN_IN] for n in range(0, len(nodes), SMALL_FAN_IN)]
            nodes = [graph.add(graph.tasks[group[0]].worker, 1e-4, group, 1e5) for group in groups]
            if len(nodes) == 1:
                break
        more = busy if step + 1 < steps else np.zeros(len(busy))
        work = [graph.add(first + n, light + s, [nodes[0], *inputs[n]]) for n, s in enumerate(more)]
        ends.append(work)
    return ends


def meeting_of_group(
    graph: Graph,
    tiles_yx: tuple[int, int],
    first: int,
    seconds: Sequence[float],
    look_s: float,
    bytes_moved: float,
    reach: int,
) -> list[int]:
    """Add epochs of tiles on their own, ``seconds`` each, and the meeting behind them; return the blended tiles.

    Tiles overlap up to ``reach`` rows and columns away; each looks at its illumination for ``look_s``.
    """
    rows, columns = tiles_yx
    places = list(itertools.product(range(rows), range(columns)))
    near = [[n for n, (a, b) in enumerate(places) if 0 < max(abs(a - y), abs(b - x)) <= reach] for y, x in places]
    pairs = [(n, other) for n, some in enumerate(near) for other in some if other > n]
    strip = bytes_moved / max(1, 3 * len(pairs))  # one to compare, one each way to blend
    light = strip / 2e9
    alone = [graph.add(first + n, s, []) for n, s in enumerate(seconds)]
    sums = _summed(graph, [graph.add(first + n, 1e-4, [one], 1e3) for n, one in enumerate(alone)], 4)
    pieces = [graph.add(first + n, look_s, [one]) for n, one in enumerate(alone)]
    compared = []
    for one, other in pairs:
        strips = [graph.add(first + n, light, [pieces[n]], strip) for n in (one, other)]
        compared.append(graph.add(first + one, light, strips, 1e3))
    solved = graph.add(first, 1e-3 * len(pieces), [*compared, sums], 1e3 * len(pieces))
    shares = [graph.add(first + n, light, [piece, solved]) for n, piece in enumerate(pieces)]
    sent = {(n, to): graph.add(first + n, light, [shares[n]], strip) for n, some in enumerate(near) for to in some}
    blends = [graph.add(first + n, light, [shares[n], *(sent[to, n] for to in near[n])]) for n in range(len(places))]
    probe = _summed(graph, [graph.add(first + n, 1e-4, [one], 1e5) for n, one in enumerate(alone)], 4)
    return [graph.add(first + n, light, [blend, probe, solved]) for n, blend in enumerate(blends)]


def _summed(graph: Graph, nodes: list[int], fan_in: int) -> int:
    while len(nodes) > 1:
        groups = [nodes[n : n + fan_in] for n in range(0, len(nodes), fan_in)]
        nodes = [graph.add(graph.tasks[group[0]].worker, 1e-4, group, 1e5) for group in groups]
    return nodes[0]


def meeting_period(tiles_yx: tuple[int, int], groups: int, alone: Alone, epochs: int, costs: Costs) -> float:
    """Return the seconds from one meeting to the next while all groups are at work."""
    graph, rng, ends = Graph(), np.random.default_rng(0), []
    count, looked = math.prod(tiles_yx), meeting_seconds(STITCHED, alone.positions, costs.pattern_s)
    reach = 1 if alone.pairs <= 4 * count else 2
    for group in range(groups):
        seconds = epochs * alone.positions * costs.pattern_s * rng.lognormal(0, costs.scatter, size=count)
        ends += meeting_of_group(graph, tiles_yx, group * count, seconds.tolist(), looked, alone.bytes_moved, reach)
    return float(graph.run(costs)[ends].max())


def stitched_hours(workers: int, costs: Costs) -> tuple[float, int, tuple[int, int]]:
    """Return :func:`series_hours` of tiles that are stitched: the fit of the probe, runs and meetings, exact epochs."""
    from tests.benchmarks.tiles import OPTICS, detector_of

    settings = with_known_halo(STITCHED, SCAN, OPTICS)
    shared = (SCAN, detector_of(PIXELS), 2, (32, 32), settings)
    groups = groups_of(*shared, Room(4 << 30, workers), TILTS, TILTS)
    choice = chosen(*shared, Room(4 << 30, workers // groups), TILTS)
    assert choice is not None
    assert choice.need.alone is not None
    _, batches = epochs_of(settings)
    alone = alone_epochs(settings, len(batches))
    tiles, turns = math.prod(choice.tiles_yx), math.ceil(math.prod(choice.tiles_yx) * groups / workers)
    seconds = settings.stitch_probe_positions**2 * settings.epochs * costs.pattern_s
    meetings, _ = meetings_of(settings, alone)
    seconds += meetings * turns * meeting_period(choice.tiles_yx, groups, choice.need.alone, alone // meetings, costs)
    patterns, strip = choice.need.positions * turns, choice.need.strips / max(1, 8 * tiles)
    seconds += len(batches[alone:]) * step_seconds(choice.tiles_yx, groups, patterns, strip, costs)
    return math.ceil(TILTS / groups) * seconds / 3600, groups, choice.tiles_yx


def _side(of: tuple[int, int], to: tuple[int, int]) -> tuple[int, int]:
    return (to[0] - of[0], 0) if to[0] != of[0] else (0, to[1] - of[1])


def step_seconds(
    tiles_yx: tuple[int, int], groups: int, patterns: float, strip_bytes: float, costs: Costs, steps: int = 4
) -> float:
    """Return the seconds of a step, on average over the last ones, while all groups are at work."""
    graph, rng, found = Graph(), np.random.default_rng(0), []
    count = math.prod(tiles_yx)
    for group in range(groups):
        seconds = patterns * costs.pattern_s * rng.lognormal(0, costs.scatter, size=count)
        found.append(steps_of_group(graph, tiles_yx, group * count, seconds, strip_bytes, steps))
    ended = graph.run(costs)
    marks = [max(ended[work].max() for work in (each[step] for each in found)) for step in (0, steps - 2)]
    return float(marks[1] - marks[0]) / (steps - 2)


def series_hours(workers: int, costs: Costs, grouped: bool = True) -> tuple[float, int, tuple[int, int]]:
    """Return the hours of the whole series on ``workers`` workers of one core, the groups, and the tiles of a tilt."""
    from tests.benchmarks.tiles import detector_of

    detector, room = detector_of(PIXELS), Room(4 << 30, workers)
    shared = (SCAN, detector, 2, (32, 32), SETTINGS)
    groups = groups_of(*shared, room, TILTS, TILTS) if grouped else 1
    choice = chosen(*shared, Room(4 << 30, workers // groups), TILTS)
    assert choice is not None
    _, batches = epochs_of(SETTINGS)
    seconds = 0.0
    for count in sorted(set(batches)):
        tiles = math.prod(choice.tiles_yx)
        strip = choice.need.strips / max(1, 8 * tiles)
        # A tile of one worker exchanges nothing; more tiles than workers take their turns.
        patterns = choice.need.positions / count * math.ceil(tiles * groups / workers)
        seconds += batches.count(count) * count * step_seconds(choice.tiles_yx, groups, patterns, strip, costs)
    return math.ceil(TILTS / groups) * seconds / 3600, groups, choice.tiles_yx


class Unmanned(Executor):
    """Workers that do nothing: what is left is what the client does."""

    def __init__(self, workers: int) -> None:
        self._workers, self.tasks = workers, 0

    @property
    def workers(self) -> int:
        """Number of workers that there would be."""
        return self._workers

    def places(self, count: int) -> tuple[str, ...]:
        """Return their names."""
        return tuple(f"worker {index * self._workers // count}" for index in range(count))

    def submit_at(self, place: Any, function: Any, /, *args: Any, urgent: bool = False) -> Any:
        """Count a task and return a stand-in for its handle."""
        self.tasks += 1
        return _Handle(place, function, args)

    def gather(self, handles: Any) -> Any:
        """Return a loss."""
        return 1.0

    def broadcast(self, value: Any) -> Any:
        """Return a stand-in for a handle."""
        return _Handle(None, None, ())

    def usage(self) -> Usage:
        """Return what this process has used."""
        return usage()

    def _wait_any(self, handles: Sequence[Any]) -> None:
        return


class _Handle:
    __slots__ = ("key",)

    def __init__(self, place: Any, function: Any, args: Any) -> None:
        self.key = f"{getattr(function, '__name__', '')}-{id(args):x}"


def client_cost(workers: int) -> dict[str, float]:
    """Return the client's processor seconds for all tasks of one tilt on its group, their number, and its memory."""
    from tests.benchmarks.tiles import detector_of

    began = time.process_time()
    shared = (SCAN, detector_of(PIXELS), 2, (32, 32), SETTINGS)
    groups = groups_of(*shared, Room(4 << 30, workers), TILTS, TILTS)
    members = workers // groups
    choice = chosen(*shared, Room(4 << 30, members), TILTS)
    assert choice is not None
    rows, columns = choice.tiles_yx
    height, width = 1000 // rows, 1000 // columns
    windows = [
        ((y * height, (y + 1) * height + 64), (x * width, (x + 1) * width + 64))
        for y, x in itertools.product(range(rows), range(columns))
    ]
    nobody = Unmanned(members)
    fields = Parts.create(nobody, len, windows)
    rules, batches = epochs_of(SETTINGS)
    schedule = Schedule([rule_of(SETTINGS)] * len(rules), batches, SCAN.count)
    planned, now = time.process_time() - began, Standing(fields)
    run = TiledRun(nobody, fields, windows, schedule)
    began = time.process_time()
    for epoch in range(schedule.epochs):
        now = run.epoch(now, epoch)
    spent = time.process_time() - began
    return {"plan_s": planned, "tilt_s": spent, "tasks": float(nobody.tasks), "rss_mb": peak_rss_mb()}


def scheduler_cost(steps: int = 40, tiles: int = 16) -> tuple[float, float]:
    """Return the processor seconds per task of scheduler and client of a cluster of two workers, and of submitting."""
    from distributed import Client, LocalCluster

    from stemtomo.distributed.cluster import ClientExecutor

    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with LocalCluster(**options) as cluster, Client(cluster, set_as_default=False) as client:
        executor = ClientExecutor(client)
        places = executor.places(tiles)
        work = [executor.submit_at(place, _nothing) for place in places]
        executor.gather(work)
        count, began, own = 0, time.process_time(), time.thread_time()
        for _ in range(steps):
            # The shape of a step: a task of each tile on neighbours' results, sums of four, and a task on the sum.
            halos = [
                executor.submit_at(place, _nothing, work[n], work[n - 1], work[(n + 1) % tiles])
                for n, place in enumerate(places)
            ]
            sums = [executor.submit_at(None, _nothing, *halos[n : n + 4], urgent=True) for n in range(0, tiles, 4)]
            total = executor.submit_at(None, _nothing, *sums, urgent=True)
            work = [executor.submit_at(place, _nothing, total, halos[n]) for n, place in enumerate(places)]
            count += 2 * tiles + len(sums) + 1
        own = time.thread_time() - own
        executor.gather(work)
        spent = time.process_time() - began
    return spent / count, own / count


def _nothing(*_: Any) -> None:
    return None


def simulated_rows() -> list[Row]:
    """Return what was measured and the hours of the series over numbers of workers."""
    from tests.benchmarks.tiles import patterns_per_cpu_second

    pattern_s = 1 / patterns_per_cpu_second(PIXELS, 256, SETTINGS.slices)
    task_s, submit_s = scheduler_cost()
    rows = [
        Row("tiles, simulated", "a pattern, 128 x 128 pixels, 5 slices", pattern_s * 1e3, "CPU ms"),
        Row("tiles, simulated", "a task: scheduler and client", task_s * 1e3, "CPU ms"),
        Row("tiles, simulated", "a task: its submission alone", submit_s * 1e3, "CPU ms"),
    ]
    for workers in (64, 512):
        found = client_cost(workers)
        work = f"{workers} workers, 36 tilts"
        rows += [
            Row("tiles, client", f"{work}: tasks", TILTS * found["tasks"], "tasks"),
            Row("tiles, client", f"{work}: making the tasks", TILTS * found["tilt_s"] + found["plan_s"], "CPU s"),
            Row("tiles, client", f"{work}: memory", found["rss_mb"], "MB peak"),
        ]
    costs = Costs(pattern_s, task_s)
    for workers in (8, 16, 36, 64, 128, 256, 512):
        ideal = SCAN.count * SETTINGS.epochs * pattern_s * TILTS / workers / 3600
        for grouped in (True, False):
            hours, groups, tiles = series_hours(workers, costs, grouped)
            work = f"36 x 800 x 800, {workers} workers in {groups} groups, {tiles[0]} x {tiles[1]} tiles"
            rows.append(cost_row("tiles, simulated", work, hours, "h", ideal))
        hours, groups, tiles = stitched_hours(workers, costs)
        work = f"36 x 800 x 800, {workers} workers in {groups} groups, {tiles[0]} x {tiles[1]} tiles, stitched"
        rows.append(cost_row("tiles, simulated", work, hours, "h", ideal))
    return rows
