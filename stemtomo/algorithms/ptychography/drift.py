"""Drift of columns through free slices: measured, taken out, and said as a mistilt.

This is what is left to do after a reconstruction with an upright propagator of a specimen that was not upright: its
slices are cross-correlated and shifted upon each other (Chen et al., Science 372, 826 (2021)). What a column is smeared
out within a slice stays, which fitting the tilt avoids. A crystal's slices correlate again after a lattice spacing, so
neighbours must drift by less than half of one.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np

from stemtomo.backend import Array, array_namespace, fft2, ifft2, to_host

_SUBPIXEL = 50
_LARGEST_SHIFT_PX = 4


class Drift(NamedTuple):
    """A drift of columns with depth."""

    per_slice_px: np.ndarray
    """(2,), x and y, from one slice to the next; positive where later slices lie at larger x, y."""
    scatter_px: float
    """Root mean square of the slices about the line."""

    def tilt_rad_xy(self, pixel_angstrom_yx: tuple[float, float], slice_thickness_angstrom: float) -> np.ndarray:
        """Return the mistilt (2,), x and y, that the drift means: positive where columns drift to +x, +y."""
        slope = self.per_slice_px * np.asarray(pixel_angstrom_yx)[::-1] / slice_thickness_angstrom
        return np.arctan(slope)


def slice_drift(phase: Array, field: tuple[slice, slice]) -> Drift:
    """Return the drift of the slices ``phase`` (slice, y, x), real, over ``field`` (rows, columns), away from the rim.

    Every slice is correlated with the next to 1/50 pixel; a line is fitted to the shifts added up.
    """
    layers = to_host(phase).real[(slice(None), *field)].astype(np.float64)
    window = np.hanning(layers.shape[1] + 2)[1:-1, None] * np.hanning(layers.shape[2] + 2)[1:-1]
    layers = (layers - layers.mean(axis=(1, 2), keepdims=True)) * window
    steps = [_shift(a, b) for a, b in itertools.pairwise(layers)]
    places = np.vstack([np.zeros((1, 2)), np.cumsum(steps, axis=0)])
    depth = np.arange(len(places)) - (len(places) - 1) / 2
    slope = depth @ places / (depth @ depth)
    scatter = places - places.mean(axis=0) - depth[:, None] * slope
    return Drift(slope, float(np.sqrt((scatter**2).sum(axis=1).mean())))


def straightened(phase: Array, drift: Drift) -> Array:
    """Return the slices shifted, by Fourier ramps, to where they lie in the middle of the stack."""
    xp = array_namespace(phase)
    rows, columns = (xp.fft.fftfreq(n) for n in phase.shape[1:])
    out = []
    for number, layer in enumerate(phase):
        x, y = (number - (len(phase) - 1) / 2) * drift.per_slice_px
        ramp = xp.exp(2j * math.pi * (rows[:, None] * float(y) + columns * float(x)))
        moved = ifft2(fft2(layer.astype(np.complex128)) * ramp)
        out.append((moved if xp.iscomplexobj(phase) else moved.real).astype(phase.dtype))
    return xp.stack(out)


def _shift(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Where ``second`` lies relative to ``first``, (2,) x and y in pixels, at the peak of their correlation."""
    spectrum = np.conj(np.fft.fft2(first)) * np.fft.fft2(second)
    found = np.zeros(2)
    for step, reach in ((1.0, _LARGEST_SHIFT_PX), (0.1, 1.0), (1 / _SUBPIXEL, 0.1)):
        offsets = np.arange(-reach, reach + step / 2, step)
        # A matrix-multiply Fourier transform of the few lags around the best so far (Guizar-Sicairos et al. 2008).
        kernels = [
            np.exp(2j * math.pi * np.outer(centre + offsets, np.fft.fftfreq(n)))
            for centre, n in zip(found[::-1], spectrum.shape, strict=True)
        ]
        values = (kernels[0] @ spectrum @ kernels[1].T).real
        y, x = np.unravel_index(int(values.argmax()), values.shape)
        found = found + np.array([offsets[x], offsets[y]])
    return found
