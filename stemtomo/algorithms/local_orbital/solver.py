"""Refinement of local orbitals: which parameters are free when, how they are scaled, atoms that come and go.

One quasi-Newton search over all free parameters together, started from the diagonal of the curvature that the model
itself predicts (a Gaussian behind a known probe), which makes Å, radians and intensities comparable. Probes are
looked for with their high frequencies raised, as the atoms' width has damped them; gauges go between searches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
from scipy.spatial import cKDTree

from stemtomo.algorithms.local_orbital.model import Orbitals, Sums, places
from stemtomo.algorithms.local_orbital.probes import without_gauges
from stemtomo.algorithms.quasi_newton import Iterate, Point, minimise

#: Sums over all images at a model; whether derivatives in the probes are wanted.
Evaluate = Callable[[Orbitals, bool], Sums]

_LARGEST = {"positions": 0.15, "width_angstrom": 0.03, "shifts_angstrom": 0.2, "tilts_rad": 3e-3}
_NARROWEST_ANGSTROM = 0.15
#: Iterations over which a search is seen to stand still.
_WATCHED = 5
_FAINTEST_FREQUENCY = 3e-3


class Geometry(NamedTuple):
    """What of a focal series is known without its images."""

    rotations: np.ndarray
    sections: np.ndarray
    shape_yx: tuple[int, int]
    pixel_angstrom: float
    gradient_power: np.ndarray
    """Sum over every image of its squared gradient, per Å², (image,)."""
    numbers: np.ndarray
    """Which of the images are refined; the others test the model."""


@dataclass(frozen=True)
class Free:
    """What a search may change."""

    positions: bool = True
    intensity: bool = True
    width: Literal["none", "shared", "species", "atom"] = "shared"
    probes: bool = False
    shifts: bool = False
    tilts: bool = False

    def names(self) -> tuple[str, ...]:
        """Return the fields of the model that change."""
        wanted = {
            "positions": self.positions,
            "intensity": self.intensity,
            "width_angstrom": self.width != "none",
            "probes": self.probes,
            "shifts_angstrom": self.shifts,
            "tilts_rad": self.tilts,
        }
        return tuple(name for name, free in wanted.items() if free)


@dataclass(frozen=True)
class Result:
    """A refined model, and the loss after every iteration."""

    model: Orbitals
    losses: list[float] = field(default_factory=list)


class _Rest:
    """Whether atoms have come to rest since they were looked at last."""

    def __init__(self, positions: np.ndarray, still_angstrom: float) -> None:
        self._positions = positions
        self._still = still_angstrom

    def reached(self, iteration: int, positions: np.ndarray) -> bool:
        if iteration % _WATCHED:
            return False
        way = np.sqrt(((positions - self._positions) ** 2).sum(axis=1).mean())
        self._positions = positions
        # A search that has just begun goes slowly, too.
        return bool(way < self._still) and iteration > _WATCHED


def gradient_power(images: np.ndarray, pixel_angstrom: float) -> np.ndarray:
    """Return the sum over every image (image, y, x) of its squared gradient along one direction, per Å²."""
    along = [((images[:, 1:] - images[:, :-1]) ** 2).sum(axis=(1, 2)), (np.diff(images, axis=2) ** 2).sum(axis=(1, 2))]
    return np.asarray(sum(along), dtype=np.float64) / 2 / pixel_angstrom**2


def refine(
    model: Orbitals,
    evaluate: Evaluate,
    geometry: Geometry,
    free: Free,
    iterations: int,
    on_iteration: Callable[[int, float], None] | None = None,
    still: float = 1e-5,
    still_angstrom: float = 0.0,
) -> Result:
    """Search for the smallest loss over what is ``free``; ends early where that is reached.

    Parameters
    ----------
    still
        Relative fall of the loss over 5 iterations at which the search ends.
    still_angstrom
        Root mean square of the atoms' way over 5 iterations at which it ends, too.
    """
    names, losses = free.names(), []
    kinds = _alike(model, free)
    watched = _Rest(model.positions, still_angstrom)
    scales, raising = inverse_curvature(model, geometry), _raising(model, geometry.pixel_angstrom)

    def evaluate_at(point: Point) -> tuple[float, Point]:
        found = evaluate(_at(model, names, raising, point, kinds), free.probes)
        return found.loss, tuple(_gradient(found, name, raising, kinds) for name in names)

    def follow(iterate: Iterate) -> bool:
        losses.append(iterate.loss)
        if on_iteration is not None:
            on_iteration(len(losses), iterate.loss)
        if free.positions and watched.reached(len(losses), iterate.point[names.index("positions")]):
            return True
        return len(losses) > _WATCHED and losses[-1 - _WATCHED] - losses[-1] < still * losses[-1 - _WATCHED]

    found = minimise(
        evaluate_at,
        tuple(_value(model, name, kinds) for name in names),
        tuple(_scale(scales[name], name, kinds) for name in names),
        iterations,
        largest_step=[_LARGEST.get(name) for name in names],
        singly=True,
        on_iteration=follow,
    )
    refined = _at(model, names, raising, found.point, kinds)
    if free.probes or free.shifts:
        refined = without_gauges(
            refined, geometry.rotations, geometry.sections, geometry.numbers, geometry.pixel_angstrom
        )
    return Result(refined, losses)


def position_uncertainty(model: Orbitals, geometry: Geometry, variance: float) -> np.ndarray:
    """Return the standard deviations of the positions, (atom, 3) in Å, that noise of this ``variance`` leaves.

    From the curvature of each atom alone: what neighbours share is not counted, so that true errors are larger where
    atoms lie behind one another. The variance is that of a pixel where the specimen is (see
    :func:`~stemtomo.algorithms.local_orbital.model.weighted_residual`).
    """
    return np.asarray(np.sqrt(variance * inverse_curvature(model, geometry)["positions"]))


def worth_keeping(model: Orbitals, faintest: float, minimum_distance_angstrom: float) -> np.ndarray:
    """Return which atoms, (atom,), are neither below ``faintest`` of the typical nor fainter than a close neighbour."""
    good: np.ndarray = model.intensity > faintest * typical_intensities(model).min()
    pairs = cKDTree(model.positions).query_pairs(minimum_distance_angstrom, output_type="ndarray")
    for first, second in pairs:
        if good[first] and good[second]:
            good[second if model.intensity[first] >= model.intensity[second] else first] = False
    return good


def typical_intensities(model: Orbitals) -> np.ndarray:
    """Return the median intensity of every kind of atoms that there are."""
    return np.array([np.median(model.intensity[model.kinds == kind]) for kind in np.unique(model.kinds)])


def summed_by_kind(values: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Return sums of ``values`` (atom,) over the atoms of each kind, (kind,)."""
    return np.bincount(kinds, values)


def _alike(model: Orbitals, free: Free) -> np.ndarray | None:
    """Return which atoms share a width, (atom,), or None where each has its own."""
    if free.width == "atom":
        return None
    return model.kinds if free.width == "species" else np.zeros(len(model), dtype=np.int64)


def _value(model: Orbitals, name: str, kinds: np.ndarray | None) -> np.ndarray:
    if name == "probes":
        return np.zeros_like(model.probes)
    value = np.asarray(getattr(model, name), dtype=np.float64)
    if name != "width_angstrom" or kinds is None:
        return value
    return summed_by_kind(value, kinds) / np.maximum(np.bincount(kinds), 1)


def _at(model: Orbitals, names: Sequence[str], raising: np.ndarray, point: Point, kinds: np.ndarray | None) -> Orbitals:
    values = dict(zip(names, point, strict=True))
    if "width_angstrom" in values:
        width = np.maximum(values["width_angstrom"], _NARROWEST_ANGSTROM)
        values["width_angstrom"] = width if kinds is None else width[kinds]
    if "probes" in values:
        values["probes"] = model.probes + _raised(values["probes"], raising)
    return replace(model, **values)


def _gradient(found: Sums, name: str, raising: np.ndarray, kinds: np.ndarray | None) -> np.ndarray:
    if name == "probes":
        return _raised(found.probes, raising)
    if name == "width_angstrom":
        return found.width if kinds is None else summed_by_kind(found.width, kinds)
    fields = {"shifts_angstrom": "shifts", "tilts_rad": "tilts"}
    gradient: np.ndarray = getattr(found, fields.get(name, name))
    return gradient


def _raising(model: Orbitals, pixel: float) -> np.ndarray:
    """Return what spectra (ky, kx) of changes of the probes are multiplied with, so that all weigh about the same."""
    width = float(np.median(model.width_angstrom))
    ky = np.fft.fftfreq(model.probes.shape[2], pixel)[:, None]
    kx = np.fft.fftfreq(model.probes.shape[3], pixel)
    damped = np.exp(-4 * (np.pi * width) ** 2 * (ky**2 + kx**2))
    return np.asarray(1 / np.sqrt(damped + _FAINTEST_FREQUENCY))


def _raised(change: np.ndarray, raising: np.ndarray) -> np.ndarray:
    return np.asarray(np.fft.ifft2(np.fft.fft2(change) * raising).real)


def _scale(scale: np.ndarray, name: str, kinds: np.ndarray | None) -> np.ndarray:
    if name != "width_angstrom" or kinds is None:
        return scale
    return 1 / np.maximum(summed_by_kind(1 / scale, kinds), np.finfo(np.float64).tiny)


def inverse_curvature(model: Orbitals, geometry: Geometry) -> dict[str, np.ndarray]:
    """Return the inverse diagonal of Gauss and Newton's curvature: of atoms alone, without their neighbours."""
    plain, slope, spread = _powers(model, geometry.pixel_angstrom)
    count = len(model)
    by_intensity, by_width, by_place = np.zeros(count), np.zeros(count), np.zeros((count, 3))
    lit = np.zeros(model.probes.shape[:2])
    for image in geometry.numbers:
        rotation, section = geometry.rotations[image], geometry.sections[image]
        depth = places(model, rotation, int(image), geometry.shape_yx, geometry.pixel_angstrom).depth
        nearest = np.clip(np.rint(depth).astype(int), 0, model.slices - 1)
        by_intensity += plain[section, nearest]
        by_width += spread[section, nearest]
        by_place += slope[section, nearest, None] * (1 - rotation[:, 2] ** 2)
        lit[section] += np.bincount(nearest, model.intensity**2, model.slices)
    floor = 0.05 * np.maximum(by_place.max(axis=1, keepdims=True), 1e-30)
    square = np.maximum(model.intensity, 0.3 * np.median(np.abs(model.intensity))) ** 2
    radius = float((model.positions**2).sum(axis=1).mean()) / 2
    # An image of nothing tells no shift, and moves by none.
    by_shift = 1 / np.maximum(geometry.gradient_power, max(1e-6 * geometry.gradient_power.max(), 1e-30))
    return {
        "positions": 1 / (square[:, None] * np.maximum(by_place, floor)),
        "intensity": 1 / by_intensity,
        "width_angstrom": 1 / (square * by_width),
        "probes": 1 / (np.maximum(lit, 0.05 * lit.max()))[:, :, None, None],
        "shifts_angstrom": np.repeat(by_shift[:, None], 2, axis=1),
        "tilts_rad": np.repeat(by_shift[:, None] / max(radius, 1.0), 3, axis=1),
    }


def _powers(model: Orbitals, pixel: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return an image's sums of squares of a unit atom behind every probe, of its slope and of its widening."""
    width = float(np.median(model.width_angstrom))
    ky = np.fft.fftfreq(model.probes.shape[2], pixel)[:, None]
    kx = np.fft.fftfreq(model.probes.shape[3], pixel)
    square = ky**2 + kx**2
    seen = np.abs(np.fft.fft2(model.probes)) ** 2 * np.exp(-4 * (np.pi * width) ** 2 * square) / square.size
    axes = (-2, -1)
    slope = 2 * np.pi**2 * (seen * square).sum(axis=axes)
    spread = (seen * (4 * np.pi**2 * width * square) ** 2).sum(axis=axes)
    return seen.sum(axis=axes), slope, spread
