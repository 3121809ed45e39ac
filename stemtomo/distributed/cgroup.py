"""What this process may use: processors and memory, as the operating system and its control groups (v1, v2) allow."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

from stemtomo.distributed.allocation import allocated_cpus

_MEMORY_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))  # v2, v1


def available_cpus(root: Path = Path("/")) -> int:
    """Return the number of processors this process may keep busy: its affinity, cut by its control groups' quotas.

    In a SLURM job it is at most what the job was given.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for directory in _group_directories("cpu", root):
        quota, period = _cpu_quota(directory)
        if quota > 0 and period > 0:
            count = min(count, max(1, math.ceil(quota / period)))
    return min(count, allocated_cpus() or count)


def group_memory_bytes(root: Path = Path("/")) -> int | None:
    """Return the bytes that the tightest control group above this process leaves it, or ``None`` without a limit.

    File pages that the kernel can drop at once count as free.
    """
    rooms = []
    for directory in _group_directories("memory", root):
        for limit_name, usage_name in _MEMORY_FILES:
            limit = _read_int(directory / limit_name)
            usage = _read_int(directory / usage_name)
            if limit is not None and usage is not None and limit < 1 << 60:  # v1 writes about 2**63 for "no limit"
                rooms.append(max(0, limit - usage + _reclaimable_bytes(directory)))
    return min(rooms, default=None)


def system_memory_bytes(root: Path = Path("/")) -> int:
    """Return the bytes of memory the machine can give without swapping (MemAvailable), else its physical memory."""
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    except OSError:
        pass  # no /proc on this system: fall through to the POSIX number
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _group_directories(controller: str, root: Path) -> Iterator[Path]:
    """Yield the directories of this process's group and of all groups above it, for one controller."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top = mount
        elif controller in controllers.split(","):
            top = mount / controller
        else:
            continue
        group = top / path.lstrip("/")
        while group != top:
            yield group
            group = group.parent
        yield top


def _cpu_quota(directory: Path) -> tuple[int, int]:
    try:  # v2: "max 100000" or "200000 100000"
        quota, period = (directory / "cpu.max").read_text().split()
        return (-1 if quota == "max" else int(quota)), int(period)
    except (OSError, ValueError):
        return _read_int(directory / "cpu.cfs_quota_us") or -1, _read_int(directory / "cpu.cfs_period_us") or -1


def _reclaimable_bytes(directory: Path) -> int:
    try:
        fields = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
