"""Geometry as a parameter: every gradient against finite differences, the sign of the tilt, and the gauge of it."""

from dataclasses import replace

import numpy as np
import pytest

from stemtomo.algorithms.ptychography import adaptive
from stemtomo.algorithms.ptychography.adaptive import Geometry, Stack
from stemtomo.algorithms.ptychography.windows import object_grid
from stemtomo.geometry import Optics, Scan
from stemtomo.physics import multislice
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.physics.probe import probe_wave
from stemtomo.physics.propagation import fresnel_propagator

PIXEL, WAVELENGTH, WINDOW = (0.4, 0.4), wavelength_angstrom(300e3), (24, 20)
OPTICS = Optics(energy_ev=300e3, semiangle_rad=21e-3, aberrations={"C10": 80.0})
TILT = np.array([6e-3, -3e-3])


def probe_modes(modes=1):
    strong = probe_wave(OPTICS, WINDOW, PIXEL, intensity=400.0, dtype=np.complex128)
    return np.stack([strong, 0.3 * np.roll(strong, 1, axis=1)][:modes])


def experiment(tied=True, kind="complex", modes=1, mapped=False, detector=(18, 16), entry=0.5):
    rng = np.random.default_rng(3)
    grid = object_grid(Scan((2, 3), (1.3, 1.1)).positions(), WINDOW, PIXEL)
    stack = Stack(grid, WAVELENGTH, 4, entry, tied, "anscombe", kind)
    phase = 0.3 * rng.random((1 if tied else 4, *grid.shape_yx))
    phase = phase + (0.05j * rng.random(phase.shape) if kind == "complex" else 0)
    tilt = TILT + 2e-3 * rng.normal(size=(6, 2)) if mapped else TILT
    geometry = Geometry(tilt, 20.0)
    expected = adaptive.patterns(phase, probe_modes(modes), geometry, stack, np.arange(6))
    counts = rng.poisson(expected[:, : detector[0], : detector[1]] * 1.2)
    return phase, probe_modes(modes), geometry, stack, counts


def run(phase, probe, geometry, stack, counts, where=None, mask=None):
    return adaptive.gradients(phase, probe, geometry, stack, counts, np.arange(6) if where is None else where, mask)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("modes", [1, 2])
def test_tilt_and_thickness_gradients_agree_with_finite_differences(tied, modes):
    phase, probe, geometry, stack, counts = experiment(tied, modes=modes)
    sums, _ = run(phase, probe, geometry, stack, counts)
    slopes = adaptive.geometry_slopes(sums.entry, sums.gaps, geometry, stack, geometry.tilt_rad_xy)
    for number, step in enumerate((1e-7, 1e-7, 1e-4)):

        def loss(sign, number=number, step=step):
            at = np.array([*geometry.tilt_rad_xy, geometry.slice_thickness_angstrom])
            at[number] += sign * step
            return run(phase, probe, Geometry(at[:2], at[2]), stack, counts)[0].loss

        assert (loss(1) - loss(-1)) / (2 * step) == pytest.approx(slopes[number], rel=1e-6)


@pytest.mark.parametrize("kind", ["phase", "complex"])
@pytest.mark.parametrize("tied", [True, False])
def test_object_and_probe_gradients_agree_with_finite_differences(tied, kind):
    phase, probe, geometry, stack, counts = experiment(tied, kind, modes=2)
    sums, _ = run(phase, probe, geometry, stack, counts)
    rng = np.random.default_rng(0)
    turn = rng.normal(size=phase.shape) + (1j * rng.normal(size=phase.shape) if kind == "complex" else 0)
    step = 1e-6
    above, below = (run(phase + s * step * turn, probe, geometry, stack, counts)[0].loss for s in (1, -1))
    assert (above - below) / (2 * step) == pytest.approx(np.vdot(sums.phase, turn).real, rel=1e-6)
    turn = rng.normal(size=probe.shape) + 1j * rng.normal(size=probe.shape)
    above, below = (run(phase, probe + s * step * turn, geometry, stack, counts)[0].loss for s in (1, -1))
    assert (above - below) / (2 * step) == pytest.approx(np.vdot(sums.probe, turn).real, rel=1e-6)


def test_a_map_of_tilts_has_a_gradient_per_position():
    phase, probe, geometry, stack, counts = experiment(mapped=True, modes=2)
    _, moments = run(phase, probe, geometry, stack, counts)
    slopes = adaptive.geometry_slopes(moments.entry, moments.gaps, geometry, stack, geometry.tilt_rad_xy)
    turn, step = np.random.default_rng(0).normal(size=(6, 2)), 1e-7

    def loss(sign):
        there = Geometry(geometry.tilt_rad_xy + sign * step * turn, geometry.slice_thickness_angstrom)
        return run(phase, probe, there, stack, counts)[0].loss

    assert (loss(1) - loss(-1)) / (2 * step) == pytest.approx(np.sum(slopes[:, :2] * turn), rel=1e-6)
    alike = replace(geometry, tilt_rad_xy=np.tile(TILT, (6, 1)))
    one = replace(geometry, tilt_rad_xy=TILT)
    assert run(phase, probe, alike, stack, counts)[0].loss == pytest.approx(
        run(phase, probe, one, stack, counts)[0].loss, rel=1e-12
    )


def test_the_focus_gradient_agrees_with_finite_differences():
    phase, _, geometry, stack, counts = experiment()

    def at(c1):
        optics = replace(OPTICS, aberrations={"C10": c1})
        probe = probe_wave(optics, WINDOW, PIXEL, intensity=400.0, dtype=np.complex128)[None]
        return run(phase, probe, geometry, stack, counts)[0]

    assert (at(80.001).loss - at(79.999).loss) / 0.002 == pytest.approx(
        adaptive.focus_slope(at(80.0).entry, WAVELENGTH), rel=1e-6
    )


def test_a_defocus_in_the_geometry_is_one_of_the_lens():
    phase, _, geometry, stack, counts = experiment()
    lens = replace(OPTICS, aberrations={"C10": 80.0})
    probes = [
        probe_wave(optics, WINDOW, PIXEL, intensity=400.0, dtype=np.complex128)[None]
        for optics in (lens, replace(lens, aberrations={"C10": 110.0}))
    ]
    beside = run(phase, probes[0], replace(geometry, c1_angstrom=30.0), stack, counts)[0]
    within = run(phase, probes[1], geometry, stack, counts)[0]
    assert beside.loss == pytest.approx(within.loss, rel=1e-12)
    np.testing.assert_allclose(beside.entry, within.entry, rtol=1e-9, atol=1e-9 * np.abs(within.entry).max())


def test_exact_data_give_zero_gradients():
    phase, probe, geometry, stack, _ = experiment()
    expected = adaptive.patterns(phase, probe, geometry, stack, np.arange(6))
    sums, moments = run(phase, probe, geometry, stack, expected)
    scale = run(phase, probe, geometry, stack, expected * 1.1)[0]
    assert sums.loss < 1e-20 * scale.loss
    for value, typical in ((sums.phase, scale.phase), (moments.gaps, scale.gaps), (moments.entry, scale.entry)):
        assert np.abs(value).max() < 1e-7 * np.abs(typical).max()  # the loss keeps its roots off zero by 1e-9


def test_sums_of_batches_add_up_to_the_sums_of_all():
    phase, probe, geometry, stack, counts = experiment()
    whole, _ = run(phase, probe, geometry, stack, counts)
    parts = [
        run(phase, probe, geometry, stack, counts, where)[0] for where in (np.array([0, 3]), np.array([1, 2, 4, 5]))
    ]
    for found, expected in zip((sum(p) for p in zip(*parts, strict=True)), whole, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-9)


def test_without_tilt_it_is_the_multislice_of_the_solver():
    phase, probe, _, stack, _ = experiment(tied=False)
    straight = Geometry(np.zeros(2), 20.0)
    propagator = fresnel_propagator(WINDOW, PIXEL, WAVELENGTH, 20.0, dtype=np.complex128)
    entering = adaptive.entering_probe(probe, straight, stack)
    grid = replace(stack.grid, shifts_px=np.zeros((6, 2)))
    waves = np.repeat(entering, 6, axis=0)
    np.testing.assert_allclose(
        adaptive.patterns(phase, probe, straight, replace(stack, grid=grid), np.arange(6)),
        multislice.intensities(waves, np.exp(1j * phase), grid.corners, [propagator] * 3),
        rtol=1e-9,
        atol=1e-10,
    )


def test_a_positive_tilt_straightens_columns_that_drift_to_positive_x_with_depth():
    # A bump per slice that moves by one pixel along +x: 0.4 Å over 20 Å is atan(0.02).
    grid = object_grid(np.zeros((1, 2)), (48, 48), PIXEL)
    stack = Stack(grid, WAVELENGTH, 5, 0.5, tied=False)
    y, x = np.indices(grid.shape_yx) - 24.0 - 2.0  # the object is larger than the window by its margin
    straight = np.stack([0.4 * np.exp(-(x**2 + y**2) / 8)] * 5)
    leaning = np.stack([np.roll(layer, s - 2, axis=1) for s, layer in enumerate(straight)])
    probe = probe_wave(OPTICS, (48, 48), PIXEL, intensity=400.0, dtype=np.complex128)[None]
    where = np.arange(1)
    upright = adaptive.patterns(leaning, probe, Geometry(np.zeros(2), 20.0), stack, where)
    tilted = adaptive.patterns(straight, probe, Geometry(np.array([np.arctan(0.02), 0]), 20.0), stack, where)
    mirrored = adaptive.patterns(straight, probe, Geometry(np.array([-np.arctan(0.02), 0]), 20.0), stack, where)
    # Where the window ends nothing scatters, so the gauge is exact but for the probe's tails.
    assert np.abs(tilted - upright).max() < 1e-4 * upright.max()
    assert np.abs(mirrored - upright).max() > 1e-2 * upright.max()
