"""A signal asks the work to stop: at a checkpoint, between pieces, or when the time that it was given is over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stemtomo.distributed import available_memory_bytes
from stemtomo.distributed.allocation import allocated_cpus, allocated_memory_bytes

PROGRAM = """
import sys, time
from pathlib import Path
from stemtomo.distributed import Checkpoint, executor
from stemtomo.distributed.interruption import stoppable
from stemtomo.errors import UnfinishedError

def steps(checkpoint):
    for step in range(1, 1000):
        time.sleep(0.05)
        checkpoint.begin(step, 0)
        checkpoint.commit(step, [], {"step": step})

def pieces(folder):
    for index, _ in executor().map_bounded(time.sleep, [0.05] * 1000):
        (folder / "piece").write_text(str(index))

how, folder, grace = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
with stoppable(grace, lambda text: print(text, flush=True)):
    print("ready", flush=True)
    try:
        if how == "steps":
            steps(Checkpoint(folder))
        elif how == "thread":
            workers = executor()
            workers.gather(workers.submit(steps, Checkpoint(folder)))
        elif how == "pieces":
            pieces(folder)
        else:
            time.sleep(60)
    except UnfinishedError as error:
        print(error)
        sys.exit(75)
"""


def stopped(how: str, folder: Path, grace_s: float = 30.0, number: int = signal.SIGTERM, times: int = 1) -> str:
    """Run the program, send it a signal some time after it began, and return what it said."""
    command = [sys.executable, "-c", PROGRAM, how, str(folder), str(grace_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(times):
            time.sleep(0.5)
            os.kill(process.pid, number)
        said = process.communicate(timeout=20)[0]
    assert process.returncode == 75, said
    return said


@pytest.mark.parametrize("how", ["steps", "thread"])
def test_the_work_stops_at_a_checkpoint_that_is_complete(how: str, tmp_path: Path) -> None:
    from stemtomo.distributed import Checkpoint

    said = stopped(how, tmp_path)
    mark = Checkpoint(tmp_path).latest()
    assert mark is not None
    assert mark.shared == {"step": mark.step}
    assert f"with a checkpoint of step {mark.step}" in said
    assert "SIGTERM: stopping at the next checkpoint" in said


def test_the_work_stops_between_pieces(tmp_path: Path) -> None:
    assert "what is finished is kept" in stopped("pieces", tmp_path, number=signal.SIGUSR1)
    assert int((tmp_path / "piece").read_text()) < 900


def test_without_a_checkpoint_it_leaves_when_its_time_is_over_or_asked_again(tmp_path: Path) -> None:
    assert "0.2 s after SIGTERM" in stopped("nothing", tmp_path, grace_s=0.2)
    assert "at once, SIGTERM came again" in stopped("nothing", tmp_path, times=2)


# -- what SLURM allocated ---------------------------------------------------------------------------------------------


def test_an_allocation_says_its_memory_and_processors() -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "8"}
    assert (allocated_cpus(job), allocated_memory_bytes(job)) == (8, None)
    assert allocated_cpus({**job, "SLURM_CPUS_PER_TASK": "2"}) == 2
    assert allocated_memory_bytes({**job, "SLURM_MEM_PER_NODE": "1000"}) == 1000 * 2**20
    assert allocated_memory_bytes({**job, "SLURM_MEM_PER_CPU": "500"}) == 8 * 500 * 2**20
    assert allocated_memory_bytes({**job, "SLURM_MEM_PER_NODE": "0"}) is None  # the whole node


def test_outside_of_a_job_the_machine_decides() -> None:
    assert allocated_cpus({"SLURM_CPUS_ON_NODE": "8"}) is None
    assert allocated_memory_bytes({"SLURM_MEM_PER_NODE": "1000"}) is None


def test_a_job_limits_the_memory_that_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    free = available_memory_bytes()
    monkeypatch.setattr("stemtomo.distributed.memory.allocated_memory_bytes", lambda: 2**30)
    assert available_memory_bytes() < min(free + 1, 2**30)
    monkeypatch.setattr("stemtomo.distributed.memory.allocated_memory_bytes", lambda: 1)
    assert available_memory_bytes() == 0
