"""A metallic glass of 18,356 atoms seen in 55 noisy projections: traced, then refined while atoms come and go.

Positions, species and angles are those published; atoms are drawn as Gaussians with intensities in the ratio of the
atomic numbers 28, 45 and 78. Noise is white over square frames. R1 = sum |noise| / sum |signal|.
"""

from __future__ import annotations

import itertools
import time
from functools import partial
from typing import NamedTuple

import numpy as np

from stemtomo.algorithms.atoms.backprojection import density
from stemtomo.algorithms.atoms.completion import CompletionRules, complete_atoms
from stemtomo.algorithms.atoms.projected import ProjectedImages
from stemtomo.algorithms.atoms.scoring import match_atoms
from stemtomo.algorithms.atoms.tracing import TracingRules, region_of, trace_blocks
from stemtomo.geometry import TiltSeries
from stemtomo.kernels.atoms import render
from stemtomo.physics.projection import TiltGeometry
from tests.benchmarks.measure import Row, cost_row
from tests.data import FOLDER

PIXEL = 0.347
NUMBERS = np.array([28.0, 45.0, 78.0])
DISTANCE = 1.75
#: Of the bright ones: a light atom is 0.36 of a heavy one, give or take its noise.
FAINTEST = 0.12


class Glass(NamedTuple):
    """Known atoms (atom, 3) in Å, their classes, and what is seen of them."""

    positions: np.ndarray
    labels: np.ndarray
    projected: ProjectedImages


def simulated(edge_angstrom: float | None, frame: int, r1: float, width_angstrom: float) -> Glass:
    """Return the glass, or a cube of ``edge_angstrom`` from its middle, in frames of ``frame`` pixels."""
    with np.load(FOLDER / "metallic_glass_models" / "models.npz") as models:
        positions = models["final_atoms_A"].astype(float)
        labels = models["final_types"].astype(int) - 1
        phi, theta, psi = models["tilt_euler_zyx_deg"].T
    positions -= positions.mean(axis=0)
    if edge_angstrom is not None:
        inside = (np.abs(positions) < edge_angstrom / 2).all(axis=1)
        positions, labels = positions[inside], labels[inside]
        positions -= positions.mean(axis=0)
    rotations = TiltSeries.from_degrees(theta, phi, psi).rotations
    width = np.full(len(positions), width_angstrom / PIXEL, np.float32)
    intensity = (NUMBERS[labels] / PIXEL**2).astype(np.float32)
    images = np.zeros((len(rotations), frame, frame), np.float32)
    for image, rotation in zip(images, rotations, strict=True):
        seen = ((positions @ rotation)[:, :2] / PIXEL + frame // 2).astype(np.float32)
        render(image, seen[:, 0].copy(), seen[:, 1].copy(), intensity, width, int(np.ceil(5 * width[0])))
    sigma = r1 * images.mean() / np.sqrt(2 / np.pi)
    images += np.random.default_rng(0).normal(0, sigma, images.shape).astype(np.float32)
    valid, shifts = np.ones(images.shape, bool), np.zeros((len(images), 2))
    return Glass(positions, labels, ProjectedImages(images, valid, rotations, shifts, PIXEL))


def started(glass: Glass, width_angstrom: float, noise: float = 0.003) -> np.ndarray:
    """Return candidates (n, 3): all that may be an atom in a volume with atoms of that width made narrow."""
    half = np.ceil((np.abs(glass.positions).max(axis=0) + 3) / PIXEL).astype(int)
    shape = (2 * int(half[2]), 2 * int(half[1]), 2 * int(half[0]))
    seen = glass.projected
    geometry = TiltGeometry(seen.rotations, seen.shifts_angstrom, shape, seen.images.shape[1:], 1)
    extent = float(2 * np.linalg.norm(glass.positions, axis=1).max())
    volume = density(iter(seen.images), geometry, PIXEL, 0.0, extent)
    rules = TracingRules(
        minimum_distance_angstrom=DISTANCE,
        threshold=FAINTEST,
        deconvolution_angstrom=width_angstrom,
        deconvolution_noise=noise,
    )
    return trace_blocks(shape, partial(region_of, volume), PIXEL, rules).positions


def found(glass: Glass, width_angstrom: float, iterations: int = 10) -> dict[str, float]:
    """Return recall, precision, RMSD in pm and the share of right species, and processor seconds."""
    began = time.process_time()
    start = started(glass, width_angstrom)
    before = match_atoms(start, glass.positions, 0.75)
    rules = CompletionRules(minimum_distance_angstrom=DISTANCE, iterations=iterations, threshold=FAINTEST)
    atoms = complete_atoms(
        start,
        glass.projected,
        3,
        width_angstrom=width_angstrom,
        rules=rules,
        iterations=30,
        intensity_spread=0.1,
        weigh=False,
    )
    after = match_atoms(atoms.refined.positions, glass.positions, 0.75)
    right = (atoms.labels[after.found] == glass.labels[after.truth]).mean()
    return {
        "traced recall": before.recall,
        "traced precision": before.precision,
        "recall": after.recall,
        "precision": after.precision,
        "rmsd pm": 100 * after.rmsd_angstrom,
        "species": float(right),
        "cpu s": time.process_time() - began,
    }


def glass_rows() -> list[Row]:
    """Find the atoms of the whole particle, at two widths of the atoms and two levels of noise each."""
    rows = []
    for width, r1 in itertools.product((0.71, 0.82), (0.14, 0.25)):
        result = found(simulated(None, 320, r1, width), width)
        rows += [cost_row("glass", f"width {width} Å, R1 {r1}: {name}", value, "") for name, value in result.items()]
    return rows
