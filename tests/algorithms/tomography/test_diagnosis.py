"""What is wrong with a series: named where the projections can tell, silent where they cannot."""

import numpy as np
import pytest

from stemtomo.algorithms.tomography import diagnosis
from stemtomo.errors import FormatError
from stemtomo.geometry import TiltSeries
from tests.algorithms.tomography import phantom

THETA = np.linspace(-60, 60, 13)
SINGLE = TiltSeries.from_degrees(THETA).rotations
GENERAL = TiltSeries.from_degrees(THETA, np.linspace(-20, 20, 13), 7 * np.cos(np.arange(13))).rotations
SWAPPED = np.arange(13)
SWAPPED[[3, 9]] = [9, 3]
RECORDED = np.argsort(np.abs(np.arange(13) - 6.1))  # 0, +10, -10, +20, ... degrees


def _images(rotations, noise=0.0):
    positions, weights = phantom.ball(60, 7.0, 2.5)
    shifts = np.random.default_rng(1).uniform(-2, 2, (13, 2))
    images = phantom.images(positions * [1, 0.8, 0.6], weights, rotations, shifts, (52, 52))
    return images + noise * images.max() * np.random.default_rng(2).normal(size=images.shape)


def _names(images, rotations):
    return [each.name for each in diagnosis.diagnoses(images, np.ones(images.shape, bool), rotations)]


@pytest.mark.parametrize("rotations", [SINGLE, GENERAL], ids=["single axis", "general"])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_nothing_is_said_of_a_series_that_is_right(rotations, noise):
    assert _names(_images(rotations, noise), rotations) == []


@pytest.mark.parametrize("rotations", [SINGLE, GENERAL], ids=["single axis", "general"])
def test_tilts_in_another_order(rotations):
    images = _images(rotations)
    (swapped,) = diagnosis.diagnoses(images[SWAPPED], np.ones(images.shape, bool), rotations)
    assert swapped.name == "tilt_order"
    assert "3 fits the angle of 9, 9 fits the angle of 3;" in swapped.text
    (recorded,) = diagnosis.diagnoses(images, np.ones(images.shape, bool), rotations[RECORDED])
    assert recorded.name == "tilt_order"
    assert "sorted by angle" in recorded.text
    assert recorded.corrected < 0.01 * recorded.misfit


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_an_axis_along_the_other_side_of_the_images(noise):
    assert _names(_images(SINGLE, noise).transpose(0, 2, 1), SINGLE) == ["tilt_axis"]
    assert _names(_images(GENERAL, noise).transpose(0, 2, 1), GENERAL) == ["tilt_axis"]
    turned = SINGLE @ diagnosis._about_z(np.radians(30))
    (found,) = diagnosis.diagnoses(_images(turned, noise), np.ones((13, 52, 52), bool), SINGLE)
    assert "30 degrees" in found.text


def test_angles_of_the_other_sense_and_mirrored_images_show_where_there_are_several_axes():
    assert _names(_images(GENERAL), GENERAL.transpose(0, 2, 1)) == ["tilt_sense"]
    assert _names(_images(GENERAL)[:, :, ::-1], GENERAL) == ["mirrored"]
    # About one axis both mirror the volume in z, and no projection can tell.
    assert _names(_images(SINGLE), SINGLE.transpose(0, 2, 1)) == []
    assert _names(_images(SINGLE)[:, :, ::-1], SINGLE) == []


def test_projections_that_cannot_be_used_are_named():
    images, angles = _images(SINGLE), np.stack([THETA] * 3, axis=1)
    valid = np.ones(images.shape, bool)
    diagnosis.require_sound(images, valid, angles)

    def refused(match, images=images, valid=valid, angles=angles):
        with pytest.raises(FormatError, match=match):
            diagnosis.require_sound(images, valid, angles)

    spoiled = images.copy()
    spoiled[4, 7, 5] = np.nan
    refused(r"projection 4: 1 of 2704 valid pixels are not numbers, the first at \(y, x\) = \(7, 5\)", spoiled)
    masked = valid.copy()
    masked[4, 7, 5] = False
    diagnosis.require_sound(spoiled, masked, angles)  # what is not valid may be anything
    flat = images.copy()
    flat[2] = 0.25
    refused("projection 2 is constant", flat)
    masked[6] = False
    refused("projection 6 has no valid pixel", valid=masked)
    refused("13 projections, but 12 tilt angles", angles=angles[1:])
    lost = angles.copy()
    lost[5, 1] = np.nan
    refused("projection 5 has no tilt angle", angles=lost)
