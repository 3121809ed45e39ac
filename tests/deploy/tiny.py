"""A tiny series with a TOML file, for whole runs from the outside, and what a run left as bytes."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np

from stemtomo.io.store import Store
from tests.pipeline.series import ANGLES_DEG, DETECTOR, OPTICS, SCAN, make_series

_TOML = """
[series]
name = "tiny"
store = "{store}"
[input]
path = "{frames}"
[optics]
energy_kev = {energy}
semiangle_mrad = {semiangle}
defocus_c1_angstrom = {defocus}
[scan]
step_angstrom = {step}
[detector]
pixel_inv_angstrom = {pixel}
[tilts]
theta_deg = {angles}
[ptychography]
epochs = {epochs}
checkpoint_every = 5
[tomography]
iterations = 40
checkpoint_every = 10
"""


def write_frames(folder: Path) -> Path:
    """Write the frames of the series to ``folder`` and return the file."""
    store = make_series(folder / "made.zarr")
    frames = np.stack([store.frames(index)[:] for index in range(store.tilt_count)])
    np.savez(folder / "frames.npz", frames=frames)
    return folder / "frames.npz"


def write_series(folder: Path, frames: Path, store: str | Path = "series.zarr", epochs: int = 40) -> Path:
    """Write ``series.toml`` to ``folder`` and return it."""
    folder.mkdir(exist_ok=True)
    text = _TOML.format(
        store=store,
        frames=frames,
        energy=OPTICS.energy_ev / 1e3,
        semiangle=OPTICS.semiangle_rad * 1e3,
        defocus=OPTICS.aberrations["C10"],
        step=SCAN.step_angstrom_yx[0],
        pixel=DETECTOR.pixel_inv_angstrom,
        angles=list(ANGLES_DEG),
        epochs=epochs,
    )
    (folder / "series.toml").write_text(text)
    return folder / "series.toml"


def arrays(path: str | Path) -> dict[str, bytes]:
    """Return the bytes of all arrays of the store at ``path``, by group and name: everything but times and costs."""
    store = Store.open(path)
    found = {}
    for row in store.info():
        for member in store.members(row["group"]) if row["group"] != "tilt" else []:
            dataset = store.read(member)
            found.update({f"{member}/{name}": dataset[name].values.tobytes() for name in dataset.variables})
    for index in range(store.tilt_count):
        found[f"tilt/{index}"] = store.frames(index)[:].tobytes()
    return found


def differing(a: str | Path, b: str | Path) -> list[str]:
    """Return the names of the arrays that two stores do not have with the same bytes."""
    first, second = arrays(a), arrays(b)
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


def environ(**more: str) -> dict[str, str]:
    """Return the environment of a command that runs this source tree, with ``stemtomo`` and ``dask`` on its path."""
    import sys

    root = Path(__file__).parents[2]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    python = ":".join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PATH": path, "PYTHONPATH": python, "OMP_NUM_THREADS": "1", **more}


assert math.prod(SCAN.shape_yx) == 110
