"""The missing wedge in closed form for a single axis, and for poses all round."""

import numpy as np
import pytest

from stemtomo.algorithms.tomography.wedge import missing_wedge
from stemtomo.geometry import TiltSeries


def test_a_single_axis():
    theta = np.arange(-60, 61, 5.0)
    found = missing_wedge(TiltSeries.from_degrees(theta).rotations, diameter_angstrom=50)
    np.testing.assert_allclose(found["worst_direction_xyz"], [0, 0, 1], atol=2e-3)
    assert found["missing_half_angle_deg"] == pytest.approx(30, abs=0.05)
    assert found["spacing_deg"] == pytest.approx(5)
    # Planes contain y: a direction is measured if its azimuth about y is, but near y every plane is close.
    assert found["measured_fraction"] == pytest.approx(125 / 180, abs=0.03)
    alpha = np.radians(60)
    ratio = (alpha + np.sin(alpha) * np.cos(alpha)) / (alpha - np.sin(alpha) * np.cos(alpha))
    assert found["elongation"] == pytest.approx(ratio**0.5)
    assert found["crowther_angstrom"] == pytest.approx(np.radians(5) * 50)


def test_a_full_turn_misses_nothing():
    found = missing_wedge(TiltSeries.from_degrees(np.arange(-88, 91, 4.0)).rotations)
    assert found["missing_half_angle_deg"] == pytest.approx(2, abs=0.05)
    assert found["measured_fraction"] > 0.99
    assert found["elongation"] == pytest.approx(1, abs=0.05)
    assert found["crowther_angstrom"] is None


def test_a_second_axis_leaves_a_pyramid():
    theta = np.arange(-60, 61, 5.0)
    rotations = TiltSeries.from_degrees([*theta, *theta[theta != 0]], [0] * 25 + [90] * 24).rotations
    one, two = missing_wedge(rotations[:25]), missing_wedge(rotations)
    assert two["measured_fraction"] > one["measured_fraction"] + 0.1
    assert two["elongation"] is None


def test_one_tilt_measures_one_plane():
    found = missing_wedge(TiltSeries.from_degrees([0.0]).rotations)
    assert found["measured_fraction"] == 0
    assert found["missing_half_angle_deg"] == pytest.approx(90, abs=0.05)
    assert found["elongation"] is None
