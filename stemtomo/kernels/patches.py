"""Fused inner loops of multislice: transmission through windows of an object, its adjoint, and the residual.

A window is the rectangle of an object (y, x) that a probe position sees; its corner is (row, column). Indices wrap, so
a periodic specimen needs no copies; for an open one the caller's object is large enough that nothing wraps.
"""

from __future__ import annotations

from typing import Literal

import numba
import numpy as np

from stemtomo.backend import Array, array_namespace, is_device_array, real_dtype
from stemtomo.kernels import cuda

Loss = Literal["amplitude", "anscombe", "poisson"]

#: Added to both intensities under the root; 3/8 makes Poisson counts of any mean equally noisy (Anscombe 1948).
_ROOT_OFFSET = {"amplitude": 0.0, "anscombe": 0.375}
#: Keeps the root off zero.
_AMPLITUDE_FLOOR = 1e-9
#: Background b in electrons per pixel that model and counts share: it bounds the weight of the darkest pixels and,
#: because both have it, does not move the minimum.
_POISSON_FLOOR = 0.1

_jit = numba.njit(nogil=True, cache=True, fastmath={"contract", "nsz", "arcp", "reassoc"}, error_model="numpy")


def transmit(waves: Array, transmission: Array, corners: Array) -> Array:
    """Return ``waves`` (position, y, x) times each position's window of ``transmission`` (Y, X).

    ``corners`` is (position, 2), integer rows and columns.
    """
    out = array_namespace(waves).empty_like(waves)
    if is_device_array(waves):
        _launch("transmit", waves, transmission, corners, waves, out)
    else:
        _transmit(waves, transmission, corners, out)
    return out


def transmit_adjoint(
    gradient: Array, incident: Array, transmission: Array, corners: Array, object_gradient: Array
) -> None:
    """Adjoint of :func:`transmit` in both its inputs.

    Adds sum_j conj(incident_j) gradient_j into each window of ``object_gradient`` (Y, X) and turns ``gradient``
    (position, y, x), in place, into the gradient of the incident waves.
    """
    if is_device_array(gradient):
        _launch("transmit_adjoint", gradient, transmission, corners, incident, gradient, object_gradient)
    else:
        _transmit_adjoint(gradient, incident, transmission, corners, object_gradient)


def illuminate(waves: Array, corners: Array, illumination: Array) -> None:
    """Add |waves|² (position, y, x) into each window of ``illumination`` (Y, X), real."""
    if is_device_array(waves):
        _launch("illuminate", waves, illumination, corners, waves, illumination)
    else:
        _illuminate(waves, corners, illumination)


def shift(spectra: Array, ramp_y: Array, ramp_x: Array) -> Array:
    """Return copies of ``spectra`` (mode, ky, kx) times each position's ramp: (position, mode, ky, kx).

    The ramp of position j is ``ramp_y[j, ky] * ramp_x[j, kx]``, complex.
    """
    out = array_namespace(spectra).empty((len(ramp_y), *spectra.shape), dtype=spectra.dtype)
    if is_device_array(spectra):
        cuda.launch("patches", "shift", out.size, real_dtype(out), *spectra.shape, spectra, ramp_y, ramp_x, out)
    else:
        _shift(spectra, ramp_y, ramp_x, out)
    return out


def shift_adjoint(spectra: Array, ramp_y: Array, ramp_x: Array) -> Array:
    """Adjoint of :func:`shift`: sum over positions of ``spectra`` (position, mode, ky, kx), ramps taken back."""
    out = array_namespace(spectra).zeros(spectra.shape[1:], dtype=spectra.dtype)
    if is_device_array(spectra):
        cuda.launch("patches", "shift_adjoint", spectra.size, real_dtype(out), *out.shape, spectra, ramp_y, ramp_x, out)
    else:
        _shift_adjoint(spectra, ramp_y, ramp_x, out)
    return out


def residual(
    spectra: Array,
    counts: Array,
    loss: Loss,
    *,
    where: Array | None = None,
    modes: int = 1,
    mask: Array | None = None,
    background: Array | None = None,
    background_gradient: Array | None = None,
    floor_factor: float = 1.0,
) -> Array:
    """Turn ``spectra``, in place, into the loss's gradient; return the loss (position,), float64.

    With the model's intensity I', the sum of |spectrum|² over the modes plus the background, and measured counts I:
    amplitude (sqrt I' - sqrt I)², Anscombe the same with 3/8 under both roots, Poisson half the deviance,
    I' - I + (I + b) log((I + b) / (I' + b)) with b = 1/10. The gradient is Wirtinger's, 2 dL/d conj(spectrum).

    Parameters
    ----------
    spectra
        (position x mode, ky, kx), the modes of a position side by side, zero frequency first.
    counts
        (pattern, qy, qx), any real type. A detector smaller than the spectra sees their low frequencies; beyond it,
        and where counts are negative, nothing is known and nothing contributes.
    where
        (position,) int64, the pattern of each position; in order unless given.
    mask
        (qy, qx) bool, False for pixels that tell nothing.
    background
        (qy, qx) electrons that the detector counts beside the waves, in the precision of ``spectra``.
    background_gradient
        (qy, qx); dL/d background, summed over the positions, is added.
    floor_factor
        Times the 3/8 or 1/10: counts weigh as if there were so many times fewer.
    """
    xp = array_namespace(spectra)
    positions = spectra.shape[0] // modes
    losses = xp.zeros(positions, dtype=np.float64)
    real = real_dtype(spectra)
    poisson = loss == "poisson"
    offset = floor_factor * (_POISSON_FLOOR if poisson else _ROOT_OFFSET[loss])
    mask = xp.ones(counts.shape[1:], dtype=bool) if mask is None else mask
    lit, wanted = background is not None, background_gradient is not None
    background = xp.zeros((1, 1), dtype=real) if background is None else background
    background_gradient = xp.zeros((1, 1), dtype=real) if background_gradient is None else background_gradient
    detector = (mask, lit, background, wanted, background_gradient, poisson)
    if is_device_array(spectra):
        seen = xp.ascontiguousarray(xp.asarray(counts if where is None else counts[where], dtype=real))
        pixels = positions * spectra.shape[1] * spectra.shape[2]
        sizes = (modes, *spectra.shape[1:], *counts.shape[1:])
        told = (int(one) if isinstance(one, bool) else one for one in detector)
        cuda.launch("patches", "residual", pixels, real, *sizes, seen, *told, float(offset), spectra, losses)
    else:
        where = np.arange(positions) if where is None else where
        # The constants come typed: a bare literal would lift single precision to double inside the loop.
        constants = np.array([offset, _AMPLITUDE_FLOOR, 0, 1, 2], dtype=real)
        _residual(spectra, modes, counts, where, *detector, constants, losses)
    return losses


def _launch(kernel: str, waves: Array, slice_array: Array, corners: Array, *arrays: Array) -> None:
    _, height, width = waves.shape
    rows, columns = slice_array.shape
    transmission = (slice_array,) if kernel.startswith("transmit") else ()
    cuda.launch(
        "patches", kernel, waves.size, real_dtype(waves), height, width, rows, columns, corners, *transmission, *arrays
    )


@_jit
def _transmit(waves, transmission, corners, out):  # type: ignore[no-untyped-def]
    rows, columns = transmission.shape
    for j in range(waves.shape[0]):
        for y in range(waves.shape[1]):
            line = transmission[(corners[j, 0] + y) % rows]
            first = corners[j, 1] % columns
            straight = min(waves.shape[2], columns - first)
            for x in range(straight):
                out[j, y, x] = waves[j, y, x] * line[first + x]
            for x in range(straight, waves.shape[2]):
                out[j, y, x] = waves[j, y, x] * line[(first + x) % columns]


@_jit
def _transmit_adjoint(gradient, incident, transmission, corners, object_gradient):  # type: ignore[no-untyped-def]
    rows, columns = transmission.shape
    for j in range(gradient.shape[0]):
        for y in range(gradient.shape[1]):
            row = (corners[j, 0] + y) % rows
            first = corners[j, 1] % columns
            straight = min(gradient.shape[2], columns - first)
            for x in range(straight):
                g = gradient[j, y, x]
                object_gradient[row, first + x] += incident[j, y, x].conjugate() * g
                gradient[j, y, x] = g * transmission[row, first + x].conjugate()
            for x in range(straight, gradient.shape[2]):
                column = (first + x) % columns
                g = gradient[j, y, x]
                object_gradient[row, column] += incident[j, y, x].conjugate() * g
                gradient[j, y, x] = g * transmission[row, column].conjugate()


@_jit
def _illuminate(waves, corners, illumination):  # type: ignore[no-untyped-def]
    rows, columns = illumination.shape
    for j in range(waves.shape[0]):
        for y in range(waves.shape[1]):
            row = (corners[j, 0] + y) % rows
            first = corners[j, 1] % columns
            straight = min(waves.shape[2], columns - first)
            for x in range(straight):
                wave = waves[j, y, x]
                illumination[row, first + x] += wave.real * wave.real + wave.imag * wave.imag
            for x in range(straight, waves.shape[2]):
                wave = waves[j, y, x]
                illumination[row, (first + x) % columns] += wave.real * wave.real + wave.imag * wave.imag


@_jit
def _shift(spectra, ramp_y, ramp_x, out):  # type: ignore[no-untyped-def]
    for j in range(out.shape[0]):
        for m in range(out.shape[1]):
            for y in range(out.shape[2]):
                ramp = ramp_y[j, y]
                for x in range(out.shape[3]):
                    out[j, m, y, x] = spectra[m, y, x] * (ramp * ramp_x[j, x])


@_jit
def _shift_adjoint(spectra, ramp_y, ramp_x, out):  # type: ignore[no-untyped-def]
    for j in range(spectra.shape[0]):
        for m in range(spectra.shape[1]):
            for y in range(spectra.shape[2]):
                ramp = ramp_y[j, y].conjugate()
                for x in range(spectra.shape[3]):
                    out[m, y, x] += spectra[j, m, y, x] * (ramp * ramp_x[j, x].conjugate())


@_jit
def _residual(  # type: ignore[no-untyped-def]
    spectra, modes, counts, where, mask, lit, background, wanted, background_gradient, poisson, constants, losses
):
    zero, two = constants[2], constants[4]
    height, width = spectra.shape[1], spectra.shape[2]
    rows, columns = counts.shape[1], counts.shape[2]
    factor = np.empty(width, dtype=constants.dtype)
    for j in range(len(where)):
        total = 0.0
        for y in range(height):
            # Zero frequency first on both: the low half of the detector's rows, a gap, the negative half.
            row = y if y < (rows + 1) // 2 else y - (height - rows)
            if y >= (rows + 1) // 2 and y < height - rows // 2:
                spectra[j * modes : (j + 1) * modes, y] = zero
                continue
            factor[:] = zero
            for m in range(modes):
                line = spectra[j * modes + m, y]
                for x in range(width):
                    factor[x] += line[x].real * line[x].real + line[x].imag * line[x].imag
            half, late = (columns + 1) // 2, width - columns // 2
            seen, good = counts[where[j], row], mask[row]
            ambient = background[row if lit else 0]
            pull = background_gradient[row if wanted else 0]
            total += _compare(factor[:half], seen[:half], good[:half], lit, ambient, wanted, pull, poisson, constants)
            factor[half:late] = zero
            total += _compare(
                factor[late:], seen[half:], good[half:], lit, ambient[half:], wanted, pull[half:], poisson, constants
            )
            for m in range(modes):
                line = spectra[j * modes + m, y]
                for x in range(width):
                    line[x] *= two * factor[x]
        losses[j] = total


@_jit
def _compare(model, counts, good, lit, background, wanted, pull, poisson, constants):  # type: ignore[no-untyped-def]
    """Turn intensities ``model`` of a run of pixels into dL/dI', in place; return the loss."""
    shift, floor, zero, one, _ = constants
    total = zero
    for x in range(len(model)):
        known = good[x] and counts[x] >= 0
        measured = max(counts[x] + zero, zero)
        intensity = model[x] + background[x] if lit else model[x]
        if poisson:
            factor = one - (measured + shift) / (intensity + shift)
            value = intensity - measured + (measured + shift) * np.log((measured + shift) / (intensity + shift))
        else:
            root, target = np.sqrt(intensity + shift), np.sqrt(measured + shift)
            factor = one - target / (root + floor)
            value = (root - target) * (root - target)
        model[x] = factor if known else zero
        total += value if known else zero
        if wanted:
            pull[x] += model[x]
    return total
