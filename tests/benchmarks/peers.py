"""Other programs beside this one in the same run, each in its own process and, if need be, its own environment.

``PTYCHI_PYTHON``, ``PTYRAD_PYTHON`` and ``QUANTEM_PYTHON`` name a Python that has pty-chi, PtyRAD or quantem, whose
torch need not be in the environment of this package.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.physics.probe import probe_wave
from tests.benchmarks import peer_programs
from tests.benchmarks.measure import Row
from tests.data import FOLDER

#: Environment variable and module of each program.
WHERE = {
    "pty-chi LSQML": ("PTYCHI_PYTHON", "ptychi"),
    "PtyRAD Adam": ("PTYRAD_PYTHON", "ptyrad"),
    "quantem AdamW": ("QUANTEM_PYTHON", "quantem"),
    "quantem analytic": ("QUANTEM_PYTHON", "quantem"),
}
_EPOCHS = 5


class Answer(NamedTuple):
    """What a program reports of itself."""

    version: str
    cpu_s: float
    peak_mb: float


def answer_of(printed: str) -> Answer:
    """Return the answer on the last line of what a program printed, which may be chatty before.

    Raises
    ------
    ValueError
        If the last line is no such answer.
    """
    last = (printed.strip().splitlines() or [""])[-1]
    try:
        return Answer(**json.loads(last))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the program's last line is not its version, cpu_s and peak_mb as JSON: {last!r}") from error


def peer_rows() -> list[Row]:
    """Time the other programs that are installed on the reference data, with two threads, and score what they find."""
    if not (FOLDER / "sto_zone").is_dir():
        return []
    rows = []
    for program, (variable, module) in WHERE.items():
        python = os.environ.get(variable, sys.executable if importlib.util.find_spec(module) else None)
        if python is None:
            rows.append(Row("peer", f"{program}: absent (not importable, no {variable})", 0.0, ""))
            continue
        rows += _timed(program, python)
    return rows


def _timed(program: str, python: str) -> list[Row]:
    from tests.benchmarks.ptychography import scored

    with tempfile.TemporaryDirectory() as folder:
        told, phase = Path(folder) / "conditions.npz", Path(folder) / "phase.npy"
        np.savez(told, **conditions())
        threads = {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [python, peer_programs.__file__, program, str(told), str(phase), str(_EPOCHS)],
            env={**environment, **threads},
            capture_output=True,
            text=True,
            check=True,
            cwd=folder,
        )
        said, found = answer_of(done.stdout), np.load(phase)
    name = f"{program} {said.version}"
    return [
        Row("peer", f"{name}: 32x32 of 96x96, 6 slices", said.cpu_s, "CPU s/epoch"),
        Row("peer", f"{name}: peak", said.peak_mb, "MB"),
        *(row._replace(benchmark="peer") for row in scored(found, f"{name}: correlation after {_EPOCHS} epochs")),
    ]


def conditions() -> dict[str, np.ndarray]:
    """Return the reference data, and the probe and positions that this package begins with too."""
    from tests.benchmarks.ptychography import SIX_SLICES

    with np.load(FOLDER / "sto_zone" / "data.npz") as data:
        patterns = data["patterns_counts"].reshape(-1, *SIX_SLICES.detector.shape_yx)
    pixel, optics = SIX_SLICES.detector.object_pixel_angstrom_yx, SIX_SLICES.optics
    electrons = float(patterns.sum(axis=(1, 2)).mean())
    probe = probe_wave(optics, SIX_SLICES.detector.shape_yx, pixel, intensity=electrons)
    told = {
        "patterns": patterns,
        "probe": probe.astype(np.complex64),
        "positions_px_yx": (SIX_SLICES.scan.positions()[:, ::-1] / np.asarray(pixel)).astype(np.float32),
        "slices": SIX_SLICES.slices,
        "thickness": SIX_SLICES.thickness_angstrom,
        "pixel": pixel[0],
        "wavelength": wavelength_angstrom(optics.energy_ev),
        "energy_kev": optics.energy_ev / 1e3,
        "semiangle_mrad": optics.semiangle_rad * 1e3,
        "scan_shape_yx": SIX_SLICES.scan.shape_yx,
        "step_yx": SIX_SLICES.scan.step_angstrom_yx,
        "object_shape": (150, 150),
        "batch": 32,
    }
    return {name: np.asarray(value) for name, value in told.items()}
