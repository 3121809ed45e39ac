"""Atoms in slices: what they look like, where they stand, and the derivatives of a loss in their parameters."""

from dataclasses import replace

import numpy as np
import pytest

from stemtomo.algorithms.joint.atoms import Atoms, Shapes, around, drawn, felt, intensity_of_element, light_at
from stemtomo.algorithms.joint.view import Box, View
from stemtomo.geometry import Pose
from stemtomo.physics.electron import interaction_parameter
from stemtomo.physics.potential import projected_potential_spectrum

VOXEL = 0.4
VIEW = View.whole(Pose(0.4, 0.2, -0.3), Box((30, 34, 30), VOXEL), (36, 32), 6)
SHIFTED = replace(VIEW, shift_px=(0.7, -1.3))
ELEMENTS = Shapes.of_elements((29, 79), VOXEL)
LIKE = np.zeros(0)


def some_atoms(count=6, seed=1):
    rng = np.random.default_rng(seed)
    model = Atoms(rng.uniform(-3.5, 3.5, (count, 3)), rng.uniform(0.5, 2, count), rng.uniform(0.2, 0.5, count))
    return model, rng.integers(0, 2, count)


@pytest.mark.parametrize("shapes", [Shapes.points(2), ELEMENTS], ids=["Gaussians", "elements"])
def test_the_gradient_is_the_adjoint_in_the_intensities(shapes):
    model, labels = some_atoms()
    change = np.random.default_rng(2).normal(size=len(model))
    slices = drawn(replace(model, intensity=change), labels, shapes, SHIFTED, LIKE)
    residual = np.random.default_rng(3).normal(size=slices.shape)
    there = float((slices * residual).sum())
    back = float(felt(residual, model, labels, shapes, SHIFTED).intensity @ change)
    assert there == pytest.approx(back, rel=1e-10)


@pytest.mark.parametrize("shapes", [Shapes.points(2), ELEMENTS], ids=["Gaussians", "elements"])
@pytest.mark.parametrize("name", ["positions", "intensity", "width_angstrom"])
def test_derivatives_are_those_of_finite_differences(shapes, name):
    model, labels = some_atoms()
    residual = np.random.default_rng(3).normal(size=(SHIFTED.slices, *SHIFTED.object_yx))
    change = np.random.default_rng(4).normal(size=getattr(model, name).shape)
    step = 1e-5
    values = [
        float((drawn(replace(model, **{name: getattr(model, name) + h * change}), labels, shapes, SHIFTED, LIKE)
               * residual).sum())
        for h in (step, -step)
    ]  # fmt: skip
    gradient = felt(residual, model, labels, shapes, SHIFTED)
    along = float((getattr(gradient, name.removesuffix("_angstrom")) * change).sum())
    # Windows end at five widths, where a Gaussian is 4e-6 of its peak: they move by whole pixels.
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(along, rel=1e-6)


def test_an_atom_stands_at_the_turned_position_and_keeps_its_mean_height():
    position = np.array([[1.3, -0.9, 0.55]])
    slices = drawn(Atoms(position, np.ones(1), np.full(1, 0.5)), np.zeros(1, int), Shapes.points(1), VIEW, LIKE)
    seen = (position @ VIEW.pose.rotation)[0]
    heights = VIEW.first_slice_z_angstrom + VIEW.slice_thickness_angstrom * np.arange(VIEW.slices)
    y, x = (np.indices(VIEW.object_yx) - np.array([18, 16])[:, None, None]) * VOXEL
    total = slices.sum()
    assert total * VOXEL**2 == pytest.approx(1, rel=1e-4)
    found = [(slices * coordinate).sum() / total for coordinate in (x, y, heights[:, None, None])]
    np.testing.assert_allclose(found, seen, atol=1e-3)


def test_an_element_has_the_potential_of_its_scattering_factor():
    sigma = interaction_parameter(300e3)
    view = View.whole(Pose(0.0), Box((24, 64, 64), VOXEL), (64, 64), 24)
    for label, number in enumerate((29, 79)):
        intensity = intensity_of_element(number, sigma)
        model = Atoms(np.zeros((1, 3)), np.array([intensity]), np.array([0.1]))
        slices = drawn(model, np.array([label]), ELEMENTS, view, LIKE)
        k = np.fft.fftfreq(64, VOXEL)
        found = np.fft.fft2(np.fft.ifftshift(slices[0]))[0, :32].real * VOXEL**2
        expected = sigma * projected_potential_spectrum(number, k[:32], 0.1)
        np.testing.assert_allclose(found, expected, atol=0.03 * intensity)


def test_slices_far_from_every_atom_are_left_out():
    model, labels = some_atoms()
    near = replace(model, positions=0.1 * model.positions)
    view = around(VIEW, near.positions)
    assert view.slices < VIEW.slices
    whole, part = (drawn(near, labels, ELEMENTS, seen, LIKE) for seen in (VIEW, view))
    first = (view.first - VIEW.first) // VIEW.voxels_per_slice
    np.testing.assert_allclose(whole[first : first + view.slices], part, atol=1e-12)
    assert whole.sum() == pytest.approx(part.sum())


def test_light_is_that_of_the_pixels_under_the_atom():
    model, _ = some_atoms()
    y, x = np.indices(SHIFTED.object_yx).astype(float)
    light = light_at(3 + 0.1 * x + 0.2 * y, model, SHIFTED)
    seen = (model.positions @ SHIFTED.pose.rotation)[:, :2] / VOXEL + np.array([16 + 0.7, 18 - 1.3])
    np.testing.assert_allclose(light, 3 + 0.1 * seen[:, 0] + 0.2 * seen[:, 1], rtol=0.02)
