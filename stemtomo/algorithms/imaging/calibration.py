"""What one look tells of the microscope: disc, descan, scan rotation from the centre of mass, dead and hot pixels.

Angles are those of :class:`stemtomo.geometry.Scan`: the scan axes are turned by ``rotation`` from the detector's,
which are the laboratory's. Defocus and astigmatism are in :mod:`stemtomo.algorithms.imaging.parallax`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import scipy.ndimage

from stemtomo.errors import CalibrationError

#: Above this part of the field that no rotation makes curl-free, the rotation is not determined.
LARGEST_RESIDUAL = 0.7


class Disc(NamedTuple):
    """The bright-field disc on the detector: centre (ky, kx) and radius in pixels, and the width of its edge."""

    centre_px_yx: tuple[float, float]
    radius_px: float
    edge_px: float


class Descan(NamedTuple):
    """The plane c + gy y + gx x of the undiffracted beam over the scan, per component, in 1/Å (per position)."""

    centre_yx: tuple[float, float]
    slope_ky_yx: tuple[float, float]
    slope_kx_yx: tuple[float, float]


class FieldRotation(NamedTuple):
    """Turn that makes the centre of mass a gradient.

    ``rotation_rad`` is that of the scan, known up to half a turn, in (-pi/2, pi/2]; ``residual`` the part of the
    field's derivatives that remains curl (0 perfect, 1 nothing); ``transposed`` whether the detector is mirrored
    (kx and ky swapped); ``other_residual`` that of the other handedness.
    """

    rotation_rad: float
    residual: float
    transposed: bool
    other_residual: float

    @property
    def determined(self) -> bool:
        """Whether the residual is low, and clearly lower than that of the other handedness."""
        return self.residual < LARGEST_RESIDUAL and self.residual < 0.9 * self.other_residual


def fit_disc(mean_pattern: np.ndarray) -> Disc:
    """Find the bright-field disc of the mean pattern (ky, kx).

    The level halfway between the inside of the disc and what lies outside is where a uniform disc of this area ends;
    centre and radius are then refined on the edge itself: along every azimuth the halfway crossing is found, and a
    circle fitted robustly (Kåsa), so that diffraction contrast inside the disc does not move it.

    Raises
    ------
    CalibrationError
        If there is no disc: nothing counted, or it does not end on the detector.
    """
    image = scipy.ndimage.median_filter(np.asarray(mean_pattern, dtype=np.float64), 3)
    level = _half_level(image)
    labels, _ = scipy.ndimage.label(image > level)
    inside = labels == 1 + int(np.argmax(np.bincount(labels.ravel())[1:])) if labels.any() else labels > 0
    if not image.any():
        raise CalibrationError("the mean pattern is empty: there is no bright-field disc; check input.array")
    inside = scipy.ndimage.binary_fill_holes(inside if inside.any() else np.ones_like(inside))
    centre = np.array(scipy.ndimage.center_of_mass(inside))
    radius = math.sqrt(inside.sum() / math.pi)
    edge = np.nan
    for _ in range(3):
        points, widths = _edge_points(image, centre, radius)
        if len(points) < 8 or not radius > 0:
            raise CalibrationError(
                f"the bright-field disc (radius about {radius:.1f} px) does not end on the detector of "
                f"{image.shape} px; the calibration needs the edge of the disc in view"
            )
        centre, radius = _circle(points)
        edge = float(np.median(widths))
    return Disc((float(centre[0]), float(centre[1])), float(radius), edge)


def _half_level(image: np.ndarray) -> float:
    """Return the level halfway between background and the mean inside the disc, by iteration (Ridler and Calvard)."""
    level = float(image.mean())
    for _ in range(30):
        above, below = image[image > level], image[image <= level]
        if not above.size or not below.size:
            break
        level = 0.5 * (float(above.mean()) + float(below.mean()))
    return level


def _edge_points(image: np.ndarray, centre: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Return where rays from ``centre`` cross half of what is just inside the edge, (n, 2), and the widths there."""
    azimuth = np.linspace(0, 2 * np.pi, max(32, int(4 * radius)), endpoint=False)
    radii = np.linspace(max(0.0, 0.6 * radius), 1.35 * radius + 2, 160)
    y = centre[0] + radii[None] * np.sin(azimuth[:, None])
    x = centre[1] + radii[None] * np.cos(azimuth[:, None])
    on_detector = (y[:, -1] < image.shape[0]) & (y[:, -1] > -1) & (x[:, -1] < image.shape[1]) & (x[:, -1] > -1)
    profile = scipy.ndimage.map_coordinates(image, [y, x], order=1, mode="nearest")
    inner = np.median(profile[:, radii < 0.85 * radius], axis=1)
    outer = np.median(profile[:, radii > 1.2 * radius + 1], axis=1)
    points, widths = [], []
    for ray in np.flatnonzero(on_detector & (inner > 2 * np.maximum(outer, 0))):
        height = (profile[ray] - outer[ray]) / (inner[ray] - outer[ray])
        crossing = _last_crossing(height, radii, 0.5)
        low, high = _last_crossing(height, radii, 0.25), _last_crossing(height, radii, 0.75)
        if crossing is None or low is None or high is None:
            continue
        points.append((centre[0] + crossing * math.sin(azimuth[ray]), centre[1] + crossing * math.cos(azimuth[ray])))
        widths.append(2 * (low - high))
    return np.array(points).reshape(-1, 2), np.array(widths)


def _last_crossing(height: np.ndarray, radii: np.ndarray, level: float) -> float | None:
    above = np.flatnonzero(height > level)
    if not above.size or above[-1] + 1 >= radii.size:
        return None
    i = above[-1]
    part = (height[i] - level) / (height[i] - height[i + 1])
    return float(radii[i] + part * (radii[i + 1] - radii[i]))


def _circle(points: np.ndarray) -> tuple[np.ndarray, float]:
    """Fit a circle to points (n, 2) by reweighted least squares."""
    weight = np.ones(len(points))
    centre, radius = points.mean(axis=0), 1.0
    for _ in range(10):
        rows = np.column_stack([2 * points, np.ones(len(points))]) * weight[:, None]
        solution = np.linalg.lstsq(rows, (points**2).sum(axis=1) * weight, rcond=None)[0]
        centre = solution[:2]
        radius = math.sqrt(max(solution[2] + centre @ centre, 0.0))
        off = np.abs(np.linalg.norm(points - centre, axis=1) - radius)
        scale = 1.5 * max(float(np.median(off)), 0.02)
        weight = 1 / np.sqrt(1 + (off / scale) ** 2)
    return centre, radius


def fit_descan(com_y: np.ndarray, com_x: np.ndarray) -> Descan:
    """Fit planes to the centre of mass (y, x) in 1/Å, robustly (reweighted least squares): what the descan left."""
    y, x = (np.indices(com_x.shape).T - (np.array(com_x.shape) - 1) / 2).T.reshape(2, -1)
    rows = np.column_stack([np.ones(y.size), y, x])
    planes = []
    for component in (com_y, com_x):
        value = np.asarray(component, dtype=np.float64).ravel()
        weight: np.ndarray = np.ones(y.size)
        plane = np.zeros(3)
        for _ in range(8):
            plane = np.linalg.lstsq(rows * weight[:, None], value * weight, rcond=None)[0]
            off = np.abs(value - rows @ plane)
            weight = 1 / np.sqrt(1 + (off / max(2 * float(np.median(off)), 1e-12)) ** 2)
        planes.append([float(p) for p in plane])
    ky, kx = planes
    return Descan((ky[0], kx[0]), (ky[1], ky[2]), (kx[1], kx[2]))


def without_descan(com_y: np.ndarray, com_x: np.ndarray, descan: Descan) -> tuple[np.ndarray, np.ndarray]:
    """Return the centre of mass less the descan plane."""
    y, x = (np.indices(com_x.shape).T - (np.array(com_x.shape) - 1) / 2).T
    return (
        com_y - descan.centre_yx[0] - descan.slope_ky_yx[0] * y - descan.slope_ky_yx[1] * x,
        com_x - descan.centre_yx[1] - descan.slope_kx_yx[0] * y - descan.slope_kx_yx[1] * x,
    )


def field_rotation(
    com_y: np.ndarray, com_x: np.ndarray, step_angstrom_yx: tuple[float, float], cutoff_inv_angstrom: float
) -> FieldRotation:
    """Find the scan rotation that makes the centre of mass (y, x) free of curl, in closed form.

    With C and D the curl and divergence of the raw field, the curl of the field turned by a is C cos a + D sin a, least
    for a = atan2(-2<CD>, <DD> - <CC>) / 2. Both handednesses are tried. The field is filtered at the information limit
    ``cutoff_inv_angstrom`` = 2 semiangle / wavelength first: beyond it there is only noise.

    Returns
    -------
    :class:`FieldRotation`, whose ``determined`` says whether it means anything.
    """
    window = np.multiply.outer(*(_taper(count) for count in com_x.shape))
    spectra = [np.fft.fft2((v - v.mean()) * window) for v in (com_y, com_x)]
    ky, kx = (np.fft.fftfreq(n, step) for n, step in zip(com_x.shape, step_angstrom_yx, strict=True))
    k_y, k_x = np.broadcast_arrays(ky[:, None], kx[None, :])
    # The shot noise of the field is white, its signal falls with k: derivatives would show the noise alone.
    limit = min(cutoff_inv_angstrom, 0.5 / max(step_angstrom_yx))
    low_pass = np.exp(-4 * (k_y**2 + k_x**2) / limit**2)
    candidates = []
    for swap in (False, True):
        v_y, v_x = (spectrum * low_pass for spectrum in (spectra[::-1] if swap else spectra))
        curl, divergence = k_x * v_y - k_y * v_x, k_x * v_x + k_y * v_y
        cc, dd = float(np.sum(np.abs(curl) ** 2)), float(np.sum(np.abs(divergence) ** 2))
        cd = float(np.sum((curl * divergence.conj()).real))
        mean = 0.5 * (cc + dd)
        residual = 1 - math.hypot(0.5 * (cc - dd), cd) / mean if mean > 0 else 1.0
        turn = 0.5 * math.atan2(-2 * cd, dd - cc)
        candidates.append((residual, -turn))
    transposed = candidates[1][0] < candidates[0][0]
    residual, rotation = candidates[int(transposed)]
    return FieldRotation(rotation, residual, transposed, candidates[int(not transposed)][0])


def integrated_phase(
    com_y: np.ndarray,
    com_x: np.ndarray,
    step_angstrom_yx: tuple[float, float],
    rotation_rad: float,
    transposed: bool = False,
) -> np.ndarray:
    """Integrate the centre of mass (y, x) in 1/Å to the phase in rad (iCOM), zero on average.

    The field is turned into the scan's axes; com = grad(phase) / 2 pi (Lazić, Bosch and Lazar, Ultramicroscopy 160,
    265, 2016), solved by least squares in Fourier space with even reflection, so that scans need not be periodic. A
    rotation that is off by half a turn inverts the image.
    """
    v_y, v_x = (com_x, com_y) if transposed else (com_y, com_x)
    cosine, sine = math.cos(-rotation_rad), math.sin(-rotation_rad)
    g_x, g_y = cosine * v_x - sine * v_y, sine * v_x + cosine * v_y
    # Even reflection of the phase: its y component is odd in y, even in x, and so on.
    g_x = np.block([[g_x, -g_x[:, ::-1]], [g_x[::-1], -g_x[::-1, ::-1]]])
    g_y = np.block([[g_y, g_y[:, ::-1]], [-g_y[::-1], -g_y[::-1, ::-1]]])
    k_y = np.fft.fftfreq(g_x.shape[0], step_angstrom_yx[0])[:, None]
    k_x = np.fft.fftfreq(g_x.shape[1], step_angstrom_yx[1])[None, :]
    square = k_y**2 + k_x**2
    square[0, 0] = np.inf
    # com = grad(phase)/2pi  =>  F[com] = i k F[phase]
    phase = np.fft.ifft2(-1j * (k_x * np.fft.fft2(g_x) + k_y * np.fft.fft2(g_y)) / square).real
    phase = phase[: com_x.shape[0], : com_x.shape[1]]
    return phase - phase.mean()


def bad_pixels(mean_pattern: np.ndarray, maximum_pattern: np.ndarray | None, patterns: int) -> np.ndarray:
    """Return (ky, kx) uint8: 1 where a pixel never counts among neighbours that do, 2 where it counts far too much.

    Each pixel is compared with its eight neighbours. Dead: no count where a Poisson process of their lower quartile
    would have left a dark pixel once in a thousand detectors; hot: above 4 times that of its brightest
    neighbour, beyond seven standard deviations of counting noise and of the spread among neighbours.
    """
    mean = np.asarray(mean_pattern, dtype=np.float64)
    ring = np.ones((3, 3), dtype=bool)
    ring[1, 1] = False
    # The lower quartile, since a pixel at the rim of the disc has bright neighbours and need not be bright itself.
    quartile = scipy.ndimage.rank_filter(mean, 2, footprint=ring, mode="mirror")
    high = scipy.ndimage.maximum_filter(mean, footprint=ring, mode="mirror")
    counts = quartile * patterns
    peak = mean if maximum_pattern is None else np.asarray(maximum_pattern, dtype=np.float64)
    dead = (mean == 0) & (peak == 0) & (-counts < math.log(1e-3 / mean.size))
    spread = 7 * np.sqrt(np.maximum(high, 1.0 / patterns) / patterns)
    hot = (mean > 4 * high) & (mean - high > spread)
    return np.where(hot, 2, np.where(dead, 1, 0)).astype(np.uint8)


def _taper(count: int) -> np.ndarray:
    """Rise and fall over an eighth of the field at each end."""
    ramp = np.minimum(np.arange(count) + 0.5, count - 0.5 - np.arange(count)) / max(1.0, count / 8)
    return np.sin(0.5 * math.pi * np.minimum(ramp, 1.0)) ** 2
