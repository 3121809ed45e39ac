"""How well a volume explains its projections: R factors per projection, and pixels held out for an honest one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stemtomo.algorithms.tomography.solver import Measurement
from stemtomo.backend import Array, array_namespace, to_device_of, to_host


class Factors(NamedTuple):
    """R1 = sum |A v - b| / sum |b| and R2 = |A v - b| / |b| of every projection, (tilt,); R1 of pixels held out."""

    r1: np.ndarray
    r2: np.ndarray
    r_free: float


def factors(images: Array, measured: Measurement, free: np.ndarray | None = None) -> Factors:
    """Return the R factors of a volume with projections ``images`` of its coefficients, (tilt, y, x).

    Parameters
    ----------
    free
        Boolean (tilt, y, x): pixels that the reconstruction did not see; ``None`` if there are none.
    """
    left = measured.seen(images) - measured.images
    valid = measured.valid

    def per_tilt(values: Array, where: Array) -> np.ndarray:
        xp = array_namespace(values)
        return to_host(xp.sum(values * where, axis=(1, 2), dtype=np.float64))

    size, error = abs(measured.images), abs(left)
    r1 = _ratio(per_tilt(error, valid), per_tilt(size, valid))
    r2 = np.sqrt(_ratio(per_tilt(left * left, valid), per_tilt(size * size, valid)))
    if free is None:
        return Factors(r1, r2, float("nan"))
    free = to_device_of(free, images)
    held = _ratio(per_tilt(error, free).sum(keepdims=True), per_tilt(size, free).sum(keepdims=True))
    return Factors(r1, r2, float(held[0]))


def held_out(valid: np.ndarray, fraction: float, seed: int = 0) -> np.ndarray:
    """Return which of the ``valid`` pixels (tilt, y, x) to hold out: ``fraction`` of them, drawn by ``seed``."""
    return np.asarray(valid) & (np.random.default_rng(seed).random(np.shape(valid)) < fraction)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)
