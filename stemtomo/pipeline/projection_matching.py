"""Projection matching: shifts by comparing every projection with what other ones predict, for strong noise.

The others make a volume of voxels, or of atoms, which noise cannot mimic as well.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from stemtomo.algorithms.tomography import atomic_model, matching, solver
from stemtomo.algorithms.tomography.alignment import ShiftEstimate, without_translation
from stemtomo.distributed import Executor
from stemtomo.errors import ConfigurationError
from stemtomo.physics.projection import TiltGeometry, blur, project, render
from stemtomo.pipeline.config import AlignmentSettings, TomographySettings
from stemtomo.pipeline.descent import Problem
from stemtomo.pipeline.joint_alignment import binned, scales_of
from stemtomo.pipeline.reconstruction import reconstruct

_HOTTEST, _COOLEST = 3.0, 1.5
_GROUPS = 3
_ITERATIONS = 15
_ELEMENT_WIDTH_PX = 0.6
#: Standard deviations of a voxel's gradient under noise, over the noise times the root of the number of tilts.
_THRESHOLD = 0.7
_WIDTH_YX = (0.5, 1.5)
"""How far the shifts may be off along y and x, px: a common line is better than a centre of mass."""
_LEAST_DISTANCE_PX = 3.0
_ATOM_ROUNDS, _UNSETTLED, _ATOM_VOLUME_ITERATIONS = 12, 3, 20
_ATOM_TEMPERATURE = 1.5
_ATOM_WIDTH_YX = (0.6, 2.0)
_MOVES, _LAST_ROUNDS = 4, 6


class _Coarse(NamedTuple):
    """Binned projections (tilt, y, x), scaled to one, zero where ``valid`` is not; how they are seen; the binning."""

    images: np.ndarray
    valid: np.ndarray
    geometry: TiltGeometry
    factor: int
    offset: np.ndarray

    def estimate(self, mean: np.ndarray, left: np.ndarray) -> ShiftEstimate:
        """Return the shifts in pixels that were not binned, from offsets and what is left of them, (tilt, 2)."""
        shifts = (self.geometry.shifts_px + mean) * self.factor + self.offset
        return ShiftEstimate(without_translation(shifts, self.geometry.rotations), np.hypot(*left.T) * self.factor)

    def part(self, used: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, TiltGeometry]:
        """Return images ``used`` in place of these, masks and poses of the tilts that are ``chosen``."""
        return used[chosen], self.valid[chosen], _of(self.geometry, chosen)


def match_projections(
    images: np.ndarray, valid: np.ndarray, geometry: TiltGeometry, settings: AlignmentSettings, executor: Executor
) -> ShiftEstimate:
    """Return better shifts than those of ``geometry`` for projections (tilt, y, x) of a specimen wholly in view.

    In every round a volume is made of two thirds of the projections, averaged over where they may lie, and the others
    are compared with its projections. The score is the standard deviation of the offset that is left, in px.
    """
    given = _coarse(images, valid, geometry, settings)
    coarse, seen, start = given.images, given.valid, given.geometry
    offsets, random = matching.offsets_px(settings.matching_reach_px), np.random.default_rng(0)
    rounds = settings.matching_rounds
    used, mean, left = coarse, np.zeros((len(coarse), 2)), np.zeros((len(coarse), 2))
    for number in range(rounds):
        references = _predicted(used, coarse, seen, start, random.permutation(len(coarse)), executor)
        squares = float((references**2).sum())
        if squares == 0:
            break  # nothing stands above the noise
        share = float((used * references).sum()) / squares
        variance = float(((coarse - share * references)[seen] ** 2).mean())
        overlap = share * matching.overlaps(coarse, references, offsets)
        temperature = _HOTTEST * (_COOLEST / _HOTTEST) ** (number / max(1, rounds - 1))
        found = matching.probabilities(overlap, variance, temperature, offsets, np.array(_WIDTH_YX))
        mean, left = matching.expected(found, offsets)
        used = matching.averaged(coarse, found, offsets)
    return given.estimate(mean, left)


def match_atoms(
    images: np.ndarray,
    valid: np.ndarray,
    geometry: TiltGeometry,
    settings: AlignmentSettings,
    executor: Executor,
    pixel_angstrom: float,
) -> ShiftEstimate:
    """Return better shifts than those of ``geometry`` for projections (tilt, y, x) in which atoms are apart.

    In every round atoms are found in a volume of two thirds of the projections, averaged over where they may lie, and
    the others are compared with their images. Which atoms are found changes from round to round; the probabilities of
    all rounds together begin the last ones, where positions, heights and shifts of all projections are refined
    in turn. The score is the standard deviation within and between rounds, in px.

    Raises
    ------
    ConfigurationError
        If atoms ``settings.atom_distance_angstrom`` apart are less than three (binned) pixels apart.
    """
    given = _coarse(images, valid, geometry, settings)
    distance = settings.atom_distance_angstrom / (pixel_angstrom * given.factor)
    if distance < _LEAST_DISTANCE_PX:
        raise ConfigurationError(
            f"alignment.methods has atom_matching, for which atoms must be {_LEAST_DISTANCE_PX:g} pixels apart; those "
            f"of atom_distance_angstrom = {settings.atom_distance_angstrom:g} are {distance:.2g} pixels apart after "
            f"binning by {given.factor}: bin less (alignment.joint_bins = [1]), or leave atom_matching out"
        )
    offsets, random = matching.offsets_px(settings.matching_reach_px), np.random.default_rng(0)
    noise = matching.noise_level(given.images, given.valid)
    if noise == 0:
        return given.estimate(np.zeros((len(images), 2)), np.zeros((len(images), 2)))
    used, means, kept = given.images, [], []
    for _ in range(_ATOM_ROUNDS):
        references = np.empty_like(given.images)
        for out in _groups(random.permutation(len(images))):
            model = _atoms(given, used, ~out, noise, distance, executor)
            references[out] = atomic_model.projections(model, _of(given.geometry, out))
        found = _placed(given.images, used, references, noise, _ATOM_TEMPERATURE, offsets)
        used = matching.averaged(given.images, found, offsets)
        means.append(matching.expected(found, offsets)[0])
        kept.append(found)
    used = matching.averaged(given.images, np.mean(kept[_UNSETTLED:], axis=0), offsets)
    mean, left = _refined_with_atoms(given, used, noise, distance, offsets, executor)
    return given.estimate(mean, np.hypot(left, np.std(means[_UNSETTLED:], axis=0)))


def _refined_with_atoms(
    given: _Coarse, used: np.ndarray, noise: float, distance_px: float, offsets: np.ndarray, executor: Executor
) -> tuple[np.ndarray, np.ndarray]:
    """Return offsets and what is left of them, (tilt, 2), after refining atoms and shifts of all tilts in turn."""
    everything = np.ones(len(used), bool)
    model = _atoms(given, used, everything, noise, distance_px, executor)
    mean = left = np.zeros((len(used), 2))
    for _ in range(_LAST_ROUNDS):
        references = atomic_model.projections(model, given.geometry).astype(np.float32)
        found = _placed(given.images, used, references, noise, 1.0, offsets)
        mean, left = matching.expected(found, offsets)
        used = matching.averaged(given.images, found, offsets)
        model = atomic_model.moved(model, *given.part(used, everything), noise, _MOVES)
    return mean, left


def _atoms(
    given: _Coarse, used: np.ndarray, chosen: np.ndarray, noise: float, distance_px: float, executor: Executor
) -> atomic_model.AtomicModel:
    """Return the atoms that the tilts ``chosen`` of the images ``used`` show."""
    images, valid, geometry = given.part(used, chosen)
    volume = _volume(images, valid, geometry, noise, _ATOM_VOLUME_ITERATIONS, executor)
    positions = atomic_model.maxima(render(volume, geometry.degree, _ELEMENT_WIDTH_PX), distance_px)
    width = atomic_model.width_of(positions, images, geometry)
    model = atomic_model.fitted(positions, width, images, valid, geometry)
    return atomic_model.moved(model, images, valid, geometry, noise, _MOVES)


def _placed(
    images: np.ndarray,
    used: np.ndarray,
    references: np.ndarray,
    noise: float,
    temperature: float,
    offsets: np.ndarray,
) -> np.ndarray:
    """Return the probabilities of the offsets of ``images``, (tilt, y offset, x offset), by atoms' images."""
    share = float((used * references).sum()) / max(float((references**2).sum()), 1e-30)
    overlap = share * matching.overlaps(images, references, offsets)
    return np.asarray(matching.probabilities(overlap, noise**2, temperature, offsets, np.array(_ATOM_WIDTH_YX)))


def _coarse(images: np.ndarray, valid: np.ndarray, geometry: TiltGeometry, settings: AlignmentSettings) -> _Coarse:
    factor = min(scales_of(geometry.image_shape, settings))
    coarse, seen, offset = binned(images, valid, factor)
    coarse = np.where(seen, coarse, 0).astype(np.float32)
    coarse /= float(np.abs(coarse).max()) or 1.0
    _, height, width = coarse.shape
    depth = math.ceil(geometry.volume_shape[0] / factor)
    start = replace(
        geometry,
        shifts_px=(geometry.shifts_px - offset) / factor,
        volume_shape=(max(2, depth), height, width),
        image_shape=(height, width),
    )
    return _Coarse(coarse, seen, start, factor, offset)


def _groups(order: np.ndarray) -> list[np.ndarray]:
    """Return the tilts of every group, boolean (tilt,), of tilts in a random ``order``."""
    groups = min(_GROUPS, len(order))
    found = []
    for group in range(groups):
        out = np.zeros(len(order), bool)
        out[order[group::groups]] = True
        found.append(out)
    return found


def _predicted(
    used: np.ndarray,
    images: np.ndarray,
    valid: np.ndarray,
    geometry: TiltGeometry,
    order: np.ndarray,
    executor: Executor,
) -> np.ndarray:
    """Return every projection (tilt, y, x) as the volume of the other groups shows it."""
    predicted = np.empty_like(images)
    noise = matching.noise_level(images, valid)
    for out in _groups(order):
        volume = _volume(used[~out], valid[~out], _of(geometry, ~out), noise, _ITERATIONS, executor)
        view = _of(geometry, out)
        seen = project(view, volume, view.whole_volume, view.whole_image)
        predicted[out] = blur(seen, _ELEMENT_WIDTH_PX)
    return predicted


def _volume(
    images: np.ndarray, valid: np.ndarray, geometry: TiltGeometry, noise: float, iterations: int, executor: Executor
) -> np.ndarray:
    """Return the coefficients of a volume that keeps the noise down."""
    count = len(images)
    measured = solver.Measurement(images, valid, np.ones(count, np.float32), _ELEMENT_WIDTH_PX)
    settings = TomographySettings(
        iterations=iterations,
        blocks=1,
        stream="never",
        refine_shifts=False,
        soft_threshold_rad=_THRESHOLD * noise * math.sqrt(count),
    )
    return reconstruct(Problem(measured, geometry, 1.0, 1.0), settings, executor).coefficients


def _of(geometry: TiltGeometry, chosen: np.ndarray) -> TiltGeometry:
    """Return the poses of the tilts that are ``chosen``."""
    return replace(
        geometry,
        rotations=geometry.rotations[chosen],
        shifts_px=geometry.shifts_px[chosen],
        magnifications=None if geometry.magnifications is None else geometry.magnifications[chosen],
    )
