"""Species from intensities: one-dimensional k-means and the confidence of each assignment."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stemtomo.errors import ConfigurationError

_ITERATIONS = 100
_NARROWEST = 1e-6  # of the range of intensities; keeps a class of equal values from having no width


@dataclass(frozen=True)
class Classes:
    """Atoms by class, faintest class first.

    Parameters
    ----------
    labels
        Class of each atom, 0 to k - 1 in order of intensity, (atom,).
    centres
        Mean intensity of each class, rising, (k,).
    confidence
        Probability of the assigned class, (atom,), if each class is Gaussian with its own mean and spread.
    """

    labels: np.ndarray
    centres: np.ndarray
    confidence: np.ndarray


def classify(intensity: np.ndarray, count: int) -> Classes:
    """Split atoms into ``count`` classes by ``intensity`` (atom,), by k-means.

    Deterministic: the start is the best of splits at quantiles and of splits at equal steps of intensity, so that a
    species of few atoms is found too.

    Raises
    ------
    ConfigurationError
        If there are fewer different intensities than classes.
    """
    intensity = np.asarray(intensity, dtype=np.float64)
    distinct = len(np.unique(intensity))
    if count < 1 or distinct < count:
        raise ConfigurationError(
            f"{count} classes cannot be made of {len(intensity)} atoms with {distinct} different intensities; "
            "lower the number of species, or the threshold that decides what is an atom"
        )
    fractions = (np.arange(count) + 0.5) / count
    low, high = np.percentile(intensity, [1, 99])
    starts = (np.quantile(intensity, fractions), low + (high - low) * fractions)
    centres = min((_lloyd(intensity, start) for start in starts), key=lambda c: _inertia(intensity, c))
    labels = np.argmin(np.abs(intensity[:, None] - centres), axis=1)
    return Classes(labels, centres, _confidence(intensity, labels, centres))


def atoms_and_others(intensity: np.ndarray, count: int) -> np.ndarray:
    """Return which of ``intensity`` (n,) belong to ``count`` species, (n,), and not to one class that is fainter still.

    The class of non-atoms is the faintest of ``count`` + 1 by :func:`classify`.
    """
    return np.asarray(classify(intensity, count + 1).labels > 0)


def order_by_atomic_number(symbols: tuple[str, ...], numbers: tuple[int, ...]) -> tuple[str, ...]:
    """Return ``symbols`` from the faintest to the brightest: the intensity of an atom rises with its ``numbers``."""
    return tuple(symbol for _, symbol in sorted(zip(numbers, symbols, strict=True)))


def _lloyd(values: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return the class means that Lloyd's iteration reaches from ``centres``, rising."""
    centres = np.sort(centres)
    for _ in range(_ITERATIONS):
        labels = np.argmin(np.abs(values[:, None] - centres), axis=1)
        updated = centres.copy()
        for index in range(len(centres)):
            members = values[labels == index]
            # An empty class restarts at the value that is worst represented.
            distance = np.abs(values - centres[labels])
            updated[index] = members.mean() if len(members) else values[np.argmax(distance)]
        updated = np.sort(updated)
        if np.array_equal(updated, centres):
            break
        centres = updated
    return centres


def _inertia(values: np.ndarray, centres: np.ndarray) -> float:
    return float((np.abs(values[:, None] - centres).min(axis=1) ** 2).sum())


def _confidence(values: np.ndarray, labels: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return the posterior probability of each atom's own class."""
    logs = np.empty((len(values), len(centres)))
    overall = max(float(np.ptp(values)), np.finfo(np.float64).tiny)
    for index, centre in enumerate(centres):
        members = values[labels == index]
        spread = max(float(members.std()), _NARROWEST * overall)
        logs[:, index] = np.log(max(len(members), 1)) - np.log(spread) - 0.5 * ((values - centre) / spread) ** 2
    logs -= logs.max(axis=1, keepdims=True)
    weights = np.exp(logs)
    return weights[np.arange(len(values)), labels] / weights.sum(axis=1)
