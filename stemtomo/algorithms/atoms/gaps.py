"""Where atoms are missing: the peaks of the density that the residuals of the projections are projections of."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

from stemtomo.algorithms.atoms.backprojection import density, sampled
from stemtomo.algorithms.atoms.peaks import local_maxima
from stemtomo.algorithms.atoms.projected import AtomModel, ProjectedImages, residuals
from stemtomo.backend import to_host
from stemtomo.physics.projection import TiltGeometry

#: Inserted atoms have one within this many typical neighbour distances: the specimen is one piece.
REACH = 1.6
#: The residual map is sampled this finely, in widths of an atom.
_SAMPLING_WIDTHS = 0.9
#: The residual is blurred by this many widths of an atom, which keeps noise down.
_BLUR_WIDTHS = 0.5


def residual_peaks(
    model: AtomModel, projected: ProjectedImages, faintest: float, significant: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return where atoms are missing: positions (n, 3) in Å and intensities (n,).

    Peaks of the density that the residuals are projections of, as intensities of atoms of median width; they count
    above ``faintest`` and ``significant`` times the noise.
    """
    width = float(np.median(model.width_angstrom))
    values, voxel = _residual_map(model, projected, width)
    # Median absolute deviation within the specimen: true peaks are rare among the voxels there.
    inside = values[values != 0]
    noise = 1.4826 * float(np.median(np.abs(inside - np.median(inside)))) if len(inside) else 0.0
    peaks = local_maxima(values, max(0.9 * width / voxel, 1.0))
    centre = np.array(values.shape) // 2
    nearest = tuple(np.rint(peaks).astype(int).T)
    intensity = values[nearest].astype(np.float64)
    strong = intensity > max(faintest, significant * noise)
    return ((peaks[strong] - centre) * voxel)[:, ::-1].copy(), intensity[strong]


def _residual_map(model: AtomModel, projected: ProjectedImages, width: float) -> tuple[np.ndarray, float]:
    """Return the map (z, y, x) of intensities, and its voxel in Å; voxels far from every atom are zero."""
    pixel = projected.pixel_angstrom
    every = max(int(_SAMPLING_WIDTHS * width / pixel), 1)
    voxel, blur = every * pixel, _BLUR_WIDTHS * width
    half = np.ceil((np.abs(model.positions).max(axis=0) + 4 * width) / voxel).astype(int)
    shape = (2 * int(half[2]), 2 * int(half[1]), 2 * int(half[0]))
    small = [sampled(gaussian_filter(to_host(image), blur / pixel), every) for image in residuals(model, projected)]
    shifts = projected.shifts_angstrom / voxel + np.array(small[0][1])
    geometry = TiltGeometry(projected.rotations, shifts, shape, small[0][0].shape, 1)
    extent = float(2 * np.linalg.norm(model.positions - model.positions.mean(axis=0), axis=1).max() + 4 * width)
    values = density((-image for image, _ in small), geometry, voxel, 0.0, extent, _near(model.positions, shape, voxel))
    return values * np.float32((2 * np.pi * (width**2 + blur**2)) ** 1.5), voxel


def _near(positions: np.ndarray, shape: tuple[int, int, int], voxel: float) -> np.ndarray:
    """Return which voxels (z, y, x) are near an atom."""
    count = np.zeros(shape, np.float32)
    indices = np.rint(positions[:, ::-1] / voxel).astype(int) + np.array(shape) // 2
    inside = ((indices >= 0) & (indices < np.array(shape))).all(axis=1)
    np.add.at(count, tuple(indices[inside].T), 1)
    spacing = float(np.median(cKDTree(positions).query(positions, k=2)[0][:, 1])) if len(positions) > 1 else voxel
    sigma = REACH * spacing / voxel / 2
    return gaussian_filter(count, sigma, truncate=2.5) > 0
