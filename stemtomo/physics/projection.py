"""Straight projections of a volume along the beam, block by block, with their exact adjoint.

The volume is a sum of B-splines, one per voxel, whose shadow on the image of any pose is the separable B-spline
b(column - u) b(row - v); for degree 2 it has the same width (variance 1/4 px²) wherever a voxel falls and however the
volume is turned, so that a fit at all tilts is consistent. Voxel values are integrals over one voxel along the beam
(rad, where images are phases); :func:`render` turns the coefficients into values at the voxels' centres.

A feature at sample position r is seen at R^T r plus the shift of its tilt; the rotation centre is index n // 2 of the
volume and of the images; voxels and pixels have one size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from stemtomo.backend import Array, array_namespace
from stemtomo.errors import ConfigurationError
from stemtomo.kernels import voxels

Window: TypeAlias = tuple[tuple[int, int], ...]
"""``((start, stop), ...)`` along the axes of a volume (z, y, x) or of an image (y, x)."""

_REACH_PX = {1: 1.0, 2: 1.5, 3: 2.0}
_RENDERED = {1: (1.0,), 2: (1 / 8, 3 / 4, 1 / 8), 3: (1 / 6, 2 / 3, 1 / 6)}


@dataclass(frozen=True)
class TiltGeometry:
    """How the volume is seen at every tilt.

    Parameters
    ----------
    rotations
        Matrices R, (tilt, 3, 3), columns x, y, z.
    shifts_px
        Detector shifts, (tilt, 2), columns x, y in pixels.
    volume_shape
        (z, y, x) of the whole volume.
    image_shape
        (y, x) of the whole image of a tilt.
    degree
        Degree of the B-spline: 1, 2 or 3.
    magnifications
        (tilt,), by which an image is larger than the volume, about the rotation centre; all one if not given. The
        line integrals stay what they are.
    """

    rotations: np.ndarray
    shifts_px: np.ndarray
    volume_shape: tuple[int, int, int]
    image_shape: tuple[int, int]
    degree: int = 2
    magnifications: np.ndarray | None = None

    def __post_init__(self) -> None:
        count = len(self.rotations)
        if np.shape(self.rotations) != (count, 3, 3) or np.shape(self.shifts_px) != (count, 2):
            raise ConfigurationError(
                f"geometry: rotations are {np.shape(self.rotations)} and shifts {np.shape(self.shifts_px)}; "
                "give (tilt, 3, 3) and (tilt, 2) for the same tilts"
            )
        if self.degree not in _REACH_PX:
            raise ConfigurationError(
                f"geometry: degree is {self.degree!r}; allowed: 1 (linear), 2 (quadratic), 3 (cubic)"
            )

    def __len__(self) -> int:
        return len(self.rotations)

    @property
    def whole_volume(self) -> Window:
        """Window of all voxels."""
        return tuple((0, n) for n in self.volume_shape)

    @property
    def whole_image(self) -> Window:
        """Window of all pixels."""
        return tuple((0, n) for n in self.image_shape)

    @property
    def scales(self) -> np.ndarray:
        """Magnifications, (tilt,)."""
        return np.ones(len(self)) if self.magnifications is None else np.asarray(self.magnifications, dtype=np.float64)

    def shifted_to(self, shifts_px: np.ndarray) -> TiltGeometry:
        """Return the same geometry with other detector shifts."""
        return replace(self, shifts_px=np.asarray(shifts_px, dtype=np.float64))

    def only(self, tilt: int) -> TiltGeometry:
        """Return the geometry of one tilt."""
        chosen = slice(tilt, tilt + 1)
        scales = None if self.magnifications is None else self.scales[chosen]
        return replace(self, rotations=self.rotations[chosen], shifts_px=self.shifts_px[chosen], magnifications=scales)

    def placements(self, block: Window, image: Window) -> np.ndarray:
        """Return (tilt, 2, 4): column and row in ``image`` from the indices (x, y, z, 1) of ``block``."""
        start = np.array([block[axis][0] - self.volume_shape[axis] // 2 for axis in (2, 1, 0)], dtype=np.float64)
        centre = np.array([self.image_shape[axis] // 2 - image[axis][0] for axis in (1, 0)], dtype=np.float64)
        turned = np.asarray(self.rotations, dtype=np.float64).transpose(0, 2, 1)[:, :2]
        if self.magnifications is not None:
            turned = turned * self.scales[:, None, None]
        constant = turned @ start + np.asarray(self.shifts_px, dtype=np.float64) + centre
        return np.concatenate([turned, constant[..., None]], axis=-1)


def project(geometry: TiltGeometry, values: Array, block: Window, image: Window, support: Array | None = None) -> Array:
    """Return the projections (tilt, y, x) in the window ``image`` of the voxels ``values`` of the window ``block``.

    The projections of a volume are the sum of those of its blocks, however it is cut.

    Parameters
    ----------
    values
        Coefficients (z, y, x), float32 or float64.
    support
        Boolean (z, y, x) of the block; voxels outside do not count.
    """
    xp = array_namespace(values)
    images = xp.zeros((len(geometry), *(stop - start for start, stop in image)), values.dtype)
    voxels.splat(values, geometry.placements(block, image), images, geometry.degree, support)
    return _spread(geometry, images)


def backproject(
    geometry: TiltGeometry, images: Array, image: Window, block: Window, support: Array | None = None
) -> Array:
    """Return the adjoint of :func:`project`, (z, y, x) of ``block``, of ``images`` (tilt, y, x) of ``image``."""
    xp = array_namespace(images)
    values = xp.zeros([stop - start for start, stop in block], images.dtype)
    images = _spread(geometry, images)
    voxels.gather(images, geometry.placements(block, image), values, geometry.degree, support)
    return values


def footprint(geometry: TiltGeometry, block: Window, margin_px: float = 0.0) -> Window:
    """Return the window ((y0, y1), (x0, x1)) that holds the projections of ``block`` at all tilts.

    It is cut at the edges of the image, and may be empty.

    Parameters
    ----------
    margin_px
        Room for shifts that are still to change.
    """
    whole = geometry.placements(block, ((0, 0), (0, 0)))
    corners = np.array(list(itertools.product(*((0, block[axis][1] - block[axis][0] - 1) for axis in (2, 1, 0)))))
    seen = corners @ whole[..., :3].transpose(0, 2, 1) + whole[:, None, :, 3]
    reach = _REACH_PX[geometry.degree] + margin_px
    low, high = seen.min(axis=(0, 1)) - reach, seen.max(axis=(0, 1)) + reach
    window = []
    for axis, length in zip((1, 0), geometry.image_shape, strict=True):
        start = int(np.clip(np.floor(low[axis]), 0, length))
        window.append((start, max(start, int(np.clip(np.ceil(high[axis]) + 1, 0, length)))))
    return tuple(window)


def seen_everywhere(geometry: TiltGeometry, valid: Array, block: Window) -> Array:
    """Return the voxels (z, y, x) of ``block`` that every tilt has in view: boolean.

    Parameters
    ----------
    valid
        Boolean (tilt, y, x), where the images were measured.
    """
    views = backproject(geometry, valid.astype(np.float32), geometry.whole_image, block)
    each = geometry.scales**2  # what a voxel reads of an image of ones
    return views > each.sum() - each.min() / 2


def seen_extent(rotations: np.ndarray, image_shape: tuple[int, int], depth: int) -> tuple[int, int]:
    """Return the voxels (y, x) that a layer of ``depth`` voxels needs to hold all that the tilts see of it; even.

    Tilts that see the layer from its side, beyond 85 degrees, do not count.
    """
    height, width = (n / 2 for n in image_shape)
    largest = np.zeros(2)
    for rotation in np.asarray(rotations):
        if abs(rotation[2, 2]) < math.cos(math.radians(85)):
            continue
        for u, v, z in itertools.product((-width, width), (-height, height), (-depth / 2, depth / 2)):
            along = (z - rotation[2, 0] * u - rotation[2, 1] * v) / rotation[2, 2]
            x, y, _ = rotation @ (u, v, along)
            largest = np.maximum(largest, np.abs([y, x]))
    return (2 * math.ceil(largest[0] - 1e-6), 2 * math.ceil(largest[1] - 1e-6))


def slabs(volume_shape: Sequence[int], count: int) -> list[Window]:
    """Cut a volume (z, y, x) into at most ``count`` slabs along y, the axis of a single-axis series.

    The images of such slabs share no more than the rows at their borders.
    """
    edges = np.unique(np.linspace(0, volume_shape[1], count + 1).round().astype(int))
    ends = itertools.pairwise(edges.tolist())
    return [((0, volume_shape[0]), (start, stop), (0, volume_shape[2])) for start, stop in ends]


def render(coefficients: Array, degree: int = 2, width_px: float = 0.0) -> Array:
    """Return the values at the voxels' centres of a volume (z, y, x) of B-spline coefficients.

    Parameters
    ----------
    width_px
        Standard deviation of the Gaussian that every B-spline is widened by; see :func:`blur`.
    """
    volume = coefficients
    for axis in range(volume.ndim):
        volume = _convolved(_convolved(volume, _RENDERED[degree], axis), _gaussian(width_px), axis)
    return volume.copy() if volume is coefficients else volume


def blur(images: Array, width_px: float) -> Array:
    """Return projections (tilt, y, x) blurred by a Gaussian of standard deviation ``width_px``; its own adjoint.

    The projections of a volume whose elements are B-splines widened by an isotropic Gaussian are those of the
    B-splines, widened alike at every pose. Beyond the edges there is nothing.
    """
    kernel = _gaussian(width_px)
    return _convolved(_convolved(images, kernel, images.ndim - 1), kernel, images.ndim - 2)


def shift_derivatives(images: Array) -> tuple[Array, Array]:
    """Return the derivatives of projections (tilt, y, x) in the x and y components of their shifts, per pixel.

    A shift moves the image, so they are minus its spatial derivatives, here by the five-point formula.
    """
    return -_derivative(images, -1), -_derivative(images, -2)


def depth_moments(
    geometry: TiltGeometry, values: Array, block: Window, image: Window, support: Array | None = None
) -> Array:
    """Return the projections (tilt, y, x) of the voxels times their depth, the laboratory z in pixels.

    They say how the projections change when the specimen is turned; as projections they are sums over blocks.
    Arguments as in :func:`project`.
    """
    xp = array_namespace(values)
    images = xp.empty((len(geometry), *(stop - start for start, stop in image)), values.dtype)
    z, y, x = (
        xp.arange(start - length // 2, stop - length // 2, dtype=values.dtype)
        for (start, stop), length in zip(block, geometry.volume_shape, strict=True)
    )
    for tilt, rotation in enumerate(geometry.rotations):
        along_x, along_y, along_z = (float(part) for part in rotation[:, 2])
        depth = (along_z * z)[:, None, None] + (along_y * y)[:, None] + along_x * x
        depth *= values
        images[tilt] = project(geometry.only(tilt), depth, block, image, support)[0]
    return images


#: Columns of a step of the poses: shift in px, turn about the laboratory's axes in rad, logarithm of the magnification.
POSE_COLUMNS = ("shift_x", "shift_y", "turn_x", "turn_y", "turn_z", "magnification")


def pose_derivatives(geometry: TiltGeometry, tilt: int, image: Array, moment: Array, columns: Sequence[str]) -> Array:
    """Return the derivatives (column, y, x) of the projection of one tilt in the parameters of its pose.

    A turn by the vector w moves a feature seen at q by w x q, so that the image changes by the divergence of what
    moves: through the image itself in the plane, through its depth moment out of it.

    Parameters
    ----------
    image, moment
        Projection and depth moment of the tilt, whole images (y, x), both behind the same blur.
    columns
        Of :data:`POSE_COLUMNS`.
    """
    xp = array_namespace(image)
    height, width = geometry.image_shape
    shift_x, shift_y = (float(value) for value in geometry.shifts_px[tilt])
    u = xp.arange(width, dtype=image.dtype) - (width // 2 + shift_x)
    v = (xp.arange(height, dtype=image.dtype) - (height // 2 + shift_y))[:, None]
    along_x, along_y = shift_derivatives(image)
    scale = float(geometry.scales[tilt])
    known = {
        "shift_x": lambda: along_x,
        "shift_y": lambda: along_y,
        "turn_x": lambda: -scale * shift_derivatives(moment)[1],
        "turn_y": lambda: scale * shift_derivatives(moment)[0],
        "turn_z": lambda: u * along_y - v * along_x,
        "magnification": lambda: u * along_x + v * along_y,
    }
    return xp.stack([known[name]() for name in columns]).astype(image.dtype)


def _spread(geometry: TiltGeometry, images: Array) -> Array:
    """Return images as bright as line integrals are: a splat keeps the total, which a magnification spreads out."""
    if geometry.magnifications is None:
        return images
    xp = array_namespace(images)
    return images * xp.asarray(geometry.scales**2, dtype=images.dtype)[:, None, None]


def _gaussian(width_px: float) -> tuple[float, ...]:
    if width_px <= 0:
        return (1.0,)
    offsets = np.arange(-math.ceil(4 * width_px), math.ceil(4 * width_px) + 1)
    weights = np.exp(-(offsets**2) / (2 * width_px**2))
    return tuple((weights / weights.sum()).tolist())


def _convolved(array: Array, kernel: Sequence[float], axis: int) -> Array:
    """Convolve with an odd, symmetric kernel along one axis; zero beyond the ends."""
    reach = len(kernel) // 2
    if reach == 0:
        return array
    total = kernel[reach] * array
    ahead, behind = [slice(None)] * array.ndim, [slice(None)] * array.ndim
    for offset in range(1, min(reach, array.shape[axis] - 1) + 1):
        ahead[axis], behind[axis] = slice(offset, None), slice(None, -offset)
        total[tuple(behind)] += kernel[reach + offset] * array[tuple(ahead)]
        total[tuple(ahead)] += kernel[reach + offset] * array[tuple(behind)]
    return total


def _derivative(images: Array, axis: int) -> Array:
    xp = array_namespace(images)
    padding = [(2, 2) if i == axis % images.ndim else (0, 0) for i in range(images.ndim)]
    padded = xp.moveaxis(xp.pad(images, padding, mode="edge"), axis, -1)
    far = padded[..., :-4] - padded[..., 4:]
    near = padded[..., 3:-1] - padded[..., 1:-3]
    return xp.moveaxis((8 * near + far) / 12, -1, axis)
