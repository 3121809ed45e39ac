"""What SLURM allocated, for sites whose SLURM sets no control group and no affinity: its environment says it."""

from __future__ import annotations

import os
from collections.abc import Mapping


def allocated_cpus(environ: Mapping[str, str] = os.environ) -> int | None:
    """Return the processors of this task in its SLURM job, ``None`` outside of one."""
    if "SLURM_JOB_ID" not in environ:
        return None
    return _number(environ, "SLURM_CPUS_PER_TASK") or _number(environ, "SLURM_CPUS_ON_NODE")


def allocated_memory_bytes(environ: Mapping[str, str] = os.environ) -> int | None:
    """Return the memory of its SLURM job on this node, ``None`` outside of one or where the whole node was given."""
    if "SLURM_JOB_ID" not in environ:
        return None
    mebibytes = _number(environ, "SLURM_MEM_PER_NODE")
    if mebibytes is None:
        per_cpu, cpus = _number(environ, "SLURM_MEM_PER_CPU"), _number(environ, "SLURM_CPUS_ON_NODE")
        mebibytes = per_cpu * cpus if per_cpu and cpus else None
    return mebibytes * 2**20 if mebibytes else None


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "")
    return int(text) if text.isdecimal() and int(text) > 0 else None
