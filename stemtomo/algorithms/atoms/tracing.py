"""From a volume to atoms: smoothing, local maxima, a blind threshold, and a three-dimensional fit of each.

The number of atoms is never given. Volumes are (z, y, x) with the rotation centre at index n // 2; positions are
columns x, y, z in Å from there. A volume is looked at whole, or block by block with margins: the same atoms.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.ndimage import map_coordinates

from stemtomo.algorithms.atoms.fitting import GaussianFits, ball_offsets, fit_gaussians, fit_polynomials
from stemtomo.algorithms.atoms.peaks import integrate, maxima, parabolic, separate, smooth
from stemtomo.algorithms.atoms.sharpening import deconvolution_reach, deconvolved, upsampled, upsampling_reach
from stemtomo.algorithms.atoms.thresholds import faintest_level
from stemtomo.errors import ConfigurationError, FormatError

#: Radius of the integrated sphere in half minimum distances: a smaller one sees less of the streaks that a missing
#: wedge draws beside atoms, a larger one less noise.
_INTEGRATED_PART = 0.75
_GAUSSIAN_REACH = 4.0  # widths at which SciPy cuts a Gaussian filter off

Region = tuple[slice, slice, slice]
#: What reads a region of a volume: region (z, y, x) -> values.
Reader = Callable[[Region], np.ndarray]
#: What applies a function to items, in order: the built-in ``map``, or one that uses several workers.
Mapper = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]


@dataclass(frozen=True)
class TracingRules:
    """What counts as an atom.

    Parameters
    ----------
    smoothing_angstrom
        Width (sigma) of the smoothing in Å; 0 for none. Fits are to the smoothed volume.
    minimum_distance_angstrom
        Smallest distance between two atoms in Å.
    threshold
        Faintest atom as a fraction of the bright ones.
    margin_angstrom
        Maxima closer than this to a face of the volume are left out: atoms that the face cuts are not seen whole.
    upsampling
        Samples per voxel along each axis, between which the volume is interpolated within its band.
    deconvolution_angstrom
        Width (sigma) in Å of an atom that is deconvolved to a sharper one before maxima are searched; 0 for none.
    deconvolution_noise
        Power of the noise over that of sharp atoms, see :func:`~stemtomo.algorithms.atoms.sharpening.deconvolved`.
    fit
        Of every atom: a Gaussian on a level background, or a polynomial of fourth order.
    lightest
        Part of the bright ones that atoms of the lightest species surely exceed.
    """

    smoothing_angstrom: float = 0.3
    minimum_distance_angstrom: float = 1.5
    threshold: float = 0.25
    margin_angstrom: float = 0.0
    upsampling: int = 1
    deconvolution_angstrom: float = 0.0
    deconvolution_noise: float = 0.01
    fit: Literal["gaussian", "polynomial"] = "gaussian"
    lightest: float = 1.0


@dataclass(frozen=True)
class TracedAtoms:
    """Atoms found in a volume.

    Parameters
    ----------
    positions
        (atom, 3), columns x, y, z in Å from the rotation centre.
    intensity
        Integral of the fitted Gaussian over space, in units of the volume times Å³ (V Å³ for a potential), (atom,).
    integrated
        Sum of the unsmoothed volume close to the atom (:data:`_INTEGRATED_PART`), times the voxel's volume, (atom,). It
        is what the threshold judged; it needs no model of the atom's shape, and tells species apart better than the
        fit.
    width_angstrom
        Standard deviation of the fitted Gaussian in Å, (atom,).
    residual
        Root mean square misfit of the fit over its amplitude, (atom,).
    """

    positions: np.ndarray
    intensity: np.ndarray
    integrated: np.ndarray
    width_angstrom: np.ndarray
    residual: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)


def trace_atoms(
    volume: np.ndarray,
    voxel_angstrom: float,
    *,
    smoothing_angstrom: float = 0.3,
    minimum_distance_angstrom: float = 1.5,
    threshold: float = 0.25,
) -> TracedAtoms:
    """Find the atoms of ``volume`` (z, y, x), real, all at once.

    1. smooth by a Gaussian; 2. take positive maxima within a ball of half the minimum distance; 3. integrate the
    unsmoothed volume about each, and keep those above about ``threshold`` times the bright ones
    (:func:`~stemtomo.algorithms.atoms.thresholds.faintest_level`); 4. of two atoms closer than the minimum distance
    keep the brighter; 5. fit a Gaussian on a level background to each.

    Parameters
    ----------
    smoothing_angstrom, minimum_distance_angstrom, threshold
        As in :class:`TracingRules`; the rest of which :func:`trace_blocks` takes.

    Raises
    ------
    FormatError
        If the volume is not three-dimensional or not finite.
    ConfigurationError
        If the minimum distance is below two voxels, so that neighbouring atoms cannot be told apart.
    """
    rules = TracingRules(smoothing_angstrom, minimum_distance_angstrom, threshold)
    return trace_blocks(volume.shape, partial(region_of, volume), voxel_angstrom, rules)


def trace_blocks(
    shape: tuple[int, ...],
    read: Reader,
    voxel_angstrom: float,
    rules: TracingRules,
    *,
    block_voxels: int | None = None,
    run: Mapper = map,
) -> TracedAtoms:
    """Find the atoms of a volume of ``shape`` (z, y, x) that ``read`` gives region by region.

    A maximum belongs to the block that holds its voxel, and is judged with all around it: an atom near a face between
    blocks is found once. Which are atoms is decided over all blocks together.

    Parameters
    ----------
    block_voxels
        Edge of the blocks; the whole volume at once if not given.
    run
        Applies a function to every block, in order; with workers elsewhere, ``read`` must travel there.

    Raises
    ------
    FormatError
        If the volume is not three-dimensional or not finite.
    ConfigurationError
        If the minimum distance is below two samples, so that neighbouring atoms cannot be told apart.
    """
    if len(shape) != 3:
        raise FormatError(f"a volume of three axes (z, y, x) and finite values is needed; got shape {shape}")
    sample = voxel_angstrom / rules.upsampling
    if rules.minimum_distance_angstrom < 2 * sample:
        raise ConfigurationError(
            f"minimum_distance_angstrom is {rules.minimum_distance_angstrom:g}, below two voxels of {sample:g} Å: "
            "atoms so close are one maximum; raise it, or reconstruct with smaller voxels"
        )
    task = _Task(shape, read, voxel_angstrom, rules)
    blocks = volume_blocks(shape, block_voxels or max(shape))
    found = list(run(task.candidates, blocks))
    owner = np.repeat(np.arange(len(blocks)), [len(candidates.centres) for candidates in found])
    centres = np.concatenate([candidates.centres for candidates in found])
    integrated = np.concatenate([candidates.integrated for candidates in found])
    strong = integrated > faintest_level(integrated, rules.threshold, rules.lightest)
    centres, integrated, owner = centres[strong], integrated[strong], owner[strong]
    kept = separate(centres * sample, integrated, rules.minimum_distance_angstrom)
    centres, integrated, owner = centres[kept], integrated[kept], owner[kept]
    fits = _fits(task, blocks, owner, centres, run)
    # Two maxima may move together as they are fitted.
    apart = separate(fits.centres * sample, integrated, rules.minimum_distance_angstrom)
    return _table(fits, integrated, apart, shape, sample, rules.upsampling)


def measure_atoms(
    shape: tuple[int, ...],
    read: Reader,
    voxel_angstrom: float,
    positions: np.ndarray,
    rules: TracingRules,
    *,
    block_voxels: int | None = None,
    run: Mapper = map,
) -> TracedAtoms:
    """Return what :func:`trace_blocks` would say of atoms at known ``positions`` (atom, 3) in Å, left where they are.

    Other arguments as there.
    """
    task = _Task(shape, read, voxel_angstrom, rules)
    sample = voxel_angstrom / rules.upsampling
    blocks = volume_blocks(shape, block_voxels or max(shape))
    centres = positions[:, ::-1] / sample + np.array([count // 2 for count in shape]) * rules.upsampling
    owner = _owner(centres / rules.upsampling, blocks)
    fits = _fits(task, blocks, owner, centres, run)
    integrated = _by_block(task.integrated, blocks, owner, centres, run)[:, 0]
    measured = _table(fits, integrated, np.arange(len(positions)), shape, sample, rules.upsampling)
    return replace(measured, positions=positions)


def atom_profiles(
    shape: tuple[int, ...],
    read: Reader,
    voxel_angstrom: float,
    positions: np.ndarray,
    rules: TracingRules,
    *,
    block_voxels: int | None = None,
    run: Mapper = map,
) -> np.ndarray:
    """Return the smoothed volume around atoms at ``positions`` (atom, 3) in Å, (atom, sample).

    Samples are voxels' offsets within half of the minimum distance, from the atom itself and not from its voxel. Other
    arguments as of :func:`trace_blocks`.
    """
    task = _Task(shape, read, voxel_angstrom, rules)
    sample = voxel_angstrom / rules.upsampling
    blocks = volume_blocks(shape, block_voxels or max(shape))
    centres = positions[:, ::-1] / sample + np.array([count // 2 for count in shape]) * rules.upsampling
    return _by_block(task.profiles, blocks, _owner(centres / rules.upsampling, blocks), centres, run)


def volume_blocks(shape: tuple[int, ...], edge: int) -> list[Region]:
    """Cut a volume of ``shape`` into regions of at most ``edge`` voxels along each axis, of about one size."""
    cuts = []
    for count in shape:
        ends = np.linspace(0, count, -(-count // edge) + 1).round().astype(int).tolist()
        cuts.append([slice(start, stop) for start, stop in itertools.pairwise(ends)])
    return [(z, y, x) for z, y, x in itertools.product(*cuts)]


class _Candidates(NamedTuple):
    """Maxima of a block: ``centres`` (n, 3; z, y, x) in samples of the whole volume, and ``integrated`` (n,)."""

    centres: np.ndarray
    integrated: np.ndarray


@dataclass(frozen=True)
class _Task:
    """What is done with a block; it travels to a worker."""

    shape: tuple[int, ...]
    read: Reader
    voxel_angstrom: float
    rules: TracingRules

    @property
    def radius(self) -> float:
        """Half of the minimum distance in samples."""
        return self.rules.minimum_distance_angstrom / 2 / self.voxel_angstrom * self.rules.upsampling

    def candidates(self, block: Region) -> _Candidates:
        """Return the maxima that ``block`` holds."""
        sharp, smoothed, origin = self._window(block)
        indices = maxima(smoothed, self.radius)
        first = np.array([axis.start for axis in block]) * self.rules.upsampling
        last = np.array([axis.stop for axis in block]) * self.rules.upsampling
        indices = indices[((indices + origin >= first) & (indices + origin < last)).all(axis=1)]
        centres = parabolic(smoothed, indices)
        margin = self.rules.margin_angstrom / self.voxel_angstrom * self.rules.upsampling
        end = np.array(self.shape) * self.rules.upsampling - 1
        whole = ((centres + origin >= margin) & (centres + origin <= end - margin)).all(axis=1)
        centres = centres[whole]
        return _Candidates(centres + origin, self._integrated(sharp, centres))

    def fitted(self, work: tuple[Region, np.ndarray]) -> np.ndarray:
        """Return the fits (n, 7) of the atoms of a block at centres (n, 3) in samples; columns as in GaussianFits."""
        block, centres = work
        _, smoothed, origin = self._window(block)
        fit = fit_gaussians if self.rules.fit == "gaussian" else fit_polynomials
        fits = fit(smoothed, centres - origin, self.radius)
        rest = (fits.width, fits.amplitude, fits.background, fits.residual)
        return np.column_stack([fits.centres + origin, *rest])

    def integrated(self, work: tuple[Region, np.ndarray]) -> np.ndarray:
        """Return what the volume holds close to the centres (n, 3) of a block, (n, 1)."""
        block, centres = work
        sharp, _, origin = self._window(block)
        return self._integrated(sharp, centres - origin)[:, None]

    def profiles(self, work: tuple[Region, np.ndarray]) -> np.ndarray:
        """Return samples around the centres (n, 3) of a block, (n, sample)."""
        block, centres = work
        _, smoothed, origin = self._window(block)
        points = (centres - origin)[:, None] + ball_offsets(max(self.radius, 1.0))
        values: np.ndarray = map_coordinates(smoothed, np.moveaxis(points, -1, 0), order=1, mode="constant")
        return values

    def _integrated(self, sharp: np.ndarray, centres: np.ndarray) -> np.ndarray:
        sample = self.voxel_angstrom / self.rules.upsampling
        return integrate(sharp, centres, _INTEGRATED_PART * self.radius) * sample**3

    def _window(self, block: Region) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return sharpened and smoothed samples of ``block`` and its margin, and the index of their first sample."""
        rules, factor = self.rules, self.rules.upsampling
        sample = self.voxel_angstrom / factor
        width = rules.deconvolution_angstrom / sample
        smoothing = rules.smoothing_angstrom / sample
        reach = deconvolution_reach(width) + int(_GAUSSIAN_REACH * smoothing + 0.5) + int(2 * self.radius) + 3
        margin = -(-reach // factor) + upsampling_reach(factor)
        limits = zip(block, self.shape, strict=True)
        z, y, x = (slice(max(axis.start - margin, 0), min(axis.stop + margin, count)) for axis, count in limits)
        values = np.asarray(self.read((z, y, x)), dtype=np.float32)
        if not np.isfinite(values).all():
            raise FormatError(
                f"the volume is not finite everywhere between voxels {(z.start, y.start, x.start)} "
                f"and {(z.stop, y.stop, x.stop)} (z, y, x); finite values are needed"
            )
        sharp = deconvolved(upsampled(values, factor), width, rules.deconvolution_noise)
        return sharp, smooth(sharp, smoothing), np.array([z.start, y.start, x.start]) * factor


def region_of(volume: np.ndarray, region: Region) -> np.ndarray:
    """Return ``region`` of ``volume``: with the volume bound, a reader for :func:`trace_blocks`."""
    return volume[region]


def _fits(task: _Task, blocks: list[Region], owner: np.ndarray, centres: np.ndarray, run: Mapper) -> GaussianFits:
    """Return the fits of atoms at ``centres`` (n, 3), each in the block that is its ``owner`` (n,)."""
    table = _by_block(task.fitted, blocks, owner, centres, run)
    table = table if len(table) else np.empty((0, 7))
    return GaussianFits(table[:, :3], table[:, 3], table[:, 4], table[:, 5], table[:, 6])


def _by_block(
    function: Callable[[Any], Any], blocks: list[Region], owner: np.ndarray, centres: np.ndarray, run: Mapper
) -> np.ndarray:
    """Return the rows of ``function`` for every block with its ``centres``, in the order of the centres."""
    order = np.argsort(owner, kind="stable")
    mine = np.split(order, np.searchsorted(owner[order], np.arange(1, len(blocks))))
    work = [(block, centres[own]) for block, own in zip(blocks, mine, strict=True) if len(own)]
    rows = list(run(function, work))
    if not rows:
        return np.empty((0, 1))
    table = np.empty((len(centres), rows[0].shape[1]))
    table[order] = np.concatenate(rows)
    return table


def _owner(centres: np.ndarray, blocks: list[Region]) -> np.ndarray:
    """Return the block that holds, or is nearest to, each of ``centres`` (n, 3) in voxels, (n,)."""
    first = np.array([[axis.start for axis in block] for block in blocks])
    last = np.array([[axis.stop for axis in block] for block in blocks]) - 1
    nearest = np.zeros(len(centres), dtype=np.int64)
    closest = np.full(len(centres), np.inf)
    for number, (low, high) in enumerate(zip(first, last, strict=True)):
        outside = np.abs(centres - np.clip(centres, low, high)).max(axis=1)
        nearest[outside < closest] = number
        closest = np.minimum(closest, outside)
    return nearest


def _table(
    fits: GaussianFits, integrated: np.ndarray, chosen: np.ndarray, shape: tuple[int, ...], sample: float, factor: int
) -> TracedAtoms:
    """Return the ``chosen`` fits in Å from the rotation centre; ``factor`` samples of ``sample`` Å are a voxel."""
    centre = np.array([count // 2 for count in shape]) * factor
    width = fits.width[chosen] * sample
    return TracedAtoms(
        positions=((fits.centres[chosen] - centre) * sample)[:, ::-1].copy(),
        intensity=fits.amplitude[chosen] * (2 * np.pi) ** 1.5 * width**3,
        integrated=integrated[chosen],
        width_angstrom=width,
        residual=fits.residual[chosen],
    )
