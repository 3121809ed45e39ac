"""Tomography per iteration against a projector and back-projector of two taps written in C, one core."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

from stemtomo.algorithms.tomography import solver
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.geometry import TiltSeries
from stemtomo.physics.projection import TiltGeometry, backproject, project, render
from stemtomo.pipeline.config import TomographySettings
from stemtomo.pipeline.descent import Problem
from stemtomo.pipeline.reconstruction import reconstruct
from tests.benchmarks.measure import Row, cost_row, cpu_seconds
from tests.data import FOLDER

ANGLES_DEG = tuple(range(-70, 71, 4))
_LANES = 16  # of projector_floor.c


def geometry(edge: int, phi_deg: float = 0.0) -> TiltGeometry:
    """Return 36 tilts of a cube; a turn about z takes the axis off y."""
    series = TiltSeries.from_degrees(ANGLES_DEG, phi_deg=[phi_deg] * len(ANGLES_DEG))
    shifts = np.zeros((len(ANGLES_DEG), 2))
    return TiltGeometry(series.rotations, shifts, (edge, edge, edge), (edge, edge))


def floor_seconds(edge: int) -> float | None:
    """Return the processor seconds of projecting and back-projecting in C; ``None`` without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "floor.so"
        flags = ["-O3", "-march=native", "-ffast-math", "-shared", "-fPIC"]
        subprocess.run(
            [compiler, *flags, "-o", library, Path(__file__).with_name("projector_floor.c"), "-lm"], check=True
        )
        functions = ctypes.CDLL(str(library))
    angles = np.deg2rad(ANGLES_DEG).astype(np.float32)
    volume = np.random.default_rng(0).random((edge // _LANES, edge, edge, _LANES), dtype=np.float32)
    images = np.zeros((edge // _LANES, len(angles), edge, _LANES), np.float32)
    cosines, sines = np.cos(angles), np.sin(angles)

    def pointer(array: np.ndarray) -> ctypes.c_void_p:
        return ctypes.c_void_p(array.ctypes.data)

    sizes = (edge // _LANES, edge, edge, len(angles), edge)

    def both() -> None:
        functions.project(pointer(volume), pointer(images), pointer(cosines), pointer(sines), *sizes)
        functions.backproject(pointer(images), pointer(volume), pointer(cosines), pointer(sines), *sizes)

    return cpu_seconds(both)


def iteration_seconds(edge: int) -> float:
    """Return the processor seconds of one iteration: project, steer, descend."""
    where = geometry(edge)
    images = np.random.default_rng(0).random((len(where), edge, edge), dtype=np.float32)
    settings = TomographySettings()
    weights = np.ones(len(where), np.float32)
    measured = solver.Measurement(images, np.ones(images.shape, bool), weights, settings.element_width_px)
    empty = np.zeros((edge,) * 3, np.float32)
    block: solver.Block = {"volume": empty, "previous": empty}
    whole, image = where.whole_volume, where.whole_image
    control = solver.steer(solver.project_block(block, where, whole, image), None, measured)

    def iterate() -> None:
        after = solver.descend(
            block, where, solver.Constraint(), control["beta"], 1e-3, whole, image, control["residual"]
        )
        solver.steer(solver.project_block(after, where, whole, image), control, measured)

    return cpu_seconds(iterate)


def projector_rows(edge: int = 128) -> list[Row]:
    """Measure the projector and its adjoint about y and about a general axis, per voxel and angle."""
    rows = []
    volume = np.random.default_rng(0).random((edge,) * 3, dtype=np.float32)
    for name, phi_deg in (("about y", 0.0), ("general axis", 1.0)):
        where = geometry(edge, phi_deg)
        images = project(where, volume, where.whole_volume, where.whole_image)
        per = 1e9 / (len(where) * edge**3)
        there = cpu_seconds(lambda g=where: project(g, volume, g.whole_volume, g.whole_image))
        back = cpu_seconds(lambda g=where, i=images: backproject(g, i, g.whole_image, g.whole_volume))
        rows.append(Row("projector", f"{edge}^3, {name}, project", there * per, "CPU ns/voxel-angle"))
        rows.append(Row("projector", f"{edge}^3, {name}, back-project", back * per, "CPU ns/voxel-angle"))
    return rows


def astra_seconds(edge: int) -> tuple[float, float] | None:
    """Return the processor seconds of projecting and back-projecting in astra ("linear"); ``None`` without it."""
    try:
        import astra
    except ImportError:
        return None
    angles, slices = np.deg2rad(ANGLES_DEG), 16
    box = astra.create_vol_geom(edge, edge)
    projector = astra.create_projector("linear", astra.create_proj_geom("parallel", 1.0, edge, angles), box)
    operator = astra.OpTomo(projector)
    planes = np.random.default_rng(0).random((slices, edge * edge), dtype=np.float32)
    rows = [operator.FP(plane) for plane in planes]
    there = cpu_seconds(lambda: [operator.FP(plane) for plane in planes], 2)
    back = cpu_seconds(lambda: [operator.BP(row) for row in rows], 2)
    astra.projector.delete(projector)
    return there * edge / slices, back * edge / slices


def astra_rows(edge: int) -> list[Row]:
    """Compare the projector and its adjoint about y with astra's in the same run."""
    theirs = astra_seconds(edge)
    if theirs is None:
        return []
    where = geometry(edge)
    volume = np.random.default_rng(0).random((edge,) * 3, dtype=np.float32)
    images = project(where, volume, where.whole_volume, where.whole_image)
    ours = (
        cpu_seconds(lambda: project(where, volume, where.whole_volume, where.whole_image)),
        cpu_seconds(lambda: backproject(where, images, where.whole_image, where.whole_volume)),
    )
    names = ("project", "back-project")
    return [
        Row("astra over stemtomo", f"{edge}^3, {name}", other / own, "times the CPU s", own, None)
        for name, own, other in zip(names, ours, theirs, strict=True)
    ]


def accuracy_rows(edge: int = 128, atoms: int = 1304, width_px: float = 1.8, iterations: int = 10) -> list[Row]:
    """Reconstruct Gaussian atoms from projections that are written down, not computed by the package."""
    rng = np.random.default_rng(0)
    positions = rng.normal(size=(atoms, 3))
    positions *= 0.42 * edge * rng.random((atoms, 1)) ** (1 / 3) / np.linalg.norm(positions, axis=1, keepdims=True)
    where, grid = geometry(edge), np.arange(edge) - edge // 2

    def profile(centres: np.ndarray) -> np.ndarray:
        lines = np.exp(-((grid - centres[:, None]) ** 2) / (2 * width_px**2))
        return (lines / (math.sqrt(2 * math.pi) * width_px)).astype(np.float32)

    seen = [positions @ rotation for rotation in where.rotations]
    images = np.stack([profile(s[:, 1]).T @ profile(s[:, 0]) for s in seen])
    z, y, x = (profile(positions[:, axis]) for axis in (2, 1, 0))
    truth = np.stack([(z[:, k, None] * y).T @ x for k in range(edge)])
    settings = TomographySettings(iterations=iterations, blocks=1, refine_shifts=False)
    weights = np.ones(len(where), np.float32)
    measured = solver.Measurement(images, np.ones(images.shape, bool), weights, settings.element_width_px)
    problem = Problem(measured, where, 1.0, 1.0)
    found = render(
        reconstruct(problem, settings, ThreadExecutor(1)).coefficients, where.degree, settings.element_width_px
    )
    correlation = float(np.corrcoef(found.ravel(), truth.ravel())[0, 1])
    return [Row("tomography", f"{edge}^3, {atoms} atoms, {iterations} iterations", correlation, "r")]


def resire_rows(iterations: int = 100, width_px: float = 0.5) -> list[Row]:
    """Reconstruct the sample that RESIRE ships, where it is at hand: 64^3, 41 tilts about all axes, known volume."""
    folder = FOLDER / "resire_sample"
    if not folder.is_dir():
        return []
    with np.load(folder / "data.npz") as data:
        images, truth = data["proj"].transpose(2, 1, 0), data["gt_volume"].transpose(2, 1, 0)
        phi, theta, psi = data["tilt_euler_zyx_deg"].T
    count = len(images)
    where = TiltGeometry(
        TiltSeries.from_degrees(theta, phi, psi).rotations, np.zeros((count, 2)), truth.shape, images.shape[1:]
    )
    ones = np.ones(count, np.float32)
    measured = solver.Measurement(np.ascontiguousarray(images), np.ones(images.shape, bool), ones, width_px)
    settings = TomographySettings(iterations=iterations, refine_shifts=False)
    problem, began = Problem(measured, where, 1.0, 1.0), time.process_time()
    coefficients = reconstruct(problem, settings, ThreadExecutor(1)).coefficients
    spent = time.process_time() - began
    seen = measured.seen(project(where, coefficients, where.whole_volume, where.whole_image))
    volume = render(coefficients, where.degree, width_px)
    r1 = np.mean(np.abs(seen - images).sum(axis=(1, 2)) / np.abs(images).sum(axis=(1, 2)))
    figures = {"CPU s": spent, "R1": r1, "r": np.corrcoef(volume.ravel(), truth.ravel())[0, 1]}
    figures |= {f"FSC at {f} Nyquist": shell_correlation(volume, truth, f) for f in (0.25, 0.5, 0.75)}
    return [Row("RESIRE sample", f"{iterations} iterations", float(value), unit) for unit, value in figures.items()]


def shell_correlation(volume: np.ndarray, truth: np.ndarray, fraction: float) -> float:
    """Return the Fourier shell correlation of two volumes in a shell of one pixel at a fraction of Nyquist."""
    frequencies = [np.fft.fftfreq(n) * n for n in truth.shape]
    radius = np.sqrt(sum(f**2 for f in np.meshgrid(*frequencies, indexing="ij")))
    shell = np.abs(radius - fraction * truth.shape[0] / 2) < 0.5
    a, b = np.fft.fftn(volume)[shell], np.fft.fftn(truth)[shell]
    return float(np.vdot(a, b).real / np.sqrt(np.vdot(a, a).real * np.vdot(b, b).real))


def benchmark(edges: tuple[int, ...] = (128, 256)) -> list[Row]:
    """Measure the projector, and whole iterations against the floor."""
    rows = projector_rows()
    for edge in edges:
        work = f"{edge}^3, {len(ANGLES_DEG)} tilts"
        rows.append(cost_row("tomography", work, iteration_seconds(edge), "CPU s/iteration", floor_seconds(edge)))
        rows += astra_rows(edge)
    return rows + accuracy_rows() + accuracy_rows(iterations=100) + resire_rows()
