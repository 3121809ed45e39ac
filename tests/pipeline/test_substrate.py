"""A particle on an amorphous film that goes on beyond the images: the film is taken off."""

import numpy as np
import pytest

from stemtomo.algorithms.tomography import masking
from stemtomo.geometry import TiltSeries
from stemtomo.pipeline.alignment import align
from stemtomo.pipeline.config import AlignmentSettings, TomographySettings
from stemtomo.pipeline.tomography import tomography
from tests.algorithms.tomography import phantom
from tests.pipeline.projected import SIGMA, VOLTS, phase_store

SERIES = TiltSeries.from_degrees(np.linspace(-65, 65, 17))
SHAPE = (52, 60)
PARTICLE = phantom.ball(110, 7.0, 2.4)


def _film():
    rng = np.random.default_rng(6)
    positions = rng.uniform([-60, -20, -9.5], [60, 20, -8.0], (3000, 3))
    return positions, np.full(3000, 0.3)


def _images():
    none = np.zeros((17, 2))
    particle, film = (phantom.images(*a, SERIES.rotations, none, SHAPE) for a in (PARTICLE, _film()))
    return SIGMA * VOLTS * particle, SIGMA * VOLTS * film


def _found(store):
    volume = store.read("volume")["potential"].values
    return np.clip(volume, 0, None)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    particle, film = _images()
    # A film is bright in the mean: what is beside it has the level of its vacuum.
    images = (particle + film).astype(np.float32)
    found = {}
    for mask in ("none", "substrate"):
        store = phase_store(tmp_path_factory.mktemp("s") / f"{mask}.zarr", SERIES, images)
        align(store, AlignmentSettings(enabled=False))
        settings = TomographySettings(iterations=40, refine_shifts=False, mask=mask, mask_bin=2)
        found[mask] = (tomography(store, settings), _found(store))
    return found


def test_the_particle_is_found_better_without_the_film(volumes):
    truth = phantom.volume(*PARTICLE, (60, *SHAPE))
    inside = [slice(30 - 20, 30 + 20), slice(26 - 20, 26 + 20), slice(30 - 20, 30 + 20)]
    correlations, beside = {}, {}
    outside = np.ones(truth.shape, bool)
    outside[tuple(inside)] = False
    for name, (_, volume) in volumes.items():
        here = volume[tuple(inside)]
        correlations[name] = np.corrcoef(here.ravel(), truth[tuple(inside)].ravel())[0, 1]
        beside[name] = volume[outside].sum() / here.sum()
    found = {name: phantom.compare(volume, PARTICLE[0]) for name, (_, volume) in volumes.items()}
    assert correlations["substrate"] > correlations["none"] + 0.005
    assert beside["substrate"] < 0.4 * beside["none"]
    assert found["substrate"].recall == 1
    assert found["substrate"].precision > found["none"].precision


def test_the_loss_is_that_of_the_particle_alone(volumes):
    assert volumes["substrate"][0]["r1"] < 0.3


def test_a_mask_is_the_largest_body_without_holes_and_a_margin():
    volume = np.zeros((24, 24, 24), np.float32)
    volume[6:18, 6:18, 6:18] = 1
    volume[10:13, 10:13, 10:13] = 0
    volume[1, 1, 1] = 5  # a speck, however bright
    mask = masking.specimen_mask(volume, 0.3, 1.0)
    assert mask[11, 11, 11] == 1
    assert mask[1, 1, 1] == 0
    assert mask[7:17, 7:17, 7:17].min() > 0.9
    assert mask[2, 11, 11] < 0.1
    assert masking.specimen_mask(np.zeros((4, 4, 4)), 0.3).min() == 1  # nothing stands out: nothing is masked


def test_a_scaled_up_mask_lies_where_the_coarse_one_did():
    fine = np.zeros((1, 31, 40))
    fine[0, 9:15, 12:21] = 1
    from stemtomo.pipeline.joint_alignment import binned

    coarse, _, offset = binned(fine, fine >= 0, 3)
    again = masking.scaled_up(coarse, 3, offset, (31, 40))
    grids = np.meshgrid(*(np.arange(n) for n in (31, 40)), indexing="ij")
    for grid in grids:
        assert (again[0] * grid).sum() / again.sum() == pytest.approx((fine[0] * grid).sum() / fine.sum(), abs=1e-3)


def test_a_surface_and_what_lies_outside_are_taken_off():
    y, x = np.meshgrid(np.linspace(-1, 1, 40), np.linspace(-1, 1, 40), indexing="ij")
    thickness = np.clip(8 - np.hypot(*np.meshgrid(np.arange(40) - 20, np.arange(40) - 20)), 0, None)
    image = np.where(thickness > 0.8, 3.0, 0.0) + 1 + 0.5 * x - 0.3 * x * y
    clean = masking.without_substrate(image[None], np.ones((1, 40, 40), bool), thickness[None])[0]
    assert np.abs(clean[thickness == 0]).max() == 0
    np.testing.assert_allclose(clean[thickness > 1], 3.0, atol=0.03)
