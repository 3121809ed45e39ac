"""The verb align: which method is used, what is stored, and that the shifts are those of the projections."""

import numpy as np
import pytest
from typer.testing import CliRunner

from stemtomo.algorithms.tomography.alignment import without_translation
from stemtomo.cli import app
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.errors import StoreError
from stemtomo.geometry import TiltSeries
from stemtomo.io.store import Store
from stemtomo.physics.projection import TiltGeometry
from stemtomo.pipeline.alignment import align, plan_align
from stemtomo.pipeline.config import AlignmentSettings, TomographySettings
from stemtomo.pipeline.projection_matching import match_projections
from stemtomo.pipeline.tomography import tomography
from tests.algorithms.tomography import phantom
from tests.pipeline.projected import phase_store, projected_store

THETA = np.linspace(-60, 60, 9)
SINGLE = TiltSeries.from_degrees(THETA)
GENERAL = TiltSeries.from_degrees(THETA, np.linspace(-20, 20, 9), np.full(9, 4.0))
ATOMS = phantom.ball(60, 7.0, 2.5)


def _shifts(series):
    return without_translation(np.random.default_rng(0).uniform(-3, 3, (9, 2)), series.rotations)


def _stored_px(store):
    result = store.read("alignment")
    return np.stack([result[f"shift_{axis}_angstrom"].values for axis in "xy"], -1) / phantom.PIXEL_ANGSTROM


@pytest.mark.parametrize(
    ("series", "method"),
    [(SINGLE, "centre_of_mass+common_line"), (GENERAL, "centre_of_mass")],
    ids=["single axis", "general"],
)
def test_shifts_of_a_particle_are_found_and_stored_in_angstrom(tmp_path, series, method):
    store = projected_store(tmp_path / "s.zarr", series, ATOMS, _shifts(series), (52, 52))
    numbers = align(store)
    np.testing.assert_allclose(_stored_px(store), _shifts(series), atol=0.02)
    assert numbers["method"] == method
    assert numbers["wholly_in_view"]
    assert numbers["computed"]
    assert not align(store)["computed"]


def test_one_method_alone(tmp_path):
    store = projected_store(tmp_path / "s.zarr", SINGLE, ATOMS, _shifts(SINGLE), (52, 52))
    align(store, AlignmentSettings(methods=("common_line",)))
    assert not _stored_px(store)[:, 0].any()
    np.testing.assert_allclose(_stored_px(store)[:, 1], _shifts(SINGLE)[:, 1], atol=0.02)


@pytest.mark.parametrize(("series", "rounds"), [(SINGLE, 6), (GENERAL, 2)], ids=["single axis", "general"])
def test_projection_matching_takes_back_what_is_wrong_by_pixels(series, rounds):
    """Views of atoms, moved; the noise is a quarter of the brightest pixel."""
    shifts = without_translation(np.random.default_rng(2).uniform(-1.5, 1.5, (9, 2)), series.rotations)
    images = phantom.images(*ATOMS, series.rotations, shifts, (40, 40)).astype(np.float32)
    images += 0.25 * images.max() * np.random.default_rng(0).normal(size=images.shape).astype(np.float32)
    where = TiltGeometry(series.rotations, np.zeros((9, 2)), (40, 40, 40), (40, 40))
    settings = AlignmentSettings(matching_rounds=rounds)
    found = match_projections(images, np.ones(images.shape, bool), where, settings, ThreadExecutor(1))
    wrong = without_translation(found.shifts_px - shifts, series.rotations)
    assert np.sqrt(np.mean(shifts**2)) > 0.6
    assert np.sqrt(np.mean(wrong**2)) < 0.3
    assert found.score.max() < 1


def test_projection_matching_is_one_of_the_methods(tmp_path):
    store = projected_store(tmp_path / "s.zarr", SINGLE, ATOMS, _shifts(SINGLE), (52, 52))
    methods = ("centre_of_mass", "common_line", "projection_matching")
    numbers = align(store, AlignmentSettings(methods=methods, matching_rounds=3))
    assert numbers["method"] == "centre_of_mass+common_line+projection_matching"
    np.testing.assert_allclose(_stored_px(store), _shifts(SINGLE), atol=0.2)
    # What was found under noise stays, unless asked otherwise.
    assert not tomography(store, TomographySettings(iterations=5))["refined"]
    assert tomography(store, TomographySettings(iterations=5, refine_shifts=True))["refined"]


def test_shifts_are_zero_where_alignment_is_off(tmp_path):
    store = projected_store(tmp_path / "s.zarr", SINGLE, ATOMS, _shifts(SINGLE), (52, 52))
    assert align(store, AlignmentSettings(enabled=False))["method"] == "none"
    assert not _stored_px(store).any()


@pytest.mark.parametrize(
    ("series", "method"), [(SINGLE, "neighbour_correlation"), (GENERAL, "none")], ids=["single axis", "general"]
)
def test_a_film_is_recognised_and_said_to_be_one(tmp_path, series, method):
    film = 1 + 0.2 * np.random.default_rng(1).random((9, 40, 40)).astype(np.float32)
    numbers = align(phase_store(tmp_path / "s.zarr", series, film))
    assert numbers["method"] == f"{method}: the specimen is not wholly in view"
    assert not numbers["wholly_in_view"]
    assert numbers["border_fraction"] > 0.5


def test_projections_must_be_there(tmp_path):
    with pytest.raises(StoreError, match="run the stage 'projections' first"):
        align(Store.create(tmp_path / "s.zarr", "empty"))


def test_the_plan_is_made_from_metadata(tmp_path):
    store = projected_store(tmp_path / "s.zarr", SINGLE, ATOMS, _shifts(SINGLE), (52, 52))
    row = plan_align(store)
    assert row.stage == "align"
    assert row.bytes_read == 9 * 52 * 52 * 5


def test_tilts_in_another_order_are_diagnosed_in_the_result(tmp_path):
    flat = (ATOMS[0] * [1, 0.8, 0.6], ATOMS[1])
    images = phantom.images(*flat, SINGLE.rotations, _shifts(SINGLE), (52, 52)).astype(np.float32)
    right = align(phase_store(tmp_path / "right.zarr", SINGLE, images))
    assert right["diagnoses"] == []
    path = tmp_path / "wrong.zarr"
    phase_store(path, SINGLE, images[[0, 6, 2, 3, 4, 5, 1, 7, 8]])
    (found,) = align(path)["diagnoses"]
    assert found["name"] == "tilt_order"
    assert found["misfit"] > 10 * found["corrected"]
    path = tmp_path / "across.zarr"
    phase_store(path, SINGLE, np.ascontiguousarray(images.transpose(0, 2, 1)))
    said = CliRunner().invoke(app, ["align", str(path)])
    assert said.exit_code == 0
    assert "tilt_axis: the tilt axis seems to lie" in said.stderr


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (np.nan, "projection 3: 2704 of 2704 valid pixels are not numbers"),
        (0.5, "projection 3 is constant"),
    ],
    ids=["NaN", "constant"],
)
def test_a_projection_that_cannot_be_used_ends_the_command_with_exit_code_2(tmp_path, spoil, words):
    images = phantom.images(*ATOMS, SINGLE.rotations, _shifts(SINGLE), (52, 52)).astype(np.float32)
    images[3] = spoil
    phase_store(tmp_path / "s.zarr", SINGLE, images)
    said = CliRunner().invoke(app, ["align", str(tmp_path / "s.zarr")])
    assert said.exit_code == 2
    assert words in said.stderr
