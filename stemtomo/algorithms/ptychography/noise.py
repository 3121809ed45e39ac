"""The loss that counting noise alone leaves: where a curve falls below it, the object fits noise."""

from __future__ import annotations

import functools

import numpy as np
from scipy import stats

from stemtomo.algorithms.ptychography.model import CURVATURE
from stemtomo.kernels.patches import _POISSON_FLOOR, _ROOT_OFFSET, Loss


def expected_loss(intensity: np.ndarray, loss: Loss) -> float:
    """Return the mean loss per pixel of Poisson counts whose expectation is ``intensity`` (any shape, electrons).

    It tends to 1/4 for bright pixels with the root losses, and to 1/2 with the Poisson loss.
    """
    means, values = _table(loss)
    return float(np.mean(np.interp(np.log(np.maximum(intensity, means[0])), np.log(means), values)))


def mean_curvature(intensity: np.ndarray, loss: Loss) -> float:
    """Return the curvature of the loss in the modulus of waves, as :data:`CURVATURE`, expected at few electrons.

    The background b that counts and model of the Poisson loss share bounds the weight of dark pixels, I / (I + b) of
    what they tell. The mean is over waves that fall on the detector as ``intensity`` (any shape, electrons) does.
    """
    if loss != "poisson" or not intensity.any():
        return CURVATURE[loss]
    weight = intensity / (intensity + _POISSON_FLOOR)
    return CURVATURE[loss] * float(np.sum(intensity * weight) / np.sum(intensity))


@functools.cache
def _table(loss: Loss) -> tuple[np.ndarray, np.ndarray]:
    means = np.geomspace(1e-6, 1e4, 200)
    values = []
    for mean in means:
        spread = 8 * np.sqrt(mean) + 10
        counts = np.arange(max(0, int(mean - spread)), int(mean + spread) + 1)
        values.append(float(np.sum(stats.poisson.pmf(counts, mean) * _losses(counts, mean, loss))))
    return means, np.array(values)


def _losses(counts: np.ndarray, mean: float, loss: Loss) -> np.ndarray:
    if loss == "poisson":
        seen = counts + _POISSON_FLOOR
        return mean - counts + seen * np.log(seen / (mean + _POISSON_FLOOR))
    offset = _ROOT_OFFSET[loss]
    return (np.sqrt(counts + offset) - np.sqrt(mean + offset)) ** 2
