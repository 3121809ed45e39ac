"""Virtual detectors see what detectors of their shape would have seen."""

import numpy as np
import pytest

from stemtomo.algorithms.imaging.virtual import (
    WEIGHTS,
    annulus,
    frequencies,
    superpixels,
    virtual_images,
    virtual_weights,
)
from stemtomo.errors import ConfigurationError
from stemtomo.geometry import Detector, Optics
from stemtomo.kernels.masks import frame_sums

OPTICS = Optics(energy_ev=300e3, semiangle_rad=0.021)  # disc of radius 0.021 / 0.019687 Å = 1.0667 1/Å
DETECTOR = Detector(shape_yx=(64, 48), pixel_inv_angstrom=0.05)


def weight(name, **fractions):
    return virtual_weights(OPTICS, DETECTOR, **fractions)[WEIGHTS.index(name)]


def test_zero_frequency_is_at_the_beam_centre():
    k_y, k_x = frequencies(DETECTOR)
    assert k_y[32, 0] == 0
    assert k_x[0, 24] == 0
    assert k_x[0, 25] == pytest.approx(0.05)
    k_y, k_x = frequencies(Detector((64, 48), 0.05, beam_centre_px_yx=(30.5, 20.0)))
    assert k_y[30, 0] == pytest.approx(-0.025)
    assert k_x[0, 20] == 0


def test_the_bright_field_is_the_convergence_disc():
    area = weight("bright_field").sum() * 0.05**2
    assert area == pytest.approx(np.pi * 1.0667**2, rel=0.06)  # plus half a pixel of rim


def test_bright_and_dark_field_do_not_overlap_and_annulus_is_within_bright():
    bright, dark, annular = weight("bright_field"), weight("dark_field"), weight("annular_bright_field")
    assert not (bright * dark).any()
    assert (bright >= annular).all()
    assert 0 < annular.sum() < bright.sum()


def test_an_annulus_holds_its_inner_and_not_its_outer_edge():
    mask = annulus(DETECTOR, 0.0499, 0.0999)
    assert mask[32, 25]
    assert not mask[32, 24]
    assert not mask[32, 26]


def test_centre_of_mass_points_to_where_the_beam_went():
    frames = np.zeros((2, 2, *DETECTOR.shape_yx), dtype=np.uint16)
    frames[0, 0, 32, 24] = 7  # undeflected
    frames[0, 1, 32, 28] = 3  # towards +x
    frames[1, 0, 29, 24] = 5  # towards -y; [1, 1] is empty
    images = virtual_images(frame_sums(frames, virtual_weights(OPTICS, DETECTOR)).weighted)
    np.testing.assert_allclose(images.com_x, [[0, 0.2], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(images.com_y, [[0, 0], [-0.15, 0]], atol=1e-6)
    np.testing.assert_array_equal(images.total_counts, [[7, 3], [5, 0]])
    np.testing.assert_array_equal(images.bright_field, images.total_counts)
    assert not images.dark_field.any()


def test_superpixels_tile_the_disc_and_say_where_they_are():
    blocks = superpixels(OPTICS, DETECTOR, 150)
    disc = np.hypot(*np.broadcast_arrays(*frequencies(DETECTOR))) < 1.0667
    assert 130 < blocks.pixels.size < 190
    assert not (blocks.labels >= 0)[~disc].any()
    assert (blocks.labels >= 0)[disc].mean() > 0.9
    k_y, k_x = np.broadcast_arrays(*frequencies(DETECTOR))
    for number in (0, 70, blocks.pixels.size - 1):
        inside = blocks.labels == number
        assert inside.sum() == blocks.pixels[number]
        assert blocks.k_x[number] == pytest.approx(k_x[inside].mean())
        assert blocks.k_y[number] == pytest.approx(k_y[inside].mean())
    assert superpixels(OPTICS, DETECTOR, 0).pixels.size == 0


def test_a_disc_beside_the_detector_is_refused():
    far = Detector(shape_yx=(8, 8), pixel_inv_angstrom=20.0, beam_centre_px_yx=(3.5, 3.5))
    with pytest.raises(ConfigurationError, match=r"covers no pixel.*semiangle_mrad"):
        virtual_weights(OPTICS, far)
    with pytest.raises(ConfigurationError, match="annular_fraction"):
        weight("total", annular_fraction=1.0)
