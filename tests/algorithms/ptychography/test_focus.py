"""C1 of a thick specimen: a small simulated crystal, an empty field, and the sign that peaks of the phase tell."""

from dataclasses import replace

import numpy as np
import pytest

from stemtomo.algorithms.ptychography import adaptive, focus, mistilt
from stemtomo.algorithms.ptychography.adaptive import Geometry, Stack
from stemtomo.algorithms.ptychography.focus import Trial, better_sign
from stemtomo.algorithms.ptychography.windows import object_grid
from stemtomo.geometry import Optics, Scan
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.physics.probe import probe_wave

WAVELENGTH, SEMIANGLE = wavelength_angstrom(300e3), 22e-3
WINDOW, PIXEL = (48, 48), (0.32, 0.32)
HALVES = tuple(np.flatnonzero((np.arange(100) % 10 < 5) == left) for left in (True, False))


def lens(c1):
    return probe_wave(Optics(300e3, SEMIANGLE, {"C10": c1}), WINDOW, PIXEL, intensity=1e5)[None]


def stack_of(slices):
    grid = object_grid(Scan((10, 10), (0.6, 0.6)).positions(), WINDOW, PIXEL)
    return Stack(grid, WAVELENGTH, slices, entry=-(slices - 1) / 2)


def crystal(c1, thickness, strength=2.5, slices=12):
    """Patterns of columns that lean by (3, -2) mrad, simulated with more slices than any fit has."""
    stack = stack_of(slices)
    y, x = (PIXEL[0] * (np.indices(stack.grid.shape_yx)[axis] - stack.grid.shape_yx[axis] // 2) for axis in (0, 1))
    lattice = np.cos(2 * np.pi * x / 2.8) + np.cos(2 * np.pi * y / 2.8)
    phase = (strength / slices * np.exp(4 * (lattice - 2))).astype(np.complex64)[None]
    geometry = Geometry(np.array([3e-3, -2e-3]), thickness / slices)
    expected = adaptive.patterns(phase, lens(c1), geometry, stack, np.arange(100))
    return np.random.default_rng(0).poisson(expected).astype(np.uint16)


@pytest.mark.parametrize(("c1", "thickness"), [(100.0, 90.0), (-60.0, 130.0)])
def test_c1_and_thickness_are_found_from_the_wrong_ones(c1, thickness):
    data = mistilt.Data(lens(c1 + 15.0), crystal(c1, thickness))
    found = focus.refine(Geometry(np.zeros(2), 0.7 * thickness / 4), stack_of(4), data, HALVES, SEMIANGLE, 50)
    assert found.reason == ""
    assert abs(c1 + 15.0 + found.c1_angstrom - c1) < 2 * found.c1_sigma_angstrom < 6
    assert abs(found.thickness_angstrom - thickness) < 2 * found.thickness_sigma_angstrom < 20
    np.testing.assert_allclose(found.mistilt_rad_xy, [3e-3, -2e-3], atol=5e-4)


def test_an_empty_field_tells_nothing():
    data = mistilt.Data(lens(100.0), crystal(100.0, 90.0, strength=0.0))
    found = focus.refine(Geometry(np.zeros(2), 10.0), stack_of(4), data, HALVES, SEMIANGLE, 15)
    assert "do not tell it" in found.reason


def test_a_wrong_semiangle_is_no_answer():
    data = mistilt.Data(lens(100.0), crystal(100.0, 90.0))
    other = probe_wave(Optics(300e3, 0.8 * SEMIANGLE, {"C10": 100.0}), WINDOW, PIXEL, intensity=1e5)[None]
    found = focus.refine(Geometry(np.zeros(2), 20.0), stack_of(4), replace(data, probe=other), HALVES, SEMIANGLE, 15)
    assert found.reason != ""


def test_the_sign_is_taken_where_loss_or_phase_tell_it():
    assert better_sign(Trial(100.0, 2.0), Trial(107.0, -1.5)) == 0  # a strong object fits one alone
    assert better_sign(Trial(107.0, 0.1), Trial(100.0, 0.2)) == 1
    assert better_sign(Trial(100.0, -1.5), Trial(100.1, 1.4)) == 1  # a weak one both, but atoms are peaks
    assert better_sign(Trial(100.0, 0.3), Trial(100.1, -0.2)) is None
    assert better_sign(Trial(100.0, -1.5), Trial(107.0, 2.0)) is None  # they contradict each other
