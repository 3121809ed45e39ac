"""Tiles with planted phases, ramps and translations are put together to the object that they were cut from."""

from dataclasses import replace

import numpy as np
import pytest

from stemtomo.algorithms.ptychography import gauges, solver
from stemtomo.algorithms.ptychography.gauges import Gauge
from stemtomo.algorithms.ptychography.model import State
from stemtomo.algorithms.ptychography.positions import Positions
from stemtomo.algorithms.ptychography.tiles import cut_scan, rectangles, with_halo
from stemtomo.algorithms.ptychography.windows import object_grid
from stemtomo.distributed import Parts
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.geometry import Optics, Scan
from stemtomo.physics.probe import probe_wave
from stemtomo.pipeline.stitching import Apart
from stemtomo.pipeline.tile_fields import Field, Resident
from stemtomo.pipeline.tile_steps import tile_tree
from stemtomo.pipeline.tiles import Schedule

SCAN, WINDOW, PIXEL = Scan((28, 28), (1.1, 1.1)), (16, 16), (0.5, 0.5)
PROBE = probe_wave(Optics(300e3, 21e-3, {"C10": 60.0}), WINDOW, PIXEL, intensity=1e4, dtype=np.dtype(np.complex128))


def smooth(shape):
    k = [np.fft.fftfreq(n) for n in shape]
    noise = np.fft.fft2(np.random.default_rng(0).normal(size=shape))
    found = np.fft.ifft2(noise * np.exp(-2 * (np.pi * 2.0) ** 2 * (k[0][:, None] ** 2 + k[1] ** 2))).real
    return 0.3 * found / found.std()


def tree_of(part, window, gauge, whole):
    """Return the tree of a tile that has ``gauge``, whose positions moved with its object."""
    (y0, y1), (x0, x1) = window
    moved = gauges.shifted(whole[None], gauge.shift_px)[:, y0:y1, x0:x1]
    y, x = np.indices(moved.shape[1:]) - np.array([(y1 - y0) / 2, (x1 - x0) / 2])[:, None, None]
    ramp = gauge.ramp_rad_per_px[0] * y + gauge.ramp_rad_per_px[1] * x
    displaced = np.tile(gauge.shift_px[::-1] * PIXEL[0], (len(part.where), 1))
    state = State(moved + gauge.phase_rad + ramp, PROBE[None], {Positions.name: displaced})
    positions = Positions(part.told_angstrom, np.tile(np.eye(2), (len(part.where), 1, 1)))
    return tile_tree(state, positions)


@pytest.mark.parametrize("size", [0.0, 1.0])
def test_planted_gauges_are_taken_off_with_the_positions_of_their_tiles(size):
    grid, everywhere = object_grid(SCAN.positions(), WINDOW, PIXEL), np.arange(SCAN.count)
    tiles = cut_scan(grid, SCAN.shape_yx, everywhere, rectangles(SCAN.shape_yx, (2, 2)), 2)
    wide = with_halo(tiles, grid, SCAN.shape_yx, everywhere, 6, 2)
    whole, rng = smooth(grid.shape_yx), np.random.default_rng(1)
    told = [
        Gauge(size * rng.normal(size=1), size * 3e-3 * rng.normal(size=2), size * rng.uniform(-1, 1, 2)) for _ in tiles
    ]
    workers = ThreadExecutor(1)
    model = solver.Model(grid, ())
    fields = [
        Field(
            replace(model, grid=tile.grid),
            tile.where,
            tile.where,
            SCAN.positions()[tile.where],
            Resident(np.zeros((0, 1, 1))),
        )
        for tile in wide
    ]
    owned = [np.isin(other.where, tile.where) for other, tile in zip(wide, tiles, strict=True)]
    parts = Parts(workers, tuple(workers.broadcast(field) for field in fields), workers.places(len(tiles)))
    schedule = Schedule([solver.Nesterov()] * 4, [1] * 4, SCAN.count, positions_from=0)
    apart = Apart(workers, parts, wide, owned, schedule, 3, 1, 1, {})
    windows = [tile.window for tile in wide]
    planted = [tree_of(*each, whole) for each in zip(fields, windows, told, strict=True)]
    trees = Parts(workers, tuple(workers.broadcast(tree) for tree in planted), parts.places)
    joined = apart.joined(trees, [tile.window for tile in tiles]).gather()
    shifts = np.array([tree["extra"][Positions.name].mean(axis=0) for tree in joined])
    # All tiles lie alike: what is left, of all together, is a shift of everything.
    assert np.abs(shifts - shifts.mean(axis=0)).max() < 0.02 * PIXEL[0]
    left = shifts.mean(axis=0)[::-1] / PIXEL[0]
    expected = gauges.shifted(whole[None], left)[0]
    for tree, tile in zip(joined, tiles, strict=True):
        assert tree["extra"][Positions.name].shape == (len(tile.where), 2)
        (y0, y1), (x0, x1) = tile.window
        off = (tree["phase"][0] - expected[y0:y1, x0:x1])[10:-10, 10:-10]
        y, x = np.indices(off.shape)
        plane = np.stack([np.ones(off.size), y.ravel() + y0, x.ravel() + x0], axis=1)
        fit = np.linalg.lstsq(plane, off.ravel(), rcond=None)[0]
        # A phase and a ramp of everything are free; each tile has the same.
        assert np.abs(off.ravel() - plane @ fit).max() < (0.03 if size else 1e-9)


def test_tiles_that_meet_hold_one_object_and_the_mean_probe_of_all_patterns():
    grid, everywhere = object_grid(SCAN.positions(), WINDOW, PIXEL), np.arange(SCAN.count)
    tiles = cut_scan(grid, SCAN.shape_yx, everywhere, rectangles(SCAN.shape_yx, (1, 2)), 2)
    wide = with_halo(tiles, grid, SCAN.shape_yx, everywhere, 6, 2)
    workers, model, counts = ThreadExecutor(1), solver.Model(grid, ()), Resident(np.zeros((0, 1, 1)))
    fields = [
        Field(replace(model, grid=each.grid), each.where, each.where, SCAN.positions()[each.where], counts)
        for each in wide
    ]
    owned = [np.isin(other.where, tile.where) for other, tile in zip(wide, tiles, strict=True)]
    parts = Parts(workers, tuple(workers.broadcast(field) for field in fields), workers.places(2))
    rng, trees = np.random.default_rng(0), []
    for number, each in enumerate(wide):
        phase = rng.normal(size=(1, *each.grid.shape_yx))
        probe = PROBE[None] * (1 + number)
        memory = {"object": {"mean": 2 * phase, "rounds": 5}, "probe": {"mean": 3 * probe, "rounds": 4}}
        trees.append(tile_tree(State(phase, probe, {}, memory), None))
    schedule = Schedule([solver.Nesterov()] * 4, [1] * 4, SCAN.count)
    apart = Apart(workers, parts, wide, owned, schedule, 3, 1, 1, {})
    met = apart.met(Parts(workers, tuple(workers.broadcast(tree) for tree in trees), parts.places), 1).gather()
    share = sum(len(tile.where) * (1 + number) for number, tile in enumerate(tiles)) / SCAN.count
    (a0, a1), (b0, _) = (each.window[1] for each in wide)
    common = slice(b0 - a0, a1 - a0), slice(0, a1 - b0)
    np.testing.assert_allclose(met[0]["phase"][..., common[0]], met[1]["phase"][..., common[1]], atol=1e-12)
    # Far inside, where the other tile owns nothing, each keeps what it had.
    np.testing.assert_allclose(met[0]["phase"][:, 4:-4, 4:8], trees[0]["phase"][:, 4:-4, 4:8], atol=1e-12)
    for tree in met:
        np.testing.assert_allclose(tree["probe"], share * PROBE[None], rtol=1e-12)
        # What the rules remember is blended alike.
        np.testing.assert_allclose(tree["memory"]["probe"]["mean"], 3 * share * PROBE[None], rtol=1e-12)
        assert [tree["memory"][kind]["rounds"] for kind in ("object", "probe")] == [5, 4]
    one, other = (tree["memory"]["object"]["mean"] for tree in met)
    np.testing.assert_allclose(one[..., common[0]], other[..., common[1]], atol=1e-12)
    np.testing.assert_allclose(one[:, 4:-4, 4:8], 2 * trees[0]["phase"][:, 4:-4, 4:8], atol=1e-12)


@pytest.mark.parametrize("modes", [1, 2])
def test_a_ramp_of_the_probe_is_taken_off(modes):
    y, x = np.indices(WINDOW) - 8.0
    told = np.stack([PROBE, 0.3j * PROBE * np.exp(-(x**2) / 9)])[:modes]
    turned = told * np.exp(1j * (0.7 + 2e-2 * y - 3e-2 * x))
    np.testing.assert_allclose(
        gauges.without_ramp_to(turned, told), told * np.exp(0.7j), atol=1e-9 * np.abs(told).max()
    )
