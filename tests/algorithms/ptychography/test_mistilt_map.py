"""A mistilt per position: the kernel that smooths it, its gradient, and a bent crystal."""

import numpy as np
import pytest

from stemtomo.algorithms.ptychography import adaptive, mistilt
from stemtomo.algorithms.ptychography.adaptive import Geometry, Stack
from stemtomo.algorithms.ptychography.mistilt_map import RasterGaussian, Smoothing, fit_map
from stemtomo.algorithms.ptychography.windows import object_grid
from stemtomo.geometry import Optics, Scan
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.physics.probe import probe_wave

SCAN = Scan((12, 12), (0.6, 0.6))


def bent_crystal(dtype=np.complex64, electrons=1e5):
    """Columns whose tilt turns from -6 to 6 mrad along x and from 2 to -2 mrad along y."""
    window, pixel = (40, 40), (0.36, 0.36)
    told = SCAN.positions()
    stack = Stack(object_grid(told, window, pixel), wavelength_angstrom(300e3), 4)
    y, x = (pixel[0] * (np.indices(stack.grid.shape_yx)[axis] - stack.grid.shape_yx[axis] // 2) for axis in (0, 1))
    lattice = np.cos(2 * np.pi * x / 2.8) + np.cos(2 * np.pi * y / 2.8)
    phase = (0.3 * np.exp(4 * (lattice - 2))).astype(dtype)[None]
    probe = probe_wave(Optics(300e3, 22e-3, {"C10": 60.0}), window, pixel, intensity=electrons, dtype=dtype)[None]
    tilt = told * np.array([6e-3, -2e-3]) / np.abs(told).max(axis=0)
    expected = adaptive.patterns(phase, probe, Geometry(tilt, 25.0), stack, np.arange(SCAN.count))
    return told, stack, mistilt.Data(probe, np.random.default_rng(0).poisson(expected).astype(np.uint16)), tilt, phase


SMOOTHING = Smoothing.of(RasterGaussian(SCAN.step_angstrom_yx, 1.2), np.ones(SCAN.shape_yx, bool))


def smoothed(smoothing, values):
    return smoothing.smoothed(smoothing.raster(values))


def test_a_map_is_smoothed_by_the_gaussian_of_the_distances_of_recorded_positions():
    scan = Scan((7, 9), (0.6, 0.8), rotation_rad=0.3)
    valid = np.random.default_rng(0).random(scan.shape_yx) < 0.8
    told = scan.positions()[valid.ravel()]
    away = np.linalg.norm(told[:, None] - told, axis=-1)
    weights = np.where(away <= 2.7 + 1e-9, np.exp(-0.5 * (away / 0.9) ** 2), 0)
    matrix = weights / weights.sum(axis=1, keepdims=True)
    found = Smoothing.of(RasterGaussian(scan.step_angstrom_yx, 0.9), valid)
    values = np.random.default_rng(1).normal(size=(len(told), 2))
    np.testing.assert_allclose(smoothed(found, values), matrix @ values, atol=1e-14)
    np.testing.assert_allclose(found.adjoint(found.shares(values)), matrix.T @ values, atol=1e-14)
    np.testing.assert_allclose(found.weight, (matrix**2).sum(axis=0), rtol=1e-13)


def test_a_part_of_a_scan_has_the_bits_of_the_whole():
    gaussian, rng = RasterGaussian((0.6, 0.6), 0.9), np.random.default_rng(0)
    valid = rng.random((12, 11)) < 0.9
    whole = Smoothing.of(gaussian, valid)
    values = rng.normal(size=(len(whole.where), 2))
    raster, own = whole.raster(values), ((5, 8), (0, 4))
    part = Smoothing.of(gaussian, valid, own)
    (y0, y1), (x0, x1) = part.wide
    inside = np.isin(whole.where, np.ravel_multi_index(np.ix_(range(5, 8), range(4)), valid.shape))
    np.testing.assert_array_equal(part.smoothed(raster[:, y0:y1, x0:x1]), whole.smoothed(raster)[inside])
    np.testing.assert_array_equal(part.weight, whole.weight[inside])


def test_the_gradient_of_a_map_agrees_with_finite_differences():
    _, stack, data, tilt, phase = bent_crystal(np.complex128)
    everything, turn = np.arange(SCAN.count), np.random.default_rng(1).normal(size=tilt.shape)

    def at(step):
        geometry = Geometry(0.5 * tilt + step * turn, 26.0)
        sums, moments = adaptive.gradients(0.9 * phase, data.probe, geometry, stack, data.counts, everything)
        slopes = adaptive.geometry_slopes(moments.entry, moments.gaps, geometry, stack, geometry.tilt_rad_xy)
        return sums.loss, slopes[:, :2]

    step = 1e-7
    numeric = (at(step)[0] - at(-step)[0]) / (2 * step)
    assert numeric == pytest.approx(np.sum(at(0.0)[1] * turn), rel=1e-6)


def test_the_bend_of_a_crystal_is_found_with_its_sign():
    told, stack, data, tilt, _ = bent_crystal()
    flat = mistilt.fit(
        Geometry(np.zeros(2), 25.0), stack, data, np.arange(SCAN.count), 15, free=mistilt.Free(thickness=False)
    )
    fit = fit_map(flat.geometry, stack, data, SMOOTHING, 20, flat.phase)
    assert fit.losses[-1] < flat.loss
    off = fit.geometry.tilt_rad_xy - tilt
    inner = (np.abs(told) < 0.8 * np.abs(told).max(axis=0)).all(axis=1)
    assert np.sqrt((tilt[inner] ** 2).mean(axis=0)).max() > 2.4e-3
    assert np.sqrt((off[inner] ** 2).mean(axis=0)).max() < 0.3e-3


def test_free_slices_have_no_map():
    _, stack, data, _, _ = bent_crystal()
    free = Stack(stack.grid, stack.wavelength, 4, tied=False)
    with pytest.raises(ValueError, match="needs tied slices"):
        fit_map(Geometry(np.zeros(2), 25.0), free, data, SMOOTHING, 1)
