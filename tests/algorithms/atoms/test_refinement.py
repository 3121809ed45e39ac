"""Refinement against projections: exact derivatives, exact recovery, and no missing wedge."""

from dataclasses import replace

import numpy as np
import pytest

from stemtomo.algorithms.atoms import refinement
from stemtomo.algorithms.atoms.projected import AtomModel, ProjectedImages
from stemtomo.algorithms.atoms.refinement import refine_atoms
from stemtomo.algorithms.atoms.scoring import match_atoms
from stemtomo.errors import FormatError
from stemtomo.geometry import TiltSeries

PIXEL = 0.4
WIDTHS, INTENSITIES = np.array([0.3, 0.36]), np.array([0.11, 0.25])


def projections(positions, labels, noise=0.0, shifts=None, count=48, tilts=range(-60, 61, 15)):
    """Return projections of Gaussian atoms drawn in plain NumPy on a level of its own for each tilt."""
    rotations = TiltSeries.from_degrees(list(tilts)).rotations
    shifts = np.zeros((len(rotations), 2)) if shifts is None else shifts
    axis = (np.arange(count) - count // 2) * PIXEL
    images = []
    for rotation, shift in zip(rotations, shifts, strict=True):
        seen = positions @ rotation
        width = WIDTHS[labels][:, None]
        x = np.exp(-0.5 * ((axis - seen[:, :1] - shift[0]) / width) ** 2)
        y = np.exp(-0.5 * ((axis - seen[:, 1:2] - shift[1]) / width) ** 2)
        images.append(np.einsum("ay,ax,a->yx", y, x, INTENSITIES[labels] / (2 * np.pi * WIDTHS[labels] ** 2)))
    levels = np.random.default_rng(3).normal(0, 0.05, (len(images), 1, 1))
    images = np.stack(images) + levels + np.random.default_rng(4).normal(0, noise, (len(images), count, count))
    return ProjectedImages(images, np.ones(images.shape, bool), rotations, np.zeros((len(images), 2)), PIXEL)


@pytest.fixture
def atoms():
    rng = np.random.default_rng(0)
    axis = np.arange(-2, 3) * 2.6
    sites = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    sites = sites[np.linalg.norm(sites, axis=1) < 6]
    return sites + rng.uniform(-0.3, 0.3, sites.shape), rng.integers(0, 2, len(sites))


def test_displaced_atoms_return_to_where_they_were(atoms):
    positions, labels = atoms
    start = positions + np.random.default_rng(1).normal(0, 0.08, positions.shape)
    refined = refine_atoms(start, labels, projections(positions, labels), width_angstrom=0.4, iterations=200)
    # To the cut of the windows, not to zero.
    assert np.abs(refined.positions - positions).max() < 1e-3
    np.testing.assert_allclose(refined.intensity, INTENSITIES[labels], rtol=2e-3)
    np.testing.assert_allclose(refined.width_angstrom, WIDTHS, rtol=2e-3)
    assert refined.explained > 0.9999
    assert refined.loss[1] < 0.01 * refined.loss[0]


def test_a_missing_wedge_does_not_stretch_the_error_along_the_beam(atoms):
    positions, labels = atoms
    refined = refine_atoms(positions, labels, projections(positions, labels, noise=0.025), width_angstrom=0.35)
    error = match_atoms(refined.positions, positions, 0.75).rmsd_xyz_angstrom
    assert error.max() < 0.02
    assert error[2] < 2 * error[0]


def test_shifts_of_tilts_are_found_without_moving_the_specimen(atoms):
    positions, labels = atoms
    shifts = np.random.default_rng(2).normal(0, 0.15, (9, 2))
    measured = projections(positions, labels, shifts=shifts)
    rigid = refine_atoms(positions, labels, measured, width_angstrom=0.35)
    free = refine_atoms(positions, labels, measured, width_angstrom=0.35, iterations=200, refine_shifts=True)
    assert match_atoms(free.positions, positions, 0.75).rmsd_angstrom < 2e-3
    assert free.loss[1] < 0.1 * rigid.loss[1]
    # Shifts that a translation of the specimen explains are no shifts.
    seen = np.swapaxes(measured.rotations[:, :, :2], 1, 2).reshape(-1, 3)
    np.testing.assert_allclose(seen.T @ free.shifts_angstrom.ravel(), 0, atol=1e-9)


def test_pixels_that_were_not_measured_do_not_count(atoms):
    positions, labels = atoms
    measured = projections(positions, labels)
    valid = measured.valid.copy()
    valid[:, :10] = False
    spoilt = np.where(valid, measured.images, 100.0)
    masked = ProjectedImages(spoilt, valid, measured.rotations, measured.shifts_angstrom, PIXEL)
    refined = refine_atoms(positions + 0.05, labels, masked, width_angstrom=0.35, iterations=150)
    inside = np.abs(positions[:, 1]) < 3
    assert np.abs(refined.positions - positions)[inside].max() < 5e-3


@pytest.mark.parametrize(("weighted", "background"), [(False, 0.0), (True, 0.0), (False, 1.0), (True, 1.0)])
def test_the_gradient_is_that_of_the_loss(atoms, weighted, background):
    positions, labels = atoms
    rng = np.random.default_rng(5)
    measured = replace(projections(positions, labels, noise=0.02), background_angstrom=background)
    measured.valid[:, :, 30:34] = not background
    if weighted:
        measured = replace(measured, weights=rng.uniform(0.5, 2, measured.images.shape))
    start = AtomModel(positions + rng.normal(0, 0.05, positions.shape), INTENSITIES[labels], WIDTHS[labels] + 0.03)
    problem = refinement._Problem(start, labels, measured, True, per_atom=weighted, intensity_spread=0.1)
    vector = rng.normal(0, 0.05, problem.size) / problem.scale
    _, gradient = problem.loss(vector)
    assert len(problem.ends) == 3
    for block in np.split(np.arange(problem.size), problem.ends):
        direction = np.zeros_like(vector)
        direction[block] = rng.normal(size=len(block))
        step = 1e-6 / np.abs(problem.scale[block]).max()
        slope = (problem.loss(vector + step * direction)[0] - problem.loss(vector - step * direction)[0]) / (2 * step)
        assert slope == pytest.approx(gradient @ direction, rel=1e-5)


def test_arrays_that_do_not_belong_together_are_refused():
    with pytest.raises(FormatError, match="need rotations"):
        ProjectedImages(np.zeros((3, 8, 8)), np.ones((3, 8, 8), bool), np.zeros((2, 3, 3)), np.zeros((3, 2)), 0.4)
    with pytest.raises(FormatError, match="must both be"):
        ProjectedImages(np.zeros((3, 8, 8)), np.ones((3, 8, 9), bool), np.zeros((3, 3, 3)), np.zeros((3, 2)), 0.4)
