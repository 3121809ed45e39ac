"""The mistilted strontium titanate of the reference data: its patterns, its truth, and how it is scored."""

import json
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from stemtomo.algorithms.ptychography.adaptive import Stack
from stemtomo.algorithms.ptychography.mistilt import Data
from stemtomo.algorithms.ptychography.windows import object_grid
from stemtomo.geometry import Detector, Optics, Scan
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.physics.probe import probe_wave
from tests.data import FOLDER

NAME = "sto_mistilt"


class Mistilted(NamedTuple):
    """Patterns (position, ky, kx), zero frequency first, and what is known about them."""

    counts: np.ndarray
    scan: Scan
    detector: Detector
    optics: Optics
    electrons: float
    truth: dict[str, Any]


def load(name: str = NAME) -> Mistilted:
    """Read the set; C1 belongs to the entrance surface."""
    told = json.loads((FOLDER / name / "metadata.json").read_text())
    with np.load(FOLDER / name / "data.npz") as file:
        counts = file["patterns_counts"].reshape(-1, *told["detector_shape"])
    with np.load(FOLDER / name / "truth.npz") as file:
        truth = dict(file)
    step = told["scan_step_A"]
    truth["scan_middle_angstrom"] = told["scan_start_A"] + (told["scan_shape_yx"][0] - 1) / 2 * step
    return Mistilted(
        np.fft.ifftshift(counts, axes=(1, 2)),
        Scan(tuple(told["scan_shape_yx"]), (step, step)),
        Detector(tuple(told["detector_shape"]), told["detector_pixel_invA"]),
        Optics(told["beam_energy_keV"] * 1e3, told["convergence_semiangle_mrad"] / 1e3, {"C10": told["defocus_C1_A"]}),
        told["electrons_per_probe"],
        truth,
    )


def prepare(specimen: Mistilted, window: int, slices: int, tied: bool = True) -> tuple[Stack, Data]:
    """Return what a fit needs, with the detector set into a window of ``window`` pixels."""
    wide = Detector((window, window), specimen.detector.pixel_inv_angstrom)
    pixel = wide.object_pixel_angstrom_yx
    grid = object_grid(specimen.scan.positions(), wide.shape_yx, pixel)
    stack = Stack(grid, wavelength_angstrom(specimen.optics.energy_ev), slices, tied=tied)
    probe = probe_wave(specimen.optics, wide.shape_yx, pixel, intensity=specimen.electrons)
    return stack, Data(probe[None], specimen.counts)


def score(phase_sum: np.ndarray, pixel_angstrom: float, specimen: Mistilted) -> dict[str, float]:
    """Compare with the zone-axis phase as the set's README says: r, r_blur and slope over the scanned square.

    Both are brought to the pixel 1 / (96 dk); the truth by its central Fourier coefficients, ours by splines, once
    frequencies that the detector does not reach are gone from it.
    """
    truth, middle = specimen.truth["zone_axis_projected_phase_rad"], specimen.truth["scan_middle_angstrom"]
    count = specimen.detector.shape_yx[0]
    target = 1 / (count * specimen.detector.pixel_inv_angstrom)
    spectrum = np.fft.fftshift(np.fft.fft2(truth.astype(np.float64)))
    low = slice(len(truth) // 2 - count // 2, len(truth) // 2 - count // 2 + count)
    band = np.fft.ifft2(np.fft.ifftshift(spectrum[low, low])).real * (count / len(truth)) ** 2
    half = (specimen.scan.shape_yx[0] - 1) / 2 * specimen.scan.step_angstrom_yx[0]
    lines = np.arange(count) * target
    kept = np.flatnonzero((lines >= middle - half) & (lines <= middle + half))
    found = {}
    for name, blur in (("r", 0.0), ("r_blur", 0.3)):
        ours = ndimage.spline_filter(_band_limited(phase_sum, pixel_angstrom, 0.5 / target, blur), order=5)
        there = ndimage.gaussian_filter(band, blur / target, mode="wrap")[np.ix_(kept, kept)]
        found[name], matched = _best(ours, pixel_angstrom, lines[kept] - middle, target, there)
        if not blur:
            found["slope"] = float(np.polyfit(there.ravel(), matched.ravel(), 1)[0])
    return found


def _band_limited(image: np.ndarray, pixel: float, limit: float, blur: float) -> np.ndarray:
    """Low-pass with mirrored borders, so that nothing rings in from them."""
    size = image.shape
    wide = np.pad(image - np.median(image), [(n // 2, n // 2) for n in size], mode="symmetric")
    ky, kx = (np.fft.fftfreq(n, pixel) for n in wide.shape)
    inside = (np.abs(ky) <= limit)[:, None] * (np.abs(kx) <= limit)
    soft = np.exp(-2 * (np.pi * blur) ** 2 * (ky[:, None] ** 2 + kx**2))
    limited = np.fft.ifft2(np.fft.fft2(wide) * inside * soft).real
    return limited[size[0] // 2 : size[0] // 2 + size[0], size[1] // 2 : size[1] // 2 + size[1]]


def _best(
    spline: np.ndarray, pixel: float, lines: np.ndarray, target: float, there: np.ndarray
) -> tuple[float, np.ndarray]:
    best, at = -1.0, (0.0, 0.0)
    matched = there
    for step, reach in ((1.0, 4.0), (0.2, 1.0)):
        offsets = np.arange(-reach, reach + 1e-9, step)
        for dy in at[0] + offsets:
            for dx in at[1] + offsets:
                y, x = ((lines + d * target) / pixel + n // 2 for d, n in zip((dy, dx), spline.shape, strict=True))
                image = ndimage.map_coordinates(spline, np.meshgrid(y, x, indexing="ij"), order=5, prefilter=False)
                r = float(np.corrcoef(image.ravel(), there.ravel())[0, 1])
                if r > best:
                    best, new, matched = r, (dy, dx), image
        at = new
    return best, matched
