"""Local orbitals seen through a probe that changes with depth: the sum written out, and every derivative."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from stemtomo.algorithms.local_orbital.model import FocalSeries, Orbitals, images_of, places, sums, wanted_at

PIXEL, SHAPE, WINDOW, SLICES = 0.5, (40, 44), (12, 10), 5


@pytest.fixture
def scene():
    """Six atoms, five images at three tilts, two sections, probes like noise."""
    rng = np.random.default_rng(0)
    tilts = np.deg2rad([-40, 0, 35])
    rotations = Rotation.from_rotvec(np.outer(tilts[[0, 0, 1, 1, 2]], [0, 1, 0])).as_matrix()
    sections = np.array([0, 1, 0, 1, 0])
    probes = rng.uniform(0, 1, (2, SLICES, *WINDOW))
    model = Orbitals(
        rng.uniform(-4, 4, (6, 3)),
        rng.uniform(1, 2, 6),
        rng.uniform(0.4, 0.6, 6),
        probes / probes.sum(axis=(2, 3), keepdims=True),
        3.0,
        rng.uniform(-0.5, 0.5, (5, 2)),
        rng.normal(0, 0.02, (5, 3)),
    )
    return model, FocalSeries(rng.uniform(0, 0.1, (5, *SHAPE)), rotations, sections, PIXEL)


def test_an_image_is_the_sum_over_atoms_and_slices_of_their_probes(scene):
    model, series = scene
    image = 3
    turn = Rotation.from_rotvec(model.tilts_rad[image]).as_matrix()
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]].astype(float)
    expected = np.zeros(SHAPE)
    for position, intensity, width in zip(model.positions, model.intensity, model.width_angstrom, strict=True):
        seen = turn @ series.rotations[image].T @ position
        u = (seen[0] + model.shifts_angstrom[image, 0]) / PIXEL + SHAPE[1] // 2
        v = (seen[1] + model.shifts_angstrom[image, 1]) / PIXEL + SHAPE[0] // 2
        for number in range(SLICES):
            share = max(0.0, 1 - abs(seen[2] / 3.0 - (number - 2)))
            for row in range(WINDOW[0]):
                for column in range(WINDOW[1]):
                    weight = intensity * share * model.probes[1, number, row, column]
                    squared = (x - u - column + WINDOW[1] // 2) ** 2 + (y - v - row + WINDOW[0] // 2) ** 2
                    sigma = width / PIXEL
                    expected += weight * np.exp(-squared / (2 * sigma**2)) / (2 * np.pi * sigma**2)
    np.testing.assert_allclose(images_of(model, series)[image], expected, atol=3e-5 * expected.max())


def test_what_sites_ask_for_is_the_derivative_in_atoms_of_no_intensity_there(scene):
    """Smooth probes, as reading between pixels holds for what the pixels sample."""
    model, series = scene
    y, x = np.mgrid[: WINDOW[0], : WINDOW[1]]
    smooth = np.exp(-((y - WINDOW[0] // 2) ** 2 + (x - WINDOW[1] // 2) ** 2) / (2 * 1.5**2))
    model = replace(
        model, probes=np.broadcast_to(smooth / smooth.sum(), model.probes.shape), width_angstrom=np.full(6, 0.5)
    )
    sites = np.random.default_rng(1).uniform(-5, 5, (50, 3))
    longer = model.with_atoms(sites, np.zeros(50), np.full(50, 0.5))
    expected = sums(longer, series, None, False).intensity[6:]
    found = wanted_at(model, series, sites)
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())
    parts = [wanted_at(model, series.part(part), sites, part) for part in (np.arange(2), np.arange(2, 5))]
    np.testing.assert_allclose(sum(parts), found, atol=1e-12)


@pytest.mark.parametrize("beyond", [3, 8, 14])
@pytest.mark.parametrize("axis", [0, 1])
def test_what_stands_outside_an_image_does_not_fold_back_onto_it(scene, axis, beyond):
    model, series = scene
    alone = model.kept(np.array([0]))
    flat = replace(alone, positions=np.zeros((1, 3)), tilts_rad=np.zeros((5, 3)))
    shifts = np.zeros((5, 2))
    shifts[:, axis] = (SHAPE[::-1][axis] // 2 + beyond) * PIXEL
    near = images_of(flat, series).sum()
    for side in (1, -1):
        assert np.abs(images_of(replace(flat, shifts_angstrom=side * shifts), series)).sum() < 0.01 * near


def test_derivatives_are_those_of_the_loss_at_the_rim_of_the_images_too(scene):
    model, series = scene
    model = replace(model, shifts_angstrom=model.shifts_angstrom + np.array([9.0, 7.5]))
    derivative = sums(model, series).positions
    direction = np.random.default_rng(1).normal(size=derivative.shape)
    ends = [sums(replace(model, positions=model.positions + s * 1e-5 * direction), series).loss for s in (1, -1)]
    scale = np.linalg.norm(derivative) * np.linalg.norm(direction)
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx((derivative * direction).sum(), abs=2e-6 * scale)


@pytest.mark.parametrize(
    ("name", "field", "step"),
    [
        ("positions", "positions", 1e-5),
        ("intensity", "intensity", 1e-4),
        ("width_angstrom", "width", 1e-5),
        ("probes", "probes", 1e-4),
        ("shifts_angstrom", "shifts", 1e-5),
        ("tilts_rad", "tilts", 1e-5),
    ],
)
def test_every_derivative_is_that_of_the_loss(scene, name, field, step):
    model, series = scene
    derivative = getattr(sums(model, series), field)
    direction = np.random.default_rng(1).normal(size=derivative.shape)
    ends = [
        sums(replace(model, **{name: getattr(model, name) + sign * step * direction}), series).loss for sign in (1, -1)
    ]
    scale = np.linalg.norm(derivative) * np.linalg.norm(direction)
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx((derivative * direction).sum(), abs=2e-6 * scale)


def test_images_in_parts_sum_to_the_whole(scene):
    model, series = scene
    whole = sums(model, series)
    parts = [sums(model, series.part(where), where) for where in (np.array([0, 3]), np.array([1, 2, 4]))]
    for name in ("loss", "positions", "intensity", "width", "probes"):
        np.testing.assert_allclose(sum(getattr(p, name) for p in parts), getattr(whole, name), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(parts[1].shifts, whole.shifts[[1, 2, 4]], rtol=1e-11, atol=1e-13)


def test_one_slice_does_not_tell_depth(scene):
    model, series = scene
    flat = replace(model, probes=model.probes[:, :1], tilts_rad=np.zeros((5, 3)))
    deeper = replace(flat, positions=flat.positions + np.array([0, 0, 1.5]))
    facing = np.flatnonzero(np.isclose(series.rotations[:, 0, 0], 1))
    assert places(deeper, series.rotations[2], 2, SHAPE, PIXEL).u == pytest.approx(
        places(flat, series.rotations[2], 2, SHAPE, PIXEL).u
    )
    np.testing.assert_allclose(images_of(deeper, series)[facing], images_of(flat, series)[facing], atol=1e-14)
