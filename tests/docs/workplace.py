"""A folder with everything that the pages name: a small series, its store and atoms, files of other programs."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from stemtomo.io.store import Store
from stemtomo.pipeline.references import load_configuration
from stemtomo.pipeline.run import run
from stemtomo.pipeline.simulate import SimulationSettings, simulate
from stemtomo.pipeline.specimen import Specimen, core_shell_nanoparticle, write_specimen
from tests.docs.blocks import blocks

PARTICLE = core_shell_nanoparticle(3, 10.0, shell_angstrom=2.0)
#: Optics, scan and detector of the series file in README.md.
SIMULATION = SimulationSettings(
    tilt_deg=tuple(float(angle) for angle in range(-60, 61, 20)),
    scan_shape=(12, 12),
    oversampling=2.0,
    slice_thickness_angstrom=2.0,
    phonon_configurations=1,
    phonon_rms_angstrom=0.05,
    dose_per_square_angstrom=4e5,
)
GOLD = core_shell_nanoparticle(1, 24.0, core="Au", lattice_angstrom=4.08, displacement_angstrom=0.1)
FEW = Specimen(np.array([[0.0, 0.4, 0.2], [2.0, -1.0, 1.1], [-1.8, 1.7, -1.0]]), np.array([79, 79, 79]), "three")


def furnish(folder: Path) -> Path:
    """Fill ``folder`` and return it."""
    from ase import Atoms

    simulated = folder / "simulated.zarr"
    simulate(simulated, PARTICLE, SIMULATION)
    store = Store.open(simulated)
    frames = np.stack([store.frames(tilt)[...] for tilt in range(store.tilt_count)])
    shutil.rmtree(simulated)
    np.savez(folder / "series.npz", patterns=frames, tilt_theta_deg=np.array(SIMULATION.tilt_deg))
    series = next(block.text for block in blocks("toml") if block.page == "README.md")
    (folder / "series.toml").write_text(series, encoding="utf-8")
    _record(folder, frames, series)
    write_specimen(folder / "atoms.xyz", PARTICLE)
    for name in ("gold.xyz", "9min.xyz", "16min.xyz"):
        write_specimen(folder / name, GOLD)
    write_specimen(folder / "particle.xyz", FEW)
    Atoms(FEW.atomic_numbers, FEW.positions + 5, cell=[10, 10, 10]).write(folder / "particle.cif")
    run(load_configuration(folder / "series.toml", [f'series.store="{folder / "series.zarr"}"']))
    return folder


def _record(folder: Path, frames: np.ndarray, series: str) -> None:
    """Write one raw file per tilt, as a detector leaves them, and the series file that follows them."""
    scans = folder / "scans"
    scans.mkdir()
    for angle, frame in zip(SIMULATION.tilt_deg, frames.astype("<u2"), strict=True):
        frame.tofile(scans / f"tilt_{angle:g}.raw")
    head, _, rest = series.partition("[optics]")
    assert head.startswith("[input]")
    layout = 'path = "scans"\nfiles = "tilt_{theta_deg}.raw"\naxes = ["y", "x", "ky", "kx"]\ndtype = "<u2"\n'
    rest = rest.replace('"@data:tilt_theta_deg"', str(list(SIMULATION.tilt_deg)))
    text = f"[input]\n{layout}shape = {list(frames.shape[1:])}\n\n[optics]{rest}"
    (folder / "watched.toml").write_text(text, encoding="utf-8")
