from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from stemtomo.distributed import MemoryPlan, PlanRow, available_memory_bytes, cpu_seconds, peak_rss_mb
from stemtomo.distributed.cgroup import available_cpus, group_memory_bytes, system_memory_bytes
from stemtomo.errors import MemoryPlanError

GIB = 1 << 30


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_group_version_2_limits_memory_at_the_tightest_level(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/job/step\n",
            "sys/fs/cgroup/job/step/memory.max": "max\n",
            "sys/fs/cgroup/job/step/memory.current": "1000\n",
            "sys/fs/cgroup/job/memory.max": "8000\n",
            "sys/fs/cgroup/job/memory.current": "3000\n",
            "sys/fs/cgroup/job/memory.stat": "anon 2500\ninactive_file 500\n",
            "sys/fs/cgroup/job/cpu.max": "150000 100000\n",
            "proc/meminfo": "MemTotal: 100 kB\nMemAvailable: 20 kB\n",
        },
    )
    assert group_memory_bytes(root) == 8000 - 3000 + 500
    assert system_memory_bytes(root) == 20 * 1024
    assert available_cpus(root) <= 2


def test_group_version_1_limits_memory_and_processors(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "9:name=systemd:/\n4:memory:/job\n2:cpu,cpuacct:/job\n0::/\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "6000\n",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "7000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "7000\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
        },
    )
    assert group_memory_bytes(root) == 0
    assert available_cpus(root) == 1


def test_without_limits_the_machine_counts(tmp_path: Path) -> None:
    assert group_memory_bytes(tmp_path) is None
    assert system_memory_bytes(tmp_path) > 1 << 26
    assert 1 << 26 < available_memory_bytes() <= system_memory_bytes() * 1.5


def test_usage_of_this_process_grows_with_work_and_memory() -> None:
    before = cpu_seconds()
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass
    assert 0.02 < cpu_seconds() - before < 5
    block = np.ones(1 << 23)
    assert peak_rss_mb() > block.nbytes / 1e6


def plan() -> MemoryPlan:
    return MemoryPlan(
        [
            PlanRow(
                "quicklook", tasks=144, bytes_per_task=GIB // 8, bytes_read=10 * GIB, bytes_written=GIB, seconds=40
            ),
            PlanRow("ptychography", 36, 3 * GIB, bytes_read=10 * GIB, seconds=4000),
            PlanRow("tomography", tasks=16, bytes_per_task=GIB, seconds=7200, resident_bytes=16 * GIB),
        ]
    )


def test_plan_that_fits_passes() -> None:
    plan().check(6 * GIB, workers=4, threads=2)
    MemoryPlan([]).check(0)


def test_need_of_a_worker_counts_what_it_holds_and_what_it_runs_at_once() -> None:
    rows = plan().rows
    assert rows[1].bytes_per_worker(workers=4, threads=2) == 6 * GIB
    assert rows[2].bytes_per_worker(workers=4, threads=2) == (4 + 2) * GIB
    assert rows[2].bytes_per_worker(workers=16, threads=2) == (1 + 1) * GIB


def test_refusal_names_stage_need_limit_and_what_would_fit() -> None:
    with pytest.raises(MemoryPlanError) as caught:
        plan().check(10 * GIB, workers=1, threads=4)
    text = str(caught.value)
    assert "tomography needs 20.0 GiB on each of 1 worker(s) (16.0 GiB held + 4 task(s) at once x 1.0 GiB)" in text
    assert "a worker has 10.0 GiB" in text
    assert "3 workers" in text
    assert "workers with 20.0 GiB" in text
    MemoryPlan(plan().rows[2:]).check(10 * GIB, workers=3, threads=4)
    with pytest.raises(MemoryPlanError, match=r"2 thread\(s\) per worker; or tasks of at most 1\.8 GiB"):
        MemoryPlan(plan().rows[:2]).check(7 * GIB, workers=1, threads=4)
    assert isinstance(caught.value, MemoryError)


def test_plan_is_json_and_a_table_with_units() -> None:
    record = json.loads(json.dumps(plan().to_dict()))
    assert record["seconds"] == 11240
    assert record["bytes_read"] == 20 * GIB
    assert record["rows"][1]["stage"] == "ptychography"
    lines = str(plan()).splitlines()
    assert lines[0].split() == ["stage", "tasks", "per", "task", "held", "read", "written", "time"]
    assert lines[1].split() == ["quicklook", "144", "128.0", "MiB", "-", "10.0", "GiB", "1.0", "GiB", "40", "s"]
    assert lines[3].split()[-2:] == ["2.0", "h"]
    assert len({len(line) for line in lines}) == 1
    unknown = MemoryPlan([PlanRow("denoise", 1, 10)])
    assert str(unknown).splitlines()[-1].endswith("?")
    assert unknown.to_dict()["seconds"] is None


def test_the_peak_of_a_process_is_not_that_of_its_launcher() -> None:
    block = np.ones(50_000_000)  # 400 MB
    told = subprocess.run(
        [sys.executable, "-c", "from stemtomo.distributed.memory import peak_rss_mb; print(peak_rss_mb())"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(told.stdout) < block.nbytes / 1e6 < peak_rss_mb()
