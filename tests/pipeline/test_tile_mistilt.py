"""A map of mistilts in tiles is the one in one piece, to rounding."""

import functools
from dataclasses import replace

import numpy as np
import pytest

from stemtomo.algorithms.ptychography.adaptive import Geometry
from stemtomo.algorithms.ptychography.mistilt import Data, vacuum
from stemtomo.algorithms.ptychography.mistilt_map import RasterGaussian, Smoothing, fit_map
from stemtomo.algorithms.ptychography.tiles import cut_scan
from stemtomo.distributed import Parts, executor
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.errors import ConfigurationError
from stemtomo.pipeline.config import PtychographySettings
from stemtomo.pipeline.ptychography import ptychography
from stemtomo.pipeline.solving import refuse_in_tiles
from stemtomo.pipeline.tile_fields import Resident
from stemtomo.pipeline.tile_mistilt import Mapped, fit_in_tiles
from tests.algorithms.ptychography.test_mistilt_map import SCAN, bent_crystal
from tests.pipeline.scanned import make_scan
from tests.pipeline.test_tiles import CUTS

VALID = np.ones(SCAN.shape_yx, bool)
GAUSSIAN = RasterGaussian(SCAN.step_angstrom_yx, 0.9)
START = Geometry(np.array([1e-3, 0.0]), 25.0)
SETTINGS = PtychographySettings(
    slices=3,
    slice_thickness_angstrom=30.0,
    epochs=6,
    refine_mistilt=True,
    mistilt_iterations=3,
    mistilt_map_smoothing_angstrom=1.7,
)
NAMES = ("object", "phase_sum", "probe", "illumination", "loss", "mistilt_map_x_mrad", "mistilt_map_y_mrad")


@functools.cache
def experiment(dtype):
    _, stack, data, _, _ = bent_crystal(dtype)
    fit = fit_map(START, stack, data, Smoothing.of(GAUSSIAN, VALID), 6)
    return stack, data, fit


def in_tiles(cut, dtype):
    stack, data, _ = experiment(dtype)
    tiles = cut_scan(stack.grid, SCAN.shape_yx, np.arange(SCAN.count), CUTS[cut], margin_px=2)
    mapped = [
        Mapped(
            replace(stack, grid=tile.grid),
            Data(data.probe, np.zeros(0)),
            START,
            Smoothing.of(GAUSSIAN, VALID, tile.scan),
            Resident(data.counts[tile.where]),
        )
        for tile in tiles
    ]
    workers, losses = ThreadExecutor(2), []
    parts = Parts.create(workers, same, mapped)
    start = Parts.create(workers, same, [vacuum(each.stack, data.probe) for each in mapped])
    rectangles = [(tile.scan, GAUSSIAN.around(tile.scan, SCAN.shape_yx)) for tile in tiles]

    def follow(iterate):
        losses.append(iterate.loss / SCAN.count)
        return False

    pieces, _ = fit_in_tiles(start, parts, [tile.window for tile in tiles], rectangles, 6, follow)
    return tiles, pieces.gather(), losses


def same(value):
    return value


@pytest.mark.parametrize(("cut", "dtype", "most"), [
    ("2x2", np.complex128, 1e-12),
    ("uneven", np.complex128, 1e-12),
    ("3x3", np.complex64, 1e-5),
])  # fmt: skip
def test_a_map_in_tiles_is_the_one_in_one_piece(cut, dtype, most):
    _, _, whole = experiment(dtype)
    tiles, pieces, losses = in_tiles(cut, dtype)
    expected = whole.geometry.tilt_rad_xy
    assert np.abs(expected - START.tilt_rad_xy).max() > 1e-3
    for tile, piece in zip(tiles, pieces, strict=True):
        (y0, y1), (x0, x1) = tile.window
        assert np.abs(piece["phase"] - whole.phase[:, y0:y1, x0:x1]).max() < most
        assert np.abs(piece["tilt"] - expected[tile.where]).max() < most * np.abs(expected).max()
    np.testing.assert_allclose(losses, whole.losses, rtol=most)


def written(tmp_path, name, workers=None, missing=(), **changes):
    store = make_scan(tmp_path / f"{name}.zarr", missing=missing)
    ptychography(store, SETTINGS.model_copy(update=changes), executor=workers or ThreadExecutor(2))
    return store.read("ptychography/000").load()


def test_tiles_write_the_map_that_one_piece_writes_whether_patterns_are_held_or_read(tmp_path):
    missing = [(0, 40)]
    one = written(tmp_path, "one", missing=missing)
    for name, changes in (("held", {"tiles": (2, 2)}), ("read", {"tiles": (3, 1), "frames": "store"})):
        found = written(tmp_path, name, missing=missing, **changes)
        assert set(found.variables) == set(one.variables)
        assert set(found.attrs) - set(one.attrs) == {"tiles"}
        for variable in NAMES:
            values, expected = found[variable].values, one[variable].values
            assert np.abs(values - expected).max() <= 1e-5 * np.abs(expected).max(), variable
        assert found.attrs["mistilt_mrad"] == pytest.approx(one.attrs["mistilt_mrad"], rel=1e-5)


def test_a_cluster_finds_the_map_of_threads_to_the_bit(tmp_path, client):
    threads = written(tmp_path, "threads", tiles=(2, 2), epochs=3)
    cluster = written(tmp_path, "cluster", executor(client), tiles=(2, 2), epochs=3)
    for variable in NAMES:
        np.testing.assert_array_equal(threads[variable].values, cluster[variable].values)


def test_tiles_on_their_own_have_no_map():
    with pytest.raises(ConfigurationError, match="a search is of one object"):
        refuse_in_tiles(SETTINGS.model_copy(update={"tile_mode": "stitch"}))
