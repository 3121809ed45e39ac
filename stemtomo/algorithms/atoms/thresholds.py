"""Which maxima of a volume are atoms, from the histogram of their intensities alone."""

from __future__ import annotations

import math

import numpy as np
from scipy.spatial import cKDTree

#: Percentile of the integrated intensities of atoms that the threshold is a fraction of.
_BRIGHT_PERCENTILE = 95.0
#: Share of the bright level that noise does not reach.
_BRIGHT = 0.6
#: Intensities relative to the bright level at which the histogram is looked at, and the width it is smoothed by.
_GRID = np.linspace(0.0, 1.0, 201)
_SMOOTHING = 0.02
#: The tail of the noise is fitted from where its density has fallen to the first of these shares of its peak, to the
#: second; atoms begin where it predicts between the first and second share of false ones among all that are brighter.
_TAIL = (0.5, 0.05)
_FALSE_SHARE = (0.1, 0.003)
#: Atoms begin below this part of the bright level, whatever the tail of the noise seems to say.
_LATEST = 0.5
#: A valley is lower than the first share of what lies below it; a rise is this many square roots above a minimum.
_DEEP, _RISE = 0.5, 2.5
_CHUNK = 16384


def bright_level(integrated: np.ndarray, threshold: float) -> float:
    """Return the 95th percentile of the atoms among ``integrated`` intensities (n,) of maxima; 0 if there are none.

    Which maxima are atoms is what the level is for, so the two are found in turn: atoms are the maxima above
    ``threshold`` times the level. The search starts at the median weighted by squared intensity, which thousands of
    maxima of noise do not pull down. (Otsu's method or 3-means over all maxima split the species instead of atoms
    from noise.)
    """
    positive = np.sort(integrated[integrated > 0])
    if len(positive) == 0:
        return 0.0
    weight = np.cumsum(positive**2)
    level = float(positive[np.searchsorted(weight, weight[-1] / 2)])
    for _ in range(20):
        updated = float(np.percentile(positive[positive > threshold * level], _BRIGHT_PERCENTILE))
        if updated == level:
            break
        level = updated
    return level


def near_bright(positions: np.ndarray, integrated: np.ndarray, threshold: float, reach_angstrom: float) -> np.ndarray:
    """Return which maxima (n,) are bright, or within ``reach_angstrom`` of a bright one.

    Noise reaches into the intensities of light atoms, but not of heavy ones; where these are everywhere in a specimen,
    they outline it.

    Parameters
    ----------
    positions
        (n, 3) in Å.
    integrated, threshold
        See :func:`bright_level`; bright is what exceeds 0.6 of it.
    """
    bright = integrated > _BRIGHT * bright_level(integrated, threshold)
    distance, _ = cKDTree(positions[bright]).query(positions)
    return bright | (distance <= reach_angstrom)


def faintest_level(integrated: np.ndarray, threshold: float, lightest: float = 1.0) -> float:
    """Return the intensity that separates atoms from other maxima among ``integrated`` (n,).

    Maxima of noise have a density that falls about exponentially with intensity; where its fitted tail predicts few
    false maxima among all that are brighter, atoms begin, and the level is the emptiest place there, or at any rate
    between half of ``threshold`` and ``threshold`` times the :func:`bright_level`; without a valley it is the latter.
    So a faint species next to the noise is kept, and a valley between two species is not the end of the atoms. That
    fails where noise fills the valley below the lightest: ``lightest``, the part of the bright level that all atoms
    surely exceed, bounds it.
    """
    bright = bright_level(integrated, threshold)
    if bright <= 0:
        return 0.0
    return min(_level(integrated, threshold, bright), max(threshold, lightest) * bright)


def _level(integrated: np.ndarray, threshold: float, bright: float) -> float:
    """Return the level before anything is known of the lightest species."""
    relative = integrated[integrated > 0] / bright
    density = _density(relative)
    low, high = _end_of_noise(relative, density, threshold)
    first = int(np.searchsorted(_GRID, max(low, threshold / 2)))
    last = int(np.searchsorted(_GRID, max(high, threshold), side="right"))
    lowest = first + int(np.argmin(density[first : min(last, first + _first_rise(density[first:]))]))
    if density[lowest] > _DEEP * density[: lowest + 1].max():
        return threshold * bright
    # Downhill from there, then the middle of the valley's floor: all that is as low as a count of one above its lowest.
    while lowest + 1 < len(density) and density[lowest + 1] <= density[lowest]:
        lowest += 1
    floor = density <= density[lowest] + 1
    start = lowest - int(np.argmin(np.append(floor[first : lowest + 1][::-1], False))) + 1
    stop = lowest + int(np.argmin(np.append(floor[lowest:], False)))
    return float(_GRID[start:stop].mean() * bright)


def _density(relative: np.ndarray) -> np.ndarray:
    """Return the number of ``relative`` intensities (n,) around every place of the grid, by Gaussians of height one."""
    density = np.zeros_like(_GRID)
    near = relative[relative < _GRID[-1] + 6 * _SMOOTHING]
    for start in range(0, len(near), _CHUNK):
        density += np.exp(-0.5 * ((_GRID[:, None] - near[start : start + _CHUNK]) / _SMOOTHING) ** 2).sum(axis=1)
    return density


def _first_rise(density: np.ndarray) -> int:
    """Return where ``density`` first stands clearly, beyond counting noise, above what it was before; or its length."""
    lowest = np.minimum.accumulate(density)
    return int(np.argmax(np.append(density > lowest + _RISE * np.sqrt(lowest) + 1, True)))


def _end_of_noise(relative: np.ndarray, density: np.ndarray, threshold: float) -> tuple[float, float]:
    """Return the intensities above which noise makes a tenth and 0.3 % of the maxima; zeros without a tail to fit.

    A peak counts as noise if it lies below half of ``threshold``; the peak of a faint species does not.
    """
    faint = int(np.searchsorted(_GRID, threshold / 2))
    peak = int(np.argmax(density[:faint]))
    onwards = density[peak:]
    # Where the density rises again, something else than noise begins.
    rises = _first_rise(onwards)
    fallen = [int(np.argmax(np.append(onwards < share * density[peak], True))) for share in _TAIL]
    tail = slice(peak + fallen[0], peak + min(fallen[1], rises))
    if density[peak] < 1 or tail.stop - tail.start < 3 or _GRID[tail.start] > threshold:
        return 0.0, 0.0
    slope, offset = np.polyfit(_GRID[tail], np.log(density[tail]), 1)
    if slope >= 0:
        return 0.0, 0.0
    # A density of one on the grid stands for 1 / (sqrt(2 pi) width) maxima per unit of intensity.
    noise = np.exp(offset + slope * _GRID) / (math.sqrt(2 * math.pi) * _SMOOTHING) / -slope
    above = len(relative) - np.searchsorted(np.sort(relative), _GRID)
    ends = []
    for share in _FALSE_SHARE:
        clean = noise <= share * np.maximum(above, 1)
        ends.append(float(_GRID[int(np.argmax(clean))]) if clean.any() else 1.0)
    low, high = ends
    # Where noise seems to reach past half of the bright level, its tail was fitted to faint atoms too: the valley says.
    return (low if low < _LATEST else 0.0), min(high, _LATEST)
