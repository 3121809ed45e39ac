"""Atoms refined against diffraction patterns: descent of the loss of multislice through the atoms themselves.

The unknowns are positions, intensities and widths (B factors, shared by a class or each atom's own); there is no volume
in between, so nothing is missing where no tilt was recorded. Half of a small change of phase under a pixel turns up in
the moduli on the detector: the light there times the square of the change of phase is the curvature that scales the
steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize

from stemtomo.algorithms.joint.atoms import AtomGradient, Atoms, Shapes, light_at
from stemtomo.algorithms.joint.view import View
from stemtomo.backend import Array

#: Spread that atoms of one class are expected to have in the logarithm of their widths.
_WIDTH_SPREAD = 0.05
_MEMORY = 20


class Evaluation(NamedTuple):
    """Loss of a model, its derivatives, and the sum of :func:`information_of` over the views."""

    loss: float
    gradient: AtomGradient
    information: np.ndarray


LossOf = Callable[[Atoms], Evaluation]


@dataclass(frozen=True)
class AtomRules:
    """What is refined and what is expected of it.

    Parameters
    ----------
    iterations
        Of L-BFGS.
    per_atom_widths
        Each atom has a width of its own, with a spread of 5 % about its class expected; else classes have one.
    intensity_spread
        Relative spread expected of the intensities of one class about their mean; none if not given.
    curvature
        Of the loss, in units of that of the amplitude loss.
    """

    iterations: int = 15
    per_atom_widths: bool = False
    intensity_spread: float | None = None
    curvature: float = 1.0


def information_of(illumination: Array, model: Atoms, labels: np.ndarray, shapes: Shapes, view: View) -> np.ndarray:
    """Return what one view tells of the positions, (atom, 3, 3) per Å²: the inverse of their covariance, for counted
    electrons and atoms taken as isolated.

    Parameters
    ----------
    illumination
        (Y, X), electrons on every pixel of the object.
    """
    pixel = view.box.voxel_angstrom
    sharpness = shapes.sharpness(labels, np.maximum(model.width_angstrom, pixel / 2))
    strength = light_at(illumination, model, view) * sharpness * model.intensity**2 / pixel**2
    plane = view.pose.rotation[:, :2]
    return 2 * strength[:, None, None] * (plane @ plane.T)


def refined_atoms(loss_of: LossOf, start: Atoms, labels: np.ndarray, begun: Evaluation, rules: AtomRules) -> Atoms:
    """Return the atoms after ``rules.iterations`` of L-BFGS, every parameter scaled by its own curvature.

    Parameters
    ----------
    loss_of
        What a model is worth over all views.
    labels
        Class of each atom, (atom,).
    begun
        What ``start`` is worth.
    """
    unknowns = _Unknowns(start, labels, begun.information, rules)
    cached = unknowns.loss(np.zeros(unknowns.size), begun)
    # With this unit of length the first step is as long as the curvatures say.
    unit = max(float(np.linalg.norm(cached[1])), np.finfo(np.float64).tiny)
    first = cached[0]

    def scaled(vector: np.ndarray) -> tuple[float, np.ndarray]:
        if vector.any():
            value, gradient = unknowns.loss(vector * unit, loss_of(unknowns.model(vector * unit)))
        else:
            value, gradient = cached
        return (value - first) / unit**2, gradient / unit

    # Differences of losses near the minimum are below what single precision resolves: iterations end it.
    told = {"maxiter": rules.iterations, "maxcor": _MEMORY, "ftol": 0.0, "gtol": 0.0}
    result = minimize(scaled, np.zeros(unknowns.size), jac=True, method="L-BFGS-B", options=told)
    return unknowns.model(result.x * unit)


class _Unknowns:
    """Positions, intensities and log widths (of classes, or of atoms) as one vector of changes over their scales."""

    def __init__(self, start: Atoms, labels: np.ndarray, information: np.ndarray, rules: AtomRules) -> None:
        self.start, self.labels, self.rules = start, labels, rules
        self.groups = np.arange(len(start)) if rules.per_atom_widths else labels
        # An amplitude loss has half of the information as its curvature; those of I and log b follow from a Gaussian's.
        by_position = np.maximum(np.trace(information, axis1=1, axis2=2) / 3, 1e-6 * np.trace(information.mean(axis=0)))
        by_position = rules.curvature / 2 * by_position
        relative = 3 * start.width_angstrom**2 * by_position
        by_intensity = relative / np.maximum(np.abs(start.intensity), 0.1 * np.abs(start.intensity).max()) ** 2
        by_width = np.bincount(self.groups, 2 * relative)
        curvature = np.concatenate([np.repeat(by_position, 3), by_intensity, by_width])
        # A class without atoms has no curvature: its width goes nowhere.
        self.scale = 1 / np.sqrt(np.maximum(curvature, 1e-30 * curvature.max()))
        self.size, count = len(self.scale), len(start)
        self.ends = (3 * count, 4 * count)
        self.intensity_spread = np.zeros(0)
        if rules.intensity_spread:
            means = _class_means(start.intensity, labels)[labels]
            self.intensity_spread = rules.intensity_spread * np.maximum(means, 0.1 * means.max())

    def model(self, vector: np.ndarray) -> Atoms:
        """Return the atoms."""
        positions, intensity, log_width = np.split(vector * self.scale, self.ends)
        return Atoms(
            self.start.positions + positions.reshape(-1, 3),
            self.start.intensity + intensity,
            self.start.width_angstrom * np.exp(np.clip(log_width, -1, 1))[self.groups],
        )

    def loss(self, vector: np.ndarray, found: Evaluation) -> tuple[float, np.ndarray]:
        """Return the loss that was ``found`` at ``vector`` with what is expected of the atoms, and its gradient."""
        model, value, gradient = self.model(vector), found.loss, found.gradient
        by_width = np.bincount(self.groups, gradient.width * model.width_angstrom)
        by_intensity = gradient.intensity
        if self.rules.per_atom_widths:
            penalty, slope = self._prior(np.log(model.width_angstrom), _WIDTH_SPREAD)
            value, by_width = value + penalty, by_width + slope
        if len(self.intensity_spread):
            penalty, slope = self._prior(model.intensity, self.intensity_spread)
            value, by_intensity = value + penalty, by_intensity + slope
        return value, np.concatenate([gradient.positions.ravel(), by_intensity, by_width]) * self.scale

    def _prior(self, values: np.ndarray, spread: float | np.ndarray) -> tuple[float, np.ndarray]:
        """Return the penalty on ``values`` away from the mean of their class, and its gradient."""
        away = values - _class_means(values, self.labels)[self.labels]
        # An amplitude loss is half of the negative logarithm of the likelihood of counted electrons.
        weight = self.rules.curvature / 4 / np.square(spread)
        # The mean moves along: what it takes from each atom's slope.
        pull = weight * away
        return float((pull * away).sum()), 2 * (pull - _class_means(pull, self.labels)[self.labels])


def _class_means(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.bincount(labels, values) / np.maximum(np.bincount(labels), 1)
