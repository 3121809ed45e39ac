"""Images of a scan with positions that have no frame: the part that is whole, and its gaps filled from beside them."""

from __future__ import annotations

import numpy as np
import scipy.ndimage

_SIGMA_POSITIONS = 1.0
_LEAST_WEIGHT = 1e-3


def whole_part(valid: np.ndarray) -> tuple[slice, slice]:
    """Return the rows and columns (slices) that are left when those at the rim that mostly have no frame are cut off.

    Parameters
    ----------
    valid
        (y, x), true where there is a frame. A scan that was stopped has no frame in its last rows.
    """
    rows = _kept(valid.mean(axis=1))
    return rows, _kept(valid[rows].mean(axis=0))


def fill_gaps(images: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Return ``images`` (y, x, ...), float64, with a weighted mean of what is near where ``valid`` (y, x) is false.

    The weights are a Gaussian of one position; far from all frames it is the mean of the image. Filled positions are
    neutral: they carry no detail that a shift or a curl could be found from.
    """
    images = np.asarray(images, dtype=np.float64)
    if valid.all():
        return images
    spread = (1,) * (images.ndim - 2)
    inside = valid.reshape(*valid.shape, *spread)
    known = np.where(inside, images, 0.0)
    sigma = (_SIGMA_POSITIONS, _SIGMA_POSITIONS, *(0,) * len(spread))
    weight = scipy.ndimage.gaussian_filter(valid.astype(np.float64), _SIGMA_POSITIONS).reshape(inside.shape)
    near = scipy.ndimage.gaussian_filter(known, sigma) / np.maximum(weight, _LEAST_WEIGHT)
    mean = known.sum(axis=(0, 1)) / max(1, int(valid.sum()))
    return np.where(inside, images, np.where(weight > _LEAST_WEIGHT, near, mean))


def _kept(share: np.ndarray) -> slice:
    there = np.flatnonzero(share > 0.5)
    return slice(int(there[0]), int(there[-1]) + 1) if there.size else slice(0, share.size)
