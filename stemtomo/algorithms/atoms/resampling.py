"""Images on wider pixels, without loss within the band that these have."""

from __future__ import annotations

import numpy as np

from stemtomo.backend import Array, array_namespace, to_device_of

#: Half of the sinc in wide pixels, and the shape of its Kaiser window.
_REACH, _KAISER = 4, 5.0
#: Share of the weights that must fall on measured pixels.
_LEAST_SEEN = 0.5


def within_band(images: Array, valid: Array, every: int) -> Array:
    """Return ``images`` (n, y, x) on pixels ``every`` times as wide, (n, y // every, x // every).

    A wide pixel is centred on those it takes the place of. Its weights are a sinc in a Kaiser window, which leaves
    frequencies up to 0.6 of the wide pixels' limit as they are and those beyond 1.4 of it out; over the ``valid``
    pixels (n, y, x), bool, alone.
    """
    xp = array_namespace(images)
    along_y, along_x = (to_device_of(_weights(count, every).astype(images.dtype), images) for count in images.shape[1:])
    found = xp.empty((len(images), len(along_y), len(along_x)), images.dtype)
    for image, measured, wide in zip(images, valid, found, strict=True):
        seen = along_y @ measured.astype(images.dtype) @ along_x.T
        wide[:] = along_y @ (image * measured) @ along_x.T / xp.maximum(seen, images.dtype.type(_LEAST_SEEN))
    return found


def _weights(count: int, every: int) -> np.ndarray:
    """Return the weights (wide, pixel) of ``count`` pixels; each wide one's add up to one."""
    centres = every * np.arange(count // every) + (every - 1) / 2
    offset = (np.arange(count) - centres[:, None]) / every
    window = np.i0(_KAISER * np.sqrt(np.clip(1 - (offset / _REACH) ** 2, 0, None)))
    weights = np.where(np.abs(offset) < _REACH, np.sinc(offset) * window, 0.0)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))
