"""Two atoms taken for one show in the residual: along which axis, how far apart, and how surely."""

from dataclasses import replace

import numpy as np
import pytest

from stemtomo.algorithms.atoms.projected import AtomModel, loss
from stemtomo.algorithms.atoms.refinement import class_factors
from stemtomo.algorithms.atoms.splitting import elongation
from tests.algorithms.atoms.test_completion import PIXEL, WIDTH, drawn, measured

AXIS = np.array([0.48, -0.64, 0.6])
PLACE = np.array([0.3, -0.2, 0.5])


def pair(half, noise=0.0):
    images, rotations = drawn(np.stack([PLACE - half * AXIS, PLACE + half * AXIS]), np.ones(2))
    return measured(images + np.random.default_rng(0).normal(0, noise, images.shape), rotations)


def one(projected):
    """Return one atom of the known width in the middle, of the intensity that explains the images best."""
    intensity = class_factors(PLACE[None], np.zeros(1, int), np.array([WIDTH]), projected)
    return AtomModel(PLACE[None], intensity, np.array([WIDTH]))


def test_the_significance_is_the_slope_of_the_loss_along_the_split():
    projected = pair(0.6)
    projected = replace(projected, images=projected.images.astype(np.float64))
    model = AtomModel(PLACE[None] + 0.05, np.array([1.9]), np.array([WIDTH]))
    found = elongation(model, projected)

    def split(half):
        moved = half * found.axis
        halves = AtomModel(
            np.concatenate([model.positions - moved, model.positions + moved]),
            np.repeat(model.intensity / 2, 2),
            np.repeat(model.width_angstrom, 2),
        )
        return loss(halves, projected)[0]

    here, steps = split(0.0), (0.02, 0.04)
    near, far = ((split(step) - here) / step**2 for step in steps)
    slope = near + (near - far) / 3
    in_plane = np.einsum("i,kij->kj", found.axis[0], projected.rotations[:, :, :2])
    # Half distance to second order: d² = -2 slope / |I (e.grad)² g|², of the part that the intensity does not explain.
    squared = ((in_plane**2).sum(axis=1) ** 2).sum() * 1.9**2 / (8 * np.pi * WIDTH**6) / PIXEL**2
    assert slope < 0
    assert found.half_distance_angstrom[0] == pytest.approx(np.sqrt(-2 * slope / squared), rel=0.01)


@pytest.mark.parametrize("half", [0.25, 0.4])
def test_the_axis_and_the_distance_of_a_pair_are_found(half):
    projected = pair(half, 0.01)
    found = elongation(one(projected), projected)
    assert abs(found.axis[0] @ AXIS) > 0.98
    assert found.half_distance_angstrom[0] == pytest.approx(half, rel=0.25)
    assert found.significance[0] > 10


def test_a_single_atom_in_noise_is_not_elongated():
    images, rotations = drawn(PLACE[None], np.array([2.0]))
    rng = np.random.default_rng(1)
    significance = []
    for _ in range(20):
        projected = measured(images + rng.normal(0, 0.1, images.shape), rotations)
        significance.append(elongation(one(projected), projected).significance[0])
    # The strongest of a few axes that noise offers.
    assert 0.3 < np.mean(significance) < 2
    assert max(significance) < 3.5
