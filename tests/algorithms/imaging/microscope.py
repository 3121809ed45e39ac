"""A small microscope of its own: one thin phase object, a scan turned against the detector, counts.

It shares no code with the package; conventions are those of docs/architecture.md.
"""

import numpy as np
import scipy.fft

WAVELENGTH = 0.019687489  # Å, 300 kV
SEMIANGLE = 20e-3
PIXEL = 0.05  # 1/Å; the disc has a radius of 20.3 pixels
DETECTOR = 64
STEP = 0.6


def potential(shape, rng, spacing=2.2, phase=0.7):
    """Phase (y, x) in rad of randomly placed atoms 0.5 Å wide on the object grid of 1 / (64 * 0.05) = 0.3125 Å."""
    pixel = 1 / (DETECTOR * PIXEL)
    count = int(shape[0] * shape[1] * pixel**2 / spacing**2)
    field = np.zeros(shape)
    for y, x in rng.integers(0, shape, size=(count, 2)):
        field[y, x] += 1
    k = [np.fft.fftfreq(n, pixel) for n in shape]
    smooth = np.exp(-2 * (np.pi * 0.5) ** 2 * (k[0][:, None] ** 2 + k[1][None] ** 2))
    field = np.fft.ifft2(np.fft.fft2(field) * smooth).real
    return phase * field / field.max()


def chi(k_y, k_x, c1, c12=0.0, phi12=0.0):
    """Aberration function in rad: pi lambda (C1 k^2 + C12 k^2 cos 2(phi - phi12))."""
    square, azimuth = k_y**2 + k_x**2, np.arctan2(k_y, k_x)
    return np.pi * WAVELENGTH * square * (c1 + c12 * np.cos(2 * (azimuth - phi12)))


def frames(scan=48, c1=150.0, rotation_deg=23.0, electrons=np.inf, seed=0, c12=0.0, phi12=0.0, transposed=False):
    """Return patterns (y, x, ky, kx), zero beam at 32, 32; their sum is ``electrons``, 1e6 without noise for inf."""
    rng = np.random.default_rng(seed)
    pixel = 1 / (DETECTOR * PIXEL)
    turn = np.deg2rad(rotation_deg)
    grid = (np.arange(scan) - (scan - 1) / 2) * STEP
    x_s, y_s = np.meshgrid(grid, grid)
    x, y = np.cos(turn) * x_s - np.sin(turn) * y_s, np.sin(turn) * x_s + np.cos(turn) * y_s
    half = int(np.ceil(scan * STEP * 0.75 / pixel)) + DETECTOR
    field = potential((2 * half, 2 * half), rng)
    frequency = np.fft.fftfreq(DETECTOR, pixel)
    k_y, k_x = frequency[:, None], frequency[None]
    edge = (SEMIANGLE / WAVELENGTH - np.hypot(k_y, k_x)) / PIXEL + 0.5
    lens = np.clip(edge, 0, 1) * np.exp(-1j * chi(k_y, k_x, c1, c12, phi12))
    lens /= np.sqrt(np.sum(np.abs(lens) ** 2))
    result = np.empty((scan, scan, DETECTOR, DETECTOR), dtype=np.float32)
    transmission, lens = np.exp(1j * field).astype(np.complex64), lens.astype(np.complex64)
    pixels = np.arange(DETECTOR)
    for row in range(scan):
        where = np.stack([y[row], x[row]]) / pixel + half
        corner = np.round(where).astype(int) - DETECTOR // 2
        part = (where - corner) * pixel
        ramps = [np.exp(-2j * np.pi * frequency * p[:, None]).astype(np.complex64) for p in part]
        probes = scipy.fft.ifft2(lens * ramps[0][:, :, None] * ramps[1][:, None, :])
        windows = transmission[(corner[0][:, None] + pixels)[:, :, None], (corner[1][:, None] + pixels)[:, None, :]]
        result[row] = np.fft.fftshift(np.abs(scipy.fft.fft2(probes * windows)) ** 2, axes=(-2, -1))
    if transposed:
        result = np.swapaxes(result, -1, -2)
    if np.isinf(electrons):
        return (1e6 * result).astype(np.float32)
    return rng.poisson(electrons * result).astype(np.uint16)
