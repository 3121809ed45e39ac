"""Atoms refined against the projections themselves, where the missing wedge is no distortion but absent data.

Model: projection k is a level plus one Gaussian per atom, C_k(x) = c_k + sum_i I_i g_b(x - q_ik), where q_ik are the
first two coordinates of R_k^T r_i plus the tilt's shift, and the width b is shared by all atoms of a class (after Yang
et al., Nature 592, 60 (2021), who refine positions and B factors against projections). The loss is
sum_k |M_k (C_k - P_k)|² over the measured pixels M_k; the levels c_k follow from the rest in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.optimize import minimize

from stemtomo.errors import FormatError
from stemtomo.kernels.atoms import gather, render

_WINDOW_WIDTHS = 4.5  # half of an atom's window, in widths: 4e-5 of the peak is cut off
_NARROWEST_PX, _WIDEST_FACTOR = 0.3, 2.0


@dataclass(frozen=True)
class ProjectedImages:
    """Projections and their geometry.

    Parameters
    ----------
    images
        (tilt, y, x), float64, the rotation centre at index n // 2.
    valid
        Boolean (tilt, y, x): which pixels were measured.
    rotations
        R of every tilt, (tilt, 3, 3).
    shifts_angstrom
        What moves the projection of the sample onto the image, (tilt, 2), x and y.
    pixel_angstrom
        Pixel of the images.
    """

    images: np.ndarray
    valid: np.ndarray
    rotations: np.ndarray
    shifts_angstrom: np.ndarray
    pixel_angstrom: float

    def __post_init__(self) -> None:
        tilts = len(self.images)
        if self.images.ndim != 3 or self.valid.shape != self.images.shape:
            raise FormatError(f"images {self.images.shape} and valid {self.valid.shape} must both be (tilt, y, x)")
        if self.rotations.shape != (tilts, 3, 3) or self.shifts_angstrom.shape != (tilts, 2):
            raise FormatError(
                f"{tilts} images need rotations (tilt, 3, 3) and shifts (tilt, 2), "
                f"got {self.rotations.shape} and {self.shifts_angstrom.shape}"
            )


@dataclass(frozen=True)
class RefinedAtoms:
    """Refined atoms.

    Parameters
    ----------
    positions
        (atom, 3), in Å.
    intensity
        Integral of each atom over an image, in image units times Å², (atom,).
    width_angstrom
        Of each class, (class,).
    shifts_angstrom
        (tilt, 2), x and y.
    loss
        Root mean square misfit before and after, in image units.
    explained
        Share of the images' variance over the measured pixels that the atoms account for, on the scale of an atom:
        after smoothing by its width, which takes out most of the noise of single pixels.
    """

    positions: np.ndarray
    intensity: np.ndarray
    width_angstrom: np.ndarray
    shifts_angstrom: np.ndarray
    loss: tuple[float, float]
    explained: float


def refine_atoms(
    positions: np.ndarray,
    labels: np.ndarray,
    projected: ProjectedImages,
    *,
    width_angstrom: float = 0.5,
    iterations: int = 60,
    refine_shifts: bool = False,
) -> RefinedAtoms:
    """Refine ``positions`` (atom, 3) in Å, intensities and widths, and, if asked, the shifts of the tilts.

    Parameters
    ----------
    labels
        Class of each atom, (atom,), from 0.
    projected
        What the atoms have to explain.
    width_angstrom
        Starting width of every class.
    iterations
        Iterations of L-BFGS with every parameter scaled by its own curvature.
    """
    problem = _Problem(np.asarray(labels), projected, refine_shifts)
    start = problem.start(np.asarray(positions, dtype=np.float64), width_angstrom)
    first = problem.loss(start)[0]
    # In these units the loss begins at 1 with curvatures of about 1, so that stopping does not depend on image units.
    scale = problem.scale(start) * np.sqrt(first)

    def scaled(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        loss, gradient = problem.loss(start + parameters * scale)
        return loss / first, gradient * scale / first

    result = minimize(
        scaled,
        np.zeros_like(start),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": iterations, "maxcor": 20, "ftol": 1e-9, "gtol": 1e-7},
    )
    end = start + result.x * scale
    last = problem.loss(end)[0]
    refined, intensity, width, shifts = problem.unpack(end)
    if refine_shifts:
        refined, shifts = _without_translation(refined, shifts, projected)
    measured = projected.valid.sum()
    return RefinedAtoms(
        refined,
        intensity,
        width,
        shifts,
        loss=(float(np.sqrt(first / measured)), float(np.sqrt(last / measured))),
        explained=problem.explained(end),
    )


class _Problem:
    """The loss as a function of one vector: positions, intensities, log widths of the classes, shifts."""

    def __init__(self, labels: np.ndarray, projected: ProjectedImages, refine_shifts: bool) -> None:
        self.labels, self.projected, self.refine_shifts = labels, projected, refine_shifts
        self.count, self.classes = len(labels), int(labels.max()) + 1
        self.radius = 1

    def start(self, positions: np.ndarray, width_angstrom: float) -> np.ndarray:
        """Return the first vector: intensities by least squares of one factor per class of intensity."""
        projected = self.projected
        self.radius = int(np.ceil(_WINDOW_WIDTHS * width_angstrom * _WIDEST_FACTOR / 1.5 / projected.pixel_angstrom))
        shifts = projected.shifts_angstrom if self.refine_shifts else np.empty(0)
        width = np.full(self.classes, np.log(width_angstrom))
        blank = np.concatenate([positions.ravel(), np.zeros(self.count), width, shifts.ravel()])
        ones = np.zeros((self.classes, *projected.images.shape))
        for label in range(self.classes):
            trial = blank.copy()
            trial[3 * self.count : 4 * self.count] = self.labels == label
            ones[label] = self._model(trial)
        columns = np.stack([(one - _level(one, projected.valid))[projected.valid] for one in ones], axis=-1)
        target = (projected.images - _level(projected.images, projected.valid))[projected.valid]
        factors = np.linalg.lstsq(columns, target, rcond=None)[0]
        blank[3 * self.count : 4 * self.count] = factors[self.labels]
        return blank

    def scale(self, parameters: np.ndarray) -> np.ndarray:
        """Return a typical change of each parameter: the inverse root of its own curvature, of isolated atoms."""
        _, intensity, width, _ = self.unpack(parameters)
        b = width[self.labels] / self.projected.pixel_angstrom
        tilts = len(self.projected.images)
        # Integrals of g², (dg/dx)² and (dg/d log b)² over the plane, g a Gaussian of width b and unit integral.
        norm = tilts / (4 * np.pi * b**2)
        strength = np.maximum(np.abs(intensity), 0.1 * np.abs(intensity).max()) / self.projected.pixel_angstrom**2
        by_position = 2 / 3 * norm * strength**2 / (2 * b**2) / self.projected.pixel_angstrom**2
        by_intensity = norm / self.projected.pixel_angstrom**4
        by_width = np.bincount(self.labels, 2 * norm * strength**2, minlength=self.classes)
        by_shift = np.full(2 * tilts, 1.5 * by_position.sum() / tilts) if self.refine_shifts else np.empty(0)
        return 1 / np.sqrt(np.concatenate([np.repeat(by_position, 3), by_intensity, by_width, by_shift]))

    def unpack(self, parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return positions (atom, 3), intensities (atom,), widths (class,) and shifts (tilt, 2)."""
        positions, intensity, width, shifts = np.split(
            parameters, [3 * self.count, 4 * self.count, 4 * self.count + self.classes]
        )
        shifts = shifts.reshape(-1, 2) if self.refine_shifts else self.projected.shifts_angstrom
        return positions.reshape(-1, 3), intensity, np.exp(width), shifts

    def loss(self, parameters: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the loss and its gradient."""
        projected, pixel = self.projected, self.projected.pixel_angstrom
        _, _, width, _ = self.unpack(parameters)
        residual = self._model(parameters) - projected.images
        residual = (residual - _level(residual, projected.valid)) * projected.valid
        by_position = np.zeros((self.count, 3))
        by_intensity, by_width = np.zeros(self.count), np.zeros(self.count)
        by_shift = np.zeros((len(residual), 2))
        for tilt, image in enumerate(residual):
            d_intensity, d_u, d_v, d_width = gather(2 * image, *self._table(parameters, tilt), self.radius)
            by_intensity += d_intensity / pixel**2
            by_position += np.stack([d_u, d_v], axis=-1) @ projected.rotations[tilt][:, :2].T / pixel
            by_width += d_width / pixel
            by_shift[tilt] = d_u.sum() / pixel, d_v.sum() / pixel
        by_log_width = np.bincount(self.labels, by_width, minlength=self.classes) * width
        parts = [by_position.ravel(), by_intensity, by_log_width]
        if self.refine_shifts:
            parts.append(by_shift.ravel())
        return float((residual**2).sum()), np.concatenate(parts)

    def explained(self, parameters: np.ndarray) -> float:
        """Return the share of the images' variance that the model accounts for, both smoothed by the mean width."""
        projected = self.projected
        sigma = float(self.unpack(parameters)[2][self.labels].mean()) / projected.pixel_angstrom
        variances = []
        for images in (self._model(parameters) - projected.images, projected.images):
            flat = (images - _level(images, projected.valid)) * projected.valid
            variances.append(float((gaussian_filter(flat, (0, sigma, sigma)) ** 2).sum()))
        return 1 - variances[0] / variances[1]

    def _model(self, parameters: np.ndarray) -> np.ndarray:
        """Return the projections of the atoms, (tilt, y, x), without the levels."""
        images = np.zeros(self.projected.images.shape)
        for tilt, image in enumerate(images):
            render(image, *self._table(parameters, tilt), self.radius)
        return images

    def _table(self, parameters: np.ndarray, tilt: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return columns, rows, intensities and widths of the atoms on the image of ``tilt``, in pixels."""
        positions, intensity, width, shifts = self.unpack(parameters)
        pixel = self.projected.pixel_angstrom
        rows, columns = self.projected.images.shape[1:]
        seen = (positions @ self.projected.rotations[tilt])[:, :2] + shifts[tilt]
        u = seen[:, 0] / pixel + columns // 2
        v = seen[:, 1] / pixel + rows // 2
        b = np.maximum(width[self.labels] / pixel, _NARROWEST_PX)
        return u, v, intensity / pixel**2, b


def _without_translation(
    positions: np.ndarray, shifts: np.ndarray, projected: ProjectedImages
) -> tuple[np.ndarray, np.ndarray]:
    """Return atoms and shifts with what a translation of all atoms explains of the change of the shifts taken back."""
    seen = np.swapaxes(projected.rotations[:, :, :2], 1, 2)  # E R^T of every tilt, (tilt, 2, 3)
    change = (shifts - projected.shifts_angstrom).ravel()
    translation = np.linalg.lstsq(seen.reshape(-1, 3), change, rcond=1e-9)[0]
    return positions + translation, shifts - seen @ translation


def _level(images: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Return the mean of each of ``images`` (tilt, y, x) over its valid pixels, (tilt, 1, 1)."""
    count = np.maximum(valid.sum(axis=(1, 2), keepdims=True), 1)
    return (images * valid).sum(axis=(1, 2), keepdims=True) / count
