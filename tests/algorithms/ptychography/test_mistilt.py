"""Mistilt and thickness from patterns: a small simulated crystal, and the reference data of another simulator."""

import numpy as np
import pytest

from stemtomo.algorithms.ptychography import adaptive, mistilt
from stemtomo.algorithms.ptychography.adaptive import Geometry, Stack
from stemtomo.algorithms.ptychography.windows import object_grid
from stemtomo.geometry import Optics, Scan
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.physics.probe import probe_wave
from tests import mistilted
from tests.data import needs

WAVELENGTH = wavelength_angstrom(300e3)
TRUTH = Geometry(np.array([6e-3, -3e-3]), 25.0)


def crystal(slices=4):
    """Columns on a lattice, the same in every slice, 100 Å thick; patterns with counting noise."""
    window, pixel = (48, 48), (0.32, 0.32)
    grid = object_grid(Scan((10, 10), (0.6, 0.6)).positions(), window, pixel)
    stack = Stack(grid, WAVELENGTH, slices)
    y, x = (pixel[0] * (np.indices(grid.shape_yx)[axis] - grid.shape_yx[axis] // 2) for axis in (0, 1))
    lattice = np.cos(2 * np.pi * x / 2.8) + np.cos(2 * np.pi * y / 2.8)
    phase = (0.3 * np.exp(4 * (lattice - 2))).astype(np.complex64)[None]
    optics = Optics(300e3, 22e-3, {"C10": 100.0})
    probe = probe_wave(optics, window, pixel, intensity=1e5)[None]
    expected = adaptive.patterns(phase, probe, TRUTH, stack, np.arange(100))
    return stack, mistilt.Data(probe, np.random.default_rng(0).poisson(expected).astype(np.uint16))


@pytest.mark.parametrize("factor", [0.8, 1.2])
def test_tilt_and_thickness_are_found_from_none_and_a_wrong_one(factor):
    stack, data = crystal()
    start = Geometry(np.zeros(2), factor * TRUTH.slice_thickness_angstrom)
    found = mistilt.fit(start, stack, data, np.arange(100), 60).geometry
    np.testing.assert_allclose(found.tilt_rad_xy, TRUTH.tilt_rad_xy, atol=3e-4)
    assert found.slice_thickness_angstrom == pytest.approx(25.0, abs=0.4)


def test_a_geometry_stands_still_when_nothing_moves_any_more():
    moving = [(1e-4 * i, 0.0, 20.0) for i in range(12)]
    assert not mistilt.stands_still(moving)
    assert not mistilt.stands_still(moving[-3:])
    assert mistilt.stands_still([*moving, *[(1e-3, 0.0, 20.0)] * 11])


@needs(mistilted.NAME)
@pytest.mark.heavy
@pytest.mark.parametrize(("slices", "factor"), [(5, 1.2), (6, 0.8), (10, 1.2), (20, 1.2)])
def test_strontium_titanate_off_zone(slices, factor):
    specimen = mistilted.load()
    stack, data = mistilted.prepare(specimen, 128, slices)
    quarter = np.flatnonzero(((np.indices((24, 24)) % 2) == 0).all(axis=0).ravel())
    thickness = float(specimen.truth["thickness_A"])
    found = mistilt.fit(Geometry(np.zeros(2), factor * thickness / slices), stack, data, quarter, 60)
    error = found.geometry.tilt_rad_xy * 1e3 - specimen.truth["mistilt_mrad"]
    # The same to 0.2 mrad of the truth for any number of slices, so to less than 0.3 mrad among themselves.
    assert np.abs(error).max() < 0.15
    assert found.geometry.slice_thickness_angstrom * slices == pytest.approx(thickness, abs=1.0)
    result = mistilted.score(slices * found.phase[0].real, stack.grid.pixel_angstrom_yx[0], specimen)
    assert result["r"] > 0.985
    assert result["r_blur"] > 0.995
