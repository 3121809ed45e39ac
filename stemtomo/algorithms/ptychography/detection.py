"""What a detector does to a pattern before it counts: a blur by its point spread, and the residual with it.

Intensities are convolved with a Gaussian, which is its own adjoint, so the derivative of the loss in the blurred
intensity is blurred once more on the way back. It costs two real transforms per pattern.
"""

from __future__ import annotations

import math

from stemtomo.backend import Array, array_namespace
from stemtomo.kernels import patches

#: Electrons per pixel below which a blurred intensity is not told from darkness; rounding may make it negative.
_DARK = 1e-9


def blurred(intensity: Array, width_px: float) -> Array:
    """Return ``intensity`` (..., ky, kx) behind a periodic Gaussian of ``width_px`` (standard deviation)."""
    if width_px <= 0:
        return intensity
    xp = array_namespace(intensity)
    rows, columns = intensity.shape[-2:]
    frequencies = xp.fft.fftfreq(rows)[:, None] ** 2 + xp.fft.rfftfreq(columns) ** 2
    transfer = xp.exp(-2 * (math.pi * width_px) ** 2 * frequencies)
    spectrum = xp.fft.rfft2(intensity, axes=(-2, -1)) * transfer
    return xp.fft.irfft2(spectrum, s=(rows, columns), axes=(-2, -1)).astype(intensity.dtype)


def residual(
    spectra: Array,
    counts: Array,
    loss: patches.Loss,
    width_px: float,
    *,
    where: Array,
    modes: int = 1,
    mask: Array | None = None,
    background: Array | None = None,
    background_gradient: Array | None = None,
    floor_factor: float = 1.0,
) -> Array:
    """Turn ``spectra``, in place, into the loss's gradient behind a blur; return the loss (position,), float64.

    As :func:`stemtomo.kernels.patches.residual`, of which it asks the derivative in the blurred intensity.
    """
    light = {"background": background, "background_gradient": background_gradient}
    seen = {"where": where, "mask": mask, "floor_factor": floor_factor, **light}
    if width_px <= 0:
        return patches.residual(spectra, counts, loss, modes=modes, **seen)
    xp = array_namespace(spectra)
    each = (xp.square(spectra.real) + xp.square(spectra.imag)).reshape(-1, modes, *spectra.shape[1:])
    roots = xp.sqrt(xp.maximum(blurred(each.sum(axis=1), width_px), _DARK))
    slope = roots.astype(spectra.dtype)
    losses = patches.residual(slope, counts, loss, **seen)
    # The kernel returns 2 dL/dI' times the root it was given.
    slope = blurred(slope.real / roots, width_px)
    spectra *= xp.repeat(slope, modes, axis=0) if modes > 1 else slope
    return losses
