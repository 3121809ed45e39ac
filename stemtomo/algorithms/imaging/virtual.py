"""Virtual detectors: what bright-field, annular and dark-field detectors would have seen; the centre of mass."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from stemtomo.backend import Array, array_namespace
from stemtomo.errors import ConfigurationError
from stemtomo.geometry import Detector, Optics
from stemtomo.physics.electron import wavelength_angstrom

#: Order of the weights of :func:`virtual_weights`.
WEIGHTS = ("total", "bright_field", "annular_bright_field", "dark_field", "moment_x", "moment_y")


class VirtualImages(NamedTuple):
    """Images (y, x): counts per probe position, and the centre of mass of each pattern in 1/Å from the beam centre."""

    total_counts: Array
    bright_field: Array
    annular_bright_field: Array
    dark_field: Array
    com_x: Array
    com_y: Array


def frequencies(detector: Detector) -> tuple[np.ndarray, np.ndarray]:
    """Return k_y (ky, 1) and k_x (1, kx) of the detector's pixels in 1/Å; zero is the undiffracted beam."""
    k_y, k_x = (
        (np.arange(count) - centre) * detector.pixel_inv_angstrom
        for count, centre in zip(detector.shape_yx, detector.centre_yx, strict=True)
    )
    return k_y[:, None], k_x[None, :]


def annulus(detector: Detector, inner_inv_angstrom: float, outer_inv_angstrom: float) -> np.ndarray:
    """Return the mask (ky, kx), bool, of the pixels whose centre has inner <= |k| < outer, in 1/Å."""
    k_y, k_x = frequencies(detector)
    radius = np.hypot(k_y, k_x)
    return (radius >= inner_inv_angstrom) & (radius < outer_inv_angstrom)


def virtual_weights(
    optics: Optics,
    detector: Detector,
    *,
    bright_field_fraction: float = 1.0,
    annular_fraction: float = 0.5,
    dark_field_fraction: float = 1.1,
) -> np.ndarray:
    """Return the weights (weight, ky, kx), float32, in the order of :data:`WEIGHTS`; the moments in 1/Å.

    Parameters
    ----------
    bright_field_fraction, annular_fraction, dark_field_fraction
        Outer radius of the bright field, inner radius of the annular bright field and inner radius of the dark field,
        in convergence semiangles. Half a pixel is added to the outer radius: the rim of the disc belongs to it.

    Raises
    ------
    ConfigurationError
        If the bright-field disc covers no pixel of this detector, or is not larger than its inner radius.
    """
    if annular_fraction >= bright_field_fraction:
        raise ConfigurationError(
            f"quicklook.annular_fraction = {annular_fraction} should be below "
            f"bright_field_fraction = {bright_field_fraction}"
        )
    disc = optics.semiangle_rad / wavelength_angstrom(optics.energy_ev)
    rim = disc * bright_field_fraction + detector.pixel_inv_angstrom / 2
    bright = annulus(detector, 0.0, rim)
    if not bright.any():
        raise ConfigurationError(
            f"the bright-field disc (radius {rim:.4g} 1/Å) covers no pixel of a detector of "
            f"{detector.pixel_inv_angstrom:.4g} 1/Å per pixel centred at {detector.centre_yx}; "
            "check optics.semiangle_mrad, detector.pixel_inv_angstrom and beam_centre_px"
        )
    k_y, k_x = np.broadcast_arrays(*frequencies(detector))
    weights = (
        np.ones(detector.shape_yx),
        bright,
        annulus(detector, disc * annular_fraction, rim),
        annulus(detector, disc * dark_field_fraction, np.inf),
        k_x,
        k_y,
    )
    return np.stack(weights).astype(np.float32)


class Superpixels(NamedTuple):
    """Square blocks of pixels that tile the bright-field disc.

    ``labels`` is (ky, kx) int32, -1 outside; ``k_x``, ``k_y`` (superpixel) the mean 1/Å of the pixels of each, and
    ``pixels`` (superpixel) their number.
    """

    labels: np.ndarray
    k_x: np.ndarray
    k_y: np.ndarray
    pixels: np.ndarray


def superpixels(optics: Optics, detector: Detector, count: int) -> Superpixels:
    """Cut the convergence disc into about ``count`` superpixels, line by line; blocks half outside are left out.

    With ``count`` 0, or where the disc covers no pixel, there are none.
    """
    disc = optics.semiangle_rad / wavelength_angstrom(optics.energy_ev)
    k_y, k_x = np.broadcast_arrays(*frequencies(detector))
    inside = np.hypot(k_y, k_x) < disc
    labels = np.full(detector.shape_yx, -1, dtype=np.int32)
    if count == 0 or not inside.any():
        return Superpixels(labels, *(np.zeros(0) for _ in range(3)))
    edge = max(1, round(math.sqrt(inside.sum() / count)))
    column, row = (np.floor(k / detector.pixel_inv_angstrom / edge + 0.5).astype(int) for k in (k_x, k_y))
    block = (row - row.min()) * (np.ptp(column) + 1) + column - column.min()
    filled = np.bincount(block[inside])
    inside &= 2 * np.append(filled, np.zeros(block.max() + 1 - filled.size, dtype=int))[block] >= edge**2
    _, numbers = np.unique(block[inside], return_inverse=True)
    labels[inside] = numbers
    pixels = np.bincount(numbers)
    mean_x, mean_y = (np.bincount(numbers, k[inside]) / pixels for k in (k_x, k_y))
    return Superpixels(labels, mean_x, mean_y, pixels.astype(np.float64))


def virtual_images(weighted: Array) -> VirtualImages:
    """Turn sums under :func:`virtual_weights` into images, float32; an empty pattern has its centre of mass at 0."""
    xp = array_namespace(weighted)
    total, bright, annular, dark, moment_x, moment_y = xp.moveaxis(weighted.astype(np.float64), -1, 0)
    per_count = 1.0 / xp.where(total > 0, total, np.inf)
    images = (total, bright, annular, dark, moment_x * per_count, moment_y * per_count)
    return VirtualImages(*(image.astype(np.float32) for image in images))
