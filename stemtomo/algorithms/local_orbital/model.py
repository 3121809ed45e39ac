"""The model of local-orbital tomography: atoms as Gaussians, and a pixelated probe for every slice and focal section.

Image k (section m of a tilt) is C_k = sum_s P_ms * O_ks: the atoms of slice s, drawn as Gaussians, convolved with the
probe's intensity in that slice, added up along the beam. An atom at r is seen at q = exp([omega_k]x) R_k^T r + t_k, its
depth q_z shared by the two slices nearest to it (hat functions). The loss is half the sum of |C_k - I_k|² over all
pixels. One slice for all depths is the linear projection of conventional tomography.

Source: Mao et al., "3D reconstruction of a million atoms by multiple-section local-orbital tomography" (2024).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation

from stemtomo.algorithms.local_orbital.convolution import SliceConvolution, padded_shape
from stemtomo.backend import Array, array_namespace, to_device_of, to_host
from stemtomo.errors import FormatError
from stemtomo.kernels.orbitals import gather, render
from stemtomo.kernels.sites import add_between

_WINDOW_WIDTHS = 4.5
_NARROWEST_PX = 0.3
#: Rows of a slice that atoms are sorted by: a few lines of a cache.
_BAND_ROWS = 16


@dataclass(frozen=True)
class FocalSeries:
    """Images of an incoherent signal (HAADF-STEM) at many tilts and foci.

    Parameters
    ----------
    images
        (image, y, x), float32 or float64, which is the precision of the work; the rotation centre at index n // 2.
    rotations
        R of every image, (image, 3, 3): a feature at r is seen at R^T r.
    sections
        Focal section of every image, (image,), from 0.
    pixel_angstrom
        Pixel of the images.
    """

    images: Array
    rotations: np.ndarray
    sections: np.ndarray
    pixel_angstrom: float

    def __post_init__(self) -> None:
        count = len(self.images)
        if self.images.ndim != 3 or self.rotations.shape != (count, 3, 3) or self.sections.shape != (count,):
            raise FormatError(
                f"images must be (image, y, x), rotations (image, 3, 3) and sections (image,); "
                f"got {self.images.shape}, {self.rotations.shape} and {self.sections.shape}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape_yx(self) -> tuple[int, int]:
        """Pixels of an image."""
        return int(self.images.shape[1]), int(self.images.shape[2])

    def part(self, where: np.ndarray) -> FocalSeries:
        """Return the images ``where``."""
        return FocalSeries(self.images[where], self.rotations[where], self.sections[where], self.pixel_angstrom)


@dataclass(frozen=True)
class Orbitals:
    """What is refined.

    Parameters
    ----------
    positions
        (atom, 3), x, y, z in Å, float64.
    intensity, width_angstrom
        (atom,): integral of an atom over an image, in the image's unit times pixels, and its standard deviation.
    probes
        (section, slice, y, x), window with the centre at n // 2; every slice sums to about 1.
    slice_thickness_angstrom
        Distance of slices; their stack is centred on the rotation centre.
    shifts_angstrom
        (image, 2), x and y: what moves the projection onto the image.
    tilts_rad
        (image, 3): rotation vectors in the laboratory frame, after R^T.
    species
        (atom,), numbers of the kinds of atoms from 0, the faintest; all of one kind if not given.
    """

    positions: np.ndarray
    intensity: np.ndarray
    width_angstrom: np.ndarray
    probes: np.ndarray
    slice_thickness_angstrom: float
    shifts_angstrom: np.ndarray
    tilts_rad: np.ndarray
    species: np.ndarray | None = None

    @property
    def kinds(self) -> np.ndarray:
        """Number of the kind of every atom, (atom,)."""
        return np.zeros(len(self), dtype=np.int64) if self.species is None else self.species

    @property
    def slices(self) -> int:
        """Slices along the beam."""
        return int(self.probes.shape[1])

    def __len__(self) -> int:
        return len(self.positions)

    def kept(self, good: np.ndarray) -> Orbitals:
        """Return the model with the atoms that are ``good`` (atom,), indices or booleans."""
        return replace(
            self,
            positions=self.positions[good],
            intensity=self.intensity[good],
            width_angstrom=self.width_angstrom[good],
            species=None if self.species is None else self.species[good],
        )

    def with_atoms(self, positions: np.ndarray, intensity: np.ndarray, width_angstrom: np.ndarray) -> Orbitals:
        """Return the model with these atoms, of the faintest kind, behind its own."""
        unknown = np.zeros(len(positions), dtype=np.int64)
        return replace(
            self,
            positions=np.concatenate([self.positions, positions]),
            intensity=np.concatenate([self.intensity, intensity]),
            width_angstrom=np.concatenate([self.width_angstrom, width_angstrom]),
            species=None if self.species is None else np.concatenate([self.species, unknown]),
        )


class Sums(NamedTuple):
    """Sums over images; loss and the derivatives of atoms and probes add up over parts, the others are an image's."""

    loss: float
    positions: np.ndarray
    intensity: np.ndarray
    width: np.ndarray
    probes: np.ndarray
    shifts: np.ndarray
    tilts: np.ndarray


class Places(NamedTuple):
    """Where the atoms are in an image: columns and rows in pixels, depth in slices, each (atom,); q in Å, (atom, 3)."""

    u: np.ndarray
    v: np.ndarray
    depth: np.ndarray
    lab: np.ndarray


def places(model: Orbitals, rotation: np.ndarray, image: int, shape_yx: tuple[int, int], pixel: float) -> Places:
    """Return where the atoms of ``model`` are in image number ``image`` of a series."""
    turn = Rotation.from_rotvec(model.tilts_rad[image]).as_matrix()
    lab = model.positions @ (turn @ rotation.T).T
    u = (lab[:, 0] + model.shifts_angstrom[image, 0]) / pixel + shape_yx[1] // 2
    v = (lab[:, 1] + model.shifts_angstrom[image, 1]) / pixel + shape_yx[0] // 2
    return Places(u, v, lab[:, 2] / model.slice_thickness_angstrom + (model.slices - 1) / 2, lab)


def slices_for(extent_angstrom: float, slice_thickness_angstrom: float) -> int:
    """Return how many slices hold a specimen of this diagonal at every tilt."""
    return max(1, math.ceil(extent_angstrom / slice_thickness_angstrom) + 1)


def images_of(model: Orbitals, series: FocalSeries, numbers: np.ndarray | None = None) -> Array:
    """Return the model's images (image, y, x) at the geometry of ``series``; see :func:`sums` for ``numbers``."""
    out = array_namespace(series.images).empty_like(series.images)
    work, (rows, columns) = _convolution(model, series), series.shape_yx
    for k, _, transfers, tables in _images(model, series, work, numbers):
        out[k] = _drawn(work, tables, transfers, series.shape_yx)[0][:rows, :columns]
    return out


def sums(model: Orbitals, series: FocalSeries, numbers: np.ndarray | None = None, with_probes: bool = True) -> Sums:
    """Return the loss of the images of ``series`` and its derivatives in all that the model holds.

    Parameters
    ----------
    series
        All images, or the part of them that is summed here.
    numbers
        Numbers of these images in the model's shifts and tilts; in order from 0 unless given.
    with_probes
        Whether the derivatives in the probes are wanted; they cost a product per image and slice.
    """
    xp = array_namespace(series.images)
    shape_yx = series.shape_yx
    region = (slice(shape_yx[0]), slice(shape_yx[1]))
    by_atom = np.zeros((len(model), 5))
    shifts, tilts = np.zeros((len(series), 2)), np.zeros((len(series), 3))
    probes, total = np.zeros(model.probes.shape), None
    loss = 0.0
    work = _convolution(model, series)
    order = _by_section(series)
    for at, (k, number, transfers, tables) in enumerate(_images(model, series, work, numbers)):
        image, spectra = _drawn(work, tables, transfers, shape_yx)
        residual = xp.zeros_like(image)
        residual[region] = image[region] - series.images[k]
        loss += 0.5 * float((residual[region] ** 2).sum(dtype=np.float64))
        turned = work.turned_spectrum(residual)
        if with_probes:
            total = xp.zeros_like(transfers) if total is None else total
            for pair, spectrum in enumerate(spectra):
                total[pair] += spectrum * turned
            section = series.sections[k]
            if at + 1 == len(order) or series.sections[order[at + 1]] != section:
                probes[section] = to_host(work.kernels_adjoint(total, model.slices, _window(model)))
                total = None
        work.correlate(transfers, turned)
        work.cut(shape_yx)
        found = [to_host(a).astype(np.float64) for a in gather(work.stack, *tables.arguments)]
        _add(by_atom, shifts[k], tilts[k], found, tables, model, series, k, number)
    return Sums(loss, by_atom[:, :3].copy(), by_atom[:, 3].copy(), by_atom[:, 4].copy(), probes, shifts, tilts)


def wanted_at(model: Orbitals, series: FocalSeries, sites: np.ndarray, numbers: np.ndarray | None = None) -> np.ndarray:
    """Return the loss's derivative in the intensity that atoms of none at ``sites`` (site, 3) in Å have, (site,).

    What :func:`sums` says of them, for many sites: they are not drawn, and slices are read between pixels instead of
    through every site's own Gaussian, which is that of the median atom.
    """
    work = _convolution(model, series)
    shape_yx, xp = series.shape_yx, array_namespace(series.images)
    width = float(np.median(model.width_angstrom)) / series.pixel_angstrom
    soft = work.transfer(lambda ky, kx: _blur(ky, width) * _blur(kx, width))
    at = to_device_of(np.ascontiguousarray(sites, dtype=series.images.dtype), series.images)
    out = xp.zeros(len(sites), dtype=series.images.dtype)
    for k, number, transfers, tables in _images(model, series, work, numbers):
        image = _drawn(work, tables, transfers, shape_yx)[0]
        residual = xp.zeros_like(image)
        residual[: shape_yx[0], : shape_yx[1]] = image[: shape_yx[0], : shape_yx[1]] - series.images[k]
        work.correlate(transfers, work.turned_spectrum(residual) * soft)
        add_between(work.stack, at, _affine(model, series.rotations[k], number, shape_yx, series.pixel_angstrom), out)
    return np.asarray(to_host(out))


def _affine(model: Orbitals, rotation: np.ndarray, image: int, shape_yx: tuple[int, int], pixel: float) -> np.ndarray:
    """Return what :func:`places` does as a matrix and an offset, (3, 4): column, row, depth of a place in Å."""
    origin = replace(model.kept(np.zeros(0, dtype=np.int64)), positions=np.concatenate([np.zeros((1, 3)), np.eye(3)]))
    found = np.stack(places(origin, rotation, image, shape_yx, pixel)[:3])
    return np.c_[found[:, 1:] - found[:, :1], found[:, :1]]


def _blur(frequency: np.ndarray, width: float) -> np.ndarray:
    """Return a Gaussian's spectrum over that of reading linearly between pixels; frequencies and width in pixels."""
    return np.asarray(np.exp(-2 * (np.pi * width * frequency) ** 2) / np.sinc(frequency) ** 2)


def weighted_residual(model: Orbitals, series: FocalSeries, numbers: np.ndarray | None = None) -> tuple[float, float]:
    """Return sums over pixels of the squared residual times the signal, and of the signal.

    Their ratio is the variance of a pixel where the specimen is, for noise that grows with the signal too.
    """
    signal = series.images.clip(0, None)
    left = images_of(model, series, numbers) - series.images
    return float((left**2 * signal).sum(dtype=np.float64)), float(signal.sum(dtype=np.float64))


class _Tables(NamedTuple):
    """Arguments of the kernels, atoms in the order of slices; the places they come from, and that order."""

    arguments: tuple[Any, ...]
    places: Places
    order: np.ndarray


def _window(model: Orbitals) -> tuple[int, int]:
    return int(model.probes.shape[2]), int(model.probes.shape[3])


def _convolution(model: Orbitals, series: FocalSeries) -> SliceConvolution:
    return SliceConvolution(model.slices, padded_shape(series.shape_yx, _window(model)), series.images)


def _by_section(series: FocalSeries) -> np.ndarray:
    """Return the order in which images are worked on: one section after the other, as only one's spectra are held."""
    return np.argsort(series.sections, kind="stable")


def _images(
    model: Orbitals, series: FocalSeries, work: SliceConvolution, numbers: np.ndarray | None
) -> Iterator[tuple[int, int, Array, _Tables]]:
    """Yield index, number, the section's probes as transfers, and the kernels' tables of every image, by section."""
    like, shape_yx = series.images, series.shape_yx
    width = np.maximum(model.width_angstrom / series.pixel_angstrom, _NARROWEST_PX)
    radius = math.ceil(_WINDOW_WIDTHS * float(width.max(initial=_NARROWEST_PX)))
    transfers, held = None, -1
    for k in _by_section(series).tolist():
        number, section = k if numbers is None else int(numbers[k]), int(series.sections[k])
        if section != held:
            transfers, held = work.transfers(to_device_of(model.probes[section].astype(like.dtype), like)), section
        where = places(model, series.rotations[k], number, shape_yx, series.pixel_angstrom)
        order = _by_slice(where, model.slices, shape_yx[0])
        columns = (where.u, where.v, where.depth, model.intensity, width)
        table = tuple(to_device_of(a.astype(like.dtype)[order], like) for a in columns)
        yield k, number, transfers, _Tables((*table, radius), where, order)


def _by_slice(where: Places, slices: int, rows: int) -> np.ndarray:
    """Return the order in which atoms that are drawn one after the other touch the same memory: slices, then rows."""
    bands = rows // _BAND_ROWS + 1
    band = np.clip(where.v / _BAND_ROWS, 0, bands - 1).astype(np.uint16)
    key = np.clip(where.depth, 0, slices - 1).astype(np.uint16) * np.uint16(bands) + band
    return np.argsort(key, kind="stable")


def _drawn(
    work: SliceConvolution, tables: _Tables, transfers: Array, shape_yx: tuple[int, int]
) -> tuple[Array, list[Array]]:
    """Return the image, padded, and the spectra of the slices, of what stands within ``shape_yx``."""
    work.stack[...] = 0
    render(work.stack, *tables.arguments)
    work.cut(shape_yx)
    return work.image(transfers)


def _add(
    by_atom: np.ndarray,
    shift: np.ndarray,
    tilt: np.ndarray,
    found: list[np.ndarray],
    tables: _Tables,
    model: Orbitals,
    series: FocalSeries,
    k: int,
    number: int,
) -> None:
    """Add one image's derivatives to those of the atoms, and fill in those of its shift and tilt."""
    by_intensity, by_u, by_v, by_depth, by_width = found
    pixel = series.pixel_angstrom
    lab = np.stack([by_u / pixel, by_v / pixel, by_depth / model.slice_thickness_angstrom], axis=1)
    turn = Rotation.from_rotvec(model.tilts_rad[number]).as_matrix()
    by_atom[tables.order, :3] += lab @ (turn @ series.rotations[k].T)
    by_atom[tables.order, 3] += by_intensity
    by_atom[tables.order, 4] += by_width / pixel
    shift[:] = lab[:, :2].sum(axis=0)
    moment = tables.places.lab[tables.order].T @ lab
    torque = np.array([moment[1, 2] - moment[2, 1], moment[2, 0] - moment[0, 2], moment[0, 1] - moment[1, 0]])
    tilt[:] = _in_rotation_vector(torque, model.tilts_rad[number])


def _in_rotation_vector(by_turn: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Return the derivative in a rotation ``vector`` from that for a small turn of what it rotated: J^T of SO(3)."""
    angle = float(np.linalg.norm(vector))
    if angle < 1e-8:
        return by_turn
    first, second = (1 - math.cos(angle)) / angle**2, (angle - math.sin(angle)) / angle**3
    once = -np.cross(vector, by_turn)
    return by_turn + first * once - second * np.cross(vector, once)
