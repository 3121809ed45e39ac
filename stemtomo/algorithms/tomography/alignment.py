"""Shifts of the projections against one another, from the projections alone.

Conventions as in :mod:`stemtomo.physics.projection`: a feature at sample position r is seen at E R^T r + shift, E the
first two rows (x, y), in pixels from index n // 2. Projections are never resampled: the shifts are the result, and the
projector places its rays by them.

Projections do not tell a common translation of the specimen, r -> r + c, from shifts E R^T c; every estimate here is
the smallest one, with that part taken out (:func:`without_translation`): a series that needs no shifts gets none.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

_BORDER_PX = 2
_SMOOTHING_PX = 2.0
_NOISY = 0.3
"""Four standard deviations of what the smoothing leaves of the noise, over the maximum, from which noise is strong."""
_UPSAMPLING = 50
_ROUNDS = 6


@dataclass(frozen=True)
class ShiftEstimate:
    """Shifts found by one method.

    Parameters
    ----------
    shifts_px
        (tilt, 2), columns x, y.
    score
        (tilt,), agreement of each tilt: a distance in px for the centre of mass (small is good), a normalised
        correlation for the common line (1 is good).
    """

    shifts_px: np.ndarray
    score: np.ndarray


def without_translation(shifts_px: np.ndarray, rotations: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return ``shifts_px`` (tilt, 2) less the part E R^T c that a translation c of the specimen explains best.

    Parameters
    ----------
    rotations
        Matrices R, (tilt, 3, 3).
    weights
        (tilt,), weight of each tilt in the fit of c.
    """
    seen = np.asarray(rotations).transpose(0, 2, 1)[:, :2]
    root = np.ones(len(seen)) if weights is None else np.sqrt(weights)
    matrix = (seen * root[:, None, None]).reshape(-1, 3)
    # Least norm: a single tilt, or tilts about one axis alone, leave a direction of c without meaning.
    translation = np.linalg.lstsq(matrix, (shifts_px * root[:, None]).ravel(), rcond=1e-9)[0]
    return shifts_px - seen @ translation


def border_fraction(images: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Return, per tilt, the mean projection at the border of what was measured over that of its brightest tenth.

    Near zero where the specimen lies wholly in view; near one for a film that goes on.
    """
    fractions = np.zeros(len(images))
    for tilt, (image, mask) in enumerate(zip(images, valid, strict=True)):
        inner = ndimage.binary_erosion(mask, iterations=_BORDER_PX, border_value=0)
        border = image[mask & ~inner]
        if border.size and mask.any():
            bright = image[mask & (image >= np.quantile(image[mask], 0.9))].mean()
            fractions[tilt] = border.mean() / bright if bright > 0 else 1.0
    return fractions


def centre_of_mass(images: np.ndarray, valid: np.ndarray, rotations: np.ndarray) -> ShiftEstimate:
    """Return the shifts that bring every projection's centre of mass onto the view of one point of the specimen.

    The point is fitted over all tilts; what is left are the shifts. Vacuum counts only near the specimen, so that
    its noise does not move the centre.

    Parameters
    ----------
    images
        (tilt, y, x), vacuum at zero, the whole specimen in view.
    valid
        Boolean (tilt, y, x).
    rotations
        Matrices R, (tilt, 3, 3).
    """
    centres = np.stack([_centre(image, mask) for image, mask in zip(images, valid, strict=True)])
    shifts = without_translation(centres, rotations)
    return ShiftEstimate(shifts, np.hypot(*shifts.T))


def common_line(images: np.ndarray, valid: np.ndarray, thetas: np.ndarray, shifts_px: np.ndarray) -> ShiftEstimate:
    """Return better shifts along y for tilts about y: the sums over x, profiles along y, are the same at all tilts.

    Beginning with the smallest tilt, each profile is shifted onto the mean of those before it; then all are shifted
    onto the mean of all, until nothing moves.

    Parameters
    ----------
    thetas
        Tilt angles, (tilt,), rad.
    shifts_px
        (tilt, 2), where to begin; the x components are kept.

    Raises
    ------
    ValueError
        If no row of a tilt is measured over its full width.
    """
    profiles = [row_profile(image, mask) for image, mask in zip(images, valid, strict=True)]
    shifts = np.array(shifts_px, dtype=np.float64)
    order = np.argsort(np.abs(thetas), kind="stable")
    known = [order[0]]
    for tilt in order[1:]:
        shifts[tilt, 1] += _profile_shift(profiles[tilt], shifts[tilt, 1], _mean_profile(profiles, shifts[:, 1], known))
        known.append(tilt)
    for _ in range(_ROUNDS):
        mean = _mean_profile(profiles, shifts[:, 1], known)
        moves = np.array([_profile_shift(profiles[tilt], shifts[tilt, 1], mean) for tilt in range(len(profiles))])
        shifts[:, 1] += moves
        if np.abs(moves).max() < 1 / _UPSAMPLING:
            break
    shifts[:, 1] -= shifts[:, 1].mean()  # a turn about y shows a translation along y at all tilts alike
    mean = _mean_profile(profiles, shifts[:, 1], known)
    score = np.array([_correlation(_moved(profiles[t], -shifts[t, 1]), mean) for t in range(len(profiles))])
    return ShiftEstimate(shifts, score)


def neighbour_correlation(images: np.ndarray, valid: np.ndarray, thetas: np.ndarray) -> ShiftEstimate:
    """Return shifts that chain each projection to its neighbour, from the smallest tilt outwards, for tilts about y.

    For a specimen that goes on beyond the view. Before two are compared by their cross-correlation, the one at
    the higher tilt is stretched along x by the ratio of the cosines. Errors add up along the chain.
    """
    prepared = [_apodised(image, mask) for image, mask in zip(images, valid, strict=True)]
    shifts, score = np.zeros((len(images), 2)), np.ones(len(images))
    order = np.argsort(thetas, kind="stable")
    start = int(np.argmin(np.abs(thetas[order])))
    for path in (order[start:], order[start::-1]):
        for before, tilt in itertools.pairwise(path):
            stretch = math.cos(thetas[before]) / max(math.cos(thetas[tilt]), 1e-3)
            offset, score[tilt] = _image_shift(_stretched(prepared[tilt], stretch), prepared[before])
            shifts[tilt] = shifts[before] / (stretch, 1.0) + offset / (stretch, 1.0)
    return ShiftEstimate(shifts, score)


def _centre(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the centre of mass (x, y) in px from index n // 2; under strong noise that of smooth heights."""
    filled = np.where(mask, image, 0.0)
    smooth = ndimage.gaussian_filter(filled, _SMOOTHING_PX, mode="constant")
    if 4 * _noise(filled, mask) > _NOISY * smooth.max():
        weight = _heights(filled)
    else:
        weight = np.where(mask & near_specimen(image, mask), image, 0.0)
    total = weight.sum()
    if total <= 0:
        return np.zeros(2)
    y, x = (np.arange(n) - n // 2 for n in image.shape)
    return np.array([weight.sum(axis=0) @ x, weight.sum(axis=1) @ y]) / total


def near_specimen(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return where the smoothed image stands above its noise, with a margin; everywhere if there is no noise."""
    filled = np.where(mask, image, 0.0)
    smooth = ndimage.gaussian_filter(filled, _SMOOTHING_PX, mode="constant")
    level = max(4 * _noise(filled, mask), 0.02 * smooth.max())
    labels, count = ndimage.label(smooth > level)
    if count == 0:
        return np.ones_like(mask)
    sizes = ndimage.sum_labels(filled, labels, np.arange(1, count + 1))
    kept = np.isin(labels, 1 + np.flatnonzero(sizes > 0.05 * sizes.max()))
    return ndimage.binary_dilation(ndimage.binary_fill_holes(kept), iterations=4)


def _noise(filled: np.ndarray, mask: np.ndarray) -> float:
    """Return the standard deviation of the noise that is left after the smoothing."""
    # Differences of neighbours are noise alone where the specimen is smooth; the median ignores where it is not.
    rough = np.diff(filled, axis=-1)[mask[:, 1:] & mask[:, :-1]]
    noise = float(np.median(np.abs(rough))) / (0.6745 * math.sqrt(2)) if rough.size else 0.0
    return noise / (2 * _SMOOTHING_PX * math.sqrt(math.pi))  # what a Gaussian leaves of white noise


def _heights(filled: np.ndarray) -> np.ndarray:
    """Return by how much the largest body of the strongly smoothed image stands out: it fades where noise begins."""
    smooth = ndimage.gaussian_filter(filled, 1.5 * _SMOOTHING_PX, mode="constant")
    heights = np.maximum(smooth - 0.1 * smooth.max(), 0)
    labels, count = ndimage.label(heights > 0)
    if count < 2:
        return heights
    sizes = ndimage.sum_labels(heights, labels, np.arange(1, count + 1))
    return np.where(labels == 1 + int(np.argmax(sizes)), heights, 0.0)


def row_profile(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the sums over x of the rows of ``image``; rows not measured over their full width are interpolated.

    Raises
    ------
    ValueError
        If no row is measured over its full width.
    """
    full = mask.all(axis=1)
    if not full.any():
        measured = mask.any(axis=0)  # the same columns may be missing in all rows
        full = mask[:, measured].all(axis=1) & measured.any()
    if not full.any():
        raise ValueError("a tilt has no row that is measured over its full width: the common line cannot be used")
    rows = np.flatnonzero(full)
    profile = np.where(mask, image, 0.0).sum(axis=1)
    return np.interp(np.arange(len(profile)), rows, profile[rows])


def _mean_profile(profiles: list[np.ndarray], shifts_y: np.ndarray, chosen: list[int]) -> np.ndarray:
    moved = [_unit(_moved(profiles[tilt], -shifts_y[tilt])) for tilt in chosen]
    return np.mean(moved, axis=0)


def _profile_shift(profile: np.ndarray, shift: float, reference: np.ndarray) -> float:
    """Return by how much ``profile``, taken back by ``shift``, still lies beyond ``reference``."""
    moved, length = _unit(_moved(profile, -shift)), 2 * len(profile)
    spectrum = np.fft.rfft(moved, length) * np.conj(np.fft.rfft(_unit(reference), length))
    correlation = np.fft.irfft(spectrum, length * _UPSAMPLING)
    return _peak(correlation) / _UPSAMPLING


def _peak(correlation: np.ndarray) -> float:
    """Return the position of the maximum of a periodic correlation, by a parabola through three points."""
    length = len(correlation)
    at = int(np.argmax(correlation))
    before, here, after = (correlation[(at + d) % length] for d in (-1, 0, 1))
    curvature = before - 2 * here + after
    at = at - length if at > length // 2 else at
    return at + (0.5 * (before - after) / curvature if curvature < 0 else 0.0)


def _moved(profile: np.ndarray, amount: float) -> np.ndarray:
    """Return ``profile`` moved by ``amount`` px; zero beyond its ends."""
    length = 2 * len(profile)
    phase = np.exp(-2j * np.pi * np.fft.rfftfreq(length) * amount)
    return np.fft.irfft(np.fft.rfft(profile, length) * phase, length)[: len(profile)]


def _unit(profile: np.ndarray) -> np.ndarray:
    centred = profile - np.median(profile)
    norm = np.linalg.norm(centred)
    return centred / norm if norm > 0 else centred


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    norm = np.linalg.norm(a - a.mean()) * np.linalg.norm(b - b.mean())
    return float((a - a.mean()) @ (b - b.mean()) / norm) if norm > 0 else 0.0


def _apodised(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return ``image`` about its mean, gently cut at the border of what was measured."""
    distance = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    window = np.minimum(distance / max(2.0, min(image.shape) / 8), 1.0)
    window = np.sin(window * math.pi / 2) ** 2
    mean = (image * window).sum() / max(window.sum(), 1e-12)
    return (ndimage.gaussian_filter(np.where(mask, image, mean), 1.0) - mean) * window


def _stretched(image: np.ndarray, factor: float) -> np.ndarray:
    """Return ``image`` with its x coordinate (from index n // 2) multiplied by ``factor``."""
    centre = image.shape[1] // 2
    x = (np.arange(image.shape[1]) - centre) / factor + centre
    rows = np.arange(image.shape[0])
    return ndimage.map_coordinates(image, np.meshgrid(rows, x, indexing="ij"), order=3, mode="constant")


def _image_shift(image: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, float]:
    """Return by how much (x, y) ``image`` lies beyond ``reference``, and their correlation there."""
    shape = [2 * n for n in image.shape]
    spectrum = np.fft.rfft2(image, shape) * np.conj(np.fft.rfft2(reference, shape))
    correlation = np.fft.irfft2(spectrum, shape)
    row, column = np.unravel_index(np.argmax(correlation), correlation.shape)
    shift = np.array([_peak(correlation[row]), _peak(correlation[:, column])])
    norm = np.linalg.norm(image) * np.linalg.norm(reference)
    return shift, float(correlation[row, column] / norm) if norm > 0 else 0.0
