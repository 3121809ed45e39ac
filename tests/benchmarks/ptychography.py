"""Ptychography per epoch against the bare FFTs of that epoch, one core, batches in the cache."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import scipy.fft
from scipy import ndimage

from stemtomo.algorithms.ptychography import solver
from stemtomo.algorithms.ptychography.model import start_modes
from stemtomo.algorithms.ptychography.padding import commensurate, to_detector_pixels, window_of
from stemtomo.algorithms.ptychography.regularisation import blurred_along_beam, depth_blur_angstrom
from stemtomo.algorithms.ptychography.rules import Adam, LeastSquares
from stemtomo.algorithms.ptychography.windows import object_grid
from stemtomo.backend import CACHE_BYTES, aligned_empty
from stemtomo.geometry import Detector, Optics, Scan
from stemtomo.kernels import fourier
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.physics.probe import probe_wave
from stemtomo.physics.propagation import fresnel_propagator
from tests.benchmarks.measure import Row, cost_row, cpu_seconds, print_result, python
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


def prepare(conditions: Conditions, padding: float = 0.0, modes: int = 1) -> tuple[solver.State, solver.Model]:
    """Return vacuum, the probe and the model of one tilt; windows are larger than the detector by ``padding``."""
    detector = conditions.detector
    extent = tuple(p * n for p, n in zip(detector.object_pixel_angstrom_yx, detector.shape_yx, strict=True))
    window = window_of(detector.shape_yx, padding, extent)
    grid = object_grid(conditions.scan.positions(), window, (extent[0] / window[0], extent[1] / window[1]))
    grid = commensurate(grid, detector.shape_yx) if padding else grid
    wavelength = wavelength_angstrom(conditions.optics.energy_ev)
    propagator = fresnel_propagator(window, grid.pixel_angstrom_yx, wavelength, conditions.thickness_angstrom)
    gaps = (propagator,) * (conditions.slices - 1)
    model = solver.Model(grid, gaps, "anscombe", detector_yx=detector.shape_yx)
    probe = probe_wave(conditions.optics, window, grid.pixel_angstrom_yx, intensity=conditions.electrons)
    return solver.State.start(model, start_modes(probe, modes)), model


def simulated_counts(state: solver.State, model: solver.Model) -> np.ndarray:
    """Return Poisson counts (position, ky, kx), uint16, of a smooth random object."""
    rng = np.random.default_rng(0)
    phase = ndimage.gaussian_filter(rng.random(state.phase.shape), (0, 1.5, 1.5)).astype(np.float32)
    truth = solver.State(phase - phase.min(), state.probe)
    return rng.poisson(solver.patterns(truth, model, np.arange(len(model.grid.corners)))).astype(np.uint16)


#: Update rules that are compared.
RULES: dict[str, solver.Rule] = {
    "nesterov": solver.Nesterov(probe_step=0.1),
    "lsqml": LeastSquares(probe_step=0.1),
    "adam": Adam(probe_step=0.1),
}


def solve(
    state: solver.State,
    model: solver.Model,
    counts: np.ndarray,
    batches: int,
    epochs: int,
    blur_slices: float = 0.0,
    rule: str = "nesterov",
) -> tuple[solver.State, list[float]]:
    """Run ``epochs`` with object and probe updated from the first on, in larger batches after the fifth."""
    rules = [RULES[rule]] * epochs
    counts_of_batches = [batches if epoch < 5 else 8 for epoch in range(epochs)]

    def regularise(now: solver.State, _: int) -> solver.State:
        return replace(now, phase=blurred_along_beam(now.phase, blur_slices))

    return solver.solve(
        state, model, counts, rules=rules, batches=counts_of_batches, probe_start=0, regularise=regularise
    )


def transforms(model: solver.Model) -> int:
    """Return the FFTs of one epoch: there and back through every slice, and to shift probes off the pixels."""
    per_pattern = 4 * model.slices - 2 + (0 if model.grid.on_pixels else 2)
    return per_pattern * len(model.grid.corners)


def fft_floor(model: solver.Model, modes: int = 1) -> tuple[float, str]:
    """Return the processor seconds of these FFTs alone, in place and in the cache, and the library that is fastest."""
    edge = model.grid.window_yx
    batch = max(1, CACHE_BYTES // (8 * edge[0] * edge[1]))
    count = modes * transforms(model)
    rounds = max(1, count // batch)
    found = {}
    for name, transform in _libraries(batch, edge).items():

        def repeat(transform: Callable[[], Any] = transform) -> None:
            for _ in range(rounds):
                transform()

        found[name] = cpu_seconds(repeat) * count / (rounds * batch)
    fastest = min(found, key=lambda name: found[name])
    return found[fastest], fastest


def _libraries(batch: int, edge: tuple[int, int]) -> dict[str, Callable[[], Any]]:
    """Return what transforms a batch of waves in place, by library; scipy is always there."""
    waves = aligned_empty((batch, *edge), np.complex64)
    waves[:] = np.random.default_rng(0).normal(size=waves.shape)
    found: dict[str, Callable[[], Any]] = {
        "scipy": lambda: scipy.fft.fft2(waves, norm="ortho", overwrite_x=True),
        "stemtomo": lambda: fourier.fft2(waves, overwrite=True),
    }
    if importlib.util.find_spec("pyfftw"):
        import pyfftw

        plan = pyfftw.FFTW(waves, waves, axes=(1, 2), flags=("FFTW_MEASURE",), threads=1)
        waves[:] = 0
        found["pyfftw"] = plan.execute
    if importlib.util.find_spec("mkl_fft"):
        import mkl_fft

        found["mkl"] = lambda: mkl_fft.fft2(waves, axes=(1, 2), norm="ortho", out=waves)
    if importlib.util.find_spec("ducc0"):
        import ducc0

        found["ducc0"] = lambda: ducc0.fft.c2c(waves, axes=(1, 2), out=waves, inorm=1, nthreads=1)
    return found


def benchmark() -> list[Row]:
    """Measure one tilt of one slice and one of six, with and without padding, and how the cost grows."""
    rows = []
    cases = [
        ("24x24 of 64x64, 1 slice", SINGLE_SLICE, 0.0, 1),
        ("32x32 of 96x96, 6 slices", SIX_SLICES, 0.0, 1),
        ("32x32 of 96x96, 6 slices, padded to 108", SIX_SLICES, 0.125, 1),
        ("32x32 of 96x96, 3 slices", SIX_SLICES._replace(slices=3), 0.0, 1),
        ("32x32 of 96x96, 12 slices", SIX_SLICES._replace(slices=12), 0.0, 1),
        ("32x32 of 96x96, 6 slices, 4 modes", SIX_SLICES, 0.0, 4),
    ]
    for name, conditions, padding, modes in cases:
        state, model = prepare(conditions, padding, modes)
        counts, batches = simulated_counts(state, model), conditions.batches
        cost = cpu_seconds(lambda s=state, m=model, c=counts, b=batches: solve(s, m, c, b, 1), repeats=2)
        floor, library = fft_floor(model, modes)
        rows.append(cost_row("ptychography", f"{name} (FFTs: {library})", cost, "CPU s/epoch", floor))
    compared = [row for rule in RULES for epochs in (5, 20) for row in strontium_titanate(epochs, rule)]
    from tests.benchmarks.peers import peer_rows

    return [*rows, *compared, *peak_row(), *peer_rows()]


def peak_row() -> list[Row]:
    """Measure the peak of a process that does nothing but the five epochs, libraries and reading included."""
    if not (FOLDER / "sto_zone").is_dir():
        return []
    run = python("tests.benchmarks.ptychography", ())
    return [Row("strontium titanate", "5 epochs, nesterov: peak of the process", run.peak_rss_mb, "MB")]


def strontium_titanate(epochs: int = 5, rule: str = "nesterov") -> list[Row]:
    """Measure how well a few epochs find the known phase of the reference data, where these are at hand."""
    folder = FOLDER / "sto_zone"
    if not folder.is_dir():
        return []
    with np.load(folder / "data.npz") as data:
        patterns = data["patterns_counts"]
    counts = np.ascontiguousarray(np.roll(patterns.reshape(-1, 96, 96), (-48, -48), axis=(-2, -1)))
    state, model = prepare(SIX_SLICES._replace(electrons=float(counts.sum(axis=(1, 2)).mean())), padding=0.125)
    optics = SIX_SLICES.optics
    width = depth_blur_angstrom(wavelength_angstrom(optics.energy_ev), optics.semiangle_rad)
    state, _ = solve(state, model, counts, SIX_SLICES.batches, epochs, width / SIX_SLICES.thickness_angstrom, rule)
    found = to_detector_pixels(state.phase.sum(axis=0), model.grid.window_yx, (96, 96))
    return scored(found, f"correlation after {epochs} epochs, {rule}")


def scored(found: np.ndarray, work: str) -> list[Row]:
    """Compare a phase sum on the detector's pixels, the scan in its middle, with the truth of the reference data."""
    with np.load(FOLDER / "sto_zone" / "truth.npz") as truth:
        projected = truth["projected_phase_rad"]
    spectrum = np.fft.fftshift(np.fft.fft2(projected))[48:144, 48:144]
    expected = np.fft.ifft2(np.fft.ifftshift(spectrum)).real / 4
    blur = 0.3 / SIX_SLICES.detector.object_pixel_angstrom_yx[0]
    blurred = (ndimage.gaussian_filter(found, blur), ndimage.gaussian_filter(expected, blur, mode="wrap"))
    return [
        Row("strontium titanate", work, _correlation(found, expected), "r"),
        Row("strontium titanate", f"{work}, 0.3 Å blur", _correlation(*blurred), "r"),
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


if __name__ == "__main__":
    print_result([row.figure for row in strontium_titanate()])
