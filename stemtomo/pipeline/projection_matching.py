"""Projection matching: shifts by comparing every projection with a volume made of other ones, for strong noise."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from stemtomo.algorithms.tomography import matching, solver
from stemtomo.algorithms.tomography.alignment import ShiftEstimate, without_translation
from stemtomo.distributed import Executor
from stemtomo.physics.projection import TiltGeometry, project
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


def match_projections(
    images: np.ndarray, valid: np.ndarray, geometry: TiltGeometry, settings: AlignmentSettings, executor: Executor
) -> ShiftEstimate:
    """Return better shifts than those of ``geometry`` for projections (tilt, y, x) of a specimen wholly in view.

    In every round a volume is made of two thirds of the projections, averaged over where they may lie, and the others
    are compared with its projections. The score is the standard deviation of the offset that is left, in px.
    """
    factor = min(scales_of(geometry.image_shape, settings))
    coarse, seen, moved = binned(images, valid, factor)
    coarse = np.where(seen, coarse, 0).astype(np.float32)
    scale = float(np.abs(coarse).max()) or 1.0
    coarse /= scale
    _, height, width = coarse.shape
    depth = math.ceil(geometry.volume_shape[0] / factor)
    start = replace(
        geometry,
        shifts_px=(geometry.shifts_px - moved) / factor,
        volume_shape=(max(2, depth), height, width),
        image_shape=(height, width),
    )
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
    shifts = (start.shifts_px + mean) * factor + moved
    return ShiftEstimate(without_translation(shifts, geometry.rotations), np.hypot(*left.T) * factor)


def _predicted(
    used: np.ndarray,
    images: np.ndarray,
    valid: np.ndarray,
    geometry: TiltGeometry,
    order: np.ndarray,
    executor: Executor,
) -> np.ndarray:
    """Return every projection (tilt, y, x) as the volume of the other groups shows it."""
    predicted, groups = np.empty_like(images), min(_GROUPS, len(images))
    noise = matching.noise_level(images, valid)
    for group in range(groups):
        out = np.zeros(len(images), bool)
        out[order[group::groups]] = True
        count = int((~out).sum())
        measured = solver.Measurement(used[~out], valid[~out], np.ones(count, np.float32), _ELEMENT_WIDTH_PX)
        settings = TomographySettings(
            iterations=_ITERATIONS,
            blocks=1,
            stream="never",
            refine_shifts=False,
            soft_threshold_rad=_THRESHOLD * noise * math.sqrt(count),
        )
        volume = reconstruct(Problem(measured, _of(geometry, ~out), 1.0, 1.0), settings, executor).coefficients
        view = _of(geometry, out)
        predicted[out] = measured.seen(project(view, volume, view.whole_volume, view.whole_image))
    return predicted


def _of(geometry: TiltGeometry, chosen: np.ndarray) -> TiltGeometry:
    """Return the poses of the tilts that are ``chosen``."""
    return replace(
        geometry,
        rotations=geometry.rotations[chosen],
        shifts_px=geometry.shifts_px[chosen],
        magnifications=None if geometry.magnifications is None else geometry.magnifications[chosen],
    )
