"""Local orbitals: what an epoch costs over the number of atoms, and particles from their images to atoms."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import stemtomo
from stemtomo.algorithms.local_orbital.model import FocalSeries, Orbitals, slices_for, sums
from stemtomo.algorithms.local_orbital.probes import start_probes
from stemtomo.algorithms.local_orbital.specimens import amorphous_particle
from stemtomo.distributed import peak_rss_mb
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.geometry import Optics, TiltSeries
from stemtomo.pipeline.focal_series import simulate_particle
from stemtomo.pipeline.local_orbital import local_orbital
from stemtomo.pipeline.settings.local_orbital import LocalOrbitalSettings
from tests.benchmarks.measure import Row, cost_row, cpu_seconds

PIXEL, THICKNESS, WINDOW_PX, SEMIANGLE_MRAD = 0.34, 4.0, 32, 25.0
IMAGES, TIMED = 72, 6
#: Enough for noise-free images: the list of atoms stands after two or three rounds.
SETTINGS = LocalOrbitalSettings(atom_iterations=10, rounds=4, probe_searches=2, probe_iterations=20)


def scene(count: int) -> tuple[Orbitals, FocalSeries]:
    """Return a particle of ``count`` atoms and the frame of a few of its images, all dark: what an epoch works on."""
    positions = amorphous_particle(count)
    diameter = 2 * float(np.linalg.norm(positions, axis=1).max())
    edge = 2 * int(np.ceil((diameter + 10) / PIXEL / 2))
    rotations = TiltSeries.from_degrees((-60.0, 30.0)).rotations.repeat(3, axis=0)
    images = np.zeros((TIMED, edge, edge), np.float32)
    series = FocalSeries(images, rotations, np.tile(np.arange(3), 2), PIXEL)
    slices = slices_for(diameter + 4, THICKNESS)
    optics = Optics(300e3, SEMIANGLE_MRAD * 1e-3, {"C10": 0.0})
    foci = np.array([-diameter / 4, 0.0, diameter / 4])
    probes = start_probes(optics, foci, slices, THICKNESS, WINDOW_PX, PIXEL)
    still = np.zeros((TIMED, 2)), np.zeros((TIMED, 3))
    return Orbitals(positions, np.ones(count), np.full(count, 0.4), probes, THICKNESS, *still), series


def epoch_rows(counts: tuple[int, ...] = (1000, 2000, 4000, 8000)) -> list[Row]:
    """Return what loss and all derivatives of 72 images cost, for particles of several sizes."""
    rows = []
    for count in counts:
        model, series = scene(count)
        spent = cpu_seconds(lambda m=model, s=series: sums(m, s)) * IMAGES / TIMED
        slices = model.slices
        name = f"epoch, {count} atoms, {series.images.shape[1]} px, {slices} slices, {IMAGES} images"
        rows.append(cost_row("local_orbital", name, spent, "CPU s"))
        rows.append(cost_row("local_orbital", f"{name}: per atom and image", 1e6 * spent / count / IMAGES, "us"))
    return rows


def end_to_end_rows(atoms: int, settings: LocalOrbitalSettings = SETTINGS) -> list[Row]:
    """Return what a particle costs from its images to atoms, blind, on two threads, and how well it is found."""
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "particle.npz", Path(folder) / "atoms.xyz"
        made = simulate_particle(file, atoms=atoms, semiangle_mrad=SEMIANGLE_MRAD)
        cpu, wall = time.process_time(), time.perf_counter()
        found = local_orbital(Path(folder) / "s.zarr", settings, images=file, out=out, executor=ThreadExecutor(2))
        spent = time.process_time() - cpu, time.perf_counter() - wall
        score: dict[str, Any] = stemtomo.score_atoms(out, file)
    name = f"{atoms} atoms, {made['diameter_angstrom']:.0f} Å"
    figures = {
        "deviation": (score["rmsd_pm"], "pm"),
        "recall": (score["recall"], "share"),
        "precision": (score["precision"], "share"),
        "work": (spent[0], "CPU s"),
        "time": (spent[1], "wall s"),
        "peak memory": (peak_rss_mb(), "MB"),
        "searches": (float(len(found["searches"])), ""),
        "iterations": (float(len(found["loss"])), ""),
    }
    figures |= {f"focus of section {n}": (depth, "Å") for n, depth in enumerate(found["focus_angstrom"])}
    return [cost_row("local_orbital", f"{name}: {what}", *figure) for what, figure in figures.items()]


def rows_25000() -> list[Row]:
    """The paper's smallest particle."""
    return end_to_end_rows(25_000)


def rows_100000() -> list[Row]:
    """The paper's fourth particle, 15 nm: for a night."""
    return end_to_end_rows(100_000)


def rows_epochs_100000() -> list[Row]:
    """An epoch of the paper's fourth particle."""
    return epoch_rows((100_000,))
