"""A SLURM of our own: real munged, slurmctld and two slurmds in a temporary folder, that stop with the test."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

NODES = ("node1", "node2")

_CONF = """\
ClusterName=stemtomo
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={run}/munge/socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
SlurmctldPort={controller}
StateSaveLocation={run}/state
SlurmdSpoolDir={run}/spool-%n
SlurmctldPidFile={run}/slurmctld.pid
SlurmdPidFile={run}/slurmd-%n.pid
SlurmctldLogFile={run}/slurmctld.log
SlurmdLogFile={run}/slurmd-%n.log
KillWait=5
MinJobAge=600
InactiveLimit=0
Waittime=0
{nodes}
PartitionName=cpu Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Return why SLURM cannot be started here; ``None`` if it can."""
    for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun", "openssl"):
        if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            return f"{name} is not installed (Debian: apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "slurmd starts jobs only as root"


class Slurm:
    """Two nodes of one processor and ``memory_mib`` each, both of them this machine."""

    def __init__(self, run: Path, memory_mib: int = 2500) -> None:
        self.run = run
        self.conf = run / "slurm.conf"
        self.environ = {**os.environ, "SLURM_CONF": str(self.conf), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        self._daemons: list[subprocess.Popen[bytes]] = []
        ports = _free_ports(1 + len(NODES))
        (run / "munge").mkdir(mode=0o755)
        (run / "state").mkdir()
        lines = [
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory={memory_mib}"
            for name, port in zip(NODES, ports[1:], strict=True)
        ]
        text = _CONF.format(run=run, controller=ports[0], nodes="\n".join(lines), names=",".join(NODES))
        self.conf.write_text(text)

    def start(self) -> None:
        """Start the daemons in the foreground of processes of our own, and wait until both nodes are idle."""
        munge, key = self.run / "munge", self.run / "munge" / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self._start(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge / 'socket'}",
            f"--pid-file={munge / 'pid'}", f"--seed-file={munge / 'seed'}", f"--log-file={munge / 'log'}",
        )  # fmt: skip
        _until(lambda: (munge / "socket").exists(), 10, "munged does not answer")
        self._start("slurmctld", "-D", "-c", "-f", str(self.conf))
        for name in NODES:
            self._start("slurmd", "-D", "-c", "-N", name, "-f", str(self.conf))
        _until(lambda: self._call("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * len(NODES), 30, self.logs)

    def stop(self) -> None:
        """Cancel what runs and stop the daemons, the last one first."""
        self._call("scancel", "-u", "root")
        deadline = time.monotonic() + 10
        while self._call("squeue", "-h").strip() and time.monotonic() < deadline:
            time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def submit(self, *arguments: str, folder: Path, **environ: str) -> int:
        """Submit a batch script; return the number of the job."""
        told = subprocess.run(
            ["sbatch", "--parsable", *arguments],
            cwd=folder, env={**self.environ, **environ}, check=True, capture_output=True, text=True,
        )  # fmt: skip
        return int(told.stdout)

    def state(self, job: int) -> str:
        """Return the state of a job, such as ``RUNNING``."""
        return self.field(job, "JobState")

    def field(self, job: int, name: str) -> str:
        """Return one field of what SLURM says of a job."""
        told = self._call("scontrol", "show", "job", "--oneliner", str(job)).split()
        return next((item.partition("=")[2] for item in told if item.startswith(f"{name}=")), "")

    def steps(self, job: int) -> list[str]:
        """Return the names JOB.STEP of the steps that run, without the batch script's own."""
        told = self._call("squeue", "-h", "--steps", "-j", str(job), "-o", "%i").split()
        return sorted(step for step in told if step.partition(".")[2].isdecimal())

    def running(self) -> list[str]:
        """Return the jobs that run."""
        return self._call("squeue", "-h", "-t", "RUNNING,COMPLETING", "-o", "%i").split()

    def cancel(self, what: str, *options: str) -> None:
        """Cancel a job or a step, or send it a signal."""
        self._call("scancel", *options, what)

    def hurry(self, job: int) -> None:
        """Let a job that went back into the queue begin at once, not after the two minutes that SLURM waits."""
        _until(lambda: self.state(job) == "PENDING", 30, f"job {job} is {self.state(job)}")
        time.sleep(3)  # a node refuses what was revoked in the same second
        self._call("scontrol", "update", f"JobId={job}", "StartTime=now")

    def finished(self, job: int, timeout_s: float = 240) -> str:
        """Wait until a job has ended; return its state and exit code, such as ``COMPLETED 0:0``."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
        _until(lambda: self.state(job) in over, timeout_s, f"job {job} is still {self.state(job)}")
        return f"{self.state(job)} {self.field(job, 'ExitCode')}"

    def logs(self) -> str:
        """Return the end of the daemons' logs, for messages."""
        return "\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in sorted(self.run.glob("*.log")))

    def _start(self, *command: str) -> None:
        log = (self.run / f"{len(self._daemons)}-{command[0]}.out").open("wb")
        with log:
            self._daemons.append(subprocess.Popen(command, env=self.environ, stdout=log, stderr=log))

    def _call(self, *command: str) -> str:
        return subprocess.run(command, env=self.environ, capture_output=True, text=True).stdout


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _until(condition: object, timeout_s: float, otherwise: object) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise TimeoutError(otherwise() if callable(otherwise) else otherwise)
        time.sleep(0.2)
