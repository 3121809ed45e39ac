"""Smooth trends over a tilt series, and the tilts that lie off them."""

from __future__ import annotations

import numpy as np

#: Outliers lie further off than this many robust standard deviations.
_FAR = 5.0


def robust_trend(
    theta_rad: np.ndarray, values: np.ndarray, known: np.ndarray, smooth: bool
) -> tuple[np.ndarray | None, np.ndarray]:
    """Fit ``values`` (tilt) by a constant, or a + b sin(theta) + c cos(theta) if ``smooth``, ignoring outliers.

    A point at (x, z) of the specimen has the height z cos(theta) - x sin(theta) at tilt theta, so the focus of a series
    follows that form; it needs five known tilts, fewer are fitted by a constant.

    Returns
    -------
    The trend at every tilt, ``None`` with fewer than three known; and which tilts are outliers.
    """
    outliers = np.zeros(len(values), dtype=bool)
    if known.sum() < 3:
        return None, outliers
    columns = [np.ones(len(values))]
    if smooth and known.sum() >= 5:
        columns += [np.sin(theta_rad), np.cos(theta_rad) - 1]
    rows, weight = np.stack(columns, axis=-1), known.astype(float)
    filled = np.where(known, values, 0.0)
    trend = np.full(len(values), np.median(values[known]))
    scale = 0.0
    for _ in range(20):
        off = np.abs(filled - trend)
        scale = max(1.4826 * float(np.median(off[known])), 1e-3 * float(np.abs(values[known]).max()), 1e-9)
        weight = np.where(known, 1 / (1 + (off / (2 * scale)) ** 2), 0.0)
        root = np.sqrt(weight)
        trend = rows @ np.linalg.lstsq(rows * root[:, None], filled * root, rcond=None)[0]
    outliers = known & (np.abs(filled - trend) > _FAR * scale)
    return trend, outliers
