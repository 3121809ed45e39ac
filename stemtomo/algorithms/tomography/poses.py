"""Poses that are refined: small turns, and what projections cannot tell of them.

A turn of the whole specimen, r -> Q r, changes R to Q R at every tilt and nothing in the projections; so does a
translation with its shifts, and a common magnification with a larger volume. Of all poses that explain the projections
equally, the ones nearest to where the refinement began are kept.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from stemtomo.algorithms.tomography.alignment import without_translation
from stemtomo.physics.projection import POSE_COLUMNS, TiltGeometry

SHIFTS, TURNS, MAGNIFICATION = slice(0, 2), slice(2, 5), 5


def turned(rotations: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Return the matrices R (tilt, 3, 3) after turns of the specimen in the laboratory, rotation vectors (tilt, 3)."""
    return np.asarray(rotations) @ Rotation.from_rotvec(vectors).as_matrix().transpose(0, 2, 1)


def turns_between(rotations: np.ndarray, later: np.ndarray) -> np.ndarray:
    """Return the vectors (tilt, 3) that :func:`turned` takes from ``rotations`` to ``later``, in rad."""
    return Rotation.from_matrix(np.asarray(rotations).transpose(0, 2, 1) @ np.asarray(later)).inv().as_rotvec()


def without_rotation(vectors: np.ndarray, rotations: np.ndarray) -> np.ndarray:
    """Return turns (tilt, 3) less the part R^T e that a small turn e of the whole specimen explains best."""
    seen = np.asarray(rotations).transpose(0, 2, 1)
    common = np.linalg.lstsq(seen.reshape(-1, 3), np.ravel(vectors), rcond=1e-9)[0]
    return vectors - seen @ common


def stepped(geometry: TiltGeometry, steps: np.ndarray) -> TiltGeometry:
    """Return ``geometry`` after ``steps`` (tilt, 6), in the columns of :data:`POSE_COLUMNS`.

    What is common to all tilts, a translation, a turn or a magnification of the specimen, is taken out.
    """
    vectors = without_rotation(steps[:, TURNS], geometry.rotations) if steps[:, TURNS].any() else steps[:, TURNS]
    rotations = turned(geometry.rotations, vectors) if vectors.any() else geometry.rotations
    scales = geometry.magnifications
    if steps[:, MAGNIFICATION].any():
        larger = np.log(geometry.scales) + steps[:, MAGNIFICATION]
        scales = np.exp(larger - larger.mean())
    return TiltGeometry(
        rotations,
        without_translation(geometry.shifts_px + steps[:, SHIFTS], rotations),
        geometry.volume_shape,
        geometry.image_shape,
        geometry.degree,
        scales,
    )


def euler_deg(rotations: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return theta, phi, psi (tilt,) in degrees of matrices R = Rz(phi) Ry(theta) Rx(psi).

    Beyond a quarter turn of theta the other two jump by a half turn: the matrices are the same.
    """
    phi, theta, psi = Rotation.from_matrix(np.asarray(rotations)).as_euler("ZYX", degrees=True).T
    return theta, phi, psi


def error_deg(rotations: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the turns (tilt, 3) in degrees from ``rotations`` to ``truth``, less the best turn of the specimen.

    Columns: about the laboratory's x, about y (the tilt axis of a single-axis series), and in the plane of the image.
    """
    common = Rotation.from_matrix(np.asarray(truth) @ np.asarray(rotations).transpose(0, 2, 1)).mean().as_matrix()
    return np.degrees(turns_between(common @ rotations, truth))


__all__ = [
    "MAGNIFICATION",
    "POSE_COLUMNS",
    "SHIFTS",
    "TURNS",
    "error_deg",
    "euler_deg",
    "stepped",
    "turned",
    "turns_between",
    "without_rotation",
]
