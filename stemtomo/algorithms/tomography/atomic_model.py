"""A volume as atoms: a sum of equal Gaussians at the maxima of a noisy volume, for predicting projections.

Where single projections hardly show the specimen, a volume of voxels fits their noise as well as the specimen; a few
hundred atoms cannot. Positions are in px from the volume's centre n // 2, columns x, y, z; images (tilt, y, x) hold
zero where nothing was measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from stemtomo.physics.projection import TiltGeometry

WIDTHS_PX = (0.7, 1.0, 1.4, 2.0)
"""Widths (sigma) of atoms that are tried."""
_BRIGHTEST, _LEVEL, _FAINT = 20, 0.3, 0.25
_MOST = 2000
_RIDGE = 0.3
_REACH_PX = 1.0
_LONGEST_STEP_PX = 0.4


class AtomicModel(NamedTuple):
    """Atoms: ``positions_px`` (atom, 3), ``heights`` (atom,) of their projections, and ``width_px``, one for all."""

    positions_px: np.ndarray
    heights: np.ndarray
    width_px: float


class _Waves(NamedTuple):
    """Profiles of all atoms in one tilt along x and y, (atom, px), and the distances of the pixels from the atoms."""

    x: np.ndarray
    y: np.ndarray
    from_x: np.ndarray
    from_y: np.ndarray


def maxima(volume: np.ndarray, distance_px: float) -> np.ndarray:
    """Return the maxima (n, 3) of ``volume`` (z, y, x), px from its centre, brightest first, none too near another.

    Those fainter than 0.3 of the median of the 20 brightest are noise; more than 2000 are not returned.
    """
    smooth = ndimage.gaussian_filter(volume, 0.5)
    reach = int(distance_px / 2)
    grid = np.mgrid[-reach : reach + 1, -reach : reach + 1, -reach : reach + 1]
    ball = (grid**2).sum(axis=0) <= distance_px**2 / 4 + 0.5
    index = np.argwhere((ndimage.maximum_filter(smooth, footprint=ball) == smooth) & (smooth > 0))
    values = smooth[tuple(index.T)]
    order = np.argsort(-values, kind="stable")
    index = index[order[values[order] > _LEVEL * np.median(np.sort(values)[-_BRIGHTEST:])]] if len(order) else index
    near = cKDTree(index).query_pairs(distance_px) if len(index) else set()
    gone: set[int] = set()
    for bright, faint in sorted(near):
        if bright not in gone:
            gone.add(faint)
    kept = [place for place in range(len(index)) if place not in gone][:_MOST]
    return (index[kept] - np.array(volume.shape) // 2)[:, ::-1].astype(float)


def width_of(positions_px: np.ndarray, images: np.ndarray, geometry: TiltGeometry) -> float:
    """Return the width of :data:`WIDTHS_PX` with which equal atoms explain most of ``images``."""

    def explained(width: float) -> float:
        seen = projections(AtomicModel(positions_px, np.ones(len(positions_px)), width), geometry)
        return float((seen * images).sum()) / max(float(np.sqrt((seen**2).sum())), 1e-30)

    return max(WIDTHS_PX, key=explained)


def fitted(
    positions_px: np.ndarray, width_px: float, images: np.ndarray, valid: np.ndarray, geometry: TiltGeometry
) -> AtomicModel:
    """Return the atoms at ``positions_px`` that stand above the noise, with their heights."""
    model = AtomicModel(positions_px, np.zeros(len(positions_px)), width_px)
    model = with_heights(model, images, valid, geometry)
    bright = model.heights > _FAINT * np.median(model.heights) if len(positions_px) else np.zeros(0, bool)
    return AtomicModel(positions_px[bright], model.heights[bright], width_px)


def projections(model: AtomicModel, geometry: TiltGeometry) -> np.ndarray:
    """Return the images (tilt, y, x) of ``model``."""
    heights = model.heights[:, None]
    return np.stack([(waves.y * heights).T @ waves.x for waves in _waves(model, geometry)])


def with_heights(model: AtomicModel, images: np.ndarray, valid: np.ndarray, geometry: TiltGeometry) -> AtomicModel:
    """Return ``model`` with the heights that explain ``images`` best, drawn towards their mean."""
    count = len(model.heights)
    if not count:
        return model
    normal, right = np.zeros((count, count)), np.zeros(count)
    for waves, image, mask in zip(_waves(model, geometry), images, valid, strict=True):
        whole = (waves.x**2).sum(axis=1) * (waves.y**2).sum(axis=1)
        share = np.sqrt(((waves.y**2 @ mask) * waves.x**2).sum(axis=1) / np.maximum(whole, 1e-30))
        normal += (waves.x @ waves.x.T) * (waves.y @ waves.y.T) * share[:, None] * share
        left = (image - (waves.y * model.heights[:, None]).T @ waves.x) * mask
        right += ((waves.y @ left) * waves.x).sum(axis=1)
    ridge = _RIDGE * np.diag(normal).mean()
    wanted = right + normal @ model.heights
    mean = wanted.sum() / normal.sum()
    return model._replace(heights=np.linalg.solve(normal + ridge * np.eye(count), wanted + ridge * mean))


def moved(
    model: AtomicModel, images: np.ndarray, valid: np.ndarray, geometry: TiltGeometry, noise: float, steps: int
) -> AtomicModel:
    """Return ``model`` after ``steps`` damped Gauss-Newton steps of its positions, and its heights there.

    Parameters
    ----------
    noise
        Standard deviation of a pixel, which says how far an atom goes from where it was found (1 px for a faint one).
    """
    start, heights = model.positions_px, model.heights
    pull = (noise / _REACH_PX) ** 2
    seen = geometry.rotations[:, :, :2]
    planes = np.einsum("kia,kja->ij", seen, seen)
    curvature = 1.5 * np.pi / 2 * (heights**2)[:, None, None] * planes + pull * np.eye(3)  # half more: atoms overlap
    for _ in range(steps):
        slope = -pull * (model.positions_px - start)
        for tilt, waves in enumerate(_waves(model, geometry)):
            left = (images[tilt] - (waves.y * heights[:, None]).T @ waves.x) * valid[tilt]
            along_x = ((waves.y @ left) * (waves.x * waves.from_x)).sum(axis=1)
            along_y = (((waves.y * waves.from_y) @ left) * waves.x).sum(axis=1)
            slope += (heights / model.width_px**2)[:, None] * (np.stack([along_x, along_y], axis=1) @ seen[tilt].T)
        step = np.linalg.solve(curvature, slope[:, :, None])[:, :, 0]
        length = np.linalg.norm(step, axis=1, keepdims=True)
        step *= _LONGEST_STEP_PX / np.maximum(length, _LONGEST_STEP_PX)
        model = model._replace(positions_px=model.positions_px + step)
    return with_heights(model, images, valid, geometry)


def _waves(model: AtomicModel, geometry: TiltGeometry) -> Iterator[_Waves]:
    height, width = geometry.image_shape
    columns, rows = np.arange(width) - width // 2, np.arange(height) - height // 2
    scales = geometry.scales
    for tilt, rotation in enumerate(geometry.rotations):
        at = scales[tilt] * (model.positions_px @ rotation)[:, :2] + geometry.shifts_px[tilt]
        from_x, from_y = columns - at[:, :1], rows - at[:, 1:]
        x, y = (np.exp(-((each / model.width_px) ** 2) / 2) for each in (from_x, from_y))
        yield _Waves(x, y, from_x, from_y)
