"""Where atomic columns lie against each other in a projected phase: the shift of one kind from the middle of another.

In a centrosymmetric crystal on its zone axis the shift is zero; a mistilt that is left in the image moves light columns
against heavy ones and smears both out along it (Sha et al., Sci. Adv. 8, eabn2275 (2022), fig. 4).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.spatial import cKDTree


class Columns(NamedTuple):
    """Columns of one kind."""

    places_px: np.ndarray
    """(column, 2), x and y in pixels."""
    widths_px: np.ndarray
    """(column, 2), spread (standard deviation) along the long and the short axis."""


def measure(image: np.ndarray, guesses_px: np.ndarray, radius_px: float, rounds: int = 10) -> Columns:
    """Return where columns lie and how wide they are, from weighted moments within a soft aperture.

    Parameters
    ----------
    image
        (y, x), bright where columns are.
    guesses_px
        (column, 2), x and y; good to about ``radius_px`` / 2.
    radius_px
        Radius of the aperture: less than half the distance between columns.
    """
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    places, widths = [], []
    for guess in np.asarray(guesses_px, dtype=np.float64):
        centre, spread = guess, np.zeros(2)
        for _ in range(rounds):
            inside = np.hypot(x - centre[0], y - centre[1]) < radius_px
            dx, dy = x[inside] - centre[0], y[inside] - centre[1]
            level = image[inside].min()
            weight = (image[inside] - level) * (1 - (dx**2 + dy**2) / radius_px**2)
            total = weight.sum()
            step = np.array([(weight * dx).sum(), (weight * dy).sum()]) / total
            cross = (weight * dx * dy).sum() / total - step[0] * step[1]
            along = [(weight * dx * dx).sum() / total - step[0] ** 2, (weight * dy * dy).sum() / total - step[1] ** 2]
            spread = np.linalg.eigvalsh(np.array([[along[0], cross], [cross, along[1]]]))[::-1]
            centre = centre + step
        places.append(centre)
        widths.append(np.sqrt(np.maximum(spread, 0)))
    return Columns(np.array(places), np.array(widths))


def shifts_from_neighbours(places_px: np.ndarray, others_px: np.ndarray, neighbours: int = 4) -> np.ndarray:
    """Return how far each column lies from the middle of its nearest ``others_px``, (column, 2), x and y in pixels.

    Columns whose neighbours do not surround them, as at the rim, are left out.
    """
    if len(others_px) < neighbours:
        return np.zeros((0, 2))
    distance, index = cKDTree(others_px).query(places_px, neighbours)
    off = places_px - others_px[index].mean(axis=1)
    surrounded = (distance[:, -1] < 1.5 * distance[:, 0]) & (np.hypot(*off.T) < 0.25 * distance[:, 0])
    return off[surrounded]
