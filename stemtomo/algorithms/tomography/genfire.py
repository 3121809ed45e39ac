"""GENFIRE: the volume whose Fourier transform agrees with that of the projections where they say anything.

Pryor et al., Sci. Rep. 7, 10409 (2017). Every projection is a central plane of the volume's transform. Its samples are
put onto the points of an oversampled grid that lie within ``reach`` of the plane (in grid steps), weighted by their
inverse squared distances; then the volume is made non-negative in real space and set to the measured values in Fourier
space, in turn. The transform couples all voxels, so this method works on volumes that fit one worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from stemtomo.backend import Array, array_namespace, irfft3, rfft3, to_device_of

Gridding = Literal["fft", "dft"]
_SOFTENING = 1e-5
_FREE_FRACTION = 0.05
_FIRST_CUTOFF = 0.1  # of Nyquist, where the extension of the resolution begins


@dataclass(frozen=True)
class Fourier:
    """Measured points of the half of Fourier space with kx >= 0.

    Parameters
    ----------
    edge
        Points of the oversampled cube along each axis.
    indices
        (point,), flat indices into the transform (kz, ky, kx >= 0), zero frequency first.
    values
        (point,), complex: the transform about the rotation centre.
    radii
        (point,), |k| over Nyquist.
    """

    edge: int
    indices: np.ndarray
    values: np.ndarray
    radii: np.ndarray


class Solution(NamedTuple):
    """Volume (z, y, x), Fourier error and R-free after every iteration."""

    volume: Array
    errors: list[float]
    r_free: list[float]


def edge_of(shape: tuple[int, ...], oversampling: float) -> int:
    """Return the edge of the oversampled cube for a volume and images of these lengths; even."""
    return 2 * round(oversampling * max(shape) / 2)


def gridded(
    images: np.ndarray,
    rotations: np.ndarray,
    shifts_px: np.ndarray,
    edge: int,
    reach: float = 0.7,
    gridding: Gridding = "fft",
) -> Fourier:
    """Return what the projections (tilt, y, x) say about the transform of the volume.

    Parameters
    ----------
    edge
        Points of the grid along each axis, of :func:`edge_of`.
    reach
        Largest distance, in grid steps, of a grid point from a sample ("fft") or from a plane ("dft").
    gridding
        ``"fft"`` takes the samples of the discrete transform next to a grid point; ``"dft"`` evaluates the transform of
        the projection at the point of its plane that is closest to the grid point: slower, and exact there.
    """
    weight = np.zeros(edge * edge * (edge // 2 + 1))
    total = np.zeros(weight.shape, np.complex128)
    place = _near_samples if gridding == "fft" else _near_plane
    for image, rotation, shift in zip(images, rotations, shifts_px, strict=True):
        points, values, distances = place(np.asarray(image, np.float64), np.asarray(rotation), shift, edge, reach)
        inside = (np.abs(points) < edge // 2).all(axis=1) & ((points**2).sum(axis=1) < (edge // 2) ** 2)
        _add(total, weight, points[inside], values[inside], 1 / (distances[inside] + _SOFTENING), edge)
    indices = np.flatnonzero(weight)
    kz, ky, kx = np.unravel_index(indices, (edge, edge, edge // 2 + 1))
    radii = np.sqrt(_signed(kz, edge) ** 2 + _signed(ky, edge) ** 2 + kx**2) / (edge // 2)
    return Fourier(edge, indices, (total[indices] / weight[indices]).astype(np.complex64), radii)


def reconstruct(
    fourier: Fourier,
    shape: tuple[int, int, int],
    iterations: int = 100,
    *,
    support: Array | None = None,
    positive: bool = True,
    extension: bool = True,
    free: bool = True,
    seed: int = 0,
    like: Array | None = None,
) -> Solution:
    """Return the volume of ``shape`` (z, y, x) that agrees with ``fourier``; of all iterates the best.

    Parameters
    ----------
    support
        Boolean (z, y, x); zero outside.
    extension
        Enforce low frequencies first, all from the middle of the iterations on.
    free
        Hold out one point in twenty of every shell, and report how well they are predicted.
    like
        An array in the memory in which to work.

    Raises
    ------
    ValueError
        If ``iterations`` is zero.
    """
    kept, held = _held_out(fourier, seed) if free else (np.ones(len(fourier.indices), bool), None)
    work = _Cube(fourier, shape, support, np.zeros(1, np.float32) if like is None else like)
    best, least, errors, missed = None, np.inf, [], []
    state = work.start(kept)
    for iteration in range(iterations):
        cutoff = 1.0 if not extension else min(1.0, _FIRST_CUTOFF + 1.8 * iteration / max(iterations - 1, 1))
        volume = work.constrained(state, positive)
        spectrum = work.spectrum(volume)
        errors.append(work.error(spectrum, kept))
        if held is not None:
            missed.append(work.error(spectrum, held))
        if errors[-1] < least:
            best, least = volume, errors[-1]
        state = work.enforced(spectrum, kept & (fourier.radii <= cutoff))
    if best is None:
        raise ValueError("no iteration was asked for")
    return Solution(work.cropped(best), errors, missed)


class _Cube:
    """The oversampled cube: its transforms, and the measured points on it."""

    def __init__(self, fourier: Fourier, shape: tuple[int, int, int], support: Array | None, like: Array) -> None:
        self._edge, self._shape, self._like = fourier.edge, shape, like
        self._indices = to_device_of(fourier.indices, like)
        # The transform about index n // 2 of the cube, whose corner the discrete transform counts from.
        kz, ky, kx = np.unravel_index(fourier.indices, (self._edge, self._edge, self._edge // 2 + 1))
        phase = np.where((kz + ky + kx) % 2, -1.0, 1.0)
        self._values = to_device_of((fourier.values * phase).astype(np.complex64), like)
        xp = array_namespace(like)
        self._allowed = xp.zeros((self._edge,) * 3, bool)
        self._allowed[self._window()] = True if support is None else support

    def start(self, kept: np.ndarray) -> Array:
        xp = array_namespace(self._like)
        spectrum = xp.zeros((self._edge, self._edge, self._edge // 2 + 1), np.complex64)
        return self.enforced(spectrum, kept)

    def spectrum(self, volume: Array) -> Array:
        return rfft3(volume)

    def enforced(self, spectrum: Array, chosen: np.ndarray) -> Array:
        chosen = to_device_of(chosen, self._like)
        flat = spectrum.reshape(-1).copy()
        flat[self._indices[chosen]] = self._values[chosen]
        return irfft3(flat.reshape(spectrum.shape), (self._edge,) * 3)

    def constrained(self, volume: Array, positive: bool) -> Array:
        xp = array_namespace(volume)
        return xp.where(self._allowed, xp.maximum(volume, 0) if positive else volume, 0).astype(np.float32)

    def error(self, spectrum: Array, chosen: np.ndarray) -> float:
        """Return sum ||F| - |K|| / sum |K|, as GENFIRE reports it."""
        xp = array_namespace(spectrum)
        where = to_device_of(chosen, self._like)
        measured = xp.abs(self._values[where])
        found = xp.abs(spectrum.reshape(-1)[self._indices[where]])
        return float(xp.sum(xp.abs(found - measured), dtype=np.float64) / xp.sum(measured, dtype=np.float64))

    def cropped(self, volume: Array) -> Array:
        xp = array_namespace(volume)
        return xp.ascontiguousarray(volume[self._window()])

    def _window(self) -> tuple[slice, ...]:
        starts = [self._edge // 2 - length // 2 for length in self._shape]
        return tuple(slice(start, start + length) for start, length in zip(starts, self._shape, strict=True))


def _near_samples(
    image: np.ndarray, rotation: np.ndarray, shift: np.ndarray, edge: int, reach: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return grid points (n, 3) of (kx, ky, kz) near the samples of the transform, values and squared distances."""
    padded = np.zeros((edge, edge))
    start = [edge // 2 - n // 2 for n in image.shape]
    padded[start[0] : start[0] + image.shape[0], start[1] : start[1] + image.shape[1]] = image
    k = np.fft.fftfreq(edge) * edge
    ramp = np.exp(2j * np.pi * (k[:, None] * (edge // 2 + shift[1]) + k * (edge // 2 + shift[0])) / edge)
    samples = (np.fft.fft2(padded) * ramp).ravel()
    ky, kx = (part.ravel() for part in np.meshgrid(k, k, indexing="ij"))
    at = kx[:, None] * rotation[:, 0] + ky[:, None] * rotation[:, 1]
    nearest = np.rint(at).astype(np.int64)
    points, values, distances = [], [], []
    steps = np.stack(np.meshgrid(*[(-1, 0, 1)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    for step in steps:
        grid = nearest + step
        squared = ((grid - at) ** 2).sum(axis=1)
        near = squared <= reach * reach
        points.append(grid[near])
        values.append(samples[near])
        distances.append(squared[near])
    return np.concatenate(points), np.concatenate(values), np.concatenate(distances)


def _near_plane(
    image: np.ndarray, rotation: np.ndarray, shift: np.ndarray, edge: int, reach: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return grid points (n, 3) near the plane of a projection, its transform at their feet, and squared distances."""
    half = edge // 2
    plane = np.arange(-half + 1, half)
    axis = int(np.argmax(np.abs(rotation[:, 2])))  # the axis along which the plane is a graph
    others = [i for i in range(3) if i != axis]
    a, b = (part.ravel() for part in np.meshgrid(plane, plane, indexing="ij"))
    normal = rotation[:, 2]
    height = -(normal[others[0]] * a + normal[others[1]] * b) / normal[axis]
    points, distances = [], []
    span = int(np.ceil(reach / abs(normal[axis])))
    for step in range(-span, span + 1):
        grid = np.empty((len(a), 3), np.int64)
        grid[:, others[0]], grid[:, others[1]] = a, b
        grid[:, axis] = np.rint(height).astype(np.int64) + step
        away = grid @ normal
        # One half of the points stands for both: the other half are their conjugates.
        near = (np.abs(away) <= reach) & (grid[:, 0] >= 0) & ((grid**2).sum(axis=1) < half * half)
        points.append(grid[near])
        distances.append(away[near] ** 2)
    chosen = np.concatenate(points)
    return (
        chosen,
        _transform(image, chosen @ rotation[:, 0], chosen @ rotation[:, 1], shift, edge),
        np.concatenate(distances),
    )


def _transform(image: np.ndarray, kx: np.ndarray, ky: np.ndarray, shift: np.ndarray, edge: int) -> np.ndarray:
    """Return the Fourier transform of ``image`` about its shifted centre at any frequencies, in steps of the grid."""
    y, x = (np.arange(n) - n // 2 - s for n, s in zip(image.shape, shift[::-1], strict=True))
    out = np.empty(len(kx), np.complex128)
    for start in range(0, len(kx), 1 << 14):
        part = slice(start, start + (1 << 14))
        across = np.exp(-2j * np.pi / edge * kx[part, None] * x)
        down = np.exp(-2j * np.pi / edge * ky[part, None] * y)
        out[part] = ((across @ image.T) * down).sum(axis=1)
    return out


def _add(
    total: np.ndarray, weight: np.ndarray, points: np.ndarray, values: np.ndarray, weights: np.ndarray, edge: int
) -> None:
    """Add values at points (kx, ky, kz) and their conjugates at the opposite ones, where kx >= 0."""
    for sign in (1, -1):
        here = sign * points
        half = here[:, 0] >= 0
        kx, ky, kz = here[half].T
        flat = ((kz % edge) * edge + ky % edge) * (edge // 2 + 1) + kx
        found = values[half] if sign == 1 else np.conj(values[half])
        # A point on the plane kx = 0 that a projection holds together with its opposite is counted twice alike.
        np.add.at(weight, flat, weights[half])
        np.add.at(total, flat, weights[half] * found)


def _signed(index: np.ndarray, edge: int) -> np.ndarray:
    return np.where(index > edge // 2, index - edge, index)


def _held_out(fourier: Fourier, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the points that are used and those that are held out, alike in every shell."""
    rng = np.random.default_rng(seed)
    shells = np.rint(fourier.radii * (fourier.edge // 2)).astype(int)
    order = np.lexsort((rng.random(len(shells)), shells))
    held = np.zeros(len(shells), bool)
    held[order[:: round(1 / _FREE_FRACTION)]] = True
    return ~held, held


def peak_bytes(edge: int) -> int:
    """Return the memory that a reconstruction on a cube of ``edge`` takes, in bytes."""
    return edge**3 * 40
