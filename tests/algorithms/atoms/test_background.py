"""Slow residuals: what is taken out, its adjoint, and when it helps."""

from dataclasses import replace

import numpy as np
import pytest

from stemtomo.algorithms.atoms.background import RunningMean
from stemtomo.algorithms.atoms.projected import AtomModel, without_slow
from stemtomo.algorithms.atoms.refinement import refine_atoms
from tests.algorithms.atoms.test_refinement import INTENSITIES, PIXEL, WIDTHS, projections

RNG = np.random.default_rng(1)
LABELS = np.arange(40) % 2
ATOMS = RNG.permutation(np.stack(np.meshgrid(*[np.arange(-2, 3) * 2.2] * 3), -1).reshape(-1, 3))[:40]


def with_hill(measured, height):
    """Add a smooth hill to every image, a little off its centre."""
    y, x = PIXEL * (np.indices(measured.images.shape[1:]) - 24)
    return replace(measured, images=measured.images + height * np.exp(-((y - 1) ** 2 + (x + 1) ** 2) / (2 * 3.5**2)))


def test_a_level_is_removed_wholly_and_what_is_narrow_stays():
    valid = np.ones((30, 24), bool)
    valid[5:9, 3:7] = False
    mean = RunningMean.of(np.zeros(valid.shape), 3.0)
    np.testing.assert_allclose(mean.removed(np.full(valid.shape, 2.5), valid), 0, atol=1e-12)
    point = np.zeros(valid.shape)
    point[20, 12] = 1
    assert mean.removed(point, valid)[20, 12] == pytest.approx(1 - 1 / (2 * np.pi * 9), rel=1e-3)


def test_the_adjoint_belongs_to_the_removal():
    valid = RNG.random((30, 24)) > 0.2
    mean = RunningMean.of(np.zeros(valid.shape), 2.5)
    a, b = RNG.normal(size=(2, *valid.shape))
    assert np.vdot(mean.removed(a, valid), b) == pytest.approx(np.vdot(a, mean.removed_adjoint(b, valid)), rel=1e-12)


def test_means_of_white_noise_keep_the_share_that_is_said():
    mean = RunningMean.of(np.zeros((400, 400)), 3.0)
    kept = mean.blurred(RNG.normal(size=(400, 400)))[20:-20, 20:-20].var()
    assert mean.share_of_white == pytest.approx(1 / (4 * np.pi * 9), rel=1e-3)
    assert kept == pytest.approx(mean.share_of_white, rel=0.15)


def test_a_smooth_hill_moves_atoms_only_where_it_is_asked_of_them():
    measured = with_hill(projections(ATOMS, LABELS), 0.4)
    errors = []
    for background in (0.0, 1.0):
        told = replace(measured, background_angstrom=background)
        found = refine_atoms(ATOMS + 0.03, LABELS, told, width_angstrom=0.33, iterations=80)
        errors.append(np.sqrt(np.mean((found.positions - ATOMS) ** 2)))
    assert errors[1] < 0.005
    assert errors[0] > 4 * errors[1]


@pytest.mark.parametrize(("height", "background"), [(0.0, 0.0), (0.4, 1.0)])
def test_the_residual_says_whether_something_slow_is_left(height, background):
    measured = with_hill(projections(ATOMS, LABELS, noise=0.05), height)
    model = AtomModel(ATOMS, INTENSITIES[LABELS], WIDTHS[LABELS])
    assert without_slow(model, measured, 1.0).background_angstrom == background
