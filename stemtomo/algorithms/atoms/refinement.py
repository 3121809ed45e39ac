"""Atoms refined against the projections themselves, where the missing wedge is no distortion but absent data.

The model is that of :mod:`stemtomo.algorithms.atoms.projected`: Gaussian atoms, whose widths (B factors) are shared by
all atoms of a class, or are each atom's own with a prior about that of its class.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.optimize import minimize

from stemtomo.algorithms.atoms.projected import (
    AtomModel,
    ProjectedImages,
    explained_share,
    loss,
    residuals,
)
from stemtomo.backend import to_host

__all__ = ["ProjectedImages", "RefinedAtoms", "refine_atoms"]

#: Spread that atoms of one class are expected to have in the logarithm of their widths.
_WIDTH_SPREAD = 0.05
_LOSS_TOLERANCE, _GRADIENT_TOLERANCE = 1e-9, 1e-7
#: An atom's window has room for widths that grow by this factor.
_ROOM = 1.1
#: Gradients of images in single precision are summed over windows; below this relative change they are noise.
_SINGLE_TOLERANCE = 1e-7


@dataclass(frozen=True)
class RefinedAtoms:
    """Refined atoms.

    Parameters
    ----------
    model
        Positions in Å, intensities in image units times Å², widths in Å.
    width_angstrom
        Of each class, (class,): the mean of its atoms.
    shifts_angstrom
        (tilt, 2), x and y.
    loss
        Root mean square misfit before and after, in image units.
    explained
        Share of the images' variance over the measured pixels that the atoms account for, on the scale of an atom:
        after smoothing by its width, which takes out most of the noise of single pixels.
    """

    model: AtomModel
    width_angstrom: np.ndarray
    shifts_angstrom: np.ndarray
    loss: tuple[float, float]
    explained: float
    background_angstrom: float = 0.0
    """Width of the running mean that the images were compared without."""

    @property
    def positions(self) -> np.ndarray:
        """Positions (atom, 3) in Å."""
        return self.model.positions

    @property
    def intensity(self) -> np.ndarray:
        """Integral of each atom over an image, (atom,)."""
        return self.model.intensity


def refine_atoms(
    positions: np.ndarray,
    labels: np.ndarray,
    projected: ProjectedImages,
    *,
    width_angstrom: float | np.ndarray = 0.5,
    intensity: np.ndarray | None = None,
    iterations: int = 60,
    refine_shifts: bool = False,
    widths: Literal["class", "atom"] = "class",
    intensity_spread: float | None = None,
) -> RefinedAtoms:
    """Refine ``positions`` (atom, 3) in Å, intensities and widths, and, if asked, the shifts of the tilts.

    Parameters
    ----------
    labels
        Class of each atom, (atom,), from 0.
    projected
        What the atoms have to explain.
    width_angstrom
        Starting width: one number, or one per class or per atom.
    intensity
        Starting intensities (atom,); by least squares of one factor per class if not given.
    iterations
        Iterations of L-BFGS with every parameter scaled by its own curvature.
    widths
        ``"atom"``: each atom has a width of its own, with a spread of 5 % about its class expected.
    intensity_spread
        Relative spread that the intensities of one class are expected to have about their mean, as a prior; none if
        not given.
    """
    labels = np.asarray(labels)
    positions = np.asarray(positions, dtype=np.float64)
    width = _per_atom(width_angstrom, labels)
    if intensity is None:
        intensity = class_factors(positions, labels, width, projected)[labels]
    start = AtomModel(positions, np.asarray(intensity, dtype=np.float64), width)
    problem = _Problem(start, labels, projected, refine_shifts, widths == "atom", intensity_spread)
    first, _ = problem.loss(np.zeros(problem.size))

    def scaled(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = problem.loss(parameters * np.sqrt(first))
        return value / first, gradient / np.sqrt(first)

    # In these units the loss begins at 1 with curvatures of about 1, so that stopping does not depend on image units.
    tolerance = _SINGLE_TOLERANCE if projected.images.dtype == np.float32 else _LOSS_TOLERANCE
    told = {"maxiter": iterations, "maxcor": 20, "ftol": tolerance, "gtol": _GRADIENT_TOLERANCE}
    result = minimize(scaled, np.zeros(problem.size), jac=True, method="L-BFGS-B", options=told)
    model, shifts = problem.unpack(result.x * np.sqrt(first))
    if refine_shifts:
        positions, shifts = _without_translation(model.positions, shifts, projected)
        model = replace(model, positions=positions)
    return _refined(model, labels, replace(projected, shifts_angstrom=shifts), first)


def class_factors(
    positions: np.ndarray, labels: np.ndarray, width: np.ndarray, projected: ProjectedImages
) -> np.ndarray:
    """Return the intensity of each class (class,) that explains the projections best, all atoms of a class alike."""
    classes = int(labels.max()) + 1
    normal, target = np.zeros((classes, classes)), np.zeros(classes)
    unit = AtomModel(positions, np.ones(len(labels)), width)
    blank = replace(projected, images=np.zeros_like(projected.images), weights=None)
    drawn = [residuals(unit[labels == label], blank) for label in range(classes)]
    for tilt, ones in enumerate(zip(*drawn, strict=True)):
        columns = np.stack([to_host(one).ravel().astype(np.float64) for one in ones])
        normal += columns @ columns.T
        target += columns @ to_host(blank.slow_removed(projected.images[tilt], tilt)).ravel()
    return np.linalg.lstsq(normal, target, rcond=1e-9)[0]


class _Problem:
    """The loss as a function of one vector, the change of every parameter over its scale.

    In order: positions, intensities, log widths (of classes, or of atoms), shifts.
    """

    def __init__(
        self,
        start: AtomModel,
        labels: np.ndarray,
        projected: ProjectedImages,
        refine_shifts: bool,
        per_atom: bool,
        intensity_spread: float | None,
    ) -> None:
        self.start, self.labels, self.projected = start, labels, projected
        self.refine_shifts, self.per_atom = refine_shifts, per_atom
        self.groups = np.arange(len(labels)) if per_atom else labels
        count = len(labels)
        self.ends = np.cumsum([3 * count, count, int(self.groups.max()) + 1])
        roomy = replace(start, width_angstrom=start.width_angstrom * _ROOM)
        self.radius = roomy.radius_px(projected.pixel_angstrom)
        self.scale = self._scale()
        self.size = len(self.scale)
        self.intensity_spread = intensity_spread
        self.noise = self._noise() if per_atom or intensity_spread else 0.0

    def unpack(self, vector: np.ndarray) -> tuple[AtomModel, np.ndarray]:
        """Return atoms and shifts (tilt, 2)."""
        positions, intensity, log_width, shifts = np.split(vector * self.scale, self.ends)
        model = AtomModel(
            self.start.positions + positions.reshape(-1, 3),
            self.start.intensity + intensity,
            self.start.width_angstrom * np.exp(np.clip(log_width, -1, 1))[self.groups],
        )
        moved = shifts.reshape(-1, 2) if self.refine_shifts else 0.0
        return model, self.projected.shifts_angstrom + moved

    def loss(self, vector: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the loss and its gradient."""
        model, shifts = self.unpack(vector)
        value, gradient = loss(model, replace(self.projected, shifts_angstrom=shifts), self.radius)
        count = int(self.groups.max()) + 1
        by_width = np.bincount(self.groups, gradient.width * model.width_angstrom, minlength=count)
        if self.per_atom:
            penalty, slope = self._prior(np.log(model.width_angstrom), _WIDTH_SPREAD)
            value, by_width = value + penalty, by_width + slope
        by_intensity = gradient.intensity
        if self.intensity_spread:
            spread = self.intensity_spread * np.maximum(_class_means(self.start.intensity, self.labels), 0)[self.labels]
            penalty, slope = self._prior(model.intensity, np.maximum(spread, 1e-6 * spread.max()))
            value, by_intensity = value + penalty, by_intensity + slope
        parts = [gradient.positions.ravel(), by_intensity, by_width]
        if self.refine_shifts:
            parts.append(gradient.shifts.ravel())
        return value, np.concatenate(parts) * self.scale

    def _prior(self, values: np.ndarray, spread: float | np.ndarray) -> tuple[float, np.ndarray]:
        """Return the penalty on ``values`` away from the mean of their class, and its gradient."""
        away = values - _class_means(values, self.labels)[self.labels]
        weight = self.noise / np.square(spread)
        return float((weight * away**2).sum()), 2 * weight * away

    def _noise(self) -> float:
        """Return the variance of a pixel's residual at the start."""
        value, _ = loss(self.start, self.projected, self.radius)
        return value / max(int(self.projected.valid.sum()), 1)

    def _scale(self) -> np.ndarray:
        """Return a typical change of each parameter: the inverse root of its own curvature, of isolated atoms."""
        pixel = self.projected.pixel_angstrom
        b = self.start.width_angstrom / pixel
        intensity = self.start.intensity
        tilts = len(self.projected)
        # Integrals of g², (dg/dx)² and (dg/d log b)² over the plane, g a Gaussian of width b and unit integral.
        norm = tilts / (4 * np.pi * b**2)
        strength = np.maximum(np.abs(intensity), 0.1 * np.abs(intensity).max()) / pixel**2
        by_position = 2 / 3 * norm * strength**2 / (2 * b**2) / pixel**2
        by_intensity = norm / pixel**4
        by_width = np.bincount(self.groups, 2 * norm * strength**2)
        by_shift = np.full(2 * tilts, 1.5 * by_position.sum() / tilts) if self.refine_shifts else np.empty(0)
        curvature = np.concatenate([np.repeat(by_position, 3), by_intensity, by_width, by_shift])
        return 1 / np.sqrt(np.maximum(curvature, 1e-30 * curvature.max()))


def _class_means(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.bincount(labels, values) / np.maximum(np.bincount(labels), 1)


def _per_atom(width_angstrom: float | np.ndarray, labels: np.ndarray) -> np.ndarray:
    width = np.asarray(width_angstrom, dtype=np.float64)
    if width.ndim == 0:
        return np.full(len(labels), float(width))
    return width if len(width) == len(labels) and len(width) != int(labels.max()) + 1 else width[labels]


def _refined(model: AtomModel, labels: np.ndarray, projected: ProjectedImages, first: float) -> RefinedAtoms:
    last, _ = loss(model, projected)
    measured = max(int(projected.valid.sum()), 1)
    return RefinedAtoms(
        model,
        _class_means(model.width_angstrom, labels),
        projected.shifts_angstrom,
        loss=(float(np.sqrt(first / measured)), float(np.sqrt(last / measured))),
        explained=explained_share(model, projected),
        background_angstrom=projected.background_angstrom,
    )


def _without_translation(
    positions: np.ndarray, shifts: np.ndarray, projected: ProjectedImages
) -> tuple[np.ndarray, np.ndarray]:
    """Return atoms and shifts with what a translation of all atoms explains of the change of the shifts taken back."""
    seen = np.swapaxes(projected.rotations[:, :, :2], 1, 2)  # E R^T of every tilt, (tilt, 2, 3)
    change = (shifts - projected.shifts_angstrom).ravel()
    translation = np.linalg.lstsq(seen.reshape(-1, 3), change, rcond=1e-9)[0]
    return positions + translation, shifts - seen @ translation
