"""Atoms drawn into the slices of a view, and the derivatives of a loss of its patterns in their parameters.

An atom is a sum of concentric Gaussians: those of its element's potential, each widened by the atom's own vibration, or
a single one. It is drawn where it stands, without a volume in between: at R^T r on pixels half as wide as the object's,
whose band is then cut to that of the object, and shared by the two slices next to it so that its mean z is kept. Every
step is linear in the intensities and comes with its adjoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from stemtomo.algorithms.joint.view import View
from stemtomo.backend import Array, array_namespace, fft2, ifft2, to_host
from stemtomo.kernels.atoms import gather, render
from stemtomo.physics.potential import VOLT_ANGSTROM_SQUARED, scattering_factor

#: Pixels that are drawn on, along an edge of a pixel of the object.
_FINER = 2
#: Half of an atom's window in widths, and the narrowest Gaussian that is drawn, in pixels.
_WINDOW_WIDTHS, _NARROWEST_PX = 5.0, 0.5
#: Slices that atoms have room to move by before they meet the first or last slice of their view.
_ROOM = 0.1
#: Widths in Å of the Gaussians that an element's potential is a sum of: what is narrower than the first is a point.
_ELEMENT_WIDTHS = (0.02, 0.06, 0.11, 0.19, 0.33, 0.58, 1.0)


@dataclass(frozen=True)
class Shapes:
    """What the atoms of each class look like at rest: sums of Gaussians, of unit integral.

    Parameters
    ----------
    weights
        (class, component); the sum over components is one.
    widths_angstrom
        (component,), standard deviations.
    """

    weights: np.ndarray
    widths_angstrom: np.ndarray

    @classmethod
    def points(cls, classes: int) -> Shapes:
        """Return atoms that are Gaussians of their own width alone."""
        return cls(np.ones((classes, 1)), np.zeros(1))

    @classmethod
    def of_elements(cls, atomic_numbers: tuple[int, ...], pixel_angstrom: float) -> Shapes:
        """Return the potentials of neutral atoms, as far as pixels of that size can show them."""
        k = np.linspace(0, 1 / (2 * pixel_angstrom), 60)
        widths = np.array(_ELEMENT_WIDTHS)
        columns = np.exp(-2 * np.pi**2 * np.square(np.outer(k, widths)))
        fitted = [nnls(columns, scattering_factor(number, k))[0] for number in atomic_numbers]
        weights = np.stack([found / found.sum() for found in fitted])
        used = weights.max(axis=0) > 0
        return cls(weights[:, used], widths[used])

    def widened(self, width_angstrom: np.ndarray) -> np.ndarray:
        """Return the widths (component, atom) of the Gaussians of atoms that vibrate by ``width_angstrom`` (atom,)."""
        return np.hypot(self.widths_angstrom[:, None], width_angstrom[None])

    def sharpness(self, labels: np.ndarray, width_angstrom: np.ndarray) -> np.ndarray:
        """Return the integral of (dg/dx)² over the plane of each atom's image g of unit integral, (atom,), in Å^-4."""
        squared = self.widened(width_angstrom) ** 2
        weights = self.weights[labels].T
        mean = (squared[:, None] + squared[None]) / 2
        return (weights[:, None] * weights[None] / (8 * np.pi * mean**2)).sum(axis=(0, 1))


def intensity_of_element(number: int, sigma_rad_per_volt_angstrom: float) -> float:
    """Return the integral of the phase, in rad Å², that an atom of atomic ``number`` gives the wave."""
    at_rest = float(scattering_factor(number, np.zeros(1))[0])
    return sigma_rad_per_volt_angstrom * VOLT_ANGSTROM_SQUARED * at_rest


@dataclass(frozen=True)
class Atoms:
    """Atoms in the specimen's frame.

    Parameters
    ----------
    positions
        (atom, 3), in Å.
    intensity
        Integral over the plane of the phase that each gives a wave, in rad Å², (atom,).
    width_angstrom
        Standard deviation that its own shape is widened by, (atom,).
    """

    positions: np.ndarray
    intensity: np.ndarray
    width_angstrom: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)


class AtomGradient(NamedTuple):
    """Derivatives of a loss: by positions (atom, 3) per Å, intensity (atom,) per rad Å² and width (atom,) per Å."""

    positions: np.ndarray
    intensity: np.ndarray
    width: np.ndarray


class _Seen(NamedTuple):
    """Atoms as a view sees them: column, row (finer pixels), first of the two slices, share of the second (atom,)."""

    u: np.ndarray
    v: np.ndarray
    lower: np.ndarray
    share: np.ndarray
    inside: np.ndarray


class _Layer(NamedTuple):
    """Atoms of a slice: its number, which atoms, their shares in it, their table for the kernels, their window."""

    number: int
    which: np.ndarray
    share: np.ndarray
    table: tuple[Array, Array, Array, Array]
    radius: int


def around(view: View, positions: np.ndarray) -> View:
    """Return ``view`` with only those slices that atoms at ``positions`` (atom, 3), or near them, are shared by."""
    place = _place(view, positions)
    first = max(int(np.floor(place.min() - _ROOM)), 0)
    last = min(int(np.ceil(place.max() + _ROOM)), view.slices - 1)
    if first > last:
        return view
    return replace(view, first=view.first + first * view.voxels_per_slice, slices=last - first + 1)


def drawn(model: Atoms, labels: np.ndarray, shapes: Shapes, view: View, like: Array) -> Array:
    """Return the phase of each slice, (slice, Y, X) in rad, of atoms with intensities in rad Å².

    Parameters
    ----------
    labels
        Class of each atom, (atom,).
    like
        An array whose kind and real dtype the slices have.
    """
    xp = array_namespace(like)
    rows, columns = view.object_yx
    fine = xp.zeros((view.slices, _FINER * rows, _FINER * columns), dtype=like.dtype)
    seen = _seen(model, view)
    for width, weight in zip(shapes.widened(model.width_angstrom), shapes.weights[labels].T, strict=True):
        for layer in _by_slice(model, seen, view, width, weight, like):
            u, v, intensity, wide = layer.table
            shared = intensity * xp.asarray(layer.share, dtype=like.dtype)
            render(fine[layer.number], u, v, shared, wide, layer.radius)
    return _coarse(fine, view.object_yx)


def felt(gradient: Array, model: Atoms, labels: np.ndarray, shapes: Shapes, view: View) -> AtomGradient:
    """Return the derivatives by the atoms of a loss whose ``gradient`` (slice, Y, X) in the phase is given.

    It is the adjoint of :func:`drawn` in the intensities, and the chain rule through it in the rest.
    """
    fine = _fine(gradient)
    seen, count = _seen(model, view), len(model)
    by_slice, by_intensity, by_width = np.zeros(count), np.zeros(count), np.zeros(count)
    by_plane = np.zeros((count, 2))
    pixel = view.box.voxel_angstrom / _FINER
    for width, weight in zip(shapes.widened(model.width_angstrom), shapes.weights[labels].T, strict=True):
        chain = np.where(width > _NARROWEST_PX * pixel, model.width_angstrom / np.maximum(width, 1e-12), 0.0)
        for layer in _by_slice(model, seen, view, width, weight, gradient):
            which, share = layer.which, layer.share
            found = gather(fine[layer.number], *layer.table, layer.radius)
            per_unit, by_u, by_v, by_wide = (to_host(part).astype(np.float64) for part in found)
            sign = np.where(seen.lower[which] == layer.number, -1.0, 1.0)
            by_slice[which] += sign * per_unit * to_host(layer.table[2])
            by_intensity[which] += share * per_unit * weight[which] / pixel**2
            by_plane[which] += share[:, None] * np.stack([by_u, by_v], axis=-1) / pixel
            by_width[which] += share * by_wide * chain[which] / pixel
    by_z = np.where(seen.inside, by_slice, 0.0) / view.slice_thickness_angstrom
    laboratory = np.concatenate([by_plane, by_z[:, None]], axis=1)
    return AtomGradient(laboratory @ view.pose.rotation.T, by_intensity, by_width)


def light_at(illumination: Array, model: Atoms, view: View) -> np.ndarray:
    """Return the mean ``illumination`` (Y, X) where each atom is seen, (atom,)."""
    xp = array_namespace(illumination)
    seen = _seen(model, view)
    u, v = (xp.asarray(place / _FINER, dtype=illumination.dtype) for place in (seen.u, seen.v))
    width = xp.full_like(u, max(float(np.median(model.width_angstrom)) / view.box.voxel_angstrom, 1.0))
    found = gather(illumination, u, v, width, width, int(np.ceil(_WINDOW_WIDTHS * float(width[0]))))[0]
    return to_host(found).astype(np.float64)


def _place(view: View, positions: np.ndarray) -> np.ndarray:
    """Return where atoms stand along the beam, (atom,), in slices: 0 is the middle of the first."""
    z = (positions @ view.pose.rotation)[:, 2]
    return (z - view.first_slice_z_angstrom) / view.slice_thickness_angstrom


def _seen(model: Atoms, view: View) -> _Seen:
    laboratory = model.positions @ view.pose.rotation
    rows, columns = view.object_yx
    u, v = (
        _FINER * (laboratory[:, axis] / view.box.voxel_angstrom + view.shift_px[axis] + count // 2)
        for axis, count in ((0, columns), (1, rows))
    )
    place = _place(view, model.positions)
    clipped = np.clip(place, 0, view.slices - 1)
    lower = np.minimum(np.floor(clipped).astype(int), max(view.slices - 2, 0))
    return _Seen(u, v, lower, clipped - lower, (place > 0) & (place < view.slices - 1))


def _by_slice(
    model: Atoms, seen: _Seen, view: View, width: np.ndarray, weight: np.ndarray, like: Array
) -> Iterator[_Layer]:
    """Yield the atoms of every slice, for one Gaussian of each."""
    xp = array_namespace(like)
    pixel = view.box.voxel_angstrom / _FINER
    wide = np.maximum(width / pixel, _NARROWEST_PX)
    radius = int(np.ceil(_WINDOW_WIDTHS * float(wide.max()))) if len(wide) else 1
    intensity = weight * model.intensity / pixel**2
    for number in range(view.slices):
        own = seen.lower == number
        which = np.flatnonzero(own | (seen.lower == number - 1))
        if which.size:
            share = np.where(own[which], 1 - seen.share[which], seen.share[which])
            columns = (seen.u, seen.v, intensity, wide)
            u, v, strength, b = (xp.asarray(column[which], dtype=like.dtype) for column in columns)
            yield _Layer(number, which, share, (u, v, strength, b), radius)


def _coarse(fine: Array, shape_yx: tuple[int, int]) -> Array:
    """Return ``fine`` (slice, y, x) on every second pixel of both axes, without what its pixels cannot hold."""
    kept = _band(fine.shape[-2:], shape_yx)
    spectrum = fft2(fine.astype(np.result_type(fine.dtype, np.complex64)))
    xp = array_namespace(fine)
    cut = spectrum[..., kept[0][:, None], kept[1]] * xp.asarray(_inner(shape_yx), dtype=fine.dtype)
    scale = fine.dtype.type(1 / _FINER)
    return xp.ascontiguousarray(ifft2(xp.ascontiguousarray(cut)).real * scale).astype(fine.dtype)


def _fine(coarse: Array) -> Array:
    """Adjoint of :func:`_coarse`."""
    xp = array_namespace(coarse)
    shape_yx = coarse.shape[-2:]
    finer = (_FINER * shape_yx[0], _FINER * shape_yx[1])
    kept = _band(finer, shape_yx)
    spectrum = fft2(coarse.astype(np.result_type(coarse.dtype, np.complex64)))
    padded = xp.zeros((len(coarse), *finer), dtype=spectrum.dtype)
    padded[..., kept[0][:, None], kept[1]] = spectrum * xp.asarray(_inner(shape_yx), dtype=coarse.dtype)
    scale = coarse.dtype.type(1 / _FINER)
    return xp.ascontiguousarray(ifft2(padded).real * scale).astype(coarse.dtype)


def _band(finer_yx: tuple[int, ...], shape_yx: tuple[int, ...]) -> list[np.ndarray]:
    """Return the indices among the frequencies of the finer axes of those of the coarser ones."""
    return [
        np.fft.fftfreq(count, 1 / count).astype(int) % finer for finer, count in zip(finer_yx, shape_yx, strict=True)
    ]


def _inner(shape_yx: tuple[int, ...]) -> np.ndarray:
    """Return 1 for frequencies inside the band and 0 at Nyquist, which has no sign, (Y, X)."""
    inner = [np.abs(np.fft.fftfreq(count)) < 0.5 for count in shape_yx]
    return np.outer(*inner).astype(float)
