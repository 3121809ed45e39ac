"""Probes over depth: what the optics say they are, and what gauges and physics say of refined ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from stemtomo.algorithms.local_orbital.model import Orbitals
from stemtomo.geometry import Optics
from stemtomo.physics.probe import probe_wave

_FINER = 2  # intensities have twice the bandwidth of waves


def probes_over_depth(
    optics: Optics,
    depths_angstrom: np.ndarray,
    window_px: int,
    pixel_angstrom: float,
    source_size_angstrom: float = 0.0,
) -> np.ndarray:
    """Return the intensity of the incoherent probe at laboratory depths z, (depth, y, x), each of sum 1.

    Computed on a finer and larger grid and cut to what ``pixel_angstrom`` samples; the centre is at index n // 2.

    Parameters
    ----------
    source_size_angstrom
        Standard deviation of the Gaussian image of the source.
    """
    size = 2 * _FINER * window_px
    fine = pixel_angstrom / _FINER
    frequency = np.fft.fftfreq(size, fine)
    blur = np.exp(-2 * (np.pi * source_size_angstrom * frequency) ** 2)
    out = np.empty((len(depths_angstrom), window_px, window_px))
    for number, depth in enumerate(depths_angstrom):
        wave = probe_wave(optics, (size, size), (fine, fine), plane_z_angstrom=float(depth), dtype=np.complex128)
        spectrum = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(np.abs(wave) ** 2)) * blur[:, None] * blur)
        half = size // 2
        kept = spectrum[half - window_px : half + window_px, half - window_px : half + window_px]
        coarse = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(kept)).real)
        middle = slice(window_px - window_px // 2, 2 * window_px - window_px // 2)
        out[number] = coarse[middle, middle]
    return normalised(out)


def start_probes(
    optics: Optics,
    defocus_angstrom: np.ndarray,
    slices: int,
    slice_thickness_angstrom: float,
    window_px: int,
    pixel_angstrom: float,
    source_size_angstrom: float = 0.0,
) -> np.ndarray:
    """Return probes (section, slice, y, x) of sections whose foci are moved from that of ``optics`` by so much."""
    depths = (np.arange(slices) - (slices - 1) / 2) * slice_thickness_angstrom
    found = []
    for defocus in defocus_angstrom:
        focused = replace(optics, aberrations={**optics.aberrations, "C10": optics.c1_angstrom + float(defocus)})
        found.append(probes_over_depth(focused, depths, window_px, pixel_angstrom, source_size_angstrom))
    return np.stack(found)


def normalised(probes: np.ndarray) -> np.ndarray:
    """Return ``probes`` (..., y, x), every one of sum 1: electrons are not lost on the way.

    They are not cut at zero: band-limited samples of a probe narrower than two pixels ring below zero as they should.
    """
    return probes / probes.sum(axis=(-2, -1), keepdims=True)


def without_gauges(
    model: Orbitals, rotations: np.ndarray, sections: np.ndarray, numbers: np.ndarray, pixel_angstrom: float
) -> Orbitals:
    """Return the model with normalised probes and with nothing in one parameter that another one says as well.

    The mean place of a section's probes goes into the shifts of its images; what moves all images as a shift of the
    sample does goes into the positions.

    Parameters
    ----------
    rotations, sections
        R and section of every image.
    numbers
        Images that are refined: they say what all move by.
    """
    probes = normalised(model.probes)
    shifts = model.shifts_angstrom + _centroids(probes)[sections] * pixel_angstrom
    probes = np.stack([_moved(stack, -centroid) for stack, centroid in zip(probes, _centroids(probes), strict=True)])
    seen = np.swapaxes(rotations, 1, 2)[:, :2, :]
    moved = np.linalg.lstsq(seen[numbers].reshape(-1, 3), shifts[numbers].reshape(-1), rcond=None)[0]
    shifts = shifts - seen @ moved
    return replace(model, probes=normalised(probes), shifts_angstrom=shifts, positions=model.positions + moved)


def depth_of_focus(probes: np.ndarray, slice_thickness_angstrom: float) -> np.ndarray:
    """Return the depth z in Å at which each section's probe (section, slice, y, x) is sharpest, (section,).

    The vertex of a parabola through the largest sum of squares over slices and its neighbours.
    """
    sharpness = (probes**2).sum(axis=(-2, -1))
    slices = sharpness.shape[1]
    found = np.empty(len(sharpness))
    for section, values in enumerate(sharpness):
        top = int(np.argmax(values))
        offset = 0.0
        if 0 < top < slices - 1:
            before, at, after = values[top - 1 : top + 2]
            offset = 0.5 * (before - after) / (before - 2 * at + after)
        found[section] = (top + offset - (slices - 1) / 2) * slice_thickness_angstrom
    return found


def _centroids(probes: np.ndarray) -> np.ndarray:
    """Return the mean place of every section's probes from the centre, (section, 2), x and y in pixels."""
    rows, columns = probes.shape[-2:]
    power = probes.sum(axis=1)
    total = power.sum(axis=(-2, -1))
    x = (power.sum(axis=-2) * (np.arange(columns) - columns // 2)).sum(axis=-1) / total
    y = (power.sum(axis=-1) * (np.arange(rows) - rows // 2)).sum(axis=-1) / total
    return np.stack([x, y], axis=1)


def _moved(stack: np.ndarray, by_px: np.ndarray) -> np.ndarray:
    """Return images (slice, y, x) moved by x, y pixels, by a phase ramp."""
    rows, columns = stack.shape[-2:]
    ky, kx = np.fft.fftfreq(rows)[:, None], np.fft.fftfreq(columns)
    ramp = np.exp(-2j * np.pi * (kx * by_px[0] + ky * by_px[1]))
    return np.fft.ifft2(np.fft.fft2(stack) * ramp).real
