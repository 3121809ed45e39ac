"""Slices of unequal thickness: against plain NumPy, against equal ones, and their gradients."""

import numpy as np
import pytest

from stemtomo.algorithms.ptychography import adaptive, mistilt, solver
from stemtomo.algorithms.ptychography.adaptive import Geometry, Stack
from stemtomo.algorithms.ptychography.model import State, untied
from stemtomo.algorithms.ptychography.regularisation import blur_matrix
from stemtomo.algorithms.ptychography.windows import object_grid
from stemtomo.geometry import Optics, Scan
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.physics.probe import probe_wave
from stemtomo.physics.propagation import fresnel_propagator

WAVELENGTH = wavelength_angstrom(300e3)
WINDOW, PIXEL = (32, 32), (0.4, 0.4)
THICKNESS = np.array([10.0, 30.0, 20.0, 40.0])
WEIGHTS = tuple(THICKNESS / THICKNESS.mean())
GRID = object_grid(Scan((4, 5), (1.3, 1.1)).positions(), WINDOW, PIXEL)
EVERY = np.arange(20)
PROBE = probe_wave(Optics(300e3, 21e-3, {"C10": 90.0}), WINDOW, PIXEL, intensity=1e4, dtype=np.complex128)[None]
TILT = np.array([4e-3, -7e-3])


def specimen(layers):
    rng = np.random.default_rng(0)
    y, x = (np.indices(GRID.shape_yx)[axis] * PIXEL[0] for axis in (0, 1))
    lattice = np.cos(2 * np.pi * x / 2.9) + np.cos(2 * np.pi * y / 2.7)
    return (0.2 + 0.02j) * np.exp(2 * (lattice - 2)) + 0.05 * rng.random((layers, *GRID.shape_yx))


def by_hand(slices, geometry_tilt, mean):
    """Patterns with a loop over slices and gaps in plain NumPy: a slice acts in its middle, C1 is told at the entrance.

    Positions are shifts of the probe by a Fourier ramp, as columns at depth z are those of the middle, drifted.
    """
    ky, kx = (np.fft.fftfreq(n, p) for n, p in zip(WINDOW, PIXEL, strict=True))
    thickness = np.asarray(WEIGHTS) * mean
    depth = np.cumsum(thickness) - thickness / 2
    drift = np.tan(geometry_tilt)

    def travel(wave, far):
        phase = -np.pi * WAVELENGTH * far * (ky[:, None] ** 2 + kx**2)
        return np.fft.ifft2(np.fft.fft2(wave) * np.exp(1j * phase))

    def moved(wave, by):
        return np.fft.ifft2(np.fft.fft2(wave) * np.exp(-2j * np.pi * (ky[:, None] * by[1] + kx * by[0])))

    found = []
    for corner, shift in zip(GRID.corners, GRID.shifts_px, strict=True):
        window = (slice(corner[0], corner[0] + WINDOW[0]), slice(corner[1], corner[1] + WINDOW[1]))
        wave, at, off = travel(PROBE[0], depth[0]), depth[0], np.zeros(2)
        wave = moved(wave, shift * np.asarray(PIXEL)[::-1])
        for number, layer in enumerate(slices):
            # In the object's frame the wave lies where the columns are not: it moves against their drift.
            lies = -(depth[number] - thickness.sum() / 2) * drift
            wave, off = moved(wave, lies - off), lies
            wave = wave * np.exp(1j * layer[window])
            if number + 1 < len(slices):
                wave, at = travel(wave, depth[number + 1] - at), depth[number + 1]
        found.append(np.abs(np.fft.fft2(wave, norm="ortho")) ** 2)
    return np.array(found)


@pytest.mark.parametrize("tied", [False, True])
def test_patterns_are_those_of_a_loop_in_plain_numpy(tied):
    phase = specimen(1 if tied else 4)
    stack = Stack(GRID, WAVELENGTH, 4, tied=tied, weights=WEIGHTS)
    stack = Stack(GRID, WAVELENGTH, 4, stack.entrance, tied, weights=WEIGHTS)
    slices = phase[0] * np.asarray(WEIGHTS)[:, None, None] if tied else phase
    seen = adaptive.patterns(phase, PROBE, Geometry(TILT, THICKNESS.mean()), stack, EVERY)
    np.testing.assert_allclose(seen, by_hand(slices, TILT, THICKNESS.mean()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tied", [False, True])
def test_the_solver_sees_the_same_and_exact_data_give_no_gradient(tied):
    phase = specimen(1 if tied else 4)
    stack = Stack(GRID, WAVELENGTH, 4, WEIGHTS[0] / 2, tied, weights=WEIGHTS)
    geometry = Geometry(TILT, THICKNESS.mean())
    counts = adaptive.patterns(phase, PROBE, geometry, stack, EVERY)
    gaps = adaptive.propagators_of(geometry, stack, EVERY[:1], PROBE)
    model = solver.Model(GRID, gaps, "anscombe", "complex", weights=WEIGHTS)
    state = State(phase, adaptive.entering_probe(PROBE, geometry, stack))
    np.testing.assert_allclose(solver.patterns(state, model, EVERY), counts, rtol=1e-9, atol=1e-9)
    exact, scale = (solver.gradients(state, model, counts * factor, EVERY) for factor in (1.0, 1.1))
    assert exact.loss < 1e-18 * scale.loss
    assert np.abs(exact.phase).max() < 1e-7 * np.abs(scale.phase).max()
    loose = untied(state, 4, WEIGHTS)
    assert solver.gradients(loose, model, counts * 1.1, EVERY).loss == pytest.approx(scale.loss, rel=1e-12)
    there, _ = adaptive.gradients(phase, PROBE, geometry, stack, counts, EVERY)
    assert there.loss < 1e-18 * scale.loss


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_agree_with_finite_differences(tied):
    rng = np.random.default_rng(1)
    phase = specimen(1 if tied else 4)
    stack = Stack(GRID, WAVELENGTH, 4, WEIGHTS[0] / 2, tied, weights=WEIGHTS)
    geometry = Geometry(TILT, THICKNESS.mean())
    counts = rng.poisson(adaptive.patterns(1.1 * phase, PROBE, geometry, stack, EVERY)).astype(float)

    def loss(u, at):
        return adaptive.gradients(u, PROBE, Geometry(at[:2], at[2]), stack, counts, EVERY)[0].loss

    at = np.array([*TILT, THICKNESS.mean()])
    sums, _ = adaptive.gradients(phase, PROBE, geometry, stack, counts, EVERY)
    slopes = adaptive.geometry_slopes(sums.entry, sums.gaps, geometry, stack, TILT)
    for number, step in enumerate((1e-6, 1e-6, 1e-4)):
        off = step * np.eye(3)[number]
        difference = (loss(phase, at + off) - loss(phase, at - off)) / (2 * step)
        assert difference == pytest.approx(slopes[number], rel=1e-6)
    way = rng.normal(size=phase.shape) + 1j * rng.normal(size=phase.shape)
    difference = (loss(phase + 1e-6 * way, at) - loss(phase - 1e-6 * way, at)) / 2e-6
    assert difference == pytest.approx(np.vdot(sums.phase, way).real, rel=1e-6)
    model = solver.Model(GRID, adaptive.propagators_of(geometry, stack, EVERY[:1], PROBE), "anscombe", "complex",
                         weights=WEIGHTS)  # fmt: skip
    state = State(phase, adaptive.entering_probe(PROBE, geometry, stack))
    np.testing.assert_allclose(solver.gradients(state, model, counts, EVERY).phase, sums.phase, rtol=1e-9, atol=1e-9)


def test_slices_that_are_told_one_by_one_and_are_alike_are_equal_slices():
    phase, ones = specimen(4), (1.0,) * 4
    geometry = Geometry(TILT, 25.0)
    told = Stack(GRID, WAVELENGTH, 4, 0.5, tied=False, weights=ones)
    assert (told.entrance, told.middle, told.distances) == (0.5, 1.5, [1.0] * 3)
    seen = adaptive.patterns(phase, PROBE, geometry, told, EVERY)
    alike = adaptive.patterns(phase, PROBE, geometry, Stack(GRID, WAVELENGTH, 4, 0.5, tied=False), EVERY)
    np.testing.assert_array_equal(seen, alike)
    for width in (0.4, 1.3):
        np.testing.assert_allclose(blur_matrix(6, width, phase, (1.0,) * 6), blur_matrix(6, width, phase), atol=1e-12)


def test_the_blur_keeps_a_uniform_slab_and_reaches_by_distance():
    weights = np.array([0.5, 0.5, 2.0, 1.0])
    blur = blur_matrix(4, 0.8, specimen(1), weights)
    np.testing.assert_allclose(blur @ weights, weights, atol=1e-12)
    # Half a slice away in the thin part, more than one in the thick one.
    density = blur * weights / weights[:, None]
    assert density[0, 1] > density[1, 2] / 4 > 0
    assert density[2, 2] > density[0, 0]


def test_thickness_and_tilt_of_unequal_slices_are_found():
    grid = object_grid(Scan((10, 10), (0.6, 0.6)).positions(), (48, 48), (0.32, 0.32))
    y, x = (0.32 * (np.indices(grid.shape_yx)[axis] - grid.shape_yx[axis] // 2) for axis in (0, 1))
    lattice = np.cos(2 * np.pi * x / 2.8) + np.cos(2 * np.pi * y / 2.8)
    phase = (0.3 * np.exp(4 * (lattice - 2))).astype(np.complex64)[None]
    probe = probe_wave(Optics(300e3, 22e-3, {"C10": 100.0}), (48, 48), (0.32, 0.32), intensity=1e5)[None]
    stack = Stack(grid, WAVELENGTH, 4, WEIGHTS[0] / 2, weights=WEIGHTS)
    truth = Geometry(np.array([6e-3, -3e-3]), 25.0)
    expected = adaptive.patterns(phase, probe, truth, stack, np.arange(100))
    data = mistilt.Data(probe, np.random.default_rng(0).poisson(expected).astype(np.uint16))
    found = mistilt.fit(Geometry(np.zeros(2), 20.0), stack, data, np.arange(100), 60).geometry
    np.testing.assert_allclose(found.tilt_rad_xy, truth.tilt_rad_xy, atol=3e-4)
    assert found.slice_thickness_angstrom == pytest.approx(25.0, abs=0.4)
    alike = fresnel_propagator((48, 48), (0.32, 0.32), WAVELENGTH, 20.0)
    assert (
        np.abs(adaptive.propagators_of(Geometry(np.zeros(2), 25.0), stack, np.arange(1), probe)[0] - alike).max() < 1e-5
    )
