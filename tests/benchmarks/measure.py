"""What work costs: processor seconds, wall seconds, peak memory, and the ratio to a floor of the same run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One measured figure.

    ``floor`` is what the unavoidable part of the work takes when it is done alone, in the same unit; ``ratio`` is the
    figure over the floor for costs, and its inverse for rates, so that 1 is perfect and more is worse.
    """

    benchmark: str
    work: str
    figure: float
    unit: str
    floor: float | None = None
    ratio: float | None = None


def cost_row(benchmark: str, work: str, figure: float, unit: str, floor: float | None = None) -> Row:
    """Return the row of a cost (less is better)."""
    return Row(benchmark, work, figure, unit, floor, figure / floor if floor else None)


def rate_row(benchmark: str, work: str, figure: float, unit: str, floor: float | None = None) -> Row:
    """Return the row of a rate (more is better)."""
    return Row(benchmark, work, figure, unit, floor, floor / figure if floor else None)


def cpu_seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    """Return the processor seconds, all threads, of the cheapest of ``repeats`` calls, after one that warms up."""
    work()
    costs = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        costs.append(time.process_time() - began)
    return min(costs)


class Run(NamedTuple):
    """A process that has ended, and what it and its own children used."""

    result: Any
    cpu_s: float
    wall_s: float
    peak_rss_mb: float


def python(module: str, arguments: Sequence[str], timeout_s: float = 900) -> Run:
    """Run ``python -m module arguments`` and return the JSON of the last line it prints, and its resource usage."""
    began = time.perf_counter()
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            printed, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    wall = time.perf_counter() - began
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {process.returncode}")
    result = json.loads(printed.strip().splitlines()[-1])
    usage = result["usage"]
    return Run(result["result"], usage["cpu_s"], wall, usage["peak_rss_mb"])


def print_result(result: Any) -> None:
    """Print ``result`` and what this process has used as one line of JSON, for :func:`python`."""
    from stemtomo.distributed.memory import usage

    spent = usage()
    print(json.dumps({"result": result, "usage": {"cpu_s": spent.cpu_seconds, "peak_rss_mb": spent.peak_rss_mb}}))


def table(rows: Sequence[Row]) -> str:
    """Return ``rows`` as aligned text."""
    cells = [("benchmark", "work", "figure", "unit", "floor", "ratio")]
    cells += [
        (row.benchmark, row.work, _number(row.figure), row.unit, _number(row.floor), _number(row.ratio)) for row in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def machine() -> dict[str, Any]:
    """Return what figures depend on: processor, cores, Python and package versions."""
    import platform

    from stemtomo.io.provenance import package_versions

    names = [line.partition(":")[2].strip() for line in _cpu_info() if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0))
    return {"processor": names[0] if names else platform.machine(), "cores": cores, "versions": package_versions()}


def _cpu_info() -> list[str]:
    return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
