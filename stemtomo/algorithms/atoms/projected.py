"""What atoms look like in projections, and how the misfit changes with every parameter of theirs.

Model: projection k is a level plus one Gaussian per atom, C_k(x) = c_k + sum_i I_i g_b(x - q_ik), where q_ik are the
first two coordinates of R_k^T r_i plus the tilt's shift (after Yang et al., Nature 592, 60 (2021), who refine positions
and B factors against projections). The loss is sum_k |M_k (C_k - P_k)|² over the measured pixels M_k; the levels c_k
follow from the rest in closed form. With a background, the running mean of every residual takes the place of the level.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy.ndimage import gaussian_filter

from stemtomo.algorithms.atoms.background import RunningMean
from stemtomo.algorithms.atoms.resampling import within_band
from stemtomo.backend import Array, array_namespace, to_host
from stemtomo.errors import FormatError
from stemtomo.kernels.atoms import gather, render

_WINDOW_WIDTHS = 4.5  # half of an atom's window, in widths: 4e-5 of the peak is cut off
_NARROWEST_PX = 0.3
_LEAST_VARIANCE = 0.1
#: Power of running means over that of white noise from where something slow is in the images.
_SLOW_EXCESS = 1.5


@dataclass(frozen=True)
class ProjectedImages:
    """Projections and their geometry.

    Parameters
    ----------
    images
        (tilt, y, x), float32 or float64, which is the precision of the work; the rotation centre at index n // 2.
    valid
        Boolean (tilt, y, x): which pixels were measured.
    rotations
        R of every tilt, (tilt, 3, 3).
    shifts_angstrom
        What moves the projection of the sample onto the image, (tilt, 2), x and y.
    pixel_angstrom
        Pixel of the images.
    weights
        Weight of every pixel, (tilt, y, x); all alike if not given. See :func:`noise_weights`.
    """

    images: Array
    valid: Array
    rotations: np.ndarray
    shifts_angstrom: np.ndarray
    pixel_angstrom: float
    weights: Array | None = None
    background_angstrom: float = 0.0
    """Width (sigma) of the running mean that residuals are compared without; 0 for their mean over the image alone."""

    def __post_init__(self) -> None:
        tilts = len(self.images)
        if self.images.ndim != 3 or self.valid.shape != self.images.shape:
            raise FormatError(f"images {self.images.shape} and valid {self.valid.shape} must both be (tilt, y, x)")
        if self.rotations.shape != (tilts, 3, 3) or self.shifts_angstrom.shape != (tilts, 2):
            raise FormatError(
                f"{tilts} images need rotations (tilt, 3, 3) and shifts (tilt, 2), "
                f"got {self.rotations.shape} and {self.shifts_angstrom.shape}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def tilts(self, chosen: slice) -> ProjectedImages:
        """Return the ``chosen`` tilts alone."""
        return replace(
            self,
            images=self.images[chosen],
            valid=self.valid[chosen],
            rotations=self.rotations[chosen],
            shifts_angstrom=self.shifts_angstrom[chosen],
            weights=None if self.weights is None else self.weights[chosen],
        )

    def weight(self, tilt: int) -> Array:
        """Return the weights (y, x) of ``tilt``, zero where nothing was measured."""
        return self.valid[tilt] if self.weights is None else self.weights[tilt] * self.valid[tilt]

    def binned(self, every: int) -> ProjectedImages:
        """Return the images on pixels ``every`` times as wide, whose band alone is kept.

        A plain mean over the pixels would dampen the frequencies that place atoms, and fold noise into them. A pixel
        counts if all those in its place were measured. Half a pixel of the centre that the wide ones do not share goes
        into the shifts. Weights are averaged.
        """
        if every == 1:
            return self
        xp = array_namespace(self.images)
        first = [(count // 2) % every for count in self.images.shape[1:]]
        bins = [(count - start) // every for count, start in zip(self.images.shape[1:], first, strict=True)]
        cut = tuple(slice(start, start + count * every) for start, count in zip(first, bins, strict=True))

        def averaged(stack: Array) -> Array:
            return stack[(slice(None), *cut)].reshape(len(self), bins[0], every, bins[1], every).mean(axis=(2, 4))

        lag = [
            (count // 2 - start - (every - 1) / 2) / every - number // 2
            for count, start, number in zip(self.images.shape[1:], first, bins, strict=True)
        ]
        pixel = self.pixel_angstrom * every
        return replace(
            self,
            images=within_band(self.images[(slice(None), *cut)], self.valid[(slice(None), *cut)], every),
            valid=averaged(self.valid.astype(xp.float32)) > 1 - 1e-3,
            shifts_angstrom=self.shifts_angstrom + np.array([lag[1], lag[0]]) * pixel,
            pixel_angstrom=pixel,
            weights=None if self.weights is None else averaged(self.weights),
        )

    def slow_removed(self, image: Array, tilt: int) -> Array:
        """Return ``image`` (y, x) of ``tilt`` without its level or running mean, zero where nothing was measured."""
        if not self.background_angstrom:
            return without_level(image, self.valid[tilt], None if self.weights is None else self.weight(tilt))
        return self._mean(image).removed(image, self.valid[tilt])

    def slow_removed_adjoint(self, image: Array, tilt: int) -> Array:
        """Adjoint of :meth:`slow_removed` where it counts: of weighted residuals, whose level is zero."""
        return self._mean(image).removed_adjoint(image, self.valid[tilt]) if self.background_angstrom else image

    def _mean(self, image: Array) -> RunningMean:
        return RunningMean.of(image, self.background_angstrom / self.pixel_angstrom)

    def seen(self, positions: np.ndarray) -> np.ndarray:
        """Return where atoms at ``positions`` (atom, 3) are seen, (tilt, atom, 2): columns and rows in pixels."""
        turned = np.einsum("tij,ni->tnj", self.rotations[:, :, :2], positions) + self.shifts_angstrom[:, None]
        rows, columns = self.images.shape[1:]
        return turned / self.pixel_angstrom + np.array([columns // 2, rows // 2])


@dataclass(frozen=True)
class AtomModel:
    """Gaussian atoms.

    Parameters
    ----------
    positions
        (atom, 3), in Å.
    intensity
        Integral of each atom over an image, in image units times Å², (atom,).
    width_angstrom
        Standard deviation of each atom's image, (atom,).
    """

    positions: np.ndarray
    intensity: np.ndarray
    width_angstrom: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, chosen: np.ndarray) -> AtomModel:
        return AtomModel(self.positions[chosen], self.intensity[chosen], self.width_angstrom[chosen])

    def radius_px(self, pixel_angstrom: float) -> int:
        """Return half of the window that holds the widest atom."""
        widest = float(self.width_angstrom.max()) if len(self) else pixel_angstrom
        return int(np.ceil(_WINDOW_WIDTHS * max(widest / pixel_angstrom, _NARROWEST_PX)))


@dataclass(frozen=True)
class Gradient:
    """Derivatives of the loss: by positions (atom, 3), intensity and width (atom,), and shifts (tilt, 2), per Å."""

    positions: np.ndarray
    intensity: np.ndarray
    width: np.ndarray
    shifts: np.ndarray


def loss(model: AtomModel, projected: ProjectedImages, radius_px: int | None = None) -> tuple[float, Gradient]:
    """Return the sum of weighted squared residuals of ``model``, and its derivatives.

    Parameters
    ----------
    radius_px
        Half of the atoms' windows; by the widest atom if not given. Keep it fixed while the loss is minimised.
    """
    pixel = projected.pixel_angstrom
    radius_px = radius_px or model.radius_px(pixel)
    by_position, by_intensity, by_width = np.zeros((len(model), 3)), np.zeros(len(model)), np.zeros(len(model))
    by_shift = np.zeros((len(projected), 2))
    total = 0.0
    for tilt, (residual, table) in enumerate(_residuals(model, projected, radius_px)):
        weighted = residual * projected.weight(tilt)
        total += float((weighted * residual).sum(dtype=np.float64))
        pulled = projected.slow_removed_adjoint(weighted, tilt)
        derivatives = [to_host(part).astype(np.float64) for part in gather(2 * pulled, *table, radius_px)]
        d_intensity, d_u, d_v, d_width = derivatives
        by_intensity += d_intensity / pixel**2
        by_position += np.stack([d_u, d_v], axis=-1) @ projected.rotations[tilt][:, :2].T / pixel
        by_width += d_width / pixel
        by_shift[tilt] = d_u.sum() / pixel, d_v.sum() / pixel
    return total, Gradient(by_position, by_intensity, by_width, by_shift)


def residuals(model: AtomModel, projected: ProjectedImages) -> Iterator[Array]:
    """Yield model minus measurement of tilt after tilt (y, x), without its level, zero where nothing was measured."""
    for residual, _ in _residuals(model, projected, model.radius_px(projected.pixel_angstrom)):
        yield residual


def explained_share(model: AtomModel, projected: ProjectedImages) -> float:
    """Return the share of the images' variance over the measured pixels that the atoms account for.

    On the scale of an atom: both are smoothed by its mean width, which takes out most of the noise of single pixels.
    """
    sigma = float(model.width_angstrom.mean()) / projected.pixel_angstrom
    missed = measured = 0.0
    unweighted = replace(projected, weights=None)
    for tilt, residual in enumerate(residuals(model, projected)):
        missed += float((gaussian_filter(to_host(residual), sigma).astype(np.float64) ** 2).sum())
        flat = to_host(unweighted.slow_removed(projected.images[tilt], tilt))
        measured += float((gaussian_filter(flat, sigma).astype(np.float64) ** 2).sum())
    return 1 - missed / measured if measured else 0.0


def without_level(image: Array, valid: Array, weight: Array | None = None) -> Array:
    """Return ``image`` (y, x) without its mean over the ``valid`` pixels by ``weight``, zero elsewhere."""
    weight = valid if weight is None else weight
    level = float((image * weight).sum(dtype=np.float64)) / max(float(weight.sum(dtype=np.float64)), 1e-30)
    return (image - image.dtype.type(level)) * valid


def without_slow(model: AtomModel, projected: ProjectedImages, background_angstrom: float) -> ProjectedImages:
    """Return ``projected`` with a background of that width if ``model`` leaves slow residuals, else without.

    The running means of white noise have a known share of its variance; where they have clearly more, the images hold
    something slow that Gaussian atoms cannot explain. White noise alone is better fitted as it is.
    """
    plain = replace(projected, background_angstrom=0.0, weights=None)
    slow = total = 0.0
    for residual, valid in zip(residuals(model, plain), projected.valid, strict=True):
        mean = RunningMean.of(residual, background_angstrom / projected.pixel_angstrom)
        slow += float((mean.blurred(residual * valid) ** 2).sum(dtype=np.float64))
        total += float((residual**2).sum(dtype=np.float64)) * mean.share_of_white
    return replace(projected, background_angstrom=background_angstrom if slow > _SLOW_EXCESS * total else 0.0)


def noise_weights(model: AtomModel, projected: ProjectedImages) -> Array:
    """Return weights (tilt, y, x) that are the inverse of the noise's variance, one on average.

    The variance is a line in the brightness of the model, as that of counted electrons is, fitted to the squared
    residuals; it is at least a tenth of the mean variance.
    """
    xp = array_namespace(projected.images)
    squares, bright = [], []
    for tilt, residual in enumerate(residuals(model, projected)):
        valid = projected.valid[tilt]
        squares.append(to_host(residual[valid]).astype(np.float64) ** 2)
        bright.append(to_host((residual + projected.images[tilt])[valid]).astype(np.float64))
    square, brightness = np.concatenate(squares), np.concatenate(bright)
    slope, offset = np.polyfit(brightness, square, 1)
    floor = _LEAST_VARIANCE * float(square.mean())
    weights = xp.ones_like(projected.images)
    for tilt, residual in enumerate(residuals(model, projected)):
        expected = residual + projected.images[tilt]
        weights[tilt] = float(square.mean()) / xp.maximum(slope * expected + offset, floor)
    return weights / weights.dtype.type(float(weights[projected.valid].mean()))


def _residuals(
    model: AtomModel, projected: ProjectedImages, radius_px: int
) -> Iterator[tuple[Array, tuple[Array, Array, Array, Array]]]:
    """Yield the residual of every tilt, and the table of atoms it was made with, in pixels."""
    xp = array_namespace(projected.images)
    dtype = projected.images.dtype
    pixel = projected.pixel_angstrom
    intensity = xp.asarray(model.intensity / pixel**2, dtype=dtype)
    width = xp.asarray(np.maximum(model.width_angstrom / pixel, _NARROWEST_PX), dtype=dtype)
    rows, columns = projected.images.shape[1:]
    for tilt in range(len(projected)):
        seen = (model.positions @ projected.rotations[tilt])[:, :2] + projected.shifts_angstrom[tilt]
        u = xp.asarray(seen[:, 0] / pixel + columns // 2, dtype=dtype)
        v = xp.asarray(seen[:, 1] / pixel + rows // 2, dtype=dtype)
        image = xp.zeros((rows, columns), dtype)
        render(image, u, v, intensity, width, radius_px)
        residual = projected.slow_removed(image - projected.images[tilt], tilt)
        yield residual, (u, v, intensity, width)
