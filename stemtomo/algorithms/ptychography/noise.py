"""The loss that counting noise alone leaves: where a curve falls below it, the object fits noise."""

from __future__ import annotations

import functools

import numpy as np
from scipy import stats

from stemtomo.kernels.patches import Loss

_OFFSET = {"amplitude": 0.0, "anscombe": 0.375}


def expected_loss(intensity: np.ndarray, loss: Loss) -> float:
    """Return the mean loss per pixel of Poisson counts whose expectation is ``intensity`` (any shape, electrons).

    For the root losses E[(sqrt(n + c) - sqrt(mu + c))²], which tends to 1/4 for bright pixels; for the Poisson loss
    mu - E[n] log mu.
    """
    if loss == "poisson":
        return float(np.mean(intensity - intensity * np.log(intensity + 0.5)))
    means, values = _root_table(_OFFSET[loss])
    return float(np.mean(np.interp(np.log(np.maximum(intensity, means[0])), np.log(means), values)))


@functools.cache
def _root_table(offset: float) -> tuple[np.ndarray, np.ndarray]:
    means = np.geomspace(1e-6, 1e4, 200)
    values = []
    for mean in means:
        spread = 8 * np.sqrt(mean) + 10
        counts = np.arange(max(0, int(mean - spread)), int(mean + spread) + 1)
        squares = (np.sqrt(counts + offset) - np.sqrt(mean + offset)) ** 2
        values.append(float(np.sum(stats.poisson.pmf(counts, mean) * squares)))
    return means, np.array(values)
