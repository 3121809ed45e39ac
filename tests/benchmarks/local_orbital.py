"""Local orbitals: what an epoch costs over the number of atoms, and particles from their images to atoms."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import stemtomo
from stemtomo.algorithms.atoms.scoring import match_atoms
from stemtomo.algorithms.local_orbital.model import FocalSeries, Orbitals, slices_for, sums
from stemtomo.algorithms.local_orbital.probes import depth_of_focus, start_probes
from stemtomo.algorithms.local_orbital.specimens import amorphous_particle
from stemtomo.distributed import Checkpoint, peak_rss_mb
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.geometry import Optics, TiltSeries
from stemtomo.io.provenance import Provenance
from stemtomo.io.store import Store
from stemtomo.pipeline.focal_series import GROUP as SERIES
from stemtomo.pipeline.focal_series import simulate_particle
from stemtomo.pipeline.local_orbital import GROUP, local_orbital
from stemtomo.pipeline.settings.local_orbital import LocalOrbitalSettings
from tests.benchmarks.measure import Row, cost_row, cpu_seconds

PIXEL, THICKNESS, WINDOW_PX, SEMIANGLE_MRAD = 0.34, 4.0, 32, 25.0
MATCH_ANGSTROM = 0.75
IMAGES, TIMED = 72, 6
#: Enough for noise-free images: the list of atoms stands after two or three rounds.
SETTINGS = LocalOrbitalSettings(atom_iterations=10, rounds=4, probe_searches=2, probe_iterations=20)


#: Large particles: probes and atoms take their time together, until the atoms hardly move.
THOROUGH = SETTINGS.model_copy(
    update={
        "atom_iterations": 14,
        "rounds": 20,
        "probe_searches": 3,
        "probe_iterations": 12,
        "last_iterations": 60,
        "still_pm": 0.05,
    }
)


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


class Course:
    """A watcher that says after every search, on the standard error, how far its atoms are from the known ones."""

    def __init__(self, path: Path, settings: LocalOrbitalSettings, known: np.ndarray) -> None:
        self._path, self._settings, self._known = path, settings, known
        self._begun = time.process_time()
        #: What the comparison itself took, which is no work of the method.
        self.own = 0.0

    def start(self, stage: str, total: int, unit: str = "") -> None:
        """Do nothing."""

    def finish(self, stage: str) -> None:
        """Do nothing."""

    def advance(self, n: int = 1, **numbers: float) -> None:
        """Read the search's checkpoint and say how good its atoms are."""
        now = time.process_time()
        self._say(now - self._begun - self.own)
        self.own += time.process_time() - now

    def _say(self, spent: float) -> None:
        store = Store.open(self._path)
        inputs = {SERIES: store.fingerprint(SERIES)}
        fingerprint = Provenance.start(GROUP, self._settings.model_dump(mode="json"), inputs).fingerprint
        mark = Checkpoint(store.checkpoint_path(GROUP), fingerprint).latest()
        if mark is None:
            return
        saved = mark.shared
        match = match_atoms(np.asarray(saved["positions"]), self._known, MATCH_ANGSTROM)
        added, dropped = np.asarray(saved["changes"])[-1]
        foci = depth_of_focus(np.asarray(saved["probes"]), self._settings.slice_thickness_angstrom)
        print(
            f"{spent:7.0f} CPU s  {saved['stages'][-1]:7s}"
            f"{len(saved['losses'][-1]):3d} iterations  +{added} -{dropped}  {len(saved['positions'])} atoms  "
            f"recall {match.recall:.4f}  precision {match.precision:.4f}  {100 * match.rmsd_angstrom:.3f} pm  "
            f"foci {', '.join(f'{focus:.1f}' for focus in foci)} Å",
            file=sys.stderr,
            flush=True,
        )


def end_to_end_rows(atoms: int, settings: LocalOrbitalSettings = THOROUGH) -> list[Row]:
    """Return what a particle costs from its images to atoms, blind, on two threads, and how well it is found."""
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "particle.npz", Path(folder) / "atoms.xyz"
        made = simulate_particle(file, atoms=atoms, semiangle_mrad=SEMIANGLE_MRAD)
        cpu, wall = time.process_time(), time.perf_counter()
        with np.load(file) as members:
            course = Course(Path(folder) / "s.zarr", settings, members["atoms_xyz_A"])
        options = {"images": file, "out": out, "executor": ThreadExecutor(2), "progress": course}
        found = local_orbital(Path(folder) / "s.zarr", settings, **options)
        spent = time.process_time() - cpu - course.own, time.perf_counter() - wall
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


WAYS = {"linear": ("linear", 1), "rigid": ("rigid", 1), "adaptive": ("adaptive", 1), "three sections": ("adaptive", 3)}


#: Atoms of a layer of 4 Å whose deviation is worth a row.
_FEWEST = 20
#: What the rows of a layer are called, before its depth.
LAYER = "layer at "


def way_rows(
    way: str, folder: Path, atoms: int = 2000, semiangle_mrad: float = 68.0, electrons_per_atom: float | None = None
) -> list[Row]:
    """Return how well one of the four ways finds a particle many depths of field thick, from atoms 15 pm per axis off.

    Six in a hundred atoms are missing to begin with, and three sections begin without any defocus. Images of all ways
    have the same dose: 71 at one focus, 72 at three.
    """
    model, sections = WAYS[way]
    file, start, out = folder / "particle.npz", folder / "start.xyz", folder / "atoms.xyz"
    sizes = {"atoms": atoms, "sections": sections, "semiangle_mrad": semiangle_mrad}
    made = simulate_particle(file, electrons_per_atom=electrons_per_atom, **sizes)
    rng = np.random.default_rng(1)
    with np.load(file) as members:
        known = members["atoms_xyz_A"]
    moved = (known + rng.normal(0, 0.15, known.shape))[rng.random(len(known)) > 0.06]
    lines = [f"Si {x:.5f} {y:.5f} {z:.5f}" for x, y, z in moved]
    start.write_text("\n".join([str(len(moved)), "", *lines]) + "\n")
    settings = SETTINGS.model_copy(update={"model": model, "atoms": start})
    cpu = time.process_time()
    local_orbital(folder / "s.zarr", settings, images=file, out=out, executor=ThreadExecutor(1))
    spent = time.process_time() - cpu
    score = stemtomo.score_atoms(out, file)
    stored = Store.open(folder / "s.zarr").read("local_orbital").compute()
    stated = 100 * float(np.sqrt(sum((stored[f"sigma_{axis}"] ** 2).mean() for axis in "xyz")))
    by_depth = score["by_depth"]
    layers = [rmsd for rmsd, count in zip(by_depth["rmsd_pm"], by_depth["atoms"], strict=True) if count >= _FEWEST]
    thick = made["diameter_angstrom"] / made["depth_of_field_angstrom"]
    noise = "no noise" if electrons_per_atom is None else f"{electrons_per_atom:g} electrons per atom and image"
    name = f"{way}, {thick:.1f} depths of field, {noise}"
    figures = {
        "deviation": (score["rmsd_pm"], "pm"),
        "best layer": (min(layers), "pm"),
        "worst layer": (max(layers), "pm"),
        "stated": (stated, "pm"),
        "recall": (score["recall"], "share"),
        "precision": (score["precision"], "share"),
        "work": (spent, "CPU s"),
    }
    for depth, rmsd, count in zip(*(by_depth[key] for key in ("z_angstrom", "rmsd_pm", "atoms")), strict=True):
        if count >= _FEWEST:
            figures[f"{LAYER}{depth:g} Å"] = (rmsd, "pm")
    return [cost_row("local_orbital", f"{name}: {what}", *figure) for what, figure in figures.items()]


def depth_rows() -> list[Row]:
    """Return the four ways beside each other, without noise and with it."""
    rows = []
    for electrons in (None, 300.0, 1000.0):
        for way in WAYS:
            with tempfile.TemporaryDirectory() as folder:
                rows += way_rows(way, Path(folder), electrons_per_atom=electrons)
    return rows


def rows_25000() -> list[Row]:
    """The paper's smallest particle."""
    return end_to_end_rows(25_000)


def rows_100000() -> list[Row]:
    """The paper's fourth particle, 15 nm: for a night."""
    return end_to_end_rows(100_000)


def rows_epochs_100000() -> list[Row]:
    """An epoch of the paper's fourth particle."""
    return epoch_rows((100_000,))


def draw_depth(rows: Sequence[Row], path: Path) -> None:
    """Draw the deviation over depth of the four ways, a panel for every dose, from the rows of :func:`depth_rows`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        name, _, what = row.work.partition(": ")
        if what.startswith(LAYER):
            way, _, noise = (part.strip() for part in name.split(",", 2))
            depth = float(what.removeprefix(LAYER).removesuffix(" Å"))
            curves.setdefault(noise, {}).setdefault(way, []).append((depth, row.figure))
    figure, panels = plt.subplots(1, len(curves), figsize=(1.2 + 4.2 * len(curves), 3.4), sharey=True, squeeze=False)
    for panel, (noise, ways) in zip(panels[0], curves.items(), strict=True):
        for way, points in ways.items():
            colour = f"C{list(WAYS).index(way)}"
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=way, color=colour)
        panel.set(title=noise, xlabel="depth at tilt 0 / Å", yscale="log")
    panels[0][0].set_ylabel("RMSD of the layer / pm")
    panels[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    # python -m tests.benchmarks local_orbital_depth --json ROWS; python -m tests.benchmarks.local_orbital ROWS PICTURE
    draw_depth([Row(**row) for row in json.loads(Path(sys.argv[1]).read_text())["rows"]], Path(sys.argv[2]))
