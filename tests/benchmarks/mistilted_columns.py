"""A mistilted crystal with the tilt in the propagator (APP) and with an upright one straightened afterwards (FPP).

Both have the same patterns, passes, slices and regularisation, from vacuum; scored against the zone-axis phase: r, and
where columns stand against each other and how round they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from stemtomo.algorithms.ptychography import adaptive, columns, drift, mistilt, solver
from stemtomo.algorithms.ptychography.adaptive import Geometry
from stemtomo.algorithms.ptychography.regularisation import blurred_along_beam, depth_blur_angstrom
from tests import mistilted
from tests.benchmarks.measure import Row
from tests.data import FOLDER

WINDOW, SLICES, PASSES = 128, 6, 8
_PITCH_ANGSTROM = 3.905
_RADIUS_ANGSTROM = 0.9
_KINDS = {"Sr": (38,), "TiO": (22,), "O": (8,)}


class Shape(NamedTuple):
    """How columns stand in a phase, against the true phase."""

    shifts_pm: dict[str, np.ndarray]
    """(2,), mean shift of a kind from the middle of its neighbours, x and y, less that of the truth."""
    scatter_pm: float
    """Root mean square distance of columns from where the truth has them, once the mean is off."""
    elongation: float
    """Mean ratio of long to short width, over that of the truth."""


def compare(specimen: mistilted.Mistilted, geometry: Geometry) -> dict[str, tuple[dict[str, float], Shape]]:
    """Return scores and column shapes by method, for a mistilt ``geometry`` that was found."""
    upright = Geometry(np.zeros(2), geometry.slice_thickness_angstrom)
    found = {}
    for name, at, tied in (
        ("APP, tied slices", geometry, True),
        ("APP, free slices", geometry, False),
        ("FPP", upright, False),
    ):
        phase, pixel = descend(specimen, at, tied)
        found[name] = phase.sum(axis=0)
        if name == "FPP":
            rows, columns_ = (slice(n // 2 - 22, n // 2 + 22) for n in phase.shape[1:])
            lean = drift.slice_drift(phase, (rows, columns_))
            found["FPP, straightened"] = drift.straightened(phase, lean).sum(axis=0)
    return {
        name: (mistilted.score(image, pixel, specimen), shape_of(image, pixel, specimen))
        for name, image in found.items()
    }


def descend(specimen: mistilted.Mistilted, geometry: Geometry, tied: bool) -> tuple[np.ndarray, float]:
    """Return the phase (slice, y, x) after :data:`PASSES`, with the usual blur along the beam, and its pixel."""
    stack, data = mistilted.prepare(specimen, WINDOW, SLICES, tied)
    propagators = adaptive.propagators_of(geometry, stack, np.arange(1), data.probe)
    seen = specimen.detector.shape_yx
    model = solver.Model(stack.grid, tuple(propagators), "anscombe", "complex", detector_yx=seen)
    probe = adaptive.entering_probe(data.probe, geometry, stack)
    blur = depth_blur_angstrom(stack.wavelength, specimen.optics.semiangle_rad) / geometry.slice_thickness_angstrom
    state, _ = solver.solve(
        solver.State.start(model, probe, tied),
        model,
        specimen.counts,
        rules=[solver.Nesterov()] * PASSES,
        batches=[16] * PASSES,
        probe_start=PASSES,
        tied_epochs=PASSES if tied else 0,
        regularise=lambda now, _: replace(now, phase=blurred_along_beam(now.phase, blur)),
    )
    return solver.untied(state, SLICES).phase.real, stack.grid.pixel_angstrom_yx[0]


def shape_of(image: np.ndarray, pixel: float, specimen: mistilted.Mistilted) -> Shape:
    """Measure the columns within the scan in ``image`` and in the true phase."""
    truth = specimen.truth["zone_axis_projected_phase_rad"].astype(float)
    middle, grid = specimen.truth["scan_middle_angstrom"], float(specimen.truth["pixel_A"])
    half = (specimen.scan.shape_yx[0] - 1) / 2 * specimen.scan.step_angstrom_yx[0]
    places: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    stretch = []
    for kind, numbers in _KINDS.items():
        guesses = _columns_of(specimen, numbers)
        guesses = guesses[(np.abs(guesses - middle) < half - 0.6).all(axis=1)]
        ours = columns.measure(image, (guesses - middle) / pixel + np.array(image.shape[::-1]) // 2,
                               _RADIUS_ANGSTROM / pixel)  # fmt: skip
        true = columns.measure(truth, guesses / grid, _RADIUS_ANGSTROM / grid)
        at = ours.places_px - np.array(image.shape[::-1]) // 2
        places[kind] = at * pixel + middle, true.places_px * grid
        stretch.append((ours.widths_px[:, 0] / ours.widths_px[:, 1]) / (true.widths_px[:, 0] / true.widths_px[:, 1]))
    off = np.concatenate([ours - true for ours, true in places.values()])
    shifts = {}
    for kind, others, neighbours in (("TiO", "Sr", 4), ("O", "TiO", 2)):
        ours, true = (
            columns.shifts_from_neighbours(places[kind][side], places[others][side], neighbours) for side in (0, 1)
        )
        shifts[f"{kind} against {others}"] = 100 * (ours.mean(axis=0) - true.mean(axis=0))
    scatter = 100 * float(np.sqrt(((off - off.mean(axis=0)) ** 2).sum(axis=1).mean()))
    return Shape(shifts, scatter, float(np.concatenate(stretch).mean()))


def benchmark() -> list[Row]:
    """Compare the methods on the reference data, where these are at hand, with the geometry fitted from them."""
    if not (FOLDER / mistilted.NAME).is_dir():
        return []
    specimen = mistilted.load()
    rows = []
    for name, (score, shape) in compare(specimen, found_geometry(specimen)).items():
        rows += [Row("mistilt", f"{name}: {key}", score[key], "r") for key in ("r", "r_blur")]
        for pair, shift in shape.shifts_pm.items():
            rows.append(Row("mistilt", f"{name}: {pair}", float(np.hypot(*shift)), "pm"))
        rows.append(Row("mistilt", f"{name}: rms distance of columns", shape.scatter_pm, "pm"))
        rows.append(Row("mistilt", f"{name}: elongation of columns", shape.elongation, ""))
    return rows


def found_geometry(specimen: mistilted.Mistilted) -> Geometry:
    """Fit mistilt and thickness from none and one that is 20 % wrong, with a quarter of the patterns."""
    stack, data = mistilted.prepare(specimen, WINDOW, 5)
    quarter = np.flatnonzero(((np.indices(specimen.scan.shape_yx) % 2) == 0).all(axis=0).ravel())
    thickness = float(specimen.truth["thickness_A"])
    found = mistilt.fit(Geometry(np.zeros(2), 1.2 * thickness / 5), stack, data, quarter, 60).geometry
    return Geometry(found.tilt_rad_xy, found.slice_thickness_angstrom * 5 / SLICES)


def _columns_of(specimen: mistilted.Mistilted, numbers: tuple[int, ...]) -> np.ndarray:
    """Places (column, 2), x and y in Å, of columns that hold ``numbers``; oxygen only where it is alone."""
    atoms, species = specimen.truth["atoms_zone_xyz_A"][:, :2], specimen.truth["atomic_numbers"]
    half_cell = _PITCH_ANGSTROM / 2
    origin = np.median(np.mod(atoms[species == 22], _PITCH_ANGSTROM), axis=0)
    cells = np.rint((atoms - origin) / half_cell).astype(int)
    keys, label = np.unique(cells, axis=0, return_inverse=True)
    label = label.ravel()
    found = []
    for number in range(len(keys)):
        inside = label == number
        held = set(species[inside].tolist())
        if (numbers == (8,) and held == {8}) or (numbers != (8,) and held & set(numbers)):
            found.append(atoms[inside].mean(axis=0))
    return np.array(found)
