"""The configuration of dask-jobqueue makes a cluster whose jobs say what the file says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask
import pytest
import yaml

jobqueue = pytest.importorskip("dask_jobqueue")
pytest.importorskip("cryptography")

TLS = {"security": True}  # as docs/clusters.md says
FILE = Path(__file__).parents[2] / "deploy" / "slurm" / "jobqueue.yaml"


def settings(tmp_path: Path) -> dict[str, Any]:
    told: dict[str, Any] = yaml.safe_load(FILE.read_text())
    folders = {"shared-temp-directory": str(tmp_path / "keys"), "log-directory": str(tmp_path / "logs")}
    (tmp_path / "keys").mkdir()
    return {f"jobqueue.slurm.{key}": value for key, value in (told["jobqueue"]["slurm"] | folders).items()}


def test_a_job_has_the_sizes_limits_and_keys_of_the_file(tmp_path: Path) -> None:
    with dask.config.set(settings(tmp_path)), jobqueue.SLURMCluster(**TLS) as cluster:
        script = cluster.job_script()
        assert cluster.scheduler_address.startswith("tls://")
        assert cluster.scheduler.http_server.port != 8787
    for line in ("#SBATCH --cpus-per-task=16", "#SBATCH --mem=64G", "#SBATCH -t 04:00:00", "#SBATCH --requeue"):
        assert line in script
    for option in ("--nworkers 16", "--nthreads 1", "--memory-limit 4.00GiB", "--lifetime 225m", "--no-dashboard"):
        assert option in script
    assert "--tls-key" in script
    assert "--local-directory $TMPDIR" in script
    assert "OMP_NUM_THREADS=1" in script


def test_the_file_has_only_keys_that_dask_jobqueue_knows() -> None:
    known = dask.config.get("jobqueue.slurm")
    told = yaml.safe_load(FILE.read_text())["jobqueue"]["slurm"]
    assert {key.replace("_", "-") for key in told} <= {key.replace("_", "-") for key in known}
