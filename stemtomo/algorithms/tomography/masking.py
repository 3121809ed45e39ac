"""A mask of the specimen from a coarse volume, whose projections tell it from its substrate.

After Romanov et al., J. Phys. Mater. 8, 015005 (2025): a reconstruction of down-scaled projections is made binary,
blurred and scaled up; where its projections are empty there is substrate alone.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

_BRIGHT_QUANTILE = 0.995
_FEWEST_PIXELS = 24
_TAIL = 0.1


def specimen_mask(volume: np.ndarray, threshold: float = 0.25, blur_px: float = 1.5) -> np.ndarray:
    """Return where the specimen is, 0 to 1, (z, y, x): the largest body above ``threshold``, without holes, blurred.

    Parameters
    ----------
    volume
        Coarse volume (z, y, x).
    threshold
        Fraction of the brightest voxels (quantile 0.995 of those above zero) that counts as specimen.
    blur_px
        Standard deviation of the blur, before and after the cut: more than half the distance of atoms; the mask reaches
        about as far beyond the specimen.
    """
    smooth = ndimage.gaussian_filter(volume, blur_px)
    bright = smooth[smooth > 0]
    level = threshold * float(np.quantile(bright, _BRIGHT_QUANTILE)) if bright.size else np.inf
    labels, count = ndimage.label(smooth > level)
    if count == 0:
        return np.ones(volume.shape, np.float32)
    sizes = ndimage.sum_labels(smooth, labels, np.arange(1, count + 1))
    body = ndimage.binary_fill_holes(labels == 1 + int(np.argmax(sizes)))
    # A blur takes the edge to one half: twice the value, cut at one, keeps all of the body.
    mask = np.clip(2 * ndimage.gaussian_filter(body.astype(np.float32), blur_px), 0, 1)
    return np.where(mask < _TAIL, 0, mask).astype(np.float32)


def scaled_up(images: np.ndarray, factor: int, offset_px: np.ndarray, shape_yx: tuple[int, int]) -> np.ndarray:
    """Return coarse images (tilt, y, x) on the fine grid, linear between pixels, zero beyond.

    Parameters
    ----------
    offset_px
        (x, y): a feature at the fine coordinate u lies at the coarse (u - offset) / factor, from index n // 2.
    """
    axes = []
    for length, coarse, offset in zip(shape_yx, images.shape[1:], offset_px[::-1], strict=True):
        axes.append((np.arange(length) - length // 2 - offset) / factor + coarse // 2)
    grid = np.meshgrid(*axes, indexing="ij")
    return np.stack([ndimage.map_coordinates(image, grid, order=1, mode="constant") for image in images])


def without_substrate(images: np.ndarray, valid: np.ndarray, thickness_px: np.ndarray) -> np.ndarray:
    """Return projections (tilt, y, x) of the specimen alone.

    What lies outside the mask's projection is substrate: a smooth surface (second order) through it is taken off
    everywhere, and the rest fades to zero where the mask ends.

    Parameters
    ----------
    thickness_px
        Projections of the mask, (tilt, y, x), in pixels.
    """
    out = np.empty_like(images)
    for tilt, (image, mask, thickness) in enumerate(zip(images, valid, thickness_px, strict=True)):
        outside = mask & (thickness < 0.05 * max(float(thickness.max()), 1e-6))
        surface = _surface(image, outside) if outside.sum() >= _FEWEST_PIXELS else 0.0
        out[tilt] = (image - surface) * np.clip(thickness / max(0.1 * float(thickness.max()), 1e-6), 0, 1)
    return out


def _surface(image: np.ndarray, where: np.ndarray) -> np.ndarray:
    y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in image.shape), indexing="ij")
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)
    wanted = terms[where].T @ image[where].astype(np.float64)
    # A little ridge keeps a surface known on one side only from running off on the other.
    normal = terms[where].T @ terms[where]
    ridge = np.diag([0.0, *[1e-4 * where.sum()] * 5])
    return np.asarray(terms @ np.linalg.solve(normal + ridge, wanted)).astype(image.dtype)
