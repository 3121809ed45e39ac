"""The memory plan: what a stage will hold, read and write, checked before anything runs; and what it did use."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stemtomo.distributed.allocation import allocated_memory_bytes
from stemtomo.distributed.cgroup import group_memory_bytes, system_memory_bytes
from stemtomo.errors import MemoryPlanError
from stemtomo.process import peak_rss_mb


def available_memory_bytes() -> int:
    """Return the bytes of memory this process can still take: the machine's, cut by its control groups and SLURM job.

    Of the job's memory, what this process holds already is taken off.
    """
    limits = [system_memory_bytes(), group_memory_bytes()]
    allocated = allocated_memory_bytes()
    if allocated is not None:
        limits.append(max(0, allocated - resident_bytes()))
    return min(limit for limit in limits if limit is not None)


def resident_bytes() -> int:
    """Return the bytes of memory that this process holds now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


class Usage(NamedTuple):
    """What processes have used since they started."""

    cpu_seconds: float
    peak_rss_mb: float


def cpu_seconds() -> float:
    """Return the processor seconds, user and system, of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def usage() -> Usage:
    """Return processor seconds (with those of its ended children) and peak memory of this process."""
    return Usage(cpu_seconds(), peak_rss_mb())


@dataclass(frozen=True)
class PlanRow:
    """One stage of a plan.

    Parameters
    ----------
    stage
        Name of the stage.
    tasks
        Number of tasks (or parts).
    bytes_per_task
        Peak memory of one running task, beyond what the parts hold.
    bytes_read, bytes_written
        Bytes moved from and to storage by the whole stage.
    seconds
        Estimated wall time, ``None`` where there is no measurement to base it on.
    resident_bytes
        Bytes that all parts of the stage hold together from its start to its end.
    seconds_over_workers
        Pairs of a number of workers and the seconds that they would take, where that is known.
    """

    stage: str
    tasks: int
    bytes_per_task: int
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float | None = None
    resident_bytes: int = 0
    seconds_over_workers: tuple[tuple[int, float], ...] = ()

    def bytes_per_worker(self, workers: int = 1, threads: int = 1) -> int:
        """Return the peak memory of one of ``workers`` processes that runs ``threads`` tasks at once."""
        at_once = min(threads, math.ceil(self.tasks / workers))
        return math.ceil(self.resident_bytes / workers) + at_once * self.bytes_per_task


@dataclass(frozen=True)
class MemoryPlan:
    """Tasks, memory, bytes and time of every stage; printing it gives a table."""

    rows: Sequence[PlanRow]

    def check(self, limit_bytes_per_worker: int, workers: int = 1, threads: int = 1) -> None:
        """Check that every stage fits ``workers`` processes of ``threads`` threads and ``limit_bytes_per_worker`` each.

        Raises
        ------
        MemoryPlanError
            For the stage with the largest need; the text names both numbers and what would fit.
        """
        if not self.rows:
            return
        row = max(self.rows, key=lambda row: row.bytes_per_worker(workers, threads))
        need = row.bytes_per_worker(workers, threads)
        if need <= limit_bytes_per_worker:
            return
        at_once = min(threads, math.ceil(row.tasks / workers))
        held = f"{_size(math.ceil(row.resident_bytes / workers))} held + " if row.resident_bytes else ""
        fits = _remedies(row, limit_bytes_per_worker, workers, threads)
        raise MemoryPlanError(
            f"{row.stage} needs {_size(need)} on each of {workers} worker(s) "
            f"({held}{at_once} task(s) at once x {_size(row.bytes_per_task)}), "
            f"but a worker has {_size(limit_bytes_per_worker)}. Would fit: {'; or '.join(fits)}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the rows as JSON-able dicts and the totals of bytes and seconds."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "bytes_read": sum(row.bytes_read for row in self.rows),
            "bytes_written": sum(row.bytes_written for row in self.rows),
            "seconds": _total_seconds(self.rows),
        }

    def _repr_html_(self) -> str:
        """Return the table for notebooks."""
        return f"<pre>{self}</pre>"

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [("stage", "tasks", "per task", "held", "read", "written", "time")]
        for row in self.rows:
            sizes = (row.bytes_per_task, row.resident_bytes, row.bytes_read, row.bytes_written)
            table.append((row.stage, str(row.tasks), *map(_size, sizes), _duration(row.seconds)))
        total = self.to_dict()
        moved = (_size(total["bytes_read"]), _size(total["bytes_written"]))
        table.append(("total", "", "", "", *moved, _duration(total["seconds"])))
        first, *others = (max(map(len, column)) for column in zip(*table, strict=True))
        lines = (
            [line[0].ljust(first), *(cell.rjust(width) for cell, width in zip(line[1:], others, strict=True))]
            for line in table
        )
        curves = [
            f"{row.stage.partition(',')[0]} over workers: "
            + ", ".join(f"{count}: {_duration(seconds)}" for count, seconds in row.seconds_over_workers)
            for row in self.rows
            if row.seconds_over_workers
        ]
        return "\n".join(["\n".join("  ".join(cells) for cells in lines), *curves])


def _remedies(row: PlanRow, limit: int, workers: int, threads: int) -> list[str]:
    fits = []
    room = limit - math.ceil(row.resident_bytes / workers)
    at_once = min(threads, math.ceil(row.tasks / workers))
    if at_once > 1 and room >= row.bytes_per_task:
        fits.append(f"{room // row.bytes_per_task} thread(s) per worker")
    if room > 0:
        fits.append(f"tasks of at most {_size(room // at_once)} (smaller blocks or tiles)")
    for more in range(workers + 1, row.tasks + 1):
        if row.bytes_per_worker(more, threads) <= limit:
            fits.append(f"{more} workers")
            break
    fits.append(f"workers with {_size(row.bytes_per_worker(workers, threads))}")
    return fits


def _total_seconds(rows: Sequence[PlanRow]) -> float | None:
    known = [row.seconds for row in rows if row.seconds is not None]
    return sum(known) if len(known) == len(rows) and rows else None


def _size(count: int) -> str:
    if count == 0:
        return "-"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
