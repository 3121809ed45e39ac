"""The model of local-orbital tomography: atoms as Gaussians, and a pixelated probe for every slice and focal section.

Image k (section m of a tilt) is C_k = sum_s P_ms * O_ks: the atoms of slice s, drawn as Gaussians, convolved with the
probe's intensity in that slice, added up along the beam. An atom at r is seen at q = exp([omega_k]x) R_k^T r + t_k, its
depth q_z shared by the two slices nearest to it (hat functions). The loss is half the sum of |C_k - I_k|² over all
pixels. One slice for all depths is the linear projection of conventional tomography.

Source: Mao et al., "3D reconstruction of a million atoms by multiple-section local-orbital tomography" (2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import scipy.fft
from scipy.spatial.transform import Rotation

from stemtomo.backend import Array, array_namespace, irfft2, rfft2, to_device_of, to_host
from stemtomo.errors import FormatError
from stemtomo.kernels.orbitals import gather, render

_WINDOW_WIDTHS = 4.5
_NARROWEST_PX = 0.3


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
    """

    positions: np.ndarray
    intensity: np.ndarray
    width_angstrom: np.ndarray
    probes: np.ndarray
    slice_thickness_angstrom: float
    shifts_angstrom: np.ndarray
    tilts_rad: np.ndarray

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
        )

    def with_atoms(self, positions: np.ndarray, intensity: np.ndarray, width_angstrom: np.ndarray) -> Orbitals:
        """Return the model with these atoms behind its own."""
        return replace(
            self,
            positions=np.concatenate([self.positions, positions]),
            intensity=np.concatenate([self.intensity, intensity]),
            width_angstrom=np.concatenate([self.width_angstrom, width_angstrom]),
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


def padded_shape(shape_yx: tuple[int, int], window_yx: tuple[int, int]) -> tuple[int, int]:
    """Return the shape in which convolutions do not fold back onto the image."""
    rows, columns = (
        scipy.fft.next_fast_len(n + w // 2 + 1, real=True) for n, w in zip(shape_yx, window_yx, strict=True)
    )
    return int(rows), int(columns)


def probe_spectra(probes: Array, shape: tuple[int, int]) -> Array:
    """Return the spectra (slice, ky, kx >= 0) of probes (slice, y, x) whose centre comes to index 0 of ``shape``."""
    xp = array_namespace(probes)
    rows, columns = probes.shape[-2:]
    whole = xp.zeros((*probes.shape[:-2], *shape), dtype=probes.dtype)
    whole[..., :rows, :columns] = probes
    return rfft2(xp.roll(whole, (-(rows // 2), -(columns // 2)), axis=(-2, -1)))


def probes_adjoint(spectra: Array, shape: tuple[int, int], window_yx: tuple[int, int]) -> Array:
    """Return the windows (slice, y, x) of what ``spectra`` are of: the adjoint of :func:`probe_spectra`."""
    xp = array_namespace(spectra)
    rows, columns = window_yx
    whole = xp.roll(irfft2(spectra, shape), (rows // 2, columns // 2), axis=(-2, -1))
    return whole[..., :rows, :columns]


def images_of(model: Orbitals, series: FocalSeries, numbers: np.ndarray | None = None) -> Array:
    """Return the model's images (image, y, x) at the geometry of ``series``; see :func:`sums` for ``numbers``."""
    xp = array_namespace(series.images)
    out = xp.empty_like(series.images)
    for k, (number, spectra, tables) in enumerate(_images(model, series, numbers)):
        out[k] = _image(_slices(tables, model.slices, series.images), spectra)[0][: out.shape[1], : out.shape[2]]
        del number
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
        Whether the derivatives in the probes are wanted; they cost a transform per section and slice.
    """
    window = (int(model.probes.shape[2]), int(model.probes.shape[3]))
    shape_yx = (int(series.images.shape[1]), int(series.images.shape[2]))
    padded = padded_shape(shape_yx, window)
    by_atom = np.zeros((len(model), 5))
    shifts, tilts = np.zeros((len(series), 2)), np.zeros((len(series), 3))
    by_spectrum: dict[int, Array] = {}
    loss = 0.0
    for k, (number, spectra, tables) in enumerate(_images(model, series, numbers)):
        stack = _slices(tables, model.slices, series.images)
        image, orbitals = _image(stack, spectra)
        residual = array_namespace(stack).zeros(padded, dtype=stack.dtype)
        region = (slice(shape_yx[0]), slice(shape_yx[1]))
        residual[region] = image[region] - series.images[k]
        loss += 0.5 * float((residual[region] ** 2).sum(dtype=np.float64))
        spectrum = rfft2(residual)
        if with_probes:
            section = int(series.sections[k])
            orbitals *= spectrum
            by_spectrum[section] = orbitals + by_spectrum[section] if section in by_spectrum else orbitals
        back = irfft2(spectra.conj() * spectrum, padded)
        found = [to_host(a).astype(np.float64) for a in gather(back, *tables.arguments)]
        _add(by_atom, shifts[k], tilts[k], found, tables, model, series, k, number)
    probes = np.zeros(model.probes.shape)
    for section, total in by_spectrum.items():
        probes[section] = to_host(probes_adjoint(total, padded, window))
    return Sums(loss, by_atom[:, :3].copy(), by_atom[:, 3].copy(), by_atom[:, 4].copy(), probes, shifts, tilts)


def weighted_residual(model: Orbitals, series: FocalSeries, numbers: np.ndarray | None = None) -> tuple[float, float]:
    """Return sums over pixels of the squared residual times the signal, and of the signal.

    Their ratio is the variance of a pixel where the specimen is, for noise that grows with the signal too.
    """
    signal = series.images.clip(0, None)
    left = images_of(model, series, numbers) - series.images
    return float((left**2 * signal).sum(dtype=np.float64)), float(signal.sum(dtype=np.float64))


class _Tables(NamedTuple):
    """Arguments of the kernels, and the places they come from."""

    arguments: tuple[Any, ...]
    places: Places
    padded: tuple[int, int]


def _images(model: Orbitals, series: FocalSeries, numbers: np.ndarray | None) -> Any:
    """Yield number, spectra of the section's probes and the kernels' tables of every image."""
    like = series.images
    shape_yx = (int(like.shape[1]), int(like.shape[2]))
    padded = padded_shape(shape_yx, (int(model.probes.shape[2]), int(model.probes.shape[3])))
    width = np.maximum(model.width_angstrom / series.pixel_angstrom, _NARROWEST_PX)
    radius = math.ceil(_WINDOW_WIDTHS * float(width.max(initial=_NARROWEST_PX)))
    spectra: dict[int, Array] = {}
    for k in range(len(series)):
        number, section = k if numbers is None else int(numbers[k]), int(series.sections[k])
        if section not in spectra:
            spectra[section] = probe_spectra(to_device_of(model.probes[section].astype(like.dtype), like), padded)
        where = places(model, series.rotations[k], number, shape_yx, series.pixel_angstrom)
        columns = (where.u, where.v, where.depth, model.intensity, width)
        table = tuple(to_device_of(np.ascontiguousarray(a, dtype=like.dtype), like) for a in columns)
        yield number, spectra[section], _Tables((*table, radius), where, padded)


def _slices(tables: _Tables, slices: int, like: Array) -> Array:
    stack = array_namespace(like).zeros((slices, *tables.padded), dtype=like.dtype)
    render(stack, *tables.arguments)
    return stack


def _image(stack: Array, spectra: Array) -> tuple[Array, Array]:
    """Return the image, padded, and the conjugate spectra of the slices."""
    orbitals = rfft2(stack)
    image = irfft2((spectra * orbitals).sum(axis=0), (int(stack.shape[1]), int(stack.shape[2])))
    return image, array_namespace(stack).conj(orbitals)


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
    by_atom[:, :3] += lab @ (turn @ series.rotations[k].T)
    by_atom[:, 3] += by_intensity
    by_atom[:, 4] += by_width / pixel
    shift[:] = lab[:, :2].sum(axis=0)
    tilt[:] = _in_rotation_vector(np.cross(tables.places.lab, lab).sum(axis=0), model.tilts_rad[number])


def _in_rotation_vector(by_turn: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Return the derivative in a rotation ``vector`` from that for a small turn of what it rotated: J^T of SO(3)."""
    angle = float(np.linalg.norm(vector))
    if angle < 1e-8:
        return by_turn
    first, second = (1 - math.cos(angle)) / angle**2, (angle - math.sin(angle)) / angle**3
    once = -np.cross(vector, by_turn)
    return by_turn + first * once - second * np.cross(vector, once)
