"""What varies slowly in a projection, and is not asked of atoms.

The potential of an atom has a tail that no Gaussian has. Around each atom it is little, but those of hundreds add up to
a smooth hill, which atoms can only explain by moving apart. So residuals are compared without their running mean, and
the loss knows it: the operator comes with its adjoint.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from stemtomo.backend import Array, array_namespace, to_device_of

#: Share of the running mean's weight that must fall on measured pixels for them to count.
_LEAST_SEEN = 1e-3


@dataclass(frozen=True)
class RunningMean:
    """Gaussian mean over the measured pixels of images (y, x) of one shape, and its removal.

    Parameters
    ----------
    along_y, along_x
        Gaussian weights (y, y) and (x, x) of pixels for each other, symmetric.
    """

    along_y: Array
    along_x: Array

    @classmethod
    def of(cls, image: Array, sigma_px: float) -> RunningMean:
        """Return the mean for images like ``image`` (y, x), over a Gaussian of ``sigma_px``."""
        along_y, along_x = (to_device_of(_gaussian(count, sigma_px, image.dtype), image) for count in image.shape)
        return cls(along_y, along_x)

    def removed(self, image: Array, valid: Array) -> Array:
        """Return ``image`` less its running mean over the ``valid`` pixels (y, x), bool; zero elsewhere."""
        seen = image * valid
        return (seen - self.blurred(seen) / self._weight(valid)) * valid

    def removed_adjoint(self, image: Array, valid: Array) -> Array:
        """Adjoint of :meth:`removed` in the image."""
        seen = image * valid
        return (seen - self.blurred(seen / self._weight(valid))) * valid

    @property
    def share_of_white(self) -> float:
        """Share of the variance of white noise that its mean keeps, away from the edges."""
        xp = array_namespace(self.along_y)
        along = [xp.square(weights).sum(axis=0).max() for weights in (self.along_y, self.along_x)]
        return float(along[0] * along[1])

    def _weight(self, valid: Array) -> Array:
        xp = array_namespace(self.along_y)
        return xp.maximum(self.blurred(valid.astype(self.along_y.dtype)), self.along_y.dtype.type(_LEAST_SEEN))

    def blurred(self, image: Array) -> Array:
        """Return ``image`` (y, x), zero outside, under the weights."""
        return self.along_y @ image @ self.along_x


@functools.lru_cache(maxsize=8)
def _gaussian(count: int, sigma_px: float, dtype: np.dtype) -> np.ndarray:
    """Return the weights of ``count`` places for each other, read-only: every tilt of every iteration asks for them."""
    places = np.arange(count)
    kernel = np.exp(-((places[:, None] - places) ** 2) / (2 * sigma_px**2)) / (np.sqrt(2 * np.pi) * sigma_px)
    found = kernel.astype(dtype)
    found.flags.writeable = False  # the cache hands out one array
    return found
