"""``python -m tests.benchmarks.joint_cuts [CUT ...]``: fewer tilts, a wider wedge and fewer electrons, in four ways.

A nightly measurement: every cut of the particle with known atoms is reconstructed jointly, jointly with one slice per
tilt, sequentially, all with default settings, and jointly from the sequential result, and scored. Minutes of processor
time.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.pipeline.references import load_configuration
from stemtomo.pipeline.run import run
from tests.data import FOLDER

EXAMPLE = Path(__file__).parents[2] / "examples" / "cuau_tilt.toml"
#: Which tilts are kept, by their angle, and which share of the electrons.
CUTS: dict[str, tuple[slice, float, float]] = {
    "all": (slice(None), 90.0, 1.0),
    "every second tilt": (slice(None, None, 2), 90.0, 1.0),
    "+-50 deg": (slice(None), 50.0, 1.0),
    "counts / 16": (slice(None), 90.0, 1 / 16),
    "counts / 100": (slice(None), 90.0, 1 / 100),
}
WAYS: dict[str, list[str]] = {
    "joint": ["joint.enabled=true"],
    "single slice": ["joint.enabled=true", "joint.single_slice=true"],
    "sequential": [],
    "sequential, then joint": [
        "joint.enabled=true",
        'joint.start="sequential"',
        "joint.single_slice_epochs=0",
        "joint.sweeps=1",
        "joint.settling_sweeps=3",
    ],
}


def cut_data(folder: Path, cut: str) -> Path:
    """Write the tilts and electrons that ``cut`` leaves beside their metadata, and return the file."""
    every, reach_deg, share = CUTS[cut]
    source = FOLDER / "cuau_tilt"
    with np.load(source / "data.npz") as data:
        angles = data["tilt_theta_deg"]
        kept = np.arange(len(angles))[every]
        kept = kept[np.abs(angles[kept]) <= reach_deg]
        counts = data["patterns_counts"][kept]
        if share < 1:
            counts = np.random.default_rng(0).binomial(counts, share).astype(np.uint16)
        poses = {name: data[name][kept] for name in ("tilt_theta_deg", "tilt_phi_deg", "tilt_psi_deg")}
    np.savez(folder / "data.npz", patterns_counts=counts, **poses)
    shutil.copy(source / "metadata.json", folder)
    return folder / "data.npz"


def scored(data: Path, store: Path, overrides: Iterable[str]) -> dict[str, Any]:
    """Return the numbers of a run on ``data`` with its score."""
    told = [f"input.path={data}", f"series.store={store}", f"score.truth={FOLDER / 'cuau_tilt' / 'truth.npz'}"]
    return run(load_configuration(EXAMPLE, [*told, *overrides]), executor=ThreadExecutor(1))


def main() -> None:
    """Print a table of the cuts that are named, or all."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.joint_cuts", description=__doc__)
    parser.add_argument("cuts", nargs="*", metavar="CUT", help=f"of {', '.join(CUTS)}; all if none")
    parser.add_argument("--way", choices=[*WAYS], help="only this way")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="more settings of every run")
    given = parser.parse_args()
    print("| cut | way | recall | precision | RMSD (pm) | species | CPU s |\n|---|---|---|---|---|---|---|")
    for cut in given.cuts or CUTS:
        with tempfile.TemporaryDirectory() as name:
            data = cut_data(Path(name), cut)
            for way in [given.way] if given.way else WAYS:
                found = scored(data, Path(name) / f"{way}.zarr", [*WAYS[way], *given.set])
                numbers = [found[key] for key in ("recall", "precision", "rmsd_pm", "species_accuracy", "cpu_s")]
                print(f"| {cut} | {way} | " + " | ".join(f"{value:.3g}" for value in numbers) + " |", flush=True)


if __name__ == "__main__":
    main()
