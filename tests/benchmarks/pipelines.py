"""The whole pipeline, from frames to scored atoms, in a process of its own.

``python -m tests.benchmarks.pipelines demo`` (or ``cuau_tilt``, on the reference data) is that process.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import Row, print_result, python
from tests.data import FOLDER

EXAMPLES = Path(__file__).parents[2] / "examples"


def benchmark() -> list[Row]:
    """Measure the demo (simulation included), and the reference series where it is at hand."""
    rows = _rows("demo")
    if (FOLDER / "cuau_tilt").is_dir():
        rows += _rows("cuau_tilt")
    return rows


def _rows(name: str) -> list[Row]:
    run = python("tests.benchmarks.pipelines", [name])
    found = run.result
    costs = [
        Row(name, "all stages", run.wall_s, "s wall"),
        Row(name, "all stages", run.cpu_s, "CPU s"),
        Row(name, "all stages", run.peak_rss_mb, "MB peak"),
    ]
    stages = [Row(name, stage, numbers["cpu_s"], "CPU s") for stage, numbers in found["stages"].items()]
    units = {"recall": "of atoms", "precision": "of found", "species_accuracy": "of matched", "rmsd_pm": "pm"}
    return costs + stages + [Row(name, key, found[key], unit) for key, unit in units.items()]


def _run(name: str, folder: str) -> dict[str, Any]:
    if name == "demo":
        from stemtomo.pipeline.demo import demo

        return demo(Path(folder) / "demo")
    from stemtomo.pipeline.references import load_configuration
    from stemtomo.pipeline.run import run

    data = FOLDER / name
    overrides = [
        f"input.path={data / 'data.npz'}",
        f"series.store={Path(folder) / name}.zarr",
        f"score.truth={data / 'truth.npz'}",
    ]
    return run(load_configuration(EXAMPLES / f"{name}.toml", overrides))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print_result(_run(sys.argv[1], scratch))
