"""Weighted back-projection: projections filtered so that their back-projections add up to the volume.

The exact filter for any set of poses (Radermacher, in Electron Tomography, 2nd ed., ch. 8 (2006)): the transform of a
projection at the frequency k is divided by how often the back-projections of all tilts reach there,
sum_j sinc(D n_j . k), with the beam directions n_j and the extent D of the object along the beam.
"""

from __future__ import annotations

import numpy as np

from stemtomo.backend import Array, array_namespace, fft2, ifft2

_LEAST = 1.0


def filtered(images: Array, rotations: np.ndarray, depth_px: float) -> Array:
    """Return ``images`` (tilt, y, x) filtered, so that their back-projections add up to rad per voxel.

    Parameters
    ----------
    rotations
        Matrices R, (tilt, 3, 3).
    depth_px
        Extent D of the volume along the beam.
    """
    xp = array_namespace(images)
    height, width = (2 * n for n in images.shape[1:])  # zeros around keep the filter from wrapping round
    ky, kx = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)
    beams = np.asarray(rotations)[:, :, 2]
    out = xp.empty_like(images)
    for tilt, image in enumerate(images):
        across, down = np.asarray(rotations)[tilt, :, 0], np.asarray(rotations)[tilt, :, 1]
        reach = np.zeros((height, width))
        for beam in beams:
            reach += np.sinc(depth_px * (kx * (beam @ across) + ky * (beam @ down)))
        weight = xp.asarray(_LEAST / np.maximum(reach, _LEAST) / depth_px, dtype=images.dtype)
        padded = xp.zeros((height, width), images.dtype)
        padded[: image.shape[0], : image.shape[1]] = image
        out[tilt] = ifft2(fft2(padded) * weight).real[: image.shape[0], : image.shape[1]]
    return out
