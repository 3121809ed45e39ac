"""The batch scripts of deploy/slurm on a real SLURM of two nodes: lost workers, warnings and cancelled jobs."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from stemtomo.io.store import Store
from tests.deploy.private_slurm import Slurm, why_not
from tests.deploy.tiny import differing, environ, write_frames, write_series

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.timeout(600),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

SCRIPTS = Path(__file__).parents[2] / "deploy" / "slurm"
TILTS = 3
UNTIL = ("--until", "tomography")
#: What docs/clusters.md says to type, with a wait that shows whether workers came out of the queue.
FROM_PYTHON = """
import sys
from dask_jobqueue import SLURMCluster
from distributed import Client
import stemtomo

if __name__ == "__main__":
    cluster = SLURMCluster(security=True)
    cluster.adapt(minimum_jobs=2, maximum_jobs=2)
    client = Client(cluster)
    client.wait_for_workers(2, timeout=90)
    stemtomo.run(sys.argv[1], until="tomography")
    print(cluster.scheduler_address, {worker["host"] for worker in client.scheduler_info()["workers"].values()})
    client.close()
    cluster.close()
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    run = tmp_path_factory.mktemp("slurm")
    started = Slurm(run)
    started.environ = environ(
        SLURM_CONF=str(started.conf), STEMTOMO_SLURM=str(SCRIPTS), STEMTOMO_INTERFACE="lo",
        STEMTOMO_SCRATCH=str(run / "scratch"), STEMTOMO_GRACE_S="60",
    )  # fmt: skip
    try:
        started.start()
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_frames(tmp_path_factory.mktemp("frames"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, frames: Path) -> Path:
    """Store of a run that nothing disturbed, without SLURM."""
    folder = tmp_path_factory.mktemp("undisturbed")
    toml = write_series(folder, frames)
    subprocess.run(["stemtomo", "run", str(toml), *UNTIL], cwd=folder, env=environ(), check=True, capture_output=True)
    return folder / "series.zarr"


def wait(condition: Callable[[], object], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.1)


def checkpointed(folder: Path) -> bool:
    """Whether ptychography is at work: its first checkpoint is there."""
    return any((folder / "series.zarr" / ".checkpoints").glob("ptychography-*/step-*/mark.json"))


def log_of(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("stemtomo-*.log")))


def test_two_nodes_one_of_them_cancelled(slurm: Slurm, tmp_path: Path, frames: Path, undisturbed: Path) -> None:
    toml = write_series(tmp_path / "run", frames)
    job = slurm.submit(
        "--nodes=2", "--cpus-per-task=1", "--mem=2000M", str(SCRIPTS / "run-nodes.sbatch"), str(toml), *UNTIL,
        folder=toml.parent,
    )  # fmt: skip
    wait(lambda: checkpointed(toml.parent) or slurm.state(job) not in ("PENDING", "RUNNING"))
    steps = slurm.steps(job)
    assert len(steps) == 2, log_of(toml.parent)
    slurm.cancel(steps[1])
    assert slurm.finished(job) == "COMPLETED 0:0", log_of(toml.parent)
    assert "it is started again" in log_of(toml.parent)
    assert differing(toml.parent / "series.zarr", undisturbed) == []
    assert not list(toml.parent.glob(".stemtomo-*"))  # neither the key of the job nor its scheduler's address is left


def test_a_warned_job_stops_at_a_checkpoint_and_goes_back_into_the_queue(
    slurm: Slurm, tmp_path: Path, frames: Path, undisturbed: Path
) -> None:
    toml = write_series(tmp_path / "run", frames)
    job = slurm.submit(
        "--cpus-per-task=1", "--mem=2000M", str(SCRIPTS / "run.sbatch"), str(toml), *UNTIL, folder=toml.parent
    )
    wait(lambda: checkpointed(toml.parent))
    slurm.cancel(str(job), "--batch", "--signal=TERM")  # what --signal=B:TERM@120 does before the walltime
    wait(lambda: slurm.field(job, "Restarts") == "1")
    assert "stopping at the next checkpoint" in log_of(toml.parent)
    assert "Run the same command again to continue there" in log_of(toml.parent)
    slurm.hurry(job)
    assert slurm.finished(job) == "COMPLETED 0:0", log_of(toml.parent)
    assert differing(toml.parent / "series.zarr", undisturbed) == []


def test_a_job_warned_while_it_waits_for_its_workers_goes_back_into_the_queue(
    slurm: Slurm, tmp_path: Path, frames: Path
) -> None:
    toml = write_series(tmp_path / "run", frames)
    job = slurm.submit(
        "--nodes=2", "--cpus-per-task=1", "--mem=2000M", str(SCRIPTS / "run-nodes.sbatch"), str(toml), *UNTIL,
        folder=toml.parent,
    )  # fmt: skip
    wait(lambda: list(toml.parent.glob(".stemtomo-*/scheduler.log")))  # the workers take seconds more
    slurm.cancel(str(job), "--batch", "--signal=TERM")
    wait(lambda: slurm.field(job, "Restarts") == "1" or slurm.state(job) not in ("PENDING", "RUNNING", "COMPLETING"))
    assert slurm.field(job, "Restarts") == "1", log_of(toml.parent)
    assert not (toml.parent / "series.zarr").exists()
    slurm.cancel(str(job))
    assert slurm.finished(job).startswith("CANCELLED")
    assert not list(toml.parent.glob(".stemtomo-*"))


def test_a_job_cancelled_at_a_random_moment_and_submitted_again(
    slurm: Slurm, tmp_path: Path, frames: Path, undisturbed: Path
) -> None:
    toml = write_series(tmp_path / "run", frames)
    command = ("--cpus-per-task=1", "--mem=2000M", str(SCRIPTS / "run.sbatch"), str(toml), *UNTIL)
    seed = int(os.environ.get("STEMTOMO_SEED", time.time_ns() % 100000))  # give the printed one to repeat a run
    moment_s = random.Random(seed).uniform(0, 12)
    job = slurm.submit(*command, folder=toml.parent)
    wait(lambda: (toml.parent / "series.zarr").exists())
    time.sleep(moment_s)
    print(f"seed {seed}: cancelled {moment_s:.2f} s after the store appeared")
    slurm.cancel(str(job))
    assert slurm.finished(job).startswith(("CANCELLED", "COMPLETED")), log_of(toml.parent)
    assert slurm.field(job, "Restarts") == "0"  # what somebody cancelled stays cancelled
    again = slurm.submit(*command, folder=toml.parent)
    assert slurm.finished(again) == "COMPLETED 0:0", log_of(toml.parent)
    assert differing(toml.parent / "series.zarr", undisturbed) == [], f"seed {seed}"


def test_an_array_over_tilts(slurm: Slurm, tmp_path: Path, frames: Path, undisturbed: Path) -> None:
    toml = write_series(tmp_path / "run", frames)
    small = {"STEMTOMO_SBATCH": "--cpus-per-task=1 --mem=1200M"}
    told = subprocess.run(
        [str(SCRIPTS / "submit-tilts.sh"), str(TILTS), str(toml), *UNTIL],
        cwd=toml.parent, env={**slurm.environ, **small}, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    last = int(told.rstrip(".\n").rpartition(" ")[2])
    assert slurm.finished(last, 400) == "COMPLETED 0:0", told + log_of(toml.parent)
    assert len(Store.open(toml.parent / "series.zarr").members("ptychography")) == TILTS
    assert differing(toml.parent / "series.zarr", undisturbed) == []


def test_workers_submitted_from_python(slurm: Slurm, tmp_path: Path, frames: Path, undisturbed: Path) -> None:
    pytest.importorskip("dask_jobqueue")
    toml = write_series(tmp_path / "run", frames)
    told = yaml.safe_load((SCRIPTS / "jobqueue.yaml").read_text())
    site = {"cores": 1, "processes": 1, "memory": "1500MB", "interface": "lo", "local-directory": str(tmp_path)}
    told["jobqueue"]["slurm"] |= site | {"shared-temp-directory": str(tmp_path), "log-directory": str(tmp_path)}
    (tmp_path / "jobqueue.yaml").write_text(yaml.safe_dump(told))
    (tmp_path / "session.py").write_text(FROM_PYTHON)
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "session.py"), str(toml)],
        cwd=toml.parent, env={**slurm.environ, "DASK_CONFIG": str(tmp_path)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as session:  # fmt: skip
        wait(lambda: len(slurm.running()) == 2 or session.poll() is not None)
        printed, _ = session.communicate(timeout=240)
    assert session.returncode == 0, printed
    assert "tls://" in printed
    assert differing(toml.parent / "series.zarr", undisturbed) == []
    wait(lambda: not slurm.running())  # no job is left behind
