"""Images of crystals with known columns, for tests of filters."""

import numpy as np

A = np.array([11.3, 2.1])
B = np.array([-2.4, 12.7])
WIDTH_PX = 2.0
DEFECT = 6 * A + 3 * B + np.array([3.2, 1.7])


def column(position, shape):
    """Return a column of height one at ``position`` (y, x)."""
    y, x = np.indices(shape)
    return np.exp(-((y - position[0]) ** 2 + (x - position[1]) ** 2) / (2 * WIDTH_PX**2))


def lattice(shape=(128, 128), occupied=1.0, radius=None):
    """Return a lattice of columns of heights 1 and 0.6; the one at ``DEFECT`` of height ``occupied``.

    With ``radius``, only columns within it of the centre: a particle in vacuum.
    """
    image, centre = np.zeros(shape), np.array(shape) / 2
    for i in range(-30, 31):
        for j in range(-30, 31):
            position = i * A + j * B + np.array([3.2, 1.7])
            inside = np.all(position > -6) and np.all(position < np.array(shape) + 6)
            if inside and (radius is None or np.hypot(*(position - centre)) < radius):
                height = 1.0 if (i + j) % 2 else 0.6
                image += (occupied if (i, j) == (6, 3) else height) * column(position, shape)
    return image


def coloured(shape, sigma, reach=0.1, seed=0):
    """Return noise of deviation ``sigma`` whose power falls beyond ``reach`` cycles per pixel, and its power."""
    ky, kx = np.fft.fftfreq(shape[0])[:, None], np.fft.fftfreq(shape[1])
    power = 1 / (1 + (ky**2 + kx**2) / reach**2) if np.isfinite(reach) else np.ones(shape)
    power *= sigma**2 / power.mean()
    white = np.random.default_rng(seed).normal(size=shape)
    return np.fft.ifft2(np.fft.fft2(white) * np.sqrt(power)).real, power


def psnr(truth, image):
    """Return the peak signal-to-noise ratio in dB for a range of one."""
    return -10 * np.log10(np.mean((np.asarray(image, float) - truth) ** 2))


def filled(image, defective, missing):
    """Return which part of a vacancy of height ``missing`` an ``image`` of the ``defective`` lattice shows filled."""
    shape = column(DEFECT, image.shape)
    return float(((image - defective) * shape).sum() / (missing * (shape**2).sum()))
