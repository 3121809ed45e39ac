"""Gaussian atoms on an image: drawing them, and the derivatives of an image's loss in their parameters.

An atom of intensity I and width b (sigma) at column u and row v adds I g(x - u, y - v), g(r) = exp(-r²/2b²)/(2 pi b²),
to the pixels of a square window about the pixel nearest to it; what falls outside the image is lost. g is a product of
one factor per axis, and along an axis a product of ratios, so an atom costs eight exponentials.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from stemtomo.backend import Array, array_namespace, is_device_array, real_dtype
from stemtomo.kernels import cuda

_jit = numba.njit(nogil=True, cache=True, fastmath={"contract", "nsz", "arcp", "reassoc"}, error_model="numpy")


def render(image: Array, u: Array, v: Array, intensity: Array, width: Array, radius: int) -> None:
    """Add Gaussian atoms to ``image`` (y, x), in place.

    Parameters
    ----------
    u, v
        Columns and rows of the atoms' centres in pixels, (atom,), of the dtype of ``image`` like the next two.
    intensity
        Integral of each atom over the image.
    width
        Standard deviation of each atom in pixels.
    radius
        Half of the window in pixels; 4 to 5 times the largest width.
    """
    if is_device_array(image):
        _launch("render_atoms", image, u, v, intensity, width, radius)
    else:
        _render(image, u, v, intensity, width, radius)


def gather(
    residual: Array, u: Array, v: Array, intensity: Array, width: Array, radius: int
) -> tuple[Array, Array, Array, Array]:
    """Return the derivatives of <``residual``, image of the atoms> in (intensity, u, v, width), each (atom,).

    The first is the exact adjoint of :func:`render` as a linear map of intensities to an image; with the residual
    dL/d image of any loss L, the four are dL/d parameters. Arguments as in :func:`render`.
    """
    xp = array_namespace(residual)
    out = tuple(xp.empty_like(u) for _ in range(4))
    if is_device_array(residual):
        _launch("gather_atoms", residual, u, v, intensity, width, radius, *out)
    else:
        _gather(residual, u, v, intensity, width, radius, *out)
    return out[0], out[1], out[2], out[3]


def _launch(
    kernel: str, image: Array, u: Array, v: Array, intensity: Array, width: Array, radius: int, *out: Array
) -> None:
    rows, columns = image.shape
    cuda.launch("atoms", kernel, len(u), real_dtype(image), rows, columns, radius, u, v, intensity, width, image, *out)


@_jit
def _factors(centre, width, first, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` with the factors of g along one axis, for pixels ``first`` onwards, from its middle outwards.

    The ratio of neighbouring values of a Gaussian is itself a geometric sequence: four exponentials make them all.
    """
    half = out.shape[0] // 2
    inverse = 1 / (width * width)
    offset = first + half - centre
    value = math.exp(-0.5 * offset * offset * inverse) / (math.sqrt(2 * math.pi) * width)
    step = math.exp(-inverse)
    up = math.exp(-(offset + 0.5) * inverse)
    down = math.exp(-(0.5 - offset) * inverse)
    out[half] = value
    above = below = value
    for i in range(1, half + 1):
        above *= up
        below *= down
        out[half + i] = above
        out[half - i] = below
        up *= step
        down *= step


@_jit
def _render(image, u, v, intensity, width, radius):  # type: ignore[no-untyped-def]
    rows, columns = image.shape
    along_x = np.empty(2 * radius + 1, image.dtype)
    along_y = np.empty(2 * radius + 1, image.dtype)
    for atom in range(u.shape[0]):
        left = int(math.floor(u[atom] + 0.5)) - radius
        top = int(math.floor(v[atom] + 0.5)) - radius
        if left >= columns or top >= rows or left + 2 * radius < 0 or top + 2 * radius < 0:
            continue
        _factors(u[atom], width[atom], left, along_x)
        _factors(v[atom], width[atom], top, along_y)
        start, stop = max(left, 0), min(left + 2 * radius + 1, columns)
        factors = along_x[start - left : stop - left]
        for y in range(max(top, 0), min(top + 2 * radius + 1, rows)):
            weight = intensity[atom] * along_y[y - top]
            line = image[y, start:stop]
            for x in range(factors.shape[0]):
                line[x] += weight * factors[x]


@_jit
def _gather(residual, u, v, intensity, width, radius, by_intensity, by_u, by_v, by_width):  # type: ignore[no-untyped-def]
    rows, columns = residual.shape
    real = residual.dtype.type
    along_x = np.empty(2 * radius + 1, residual.dtype)
    along_y = np.empty(2 * radius + 1, residual.dtype)
    columns_0 = np.empty(2 * radius + 1, residual.dtype)
    columns_1 = np.empty(2 * radius + 1, residual.dtype)
    columns_2 = np.empty(2 * radius + 1, residual.dtype)
    for atom in range(u.shape[0]):
        left = int(math.floor(u[atom] + 0.5)) - radius
        top = int(math.floor(v[atom] + 0.5)) - radius
        moment_0 = moment_x = moment_y = moment_rr = real(0)
        if left < columns and top < rows and left + 2 * radius >= 0 and top + 2 * radius >= 0:
            _factors(u[atom], width[atom], left, along_x)
            _factors(v[atom], width[atom], top, along_y)
            start, stop = max(left, 0), min(left + 2 * radius + 1, columns)
            # Sums over y for every column first: no sum over a line within the loop over lines.
            sums_0, sums_1, sums_2 = columns_0[: stop - start], columns_1[: stop - start], columns_2[: stop - start]
            sums_0[:] = 0
            sums_1[:] = 0
            sums_2[:] = 0
            for y in range(max(top, 0), min(top + 2 * radius + 1, rows)):
                dy = real(y - v[atom])
                weight_0 = along_y[y - top]
                weight_1 = weight_0 * dy
                weight_2 = weight_1 * dy
                line = residual[y, start:stop]
                for x in range(sums_0.shape[0]):
                    sums_0[x] += weight_0 * line[x]
                    sums_1[x] += weight_1 * line[x]
                    sums_2[x] += weight_2 * line[x]
            for x in range(sums_0.shape[0]):
                dx = real(start + x - u[atom])
                factor = along_x[start - left + x]
                moment_0 += factor * sums_0[x]
                moment_x += factor * dx * sums_0[x]
                moment_y += factor * sums_1[x]
                moment_rr += factor * (dx * dx * sums_0[x] + sums_2[x])
        b = width[atom]
        by_intensity[atom] = moment_0
        by_u[atom] = intensity[atom] * moment_x / (b * b)
        by_v[atom] = intensity[atom] * moment_y / (b * b)
        by_width[atom] = intensity[atom] * (moment_rr / (b * b) - 2 * moment_0) / b
