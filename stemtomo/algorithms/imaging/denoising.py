"""Noise out of images of crystals, by the resemblance of their parts: an own filter, free, and BM3D where allowed.

The own filter collects, for every small patch, the most similar ones around it. Written as rows of a matrix they are of
low rank, noise is not: singular values are shrunk by the rule that is optimal for white noise in a large matrix, and
what is left of all patches is averaged where they overlap. Coloured noise is made white within a patch first, by its
covariance.

Sources: the groups of similar patches are those of K. Dabov et al., IEEE Trans. Image Process. 16, 2080 (2007) (BM3D)
and M. Lebrun et al., SIAM J. Imaging Sci. 6, 1665 (2013); the shrinkage is M. Gavish and D. L. Donoho, IEEE Trans. Inf.
Theory 63, 2137 (2017), equation 7.
"""

from __future__ import annotations

import importlib.util
import threading
from dataclasses import dataclass

import numpy as np

from stemtomo.algorithms.imaging.noise_spectrum import NoiseSpectrum
from stemtomo.backend import Array, array_namespace, to_device_of, to_host
from stemtomo.errors import ConfigurationError

BM3D_LICENCE = (
    "BM3D (package bm3d, Tampere University) is licensed for non-commercial use only; see its LICENSE. "
    'The filter "lowrank" is free of that.'
)
#: Thresholds of BM3D's two steps; given, because the package's own choice for coloured noise fails with NumPy 2.4
#: (numpy.trapz). They are its values for white noise.
_BM3D_HARD, _BM3D_WIENER = 3.0, 0.4
#: The package has one pool of threads for all callers: a second call at the same time aborts the process.
_ONE_BM3D = threading.Lock()

#: Patches worked on together.
_BATCH = 256
_FAR = 1e6


@dataclass(frozen=True)
class PatchGroups:
    """How patches are compared.

    Parameters
    ----------
    patch_px
        Edge of a patch.
    similar
        Patches in a group.
    reach_px
        Similar ones are searched up to this far along y and x.
    stride_px
        Distance of the patches that groups are made for.
    """

    patch_px: int = 7
    similar: int = 96
    reach_px: int = 16
    stride_px: int = 3


def denoise_lowrank(image: Array, noise: NoiseSpectrum, groups: PatchGroups | None = None) -> Array:
    """Return ``image`` (y, x) without ``noise``, in float32.

    Raises
    ------
    ConfigurationError
        If the image is smaller than the patches need.
    """
    xp = array_namespace(image)
    groups = groups or PatchGroups()
    height, width = image.shape
    if min(height, width) < 2 * groups.patch_px:
        raise ConfigurationError(
            f"an image of {height} x {width} px is too small for patches of {groups.patch_px} px; switch denoise off"
        )
    if noise.sigma == 0:
        return image.astype(np.float32)
    scaled = (image / noise.sigma).astype(np.float32)
    total, weight = xp.zeros(image.size), xp.zeros(image.size)
    colour = _patch_colour(noise, groups.patch_px)
    offsets = (xp.arange(groups.patch_px)[:, None] * width + xp.arange(groups.patch_px)).ravel()
    flat = scaled.ravel()
    for corners in _similar(scaled, groups):
        # A band of rows: counting all pixels for every batch would go with the square of the image.
        band = slice(int(corners.min()), int(corners.max()) + int(offsets[-1]) + 1)
        size = band.stop - band.start
        for start in range(0, len(corners), _BATCH):
            pixels = corners[start : start + _BATCH, :, None] + offsets
            cleaned, there = _shrunk(flat[pixels], *colour), pixels.ravel() - band.start
            total[band] += xp.bincount(there, cleaned.ravel(), size)
            weight[band] += xp.bincount(there, minlength=size)
    return (total / weight).reshape(image.shape).astype(np.float32) * np.float32(noise.sigma)


def denoise_bm3d(image: Array, noise: NoiseSpectrum) -> Array:
    """Return ``image`` (y, x) filtered by BM3D for coloured ``noise``, in float32.

    Uses the package ``bm3d`` (Y. Mäkinen, L. Azzari and A. Foi, IEEE Trans. Image Process. 29, 8339 (2020)), which may
    be used for **non-commercial purposes only**.

    Raises
    ------
    ConfigurationError
        If the package is not installed.
    """
    if not bm3d_installed():
        raise ConfigurationError(
            "denoise = 'bm3d' needs the package bm3d: pip install 'stemtomo[bm3d]'. It is free for non-commercial use"
            " only; denoise = 'lowrank' needs nothing and is free"
        )
    import bm3d

    host, power = to_host(image).astype(np.float64), to_host(noise.power)
    profile = bm3d.BM3DProfile()
    profile.lambda_thr3d, profile.mu2 = _BM3D_HARD, _BM3D_WIENER
    # The package works in single precision with thresholds made for values of about one.
    scale = float(np.ptp(host)) or 1.0
    with _ONE_BM3D:
        filtered = bm3d.bm3d(host / scale, power * (host.size / scale**2), profile) * scale
    return to_device_of(np.asarray(filtered, np.float32), image)


def bm3d_installed() -> bool:
    """Whether the package ``bm3d`` can be imported."""
    return importlib.util.find_spec("bm3d") is not None


def _similar(image: Array, groups: PatchGroups) -> list[Array]:
    """Return the corners of similar patches as indices into the flat image, (patch, similar), in bands of rows."""
    xp = array_namespace(image)
    height, width = image.shape
    patch, reach = groups.patch_px, groups.reach_px
    rows, columns = (_corners(length, patch, groups.stride_px) for length in (height, width))
    padded = xp.pad(image, reach, constant_values=_FAR)
    across = 2 * reach + 1
    # As many as a patch in a corner has around it.
    count = min(groups.similar, min(reach + 1, height - patch + 1) * min(reach + 1, width - patch + 1))
    band = max(1, 2**22 // (across**2 * len(columns)))
    found = []
    for start in range(0, len(rows), band):
        chosen = rows[start : start + band]
        distance = _distances(image, padded, chosen, columns, patch, reach)
        near = xp.argpartition(distance, count - 1, axis=1)[:, :count]
        y = xp.asarray(np.repeat(chosen, len(columns)))[:, None] + near // across - reach
        x = xp.asarray(np.tile(columns, len(chosen)))[:, None] + near % across - reach
        found.append(y * width + x)
    return found


def _distances(image: Array, padded: Array, rows: np.ndarray, columns: np.ndarray, patch: int, reach: int) -> Array:
    """Return squared differences of the patches at ``rows`` x ``columns`` to those around, (patch, offset), float32."""
    xp = array_namespace(image)
    top, bottom = int(rows[0]), int(rows[-1]) + patch
    here, width, across = image[top:bottom], image.shape[1], 2 * reach + 1
    inside, right = xp.asarray(rows - top), xp.asarray(columns)
    out = xp.empty((across**2, len(rows), len(columns)), np.float32)
    for dy in range(across):
        for dx in range(across):
            squares = (padded[top + dy : bottom + dy, dx : dx + width] - here) ** 2
            high = sum(squares[inside + u] for u in range(patch))
            out[dy * across + dx] = sum(high[:, right + v] for v in range(patch))
    return xp.ascontiguousarray(out.reshape(across**2, -1).T)


def _shrunk(patches: Array, whiten: Array, colour: Array) -> Array:
    """Return groups of patches (group, similar, pixel) with the singular values of their deviations shrunk."""
    xp = array_namespace(patches)
    mean = patches.mean(axis=1, keepdims=True)
    white = (patches - mean) @ whiten
    count, pixels = patches.shape[1:]
    values, vectors = xp.linalg.eigh(xp.swapaxes(white, 1, 2) @ white / np.float32(count))
    ratio = pixels / count
    squares = xp.maximum(values, 1e-6)
    above = (squares - ratio - 1) ** 2 - 4 * ratio
    gains = xp.where(squares > (1 + ratio**0.5) ** 2, xp.sqrt(xp.maximum(above, 0)) / squares, 0).astype(np.float32)
    kept = (vectors * gains[:, None, :]) @ xp.swapaxes(vectors, 1, 2)
    return mean + (white @ kept) @ colour


def _patch_colour(noise: NoiseSpectrum, patch: int) -> tuple[Array, Array]:
    """Return the matrices that make noise of unit variance white within a patch, and coloured again (rows times it)."""
    xp = array_namespace(noise.power)
    correlation = xp.fft.ifft2(noise.power).real / float(noise.power.mean())
    y, x = (axis.ravel() for axis in xp.indices((patch, patch)))
    covariance = correlation[y[:, None] - y, x[:, None] - x]
    # Noise without any power at some frequency would be whitened by dividing by zero.
    factor = xp.linalg.cholesky(covariance + 1e-3 * xp.eye(patch * patch))
    return xp.linalg.inv(factor).T.astype(np.float32), factor.T.astype(np.float32)


def _corners(length: int, patch: int, stride: int) -> np.ndarray:
    return np.unique(np.append(np.arange(0, length - patch + 1, stride), length - patch))
