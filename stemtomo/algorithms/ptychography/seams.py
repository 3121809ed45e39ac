"""How well tiles of a picture fit together: what would show at their seams, measured with and without a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stemtomo.algorithms.ptychography.tiles import Rectangle


@dataclass(frozen=True)
class Seams:
    """What the seams of a picture show.

    Parameters
    ----------
    step_ratio
        Root mean square of the differences of neighbouring pixels across the seams over those beside them: 1 where
        nothing shows, more where tiles are offset against each other.
    period_peak
        Largest share by which the power of the picture at the frequencies of the tiles exceeds the mean of the
        frequencies around them: about 1 to 3 for noise, far more for a pattern of tiles; 0 without seams.
    difference_ratio, difference_rms
        Root mean square of the difference to a reference in the band of the seams over that elsewhere, and in the band
        alone; ``None`` without a reference.
    """

    step_ratio: float
    period_peak: float
    difference_ratio: float | None = None
    difference_rms: float | None = None


def seam_lines(windows: Sequence[Rectangle]) -> tuple[list[int], list[int]]:
    """Return the rows and columns of pixels where tiles with these windows meet: the middle of their overlaps."""
    found = []
    for axis in (0, 1):
        spans = sorted({window[axis] for window in windows})
        found.append([(spans[i][1] + spans[i + 1][0]) // 2 for i in range(len(spans) - 1)])
    return found[0], found[1]


def seams(
    picture: np.ndarray,
    rows: Sequence[int],
    columns: Sequence[int],
    reference: np.ndarray | None = None,
    band_px: int = 8,
    without_ramp: bool = False,
) -> Seams:
    """Return what the seams of ``picture`` (y, x), real, show.

    Parameters
    ----------
    rows, columns
        First pixel behind each seam, from :func:`seam_lines`.
    reference
        The same picture without seams: the truth, or a reconstruction in one piece.
    band_px
        Pixels on either side of a seam that count as its band.
    without_ramp
        Compare with ``reference`` up to a plane, not to a constant alone: a ramp of the whole object against one of the
        probe is all but free where the probe is unknown, and projections are freed from it.

    Raises
    ------
    ValueError
        If a seam lies outside the picture.
    """
    height, width = picture.shape
    if any(not 0 < row < height for row in rows) or any(not 0 < column < width for column in columns):
        raise ValueError(f"seams at rows {list(rows)} and columns {list(columns)} of a picture of {height} x {width}")
    across, beside = [], []
    for axis, lines in ((0, rows), (1, columns)):
        steps = np.moveaxis(np.diff(picture, axis=axis), axis, 0) ** 2
        at = np.zeros(len(steps), bool)
        at[[line - 1 for line in lines]] = True
        near = np.zeros(len(steps), bool)
        for line in lines:
            near[max(0, line - 1 - band_px) : line + band_px] = True
        across.append(steps[at].ravel())
        beside.append(steps[near & ~at].ravel())
    seam, other = np.concatenate(across), np.concatenate(beside)
    ratio = float(np.sqrt(seam.mean() / other.mean())) if seam.size and other.mean() > 0 else 1.0
    peak = max(_period_peak(picture, lines, axis) for axis, lines in ((0, rows), (1, columns)))
    if reference is None:
        return Seams(ratio, peak)
    band = np.zeros(picture.shape, bool)
    for line in rows:
        band[max(0, line - band_px) : line + band_px] = True
    for line in columns:
        band[:, max(0, line - band_px) : line + band_px] = True
    off = picture - reference
    squared = (off - (_plane(off) if without_ramp else off.mean())) ** 2
    inside = float(np.sqrt(squared[band].mean())) if band.any() else 0.0
    outside = float(np.sqrt(squared[~band].mean())) if (~band).any() else 0.0
    return Seams(ratio, peak, inside / outside if outside else float(inside > 0) or 1.0, inside)


def _plane(picture: np.ndarray) -> np.ndarray:
    """Return the least-squares plane of ``picture`` (y, x)."""
    y, x = (axis - axis.mean() for axis in np.indices(picture.shape, dtype=np.float64))
    found: np.ndarray = picture.mean() + sum(
        slope * (slope * picture).sum() / max((slope**2).sum(), 1.0) for slope in (y, x)
    )
    return found


def _period_peak(picture: np.ndarray, lines: Sequence[int], axis: int) -> float:
    """Power at the frequencies of evenly spaced seams over the mean of those around."""
    if len(lines) < 2:
        return 0.0
    profile = np.diff(np.moveaxis(picture, axis, 0).mean(axis=1))
    power = np.abs(np.fft.rfft((profile - profile.mean()) * np.hanning(len(profile)))) ** 2
    period = (lines[-1] - lines[0]) / (len(lines) - 1)
    found = 0.0
    for harmonic in (1, 2, 3):
        centre = round(harmonic * len(profile) / period)
        around = [k for k in range(max(1, centre - 8), min(len(power), centre + 9)) if abs(k - centre) > 2]
        if centre < len(power) and around:
            mean = power[around].mean()
            found = max(found, float(power[max(1, centre - 1) : centre + 2].max() / mean) if mean > 0 else 0.0)
    return found
