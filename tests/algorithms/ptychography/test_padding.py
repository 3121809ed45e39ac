import numpy as np
import pytest

from stemtomo.algorithms.ptychography.padding import commensurate, to_detector_pixels, window_of
from stemtomo.algorithms.ptychography.regularisation import blurred_along_beam, depth_blur_angstrom
from stemtomo.algorithms.ptychography.windows import object_grid
from stemtomo.geometry import Scan


@pytest.mark.parametrize(
    ("detector", "padding", "step", "expected"),
    [
        ((96, 96), 0.0, None, (96, 96)),
        ((96, 96), 0.125, None, (108, 108)),
        ((96, 64), 0.25, None, (120, 80)),
        ((64, 64), 0.125, (1.6, 1.6), (80, 80)),  # 25.6 Å: 4 of the detector's pixels, and 5 of these
        ((64, 64), 0.125, (1.5, 1.5), (72, 72)),
    ],
)
def test_a_window_is_fast_to_transform_and_keeps_a_scan_on_pixels(detector, padding, step, expected):
    assert window_of(detector, padding, (25.6, 25.6), step) == expected


def test_the_finer_grid_and_the_detectors_share_their_centre():
    positions = Scan((5, 7), (0.37, 0.41)).positions()
    grid = commensurate(object_grid(positions, (108, 120), (0.2, 0.18)), (96, 96))
    coarse = [size * 96 / window for size, window in zip(grid.shape_yx, grid.window_yx, strict=True)]
    assert all(length == round(length) and length % 2 == 0 for length in coarse)
    y = (grid.corners[:, 0] + 54 - grid.shape_yx[0] // 2 + grid.shifts_px[:, 1]) * 0.2
    x = (grid.corners[:, 1] + 60 - grid.shape_yx[1] // 2 + grid.shifts_px[:, 0]) * 0.18
    np.testing.assert_allclose(np.stack([x, y], axis=1), positions, atol=1e-12)


def test_what_the_detectors_pixels_can_hold_comes_through_unchanged():
    y, x = (np.arange(144) - 72) / 9 * 8, (np.arange(90) - 45) / 9 * 8
    coarse_y, coarse_x = np.arange(128) - 64, np.arange(80) - 40

    def wave(y, x):
        return 0.3 + np.cos(2 * np.pi * (5 * y[:, None] / 128 + 9 * x[None, :] / 80) + 0.4)

    found = to_detector_pixels(wave(y, x)[None], (108, 108), (96, 96))
    np.testing.assert_allclose(found[0], wave(coarse_y, coarse_x), atol=1e-12)


@pytest.mark.parametrize(("window", "detector"), [((60, 64), (51, 55)), ((60, 72), (50, 63))])
def test_a_probe_stays_at_its_centre_on_detectors_of_any_number_of_pixels(window, detector):
    def bell(count, pixel):
        return np.exp(-(((np.arange(count) - count // 2) * pixel) ** 2) / 2)

    fine, coarse = (
        bell(shape[0], 10 / shape[0])[:, None] * bell(shape[1], 12 / shape[1]) for shape in (window, detector)
    )
    np.testing.assert_allclose(to_detector_pixels(fine[None], window, detector)[0], coarse, atol=1e-5)


def test_the_blur_along_the_beam_keeps_what_is_shared_and_has_the_gaussians_width():
    rng = np.random.default_rng(0)
    same = np.repeat(rng.normal(size=(1, 4, 5)), 6, axis=0)
    np.testing.assert_allclose(blurred_along_beam(same, 1.3), same, atol=1e-12)
    point = np.zeros((41, 1, 1))
    point[20] = 1
    found = blurred_along_beam(point, 2.0)[:, 0, 0]
    offset = np.arange(41) - 20
    assert found.sum() == pytest.approx(1)
    assert (found * offset**2).sum() == pytest.approx(4.0, rel=0.01)
    assert blurred_along_beam(point, 0.0) is point


def test_the_default_blur_is_half_the_depth_of_focus():
    assert depth_blur_angstrom(0.0196875, 21.4e-3) == pytest.approx(21.5, abs=0.1)
