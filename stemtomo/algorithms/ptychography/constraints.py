"""Constraints on the object that a user may ask for: applied to u = phase + i absorption between updates.

None is on unless asked for: each says something about the specimen that the data do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from stemtomo.algorithms.ptychography.model import State
from stemtomo.algorithms.total_variation import smoothed
from stemtomo.backend import Array, array_namespace, fft2, ifft2, to_device_of


@dataclass(frozen=True)
class Constraints:
    """What is asked of every layer of the object; the defaults ask nothing.

    Parameters
    ----------
    positive
        No phase below zero (zero is vacuum where ``vacuum_percentile`` is given).
    amplitude_limits
        |t| between these, by the absorption; of a complex object.
    tv_weight_rad
        Weight of the total variation of the phase in each layer, after every epoch.
    kz_weight
        beta of the filter of high frequencies along the beam at low ones across it, after every epoch.
    vacuum_percentile
        Percentile of the phase in well lit pixels that is set to zero in every layer, after every epoch.
    notch_px
        Periods (y, x) in object pixels of a raster whose harmonics are taken out, after every epoch.
    """

    positive: bool = False
    amplitude_limits: tuple[float, float] | None = None
    tv_weight_rad: float = 0.0
    kz_weight: float = 0.0
    vacuum_percentile: float | None = None
    notch_px: tuple[float, float] | None = None

    def after_update(self, state: State) -> State:
        """Return ``state`` within the bounds that hold pixel by pixel."""
        phase = state.phase
        xp = array_namespace(phase)
        if self.positive:
            phase = phase - xp.minimum(phase.real, 0)
        if self.amplitude_limits is not None and xp.iscomplexobj(phase):
            least, most = self.amplitude_limits
            absorption = xp.clip(phase.imag, -math.log(most), -math.log(least))
            phase = (phase.real + 1j * absorption).astype(phase.dtype)
        return state if phase is state.phase else replace(state, phase=phase)

    def after_epoch(self, state: State, illumination: Array) -> State:
        """Return ``state`` behind the filters that look at more than one pixel; ``illumination`` is (Y, X)."""
        phase = state.phase
        if self.tv_weight_rad > 0:
            smooth = flattened(array_namespace(phase).ascontiguousarray(phase.real), self.tv_weight_rad)
            phase = phase + (smooth - phase.real)
        if self.kz_weight > 0:
            phase = kz_filtered(phase, self.kz_weight)
        if self.notch_px is not None:
            phase = notched(phase, self.notch_px)
        if self.vacuum_percentile is not None:
            phase = vacuum_at_zero(phase, illumination, self.vacuum_percentile)
        return state if phase is state.phase else replace(state, phase=phase)


def flattened(image: Array, weight: float) -> Array:
    """Return every layer of ``image`` (layer, Y, X), real, after the proximal step of its own total variation."""
    return array_namespace(image).concatenate([smoothed(layer[None], weight, positive=False) for layer in image])


def kz_filtered(phase: Array, weight: float) -> Array:
    """Return ``phase`` (slice, Y, X) with frequencies along the beam damped where those across it are low.

    W = 1 - (2/pi) atan((beta |kz| / sqrt(k_perp² + 1e-3))²), frequencies in cycles per slice and per pixel. The stack
    is mirrored at its ends, so its first slice does not meet its last. What all slices share is kept as it is.
    """
    if len(phase) == 1:
        return phase
    xp = array_namespace(phase)
    stack = xp.concatenate([phase, phase[::-1]])
    kz, ky, kx = (to_device_of(np.fft.fftfreq(n), phase) for n in stack.shape)
    across = xp.sqrt(ky[:, None] ** 2 + kx**2 + 1e-3)
    along = weight * xp.abs(kz)[:, None, None]
    factor = 1 - (2 / math.pi) * xp.arctan((along / across) ** 2)
    found = xp.fft.ifftn(xp.fft.fftn(stack) * factor)[: len(phase)]
    return (found if xp.iscomplexobj(phase) else found.real).astype(phase.dtype)


def vacuum_at_zero(phase: Array, illumination: Array, percentile: float) -> Array:
    """Return ``phase`` with a constant off every layer, so that ``percentile`` of its well lit phase is zero.

    The constant is a gauge: no pattern changes.
    """
    xp = array_namespace(phase)
    lit = illumination > 0.5 * illumination.max()
    level = xp.percentile(phase.real[:, lit], percentile, axis=1)
    return (phase - level[:, None, None]).astype(phase.dtype)


def notched(phase: Array, period_px_yx: tuple[float, float], width: float = 1.5) -> Array:
    """Return ``phase`` without the harmonics of a raster of ``period_px_yx``, which probe and object can trade.

    Whatever the specimen itself has at these frequencies goes too. ``width`` is the radius of a notch in frequency
    pixels.
    """
    ky, kx = (np.fft.fftfreq(n) for n in phase.shape[1:])
    off_y, off_x = (k * p - np.rint(k * p) for k, p in zip((ky, kx), period_px_yx, strict=True))
    # Distance from the nearest node of the reciprocal raster, in pixels of the spectrum.
    far_y, far_x = (
        np.abs(off) * n / p for off, n, p in zip((off_y, off_x), phase.shape[1:], period_px_yx, strict=True)
    )
    node = np.hypot(far_y[:, None], far_x) < width
    centre = (np.rint(ky * period_px_yx[0]) == 0)[:, None] & (np.rint(kx * period_px_yx[1]) == 0)
    kept = to_device_of((~node | centre).astype(np.float32), phase)
    found = ifft2(fft2(phase.astype(np.complex128)) * kept)
    return (found if array_namespace(phase).iscomplexobj(phase) else found.real).astype(phase.dtype)
