"""Gauges of tiles: what is planted into the tiles of a known picture is found and taken off; noise moves nothing."""

import itertools

import numpy as np
import pytest

from stemtomo.algorithms.ptychography import gauges
from stemtomo.algorithms.ptychography.gauges import Difference, Gauge, blended, difference, shifted, solve, without

EDGE, SLICES = 144, 2
STARTS, SPAN = (0, 40, 80), 64
WINDOWS = [((y, y + SPAN), (x, x + SPAN)) for y in STARTS for x in STARTS]
CENTRES = np.array([(y[0] + SPAN / 2, x[0] + SPAN / 2) for y, x in WINDOWS])


def picture(seed=0, correlation=2.0):
    """Return (slice, y, x), smooth over some pixels, with a standard deviation of one."""
    noise = np.fft.fft2(np.random.default_rng(seed).normal(size=(SLICES, EDGE, EDGE)))
    k = np.fft.fftfreq(EDGE)
    found = np.fft.ifft2(noise * np.exp(-2 * (np.pi * correlation) ** 2 * (k[:, None] ** 2 + k**2))).real
    return found / found.std()


def planted(seed=1, phase=2.0, ramp=0.01, shift=1.5):
    rng = np.random.default_rng(seed)
    return [
        Gauge(phase * rng.normal(size=SLICES), ramp * rng.normal(size=2), shift * rng.uniform(-1, 1, size=2))
        for _ in WINDOWS
    ]


def tiles_of(gauges, noise=0.0):
    """Return the tiles of the picture with their gauges, and with noise of their own."""
    whole, found = 0.3 * picture(), []
    y, x = np.indices((SPAN, SPAN)) - SPAN / 2
    for number, (window, gauge) in enumerate(zip(WINDOWS, gauges, strict=True)):
        ((y0, y1), (x0, x1)), moved = window, shifted(whole, gauge.shift_px)
        tile = moved[:, y0:y1, x0:x1] + gauge.phase_rad[:, None, None]
        tile = tile + gauge.ramp_rad_per_px[0] * y + gauge.ramp_rad_per_px[1] * x
        found.append(tile + noise * picture(10 + number)[:, y0:y1, x0:x1])
    return found


def overlaps(tiles):
    found = []
    for (first, one), (second, other) in itertools.combinations(enumerate(WINDOWS), 2):
        common = [(max(a[0], b[0]), min(a[1], b[1])) for a, b in zip(one, other, strict=True)]
        if all(stop - start >= 12 for start, stop in common):
            cuts = []
            for number, window in ((first, one), (second, other)):
                y, x = (slice(c[0] - w[0], c[1] - w[0]) for c, w in zip(common, window, strict=True))
                cuts.append(tiles[number][:, y, x])
            weight, corner = np.ones(cuts[0].shape[1:]), (common[0][0], common[1][0])
            found.append(difference(*cuts, weight, (first, second), corner))
    return found


def relative(gauges):
    """Return phases, ramps and shifts of all tiles less those of the middle one: the rest is free."""
    middle = gauges[4]
    # A common ramp tilts the whole picture, so that phases at the tiles' centres differ by it.
    arms = CENTRES - CENTRES[4]
    level = middle.phase_rad
    phases = np.array([g.phase_rad - level - arm @ middle.ramp_rad_per_px for g, arm in zip(gauges, arms, strict=True)])
    phases = np.angle(np.exp(1j * phases))
    rest = [np.array([getattr(g, n) - getattr(middle, n) for g in gauges]) for n in ("ramp_rad_per_px", "shift_px")]
    return phases, *rest


def off(found, told):
    pairs = zip(relative(found), relative(told), strict=True)
    return (np.abs(np.angle(np.exp(1j * (one - other)))) for one, other in pairs)


def test_planted_phases_ramps_and_translations_are_found():
    told = planted()
    found = solve(overlaps(tiles_of(told)), CENTRES, SLICES)
    phase, ramp, shift = off(found, told)
    assert shift.max() < 0.03
    assert ramp.max() < 2e-4
    assert phase.max() < 0.02


def test_they_are_found_to_the_noise_of_the_overlaps():
    told, noise = planted(), 0.05
    found = solve(overlaps(tiles_of(told, noise)), CENTRES, SLICES)
    phase, ramp, shift = off(found, told)
    # 24 x 64 pixels, each alike over 4 pi 2² others, are 30 independent ones, of two tiles and in two slices.
    assert shift.max() < 0.2
    assert ramp.max() < 3 * noise * np.sqrt(12 / 30) / 24
    assert phase.max() < 6 * noise * np.sqrt(2 / 30)


def test_noise_alone_moves_no_tile():
    nothing = planted(phase=0, ramp=0, shift=0)
    differences = overlaps(tiles_of(nothing, 0.05))
    assert max(np.abs(each.gauge.phase_rad).max() for each in differences) > 0.01
    for gauge in solve(differences, CENTRES, SLICES):
        assert not np.concatenate(gauge).any()


def test_a_tile_without_its_gauge_is_the_object():
    told = planted()
    whole = 0.3 * picture()
    for window, tile, gauge in zip(WINDOWS, tiles_of(told), told, strict=True):
        found = without(tile, gauge, np.array([SPAN / 2, SPAN / 2]))
        ((y0, y1), (x0, x1)), inner = window, slice(8, -8)
        expected = whole[:, y0:y1, x0:x1]
        assert np.abs(found - expected)[:, inner, inner].max() < 0.02


def test_a_flat_overlap_tells_no_translation():
    flat = np.zeros((1, 30, 60))
    found = difference(flat + 0.2, flat, np.ones((30, 60)), (0, 1))
    assert found.gauge.phase_rad[0] == pytest.approx(0.2)
    assert found.variance.phase_rad[0] < 1e-6
    assert not found.gauge.shift_px.any()


@pytest.mark.parametrize(("edge", "islands"), [(3, 2), (5, 3), (16, 1)])
def test_islands_of_tiles_that_nothing_ties_to_each_other_are_each_in_tune(edge, islands):
    rng = np.random.default_rng(1)
    numbers = np.arange(islands * edge**2).reshape(islands, edge, edge)
    pairs = [
        *zip(numbers[:, :-1].ravel(), numbers[:, 1:].ravel(), strict=True),
        *zip(numbers[..., :-1].ravel(), numbers[..., 1:].ravel(), strict=True),
    ]
    told, places = rng.uniform(-np.pi, np.pi, numbers.size), rng.uniform(0, 100, (numbers.size, 2))
    zero, spread = np.zeros(2), Gauge(np.full(1, 4e-4), np.full(2, 4e-4), np.full(2, 4e-4))
    differences = []
    for one, other in pairs:
        seen = np.angle(np.exp(1j * (told[one] - told[other] + rng.normal(0, 0.02))))
        differences.append(Difference(one, other, places[one], Gauge(np.array([seen]), zero, zero), spread, spread))
    found = np.array([gauge.phase_rad[0] for gauge in solve(differences, places, 1)])
    one, other = np.array(pairs).T
    left = np.angle(np.exp(1j * (found[one] - found[other] - told[one] + told[other])))
    assert np.abs(left).max() < 0.1


def test_tiles_that_meet_in_vacuum_alone_stay_where_they_are():
    height, width = 64, 40
    noise = np.random.default_rng(0).normal(0, 1e-3, (2, 1, height, width))
    found = difference(noise[0] + 0.2, noise[1], np.ones((height, width)), (0, 1))
    flat = found._replace(variance=found.variance._replace(shift_px=np.full(2, np.inf)))
    gauges = solve([flat], np.array([[32.0, 0.0], [32.0, 40.0]]), 1)
    assert np.isfinite(np.concatenate([np.concatenate(gauge) for gauge in gauges])).all()
    assert gauges[0].phase_rad[0] - gauges[1].phase_rad[0] == pytest.approx(0.2, abs=1e-3)
    assert not any(gauge.shift_px.any() for gauge in gauges)


def test_a_blend_keeps_the_branch_of_the_phase():
    u = np.linspace(-9, 9, 64).reshape(1, 8, 8)
    np.testing.assert_allclose(blended(u + 0.1, np.exp(1j * u)), u, atol=1e-12)
    absorbing = u + 0.1j
    np.testing.assert_allclose(blended(absorbing, np.exp(1j * absorbing)), absorbing, atol=1e-12)


def test_modes_that_were_turned_into_each_other_are_turned_back():
    rng = np.random.default_rng(0)
    told = rng.normal(size=(3, 16, 16, 2)) @ [1, 1j]
    unitary, _ = np.linalg.qr(rng.normal(size=(3, 3, 2)) @ [1, 1j])
    other = gauges.turned(told, unitary)
    np.testing.assert_allclose((np.abs(other) ** 2).sum(axis=0), (np.abs(told) ** 2).sum(axis=0))
    assert np.abs(other - told).max() > 1
    np.testing.assert_allclose(gauges.turned(other, gauges.turn_to(other, told)), told, atol=1e-12)
