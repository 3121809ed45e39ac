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
_POISSON_FLOOR = 0.5

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


def residual(spectra: Array, counts: Array, loss: Loss) -> Array:
    """Turn ``spectra`` (position, ky, kx), in place, into the loss's gradient; return the loss (position,), float64.

    With the model's intensity I' = |spectrum|² and measured ``counts`` I (position, ky, kx): amplitude
    (sqrt I' - sqrt I)², Anscombe the same with 3/8 under both roots, Poisson half the
    deviance, I' - I + (I + b) log((I + b) / (I' + b)) with b = 1/2. The gradient is the
    Wirtinger gradient 2 dL/d conj(spectrum). Negative counts mark pixels without information (dead, masked): they
    contribute nothing.
    """
    xp = array_namespace(spectra)
    losses = xp.zeros(spectra.shape[0], dtype=np.float64)
    poisson = loss == "poisson"
    offset = _POISSON_FLOOR if poisson else _ROOT_OFFSET[loss]
    if is_device_array(spectra):
        _, height, width = spectra.shape
        cuda.launch(
            "patches",
            "residual",
            spectra.size,
            real_dtype(spectra),
            spectra,
            counts,
            losses,
            height * width,
            int(poisson),
            float(offset),
        )
    else:
        # The constants come typed: a bare literal would lift single precision to double inside the loop.
        constants = np.array([offset, _AMPLITUDE_FLOOR, 0, 1, 2], dtype=real_dtype(spectra))
        _residual(spectra, counts, poisson, constants, losses)
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
def _residual(spectra, counts, poisson, constants, losses):  # type: ignore[no-untyped-def]
    shift, floor, zero, one, two = constants
    for j in range(spectra.shape[0]):
        total = 0.0
        for y in range(spectra.shape[1]):
            row_total = zero
            for x in range(spectra.shape[2]):
                value = spectra[j, y, x]
                measured = counts[j, y, x]
                model = value.real * value.real + value.imag * value.imag
                if measured < 0:
                    factor = zero
                elif poisson:
                    factor = one - (measured + shift) / (model + shift)
                    row_total += model - measured + (measured + shift) * np.log((measured + shift) / (model + shift))
                else:
                    root, target = np.sqrt(model + shift), np.sqrt(measured + shift)
                    factor = one - target / (root + floor)
                    row_total += (root - target) * (root - target)
                spectra[j, y, x] = value * (two * factor)
            total += row_total
        losses[j] = total
