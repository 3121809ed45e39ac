"""What a tilt series leaves unmeasured: the missing wedge of any set of poses, in numbers.

A projection measures the plane of Fourier space through the origin that is perpendicular to its beam. Sources: R. A.
Crowther et al., Proc. R. Soc. A 317, 319 (1970) (angular sampling); M. Radermacher, in Electron Tomography (1992)
(elongation).
"""

from __future__ import annotations

from typing import Any

import numpy as np

_DIRECTIONS = 20000
_REFINEMENTS = 6


def missing_wedge(rotations: np.ndarray, diameter_angstrom: float | None = None) -> dict[str, Any]:
    """Return what the poses ``rotations`` (tilt, 3, 3) leave out of Fourier space.

    Returns
    -------
    dict
        ``worst_direction_xyz``: the direction that is farthest from any measurement; ``missing_half_angle_deg``: how
        far; ``spacing_deg``: median angle between neighbouring planes; ``measured_fraction``: of all directions, those
        within half a spacing of a plane, 0 of a single one; ``elongation``: of a point along the beam for a single
        axis, ``None`` else; ``crowther_angstrom``: finest detail over ``diameter_angstrom`` that the spacing allows,
        ``None`` without one.
    """
    beams = np.asarray(rotations)[:, :, 2]
    spacing = _spacing(beams)
    directions = _sphere(_DIRECTIONS)
    away = _away(directions, beams)
    worst = directions[np.argmax(away)]
    for halved in range(_REFINEMENTS):
        worst = _climbed(worst, beams, 2.0 / np.sqrt(_DIRECTIONS) / 2**halved)
    half_angle = float(_away(worst[None], beams)[0])
    # A sign has no meaning: the half-space of positive z, then y, then x.
    worst = worst * (np.sign(worst[np.abs(worst) > 1e-3][-1]) if np.any(np.abs(worst) > 1e-3) else 1)
    return {
        "worst_direction_xyz": [round(float(value), 4) for value in worst],
        "missing_half_angle_deg": float(np.degrees(half_angle)),
        "spacing_deg": float(np.degrees(spacing)),
        "measured_fraction": float(np.mean(away <= spacing / 2)) if len(beams) > 1 else 0.0,
        "elongation": _elongation(beams),
        "crowther_angstrom": None if diameter_angstrom is None else float(spacing * diameter_angstrom),
    }


def _away(directions: np.ndarray, beams: np.ndarray) -> np.ndarray:
    """Return the angle in rad between every direction and the nearest measured plane."""
    return np.arcsin(np.clip(np.abs(directions @ beams.T).min(axis=1), 0, 1))


def _spacing(beams: np.ndarray) -> float:
    """Return the median angle in rad of a beam to its nearest neighbour (a beam is a line, without a sense)."""
    if len(beams) < 2:
        return float(np.pi)
    cosines = np.abs(beams @ beams.T)
    np.fill_diagonal(cosines, 0)
    return float(np.median(np.arccos(np.clip(cosines.max(axis=1), 0, 1))))


def _sphere(count: int) -> np.ndarray:
    """Return ``count`` directions, evenly spread (a spiral), and the axes, (n, 3)."""
    index = np.arange(count) + 0.5
    z, turn = 1 - 2 * index / count, np.pi * (1 + 5**0.5) * index
    radius = np.sqrt(1 - z**2)
    return np.concatenate([np.stack([radius * np.cos(turn), radius * np.sin(turn), z], axis=1), np.eye(3)])


def _climbed(start: np.ndarray, beams: np.ndarray, reach: float) -> np.ndarray:
    """Return the direction near ``start``, within about ``reach`` rad, that is farthest from any plane."""
    across = np.cross(start, np.eye(3)[np.argmin(np.abs(start))])
    across /= np.linalg.norm(across)
    steps = np.linspace(-reach, reach, 9)
    offsets = steps[:, None, None] * across + steps[None, :, None] * np.cross(start, across)
    near = start + offsets.reshape(-1, 3)
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    return np.asarray(near[np.argmax(_away(near, beams))])


def _elongation(beams: np.ndarray) -> float | None:
    """Return by how much a point is longer along the beam, for tilts about y alone within ±alpha."""
    if np.abs(beams[:, 1]).max() > 1e-6:
        return None
    angles = np.arctan2(beams[:, 0], beams[:, 2])
    alpha = float(np.max(angles) - np.min(angles)) / 2
    if not 0 < alpha < np.pi / 2:
        return None if alpha == 0 else 1.0
    return float(np.sqrt((alpha + np.sin(alpha) * np.cos(alpha)) / (alpha - np.sin(alpha) * np.cos(alpha))))
