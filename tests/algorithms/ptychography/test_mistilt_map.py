"""A mistilt per position: the kernel that smooths it, its gradient, and a bent crystal."""

import numpy as np
import pytest

from stemtomo.algorithms.ptychography import adaptive, mistilt
from stemtomo.algorithms.ptychography.adaptive import Geometry, Stack
from stemtomo.algorithms.ptychography.mistilt_map import fit_map, kernel
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


def test_the_kernel_keeps_a_constant_and_reaches_as_far_as_it_says():
    told = SCAN.positions()
    found = kernel(told, 0.9)
    np.testing.assert_allclose(found @ np.ones(SCAN.count), 1, rtol=1e-12)
    row = found.toarray()[6 * 12 + 6].reshape(12, 12)
    away = 0.6 * (np.arange(12) - 6)
    spread = np.sqrt((row.sum(axis=0) * away**2).sum() - (row.sum(axis=0) * away).sum() ** 2)
    assert spread == pytest.approx(0.9, rel=0.05)
    assert row.argmax() == 6 * 12 + 6


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
    fit = fit_map(flat.geometry, stack, data, told, 1.2, 20, flat.phase)
    assert fit.losses[-1] < flat.loss
    off = fit.geometry.tilt_rad_xy - tilt
    inner = (np.abs(told) < 0.8 * np.abs(told).max(axis=0)).all(axis=1)
    assert np.sqrt((tilt[inner] ** 2).mean(axis=0)).max() > 2.4e-3
    assert np.sqrt((off[inner] ** 2).mean(axis=0)).max() < 0.3e-3


def test_free_slices_have_no_map():
    told, stack, data, _, _ = bent_crystal()
    free = Stack(stack.grid, stack.wavelength, 4, tied=False)
    with pytest.raises(ValueError, match="needs tied slices"):
        fit_map(Geometry(np.zeros(2), 25.0), free, data, told, 1.2, 1)
