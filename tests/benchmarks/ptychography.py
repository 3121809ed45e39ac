"""Ptychography per epoch against the bare FFTs of that epoch, one core, batches in the cache."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.fft
from scipy import ndimage

from stemtomo.algorithms.ptychography import solver
from stemtomo.algorithms.ptychography.windows import object_grid
from stemtomo.backend import CACHE_BYTES
from stemtomo.geometry import Detector, Optics, Scan
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.physics.probe import probe_wave
from stemtomo.physics.propagation import fresnel_propagator
from tests.benchmarks.measure import Row, cost_row, cpu_seconds
from tests.data import FOLDER


class Conditions(NamedTuple):
    """One tilt."""

    scan: Scan
    detector: Detector
    optics: Optics
    slices: int
    thickness_angstrom: float
    batches: int
    electrons: float


#: As the examples' CuAu series: every position on an object pixel, so two transforms per pattern.
SINGLE_SLICE = Conditions(
    Scan((24, 24), (1.6, 1.6)),
    Detector((64, 64), 1 / 25.6),
    Optics(300e3, 21e-3, {"C10": 200.0}),
    slices=1,
    thickness_angstrom=0.0,
    batches=8,
    electrons=3.4e4,
)
#: Strontium titanate on zone, 117 Å: the conditions under which other programs were measured.
SIX_SLICES = Conditions(
    Scan((32, 32), (0.4, 0.4)),
    Detector((96, 96), 0.03658313517468447),
    Optics(300e3, 21.4e-3, {"C10": -150.0}),
    slices=6,
    thickness_angstrom=19.525,
    batches=32,
    electrons=1.6e4,
)


def prepare(conditions: Conditions) -> tuple[solver.State, solver.Model]:
    """Return vacuum, the probe and the model of one tilt."""
    detector = conditions.detector
    grid = object_grid(conditions.scan.positions(), detector.shape_yx, detector.object_pixel_angstrom_yx)
    wavelength = wavelength_angstrom(conditions.optics.energy_ev)
    propagator = fresnel_propagator(
        detector.shape_yx, grid.pixel_angstrom_yx, wavelength, conditions.thickness_angstrom
    )
    model = solver.Model(grid, (propagator,) * (conditions.slices - 1), "anscombe")
    probe = probe_wave(conditions.optics, detector.shape_yx, grid.pixel_angstrom_yx, intensity=conditions.electrons)
    return solver.State.start(model, probe), model


def simulated_counts(state: solver.State, model: solver.Model) -> np.ndarray:
    """Return Poisson counts (position, ky, kx), uint16, of a smooth random object."""
    rng = np.random.default_rng(0)
    phase = ndimage.gaussian_filter(rng.random(state.phase.shape), (0, 1.5, 1.5)).astype(np.float32)
    truth = solver.State(phase - phase.min(), state.probe)
    return rng.poisson(solver.patterns(truth, model, np.arange(len(model.grid.corners)))).astype(np.uint16)


def solve(
    state: solver.State, model: solver.Model, counts: np.ndarray, batches: int, epochs: int
) -> tuple[solver.State, list[float]]:
    """Run ``epochs`` with object and probe updated from the first on."""
    rules = [solver.Nesterov(probe_step=0.1)] * epochs
    return solver.solve(state, model, counts, rules=rules, batches=[batches] * epochs, probe_start=0)


def transforms(model: solver.Model) -> int:
    """Return the FFTs of one epoch: there and back through every slice, and to shift probes off the pixels."""
    per_pattern = 4 * model.slices - 2 + (0 if model.grid.on_pixels else 2)
    return per_pattern * len(model.grid.corners)


def fft_floor(model: solver.Model) -> float:
    """Return the processor seconds of these FFTs alone, by scipy.fft, in place and in the cache."""
    edge = model.grid.window_yx
    batch = max(1, CACHE_BYTES // (8 * edge[0] * edge[1]))
    waves = np.random.default_rng(0).normal(size=(batch, *edge)).astype(np.complex64)
    rounds = max(1, transforms(model) // batch)

    def transform() -> None:
        for _ in range(rounds):
            scipy.fft.fft2(waves, norm="ortho", overwrite_x=True)

    return cpu_seconds(transform) * transforms(model) / (rounds * batch)


def benchmark() -> list[Row]:
    """Measure one tilt of one slice and one of six."""
    rows = []
    for name, conditions in (("24x24 of 64x64, 1 slice", SINGLE_SLICE), ("32x32 of 96x96, 6 slices", SIX_SLICES)):
        state, model = prepare(conditions)
        counts, batches = simulated_counts(state, model), conditions.batches
        cost = cpu_seconds(lambda s=state, m=model, c=counts, b=batches: solve(s, m, c, b, 1))
        rows.append(cost_row("ptychography", name, cost, "CPU s/epoch", fft_floor(model)))
    return rows + strontium_titanate()


def strontium_titanate(epochs: int = 5) -> list[Row]:
    """Measure how well a few epochs find the known phase of the reference data, where these are at hand."""
    folder = FOLDER / "sto_zone"
    if not folder.is_dir():
        return []
    with np.load(folder / "data.npz") as data, np.load(folder / "truth.npz") as truth:
        patterns, projected = data["patterns_counts"], truth["projected_phase_rad"]
    counts = np.roll(patterns.reshape(-1, 96, 96), (-48, -48), axis=(-2, -1))
    state, model = prepare(SIX_SLICES._replace(electrons=float(counts.sum(axis=(1, 2)).mean())))
    state, _ = solve(state, model, counts, SIX_SLICES.batches, epochs)
    spectrum = np.fft.fftshift(np.fft.fft2(projected))[48:144, 48:144]
    expected = np.fft.ifft2(np.fft.ifftshift(spectrum)).real / 4
    found = state.phase.sum(axis=0)
    blur = 0.3 / model.grid.pixel_angstrom_yx[0]
    work = f"correlation after {epochs} epochs"
    return [
        Row("strontium titanate", work, _correlation(found, expected), "r"),
        Row(
            "strontium titanate",
            f"{work}, 0.3 Å blur",
            _correlation(*(ndimage.gaussian_filter(image, blur) for image in (found, expected))),
            "r",
        ),
    ]


def _correlation(found: np.ndarray, expected: np.ndarray, half: int = 21) -> float:
    """Correlate the scanned squares (2 half + 1 pixels about n // 2) after the best shift of up to 4 pixels."""
    ky, kx = np.fft.fftfreq(expected.shape[0])[:, None], np.fft.fftfreq(expected.shape[1])[None, :]
    spectrum = np.fft.fft2(expected)
    square = _centre(found, half)
    best = -1.0
    for dy in np.arange(-4, 4.01, 0.2):
        for dx in np.arange(-4, 4.01, 0.2):
            shifted = np.fft.ifft2(spectrum * np.exp(-2j * np.pi * (ky * dy + kx * dx))).real
            best = max(best, float(np.corrcoef(square.ravel(), _centre(shifted, half).ravel())[0, 1]))
    return best


def _centre(image: np.ndarray, half: int) -> np.ndarray:
    y, x = image.shape[0] // 2, image.shape[1] // 2
    return image[y - half : y + half + 1, x - half : x + half + 1]
