"""Projections of one specimen in one scale: factors per tilt, or per row along the tilt axis.

Every projection holds the whole specimen, so its total is the same at all tilts; for turns about y so is what lies in
every row, the sum over x (the common line). What differs is a drift of the beam, the detector or the background.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy import ndimage

from stemtomo.algorithms.tomography.alignment import row_profile

_ROUNDS = 4
_LEAST = 0.02


def gains(
    images: np.ndarray,
    valid: np.ndarray,
    shifts_y_px: np.ndarray,
    kind: Literal["tilt", "rows"],
    smoothing_fraction: float = 0.1,
) -> np.ndarray:
    """Return factors (tilt, y) that give the projections one scale; their mean logarithm is zero.

    Parameters
    ----------
    images
        (tilt, y, x), vacuum at zero, the whole specimen in view.
    valid
        Boolean (tilt, y, x).
    shifts_y_px
        (tilt,), where the rows lie, so that the same rows of the specimen are compared.
    kind
        One factor per ``tilt``, for any poses; or per row along the axis (``rows``), for turns about y.
    smoothing_fraction
        How smooth the factors of ``rows`` are: standard deviation over the height of the images.
    """
    profiles = np.stack([row_profile(image, mask) for image, mask in zip(images, valid, strict=True)])
    if kind == "tilt":
        totals = profiles.sum(axis=1)
        factors = np.median(totals) / np.maximum(totals, _LEAST * np.median(totals))
        return np.repeat((factors / np.exp(np.log(factors).mean()))[:, None], profiles.shape[1], axis=1)
    rows = np.arange(profiles.shape[1], dtype=float)
    common = np.stack([np.interp(rows + shift, rows, p) for p, shift in zip(profiles, shifts_y_px, strict=True)])
    width, factors = smoothing_fraction * profiles.shape[1], np.ones_like(common)
    for _ in range(_ROUNDS):
        mean = (common * factors).mean(axis=0)
        weight = ndimage.gaussian_filter1d(common * common, width, axis=1, mode="constant")
        shared = ndimage.gaussian_filter1d(common * mean, width, axis=1, mode="constant")
        # Rows without a specimen say nothing: they take the factor of the whole tilt.
        whole = (common @ mean) / np.maximum((common * common).sum(axis=1), 1e-30)
        prior = _LEAST * weight.max(axis=1, keepdims=True)
        factors = (shared + prior * whole[:, None]) / np.maximum(weight + prior, 1e-30)
        factors /= np.exp(np.log(np.maximum(factors, 1e-3)).mean())
    return np.stack([np.interp(rows - shift, rows, f) for f, shift in zip(factors, shifts_y_px, strict=True)])
