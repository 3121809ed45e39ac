"""Projections of the specimen without its substrate, by a mask from a coarse volume."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from stemtomo.algorithms.tomography import masking, solver
from stemtomo.distributed import Executor
from stemtomo.physics.projection import project, render, seen_extent
from stemtomo.pipeline.config import TomographySettings
from stemtomo.pipeline.descent import Problem
from stemtomo.pipeline.joint_alignment import binned
from stemtomo.pipeline.reconstruction import reconstruct

_COARSE_PX = 64
_ITERATIONS = 30


def without_substrate(problem: Problem, settings: TomographySettings, executor: Executor) -> Problem:
    """Return ``problem`` with the substrate taken off its projections, which is fainter than the specimen."""
    measured, geometry = problem.measured, problem.geometry
    factor = settings.mask_bin or max(1, math.ceil(max(geometry.image_shape) / _COARSE_PX))
    images, valid, offset = binned(measured.images, measured.valid, factor)
    depth = max(2, math.ceil(geometry.volume_shape[0] / factor))
    # Room for what the tilts see beside the images: it would crowd at the sides of a narrower box.
    wide = seen_extent(geometry.rotations, (images.shape[1], images.shape[2]), depth)
    coarse = replace(
        geometry,
        shifts_px=(geometry.shifts_px - offset) / factor,
        volume_shape=(depth, max(wide[0], images.shape[1]), max(wide[1], images.shape[2])),
        image_shape=(images.shape[1], images.shape[2]),
        degree=2,
    )
    rough = TomographySettings(iterations=_ITERATIONS, refine_shifts=False, stream="never")
    small = solver.Measurement(images, valid, measured.weights, 0.5)
    found = reconstruct(Problem(small, coarse, 1.0, 1.0), rough, executor)
    volume = render(found.coefficients, coarse.degree, 0.5)
    mask = masking.specimen_mask(volume, settings.mask_threshold, settings.mask_blur_px).astype(np.float32)
    shadow = project(coarse, mask, coarse.whole_volume, coarse.whole_image)
    thickness = masking.scaled_up(shadow, factor, offset, geometry.image_shape)
    cleaned = masking.without_substrate(measured.images, measured.valid, thickness).astype(np.float32)
    return replace(problem, measured=replace(measured, images=cleaned))
