"""What is asked for beside the defaults gives in tiles what it gives in one piece, to rounding."""

import functools
from dataclasses import replace

import numpy as np
import pytest

from stemtomo.algorithms.ptychography import held_out, solver
from stemtomo.algorithms.ptychography.parameters import Background
from stemtomo.algorithms.ptychography.tiles import cut_scan
from stemtomo.algorithms.ptychography.variation import Variation
from stemtomo.distributed import Checkpoint, Parts
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.errors import ConfigurationError
from stemtomo.pipeline.config import PtychographySettings
from stemtomo.pipeline.solving import (
    Tilt,
    epochs_of,
    filters_of,
    pixelwise,
    refuse_in_tiles,
    solve_tilt,
    variation_of,
)
from stemtomo.pipeline.tile_fields import Field, Resident
from stemtomo.pipeline.tile_whole import WholeFilter
from stemtomo.pipeline.tiled_ptychography import _search, blur_object
from stemtomo.pipeline.tiles import Schedule, TiledRun
from tests.pipeline.test_tiles import CUTS, DOUBLE, PIXEL, SCAN, experiment, start_state

SETTINGS = PtychographySettings(epochs=8, settling_epochs=2, batches=3, probe_update_start_epoch=2, probe_modes=2)
SEED = 7
FEATURES = {
    "uniform background": {"background": "uniform", "background_from_epoch": 3, "loss": "poisson"},
    "background of pixels": {"background": "pixels", "background_from_epoch": 3, "refine_positions_from_epoch": 4},
    "total variation": {"tv_weight_rad": 0.02},
    "adam": {"rule": "adam", "step": 0.2},
    "steps of least squares": {"rule": "lsqml", "step": 0.5},
    "a probe that varies": {"probe_variations": 2, "probe_variations_from_epoch": 3, "held_out": 0.1},
    "vacuum at zero, no raster": {"vacuum_percentile": 20.0, "notch_scan_raster": True},
    "a filter along the beam": {"kz_filter": 0.3, "tv_weight_rad": 0.01, "object": "complex"},
    "unequal slices": {"slices": 2, "slice_thickness_angstrom": (10.0, 40.0)},
    "a search": {"rule": "lbfgs", "settling_epochs": 4},
    "a search, patterns held out": {
        "rule": "lbfgs",
        "settling_epochs": 4,
        "held_out": 0.1,
        "probe_update_start_epoch": 99,
    },
    "held out": {"held_out": 0.1, "held_out_patience": 2, "refine_positions_from_epoch": 3},
    "all": {
        "background": "pixels",
        "background_from_epoch": 2,
        "tv_weight_rad": 0.01,
        "rule": "adam",
        "step": 0.2,
        "held_out": 0.1,
    },
}


def data(background, settings=SETTINGS):
    model, probe, counts = experiment(DOUBLE)
    model = replace(model, loss=settings.loss, kind=settings.object, weights=settings.slice_weights)
    lit = np.random.default_rng(3).poisson(2.0, counts.shape).astype(counts.dtype) if background else 0
    return model, probe, counts + lit


def in_one_piece(settings):
    model, probe, counts = data(settings.background != "none", settings)
    tilt = Tilt(model, counts, SCAN.positions(), 0.4, False, SEED)
    return solve_tilt(tilt, solver.State.start(model, probe), settings)


def build(tile, settings, members):
    model, _, counts = data(settings.background != "none", settings)
    local = replace(model, grid=tile.grid)
    told = SCAN.positions()[tile.where]
    return Field(local, tile.where, members[tile.where], told, Resident(counts[tile.where]), SCAN.count)


def in_tiles(settings, cut, checkpoint=None):
    model, probe, _ = data(False, settings)
    tiles = cut_scan(model.grid, SCAN.shape_yx, np.arange(SCAN.count), CUTS[cut], margin_px=2)
    used, _ = held_out.split(SCAN.count, settings.held_out, SEED)
    members = np.full(SCAN.count, -1)
    members[used] = np.arange(len(used))
    workers = ThreadExecutor(2)
    fields = Parts.create(workers, functools.partial(build, settings=settings, members=members), tiles)
    rules, batches = epochs_of(settings)
    schedule = Schedule(
        rules,
        batches,
        len(used),
        settings.probe_update_start_epoch,
        SEED,
        positions_from=settings.refine_positions_from_epoch,
        regularise=functools.partial(
            blur_object, width=0.4, constraints=pixelwise(settings), weights=settings.slice_weights
        ),
        background_from=None if settings.background == "none" else settings.background_from_epoch,
        uniform_background=settings.background == "uniform",
        tv_weight_rad=settings.tv_weight_rad,
        patience=settings.held_out_patience if settings.held_out else None,
        variation=variation_of(settings, SEED),
        variation_from=settings.probe_variations_from_epoch,
        search=_search(settings, 0.4),
        whole=WholeFilter(filters_of(settings, SCAN.positions(), PIXEL), model.grid.shape_yx),
    )
    run = TiledRun(workers, fields, [tile.window for tile in tiles], schedule)
    now = run.solve(run.start(start_state, probe), checkpoint=checkpoint, checkpoint_every=2)
    return tiles, run, now


@pytest.mark.parametrize("cut", ["2x2", "uneven"])
@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_in_tiles_is_the_one_in_one_piece(feature, cut):
    settings = SETTINGS.model_copy(update=FEATURES[feature])
    whole = in_one_piece(settings)
    tiles, run, now = in_tiles(settings, cut)
    for tile, state in zip(tiles, now.states.gather(), strict=True):
        (y0, y1), (x0, x1) = tile.window
        assert np.abs(state.phase - whole.state.phase[:, y0:y1, x0:x1]).max() < 1e-12
        assert np.abs(state.probe - whole.state.probe).max() < 1e-12 * np.abs(whole.state.probe).max()
        if settings.background != "none":
            expected = whole.state.extra[Background.name]
            assert expected.max() > 0.5
            np.testing.assert_allclose(state.extra[Background.name], expected, atol=1e-12)
        if settings.probe_variations:
            mine, expected = state.extra[Variation.name], whole.state.extra[Variation.name]
            assert np.abs(expected["weights"]).max() > 1e-3
            np.testing.assert_allclose(mine["weights"], expected["weights"][tile.where], atol=1e-12)
            assert np.abs(mine["modes"] - expected["modes"]).max() < 1e-12 * np.abs(expected["modes"]).max()
    np.testing.assert_allclose(now.losses, whole.losses, rtol=1e-12)
    np.testing.assert_allclose(now.held_out, whole.held_out, rtol=1e-12)
    assert run.best_epoch(now) == whole.best_epoch


def test_the_features_change_the_result():
    plain = in_one_piece(SETTINGS).state.phase
    for name, changes in FEATURES.items():
        state = in_one_piece(SETTINGS.model_copy(update=changes)).state
        assert np.abs(state.phase - plain).max() > 1e-3, name


def test_patterns_held_out_end_a_run_and_outlive_a_checkpoint(tmp_path):
    settings = SETTINGS.model_copy(update={"held_out": 0.2, "held_out_patience": 1, "epochs": 40, "step": 1.9})
    whole = in_one_piece(settings)
    assert len(whole.losses) < 40
    checkpoint = Checkpoint(tmp_path / "checkpoint")
    _, run, now = in_tiles(settings, "2x2", checkpoint)
    assert len(now.losses) == len(whole.losses)
    # As after a kill: the last checkpoint knows the losses and the best state.
    resumed = run.resumed(checkpoint)
    assert resumed.held_out == now.held_out[: len(resumed.held_out)]
    again = run.solve(resumed)
    assert again.losses == now.losses
    for one, other in zip(again.states.gather(), now.states.gather(), strict=True):
        np.testing.assert_array_equal(one.phase, other.phase)


def test_what_stays_refused_says_why():
    for changes, reason in (
        ({"rule": "lbfgs", "tile_mode": "stitch"}, "a search is of one object"),
        ({"held_out": 0.1, "tile_mode": "stitch"}, "they end at different times"),
    ):
        with pytest.raises(ConfigurationError, match=reason):
            refuse_in_tiles(SETTINGS.model_copy(update=changes))
    for changes in FEATURES.values():
        refuse_in_tiles(SETTINGS.model_copy(update=changes))
