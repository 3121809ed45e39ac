"""Many small series through one long-lived cluster: what a worker holds must not grow, nor what the scheduler knows."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.benchmarks.measure import Row, print_result, python

WORKERS = 2
#: Share of the series after which libraries are loaded, functions compiled and allocators have taken what they keep.
WARM_UP = 0.25
MB = 1e6

_SERIES = """
[series]
name = "soak"
[input]
path = "frames.npy"
[optics]
energy_kev = 300
semiangle_mrad = 21
defocus_c1_angstrom = 120
[scan]
step_angstrom = 1.2
[detector]
pixel_inv_angstrom = 0.078125
[tilts]
theta_deg = [-40, 0, 35]
[ptychography]
epochs = 4
settling_epochs = 1
[tomography]
iterations = 20
[atoms]
refine_iterations = 5
completion_rounds = 1
"""


class Look(NamedTuple):
    """What is held after a series, with the client idle."""

    worker_rss_mb: tuple[float, ...]
    worker_results: int
    client_rss_mb: float
    scheduler_tasks: int
    client_futures: int


def soak(series: int, folder: Path, workers: int = WORKERS) -> list[Look]:
    """Run ``series`` small series, frames to atoms, on one cluster as of ``--workers``, and look after each."""
    from distributed import default_client

    from stemtomo.cli.shell import cluster
    from stemtomo.pipeline.references import load_configuration
    from stemtomo.pipeline.run import run

    toml = _write_series(folder)
    looks: list[Look] = []
    with cluster(None, workers):
        client = default_client()
        for number in range(series):
            store = folder / f"series{number}.zarr"
            given = [f'series.store="{store}"', f"ptychography.seed={number}"]
            result = run(load_configuration(toml, given))
            if result["stages"]["ptychography"]["computed"] != 3:
                raise RuntimeError(f"series {number} was not computed: {result['stages']['ptychography']}")
            shutil.rmtree(store)
            looks.append(_look(client))
    return looks


def _look(client: Any) -> Look:
    import gc

    gc.collect()
    held = client.run(_held)
    return Look(
        tuple(held[address][0] for address in sorted(held)),
        sum(count for _, count in held.values()),
        _rss_mb(),
        len(client.cluster.scheduler.tasks),
        len(client.futures),
    )


def _held(dask_worker: Any) -> tuple[float, int]:
    """Resident MB of this worker after a collection, and the results that it keeps."""
    import gc

    gc.collect()
    return _rss_mb(), len(dask_worker.data)


def _rss_mb() -> float:
    import psutil

    return float(psutil.Process().memory_info().rss) / MB


def _write_series(folder: Path) -> Path:
    """Write frames of three tilts of a few atoms, and the configuration beside them."""
    from tests.pipeline.series import make_series

    store = make_series(folder / "source.zarr")
    np.save(folder / "frames.npy", np.stack([store.frames(tilt)[...] for tilt in range(3)]))
    path = folder / "series.toml"
    path.write_text(_SERIES, encoding="utf-8")
    return path


def slope_mb(values: list[float]) -> float:
    """Return the growth per series in MB of ``values`` after the warm-up: the median of the slopes of all pairs."""
    kept = np.asarray(values[round(len(values) * WARM_UP) :])
    first, second = np.triu_indices(len(kept), 1)
    return float(np.median((kept[second] - kept[first]) / (second - first)))


def soak_rows(series: int = 100) -> list[Row]:
    """Return what is held, and how it grows, over ``series`` series in one cluster."""
    run = python("tests.benchmarks.soak", [str(series)], timeout_s=3600)
    looks = [Look(tuple(rss), *rest) for rss, *rest in run.result]
    warm = looks[round(len(looks) * WARM_UP) :]
    rows = [Row("soak", f"{series} series: CPU of all processes, a series", run.cpu_s / series, "s")]
    for worker in range(WORKERS):
        held = [look.worker_rss_mb[worker] for look in looks]
        rows += [
            Row("soak", f"worker {worker}: resident after warm-up", held[len(looks) - len(warm)], "MB"),
            Row("soak", f"worker {worker}: resident at the end", held[-1], "MB"),
            Row("soak", f"worker {worker}: growth per series", slope_mb(held), "MB"),
        ]
    rows.append(Row("soak", "client and scheduler: resident at the end", looks[-1].client_rss_mb, "MB"))
    rows.append(
        Row("soak", "client and scheduler: growth per series", slope_mb([x.client_rss_mb for x in looks]), "MB")
    )
    rows.append(Row("soak", "tasks of the scheduler, most after a series", max(x.scheduler_tasks for x in looks), ""))
    rows.append(Row("soak", "futures of the client, most after a series", max(x.client_futures for x in looks), ""))
    return rows


def main() -> None:
    """Soak in this process and print what was seen."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.soak", description=__doc__)
    parser.add_argument("series", type=int)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print_result(soak(given.series, Path(folder)))


if __name__ == "__main__":
    main()
