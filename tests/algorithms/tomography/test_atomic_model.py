"""A volume as atoms: their images, heights and places against Gaussians that are written down."""

import numpy as np
import pytest

from stemtomo.algorithms.tomography import atomic_model
from stemtomo.algorithms.tomography.atomic_model import AtomicModel
from stemtomo.geometry import TiltSeries
from stemtomo.physics.projection import TiltGeometry
from tests.algorithms.tomography import phantom

SERIES = TiltSeries.from_degrees(np.linspace(-70, 70, 15), np.linspace(-4, 3, 15), np.linspace(2, -5, 15))
SHIFTS = np.random.default_rng(1).normal(size=(15, 2))
SHAPE = (34, 36)
WIDTH_PX = phantom.WIDTH_ANGSTROM / phantom.PIXEL_ANGSTROM
GEOMETRY = TiltGeometry(SERIES.rotations, SHIFTS, (36, 34, 36), SHAPE)


def _seen(count=25):
    """Return positions in px, heights of the images of the atoms, and these images."""
    positions, weights = phantom.ball(count, 4.5, 2.6)
    images = phantom.images(positions, weights, SERIES.rotations, SHIFTS, SHAPE)
    return positions / phantom.PIXEL_ANGSTROM, weights / (2 * np.pi * phantom.WIDTH_ANGSTROM**2), images


def test_images_of_atoms_are_those_written_down():
    positions, heights, images = _seen()
    found = atomic_model.projections(AtomicModel(positions, heights, WIDTH_PX), GEOMETRY)
    np.testing.assert_allclose(found, images, atol=1e-6 * images.max())


def test_displaced_atoms_come_back_and_those_that_are_none_are_dropped():
    positions, heights, images = _seen()
    valid = np.ones(images.shape, bool)
    valid[3, :, :10] = False
    images = images * valid
    random = np.random.default_rng(2)
    start = positions + random.uniform(-0.5, 0.5, positions.shape)
    ghost = np.array([[13.0, -12.0, 12.0]])
    model = atomic_model.fitted(np.concatenate([start, ghost]), WIDTH_PX, images, valid, GEOMETRY)
    assert len(model.heights) == len(positions)
    for _ in range(8):
        model = atomic_model.moved(model, images, valid, GEOMETRY, 1e-3, 4)
    assert np.abs(model.positions_px - positions).max() < 0.1 * np.abs(start - positions).max()
    assert np.corrcoef(model.heights, heights)[0, 1] > 0.99


def test_an_atom_that_most_tilts_do_not_show_is_as_high_as_the_others():
    positions = np.array([[-8.0, 0.0, 0.0], [8.0, 3.0, 1.0]])
    geometry = TiltGeometry(SERIES.rotations, np.zeros((15, 2)), (48, 48, 48), (48, 48))
    images = atomic_model.projections(AtomicModel(positions, np.full(2, 2.0), 1.4), geometry)
    valid = np.ones(images.shape, bool)
    valid[np.arange(15) % 5 != 0, :, 24:] = False
    found = atomic_model.fitted(positions, 1.4, images * valid, valid, geometry)
    np.testing.assert_allclose(found.heights, 2, rtol=0.02)


def test_the_width_of_atoms_is_chosen_by_what_it_explains():
    positions, _, _ = _seen()
    for width in atomic_model.WIDTHS_PX:
        images = atomic_model.projections(AtomicModel(positions, np.ones(len(positions)), width), GEOMETRY)
        assert atomic_model.width_of(positions, images, GEOMETRY) == width


def test_maxima_are_apart_and_above_the_noise():
    volume = np.zeros((20, 21, 22))
    for (x, y, z), height in {(4, 5, 6): 1.0, (4, 5, 8): 0.9, (15, 14, 12): 0.7, (10, 4, 15): 0.1}.items():
        volume[z, y, x] = height
    found = atomic_model.maxima(volume, 4.0)
    np.testing.assert_array_equal(found, np.array([[4, 5, 6], [15, 14, 12]]) - [11, 10, 10])
    assert atomic_model.maxima(np.zeros((4, 4, 4)), 2.0).shape == (0, 3)
    assert (
        atomic_model.fitted(np.zeros((0, 3)), 1.0, np.zeros((15, *SHAPE)), np.ones((15, *SHAPE)), GEOMETRY).heights.size
        == 0
    )


@pytest.mark.parametrize("scale", [0.98, 1.03])
def test_a_magnified_tilt_shows_atoms_further_apart(scale):
    one = TiltGeometry(np.eye(3)[None], np.zeros((1, 2)), (36, 34, 36), SHAPE, magnifications=np.array([scale]))
    image = atomic_model.projections(AtomicModel(np.array([[10.0, -6.0, 3.0]]), np.ones(1), 1.2), one)[0]
    y, x = (np.arange(n) - n // 2 for n in SHAPE)
    at = np.array([image.sum(axis=0) @ x, image.sum(axis=1) @ y]) / image.sum()
    np.testing.assert_allclose(at, scale * np.array([10.0, -6.0]), atol=1e-3)
