import numpy as np
import pytest

from stemtomo.algorithms.ptychography.columns import measure, shifts_from_neighbours


def lattice(shift=(0.0, 0.0), stretch=1.0, size=80, pitch=16.0):
    y, x = np.indices((size, size))
    corners = np.stack(np.meshgrid(np.arange(16, 70, pitch), np.arange(16, 70, pitch)), -1).reshape(-1, 2)
    centres = corners[(corners < 60).all(axis=1)] + pitch / 2 + np.asarray(shift)
    image = np.zeros((size, size))
    for (a, b), height in [*((c, 1.0) for c in corners), *((c, 0.5) for c in centres)]:
        image += height * np.exp(-((x - a) ** 2 / stretch**2 + (y - b) ** 2) / (2 * 1.5**2))
    return image, corners, centres


def test_a_shift_between_two_kinds_of_columns_is_measured():
    image, corners, centres = lattice(shift=(0.30, -0.12))
    rng = np.random.default_rng(0)
    heavy = measure(image, corners + rng.uniform(-1, 1, corners.shape), 5.0)
    light = measure(image, centres + rng.uniform(-1, 1, centres.shape), 5.0)
    found = shifts_from_neighbours(light.places_px, heavy.places_px)
    assert len(found) == 9
    np.testing.assert_allclose(found, np.tile([0.30, -0.12], (9, 1)), atol=0.02)


def test_a_smeared_column_is_longer_than_wide():
    image, corners, _ = lattice(stretch=1.5)
    widths = measure(image, corners, 5.0).widths_px
    assert np.all(widths[:, 0] > 1.1 * widths[:, 1])
    image, corners, _ = lattice()
    np.testing.assert_allclose(*measure(image, corners, 5.0).widths_px.T, rtol=0.05)


def test_columns_without_neighbours_all_round_are_left_out():
    _, corners, centres = lattice()
    assert len(shifts_from_neighbours(centres, corners[:6])) == 1
    assert shifts_from_neighbours(centres, corners[:3]).shape == (0, 2)
    assert shifts_from_neighbours(centres, corners[:6])[0] == pytest.approx([0, 0])
