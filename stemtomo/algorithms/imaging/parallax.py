"""Defocus, astigmatism and scan rotation from tilt-corrected bright field (parallax).

The image that one bright-field pixel records while the beam scans is that of a beam tilted by its angle alpha: it is
shifted in the scan's axes by s = -R(-theta) (C1 + A1) alpha, theta being the rotation of the scan (Lupini, Chi and
Jesse, J. Microsc. 263, 43, 2016). All shifts are one matrix M of four numbers, which is fitted to all images at once;
its polar decomposition is (rotation, C1 and A1), up to (rotation + pi, -C1, -A1).
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import numpy as np
import scipy.optimize

#: Noise alone exceeds this significance in none of the searches that were tried.
LEAST_SIGNIFICANCE = 8.0
#: A rival solution this good leaves the answer open.
_RIVAL = 0.93
#: What the thin-object model leaves out, taken as noise of this part of the power in the strongest ring.
_FLOOR = 3.0
_MIRROR = np.array([[0.0, 1.0], [1.0, 0.0]])


class Lens(NamedTuple):
    """What a matrix of shifts says: rotation in (-pi/2, pi/2], signed C1 and C12 in Å, azimuth in rad, handedness."""

    rotation_rad: float
    c1_angstrom: float
    c12_angstrom: float
    phi12_rad: float
    transposed: bool


class ParallaxFit(NamedTuple):
    """The fit: the lens, one standard deviation of C1, C12 (Å) and rotation (rad), and how far to trust it.

    ``significance`` is how many standard deviations of pure noise the agreement of the images is worth; ``reason``
    says why the result means nothing, and is empty where it does. ``image`` (y, x) is the aligned mean over its mean.
    """

    lens: Lens
    c1_sigma_angstrom: float
    c12_sigma_angstrom: float
    rotation_sigma_rad: float
    significance: float
    reason: str
    image: np.ndarray


class _Spectra(NamedTuple):
    """Spectra of the images (image, q) at ``q`` (q, 2; x, y in 1/Å), beam angles ``alpha`` (image, 2), weights (q)."""

    values: np.ndarray
    q: np.ndarray
    alpha: np.ndarray
    weight: np.ndarray


def lens_of(matrix: np.ndarray) -> Lens:
    """Decompose the shifts s = ``matrix`` alpha (columns x, y; Å per rad) into rotation, defocus and astigmatism."""
    transposed = bool(np.linalg.det(matrix) < 0)
    turned = -matrix @ _MIRROR if transposed else -matrix
    left, values, right = np.linalg.svd(turned)
    rotation, stretch = left @ right, right.T @ np.diag(values) @ right
    angle = -math.atan2(rotation[1, 0], rotation[0, 0])
    sign = 1.0
    if not -math.pi / 2 < angle <= math.pi / 2:
        angle, sign = angle - math.copysign(math.pi, angle), -1.0
    stretch = sign * stretch
    difference, cross = 0.5 * (stretch[0, 0] - stretch[1, 1]), 0.5 * (stretch[0, 1] + stretch[1, 0])
    c1 = 0.5 * float(np.trace(stretch))
    return Lens(angle, c1, math.hypot(difference, cross), 0.5 * math.atan2(cross, difference), transposed)


def matrix_of(lens: Lens) -> np.ndarray:
    """Return the matrix of shifts (2, 2) of ``lens``, the inverse of :func:`lens_of`."""
    cosine, sine = math.cos(-lens.rotation_rad), math.sin(-lens.rotation_rad)
    a, b = (lens.c12_angstrom * f(2 * lens.phi12_rad) for f in (math.cos, math.sin))
    stretch = np.array([[lens.c1_angstrom + a, b], [b, lens.c1_angstrom - a]])
    matrix = -np.array([[cosine, -sine], [sine, cosine]]) @ stretch
    return matrix @ _MIRROR if lens.transposed else matrix


def fit_parallax(
    stack: np.ndarray,
    alpha: np.ndarray,
    semiangle_rad: float,
    wavelength_angstrom: float,
    step_angstrom_yx: tuple[float, float],
    *,
    largest_shift_fraction: float = 0.2,
    periodic: bool = False,
) -> ParallaxFit:
    """Fit the shifts of the bright-field images ``stack`` (y, x, image), in counts.

    Parameters
    ----------
    alpha
        (image, 2), columns x, y: the angle in rad of the beam that each image was made with.
    largest_shift_fraction
        Largest shift looked for, as a part of the scanned field; larger fields are looked at in coarser steps too.
    periodic
        The scanned field repeats, so that shifted images are whole.

    Returns
    -------
    :class:`ParallaxFit`; look at ``reason`` before its numbers.
    """
    inside = np.hypot(*alpha.T) < 0.95 * semiangle_rad  # the rim is half outside
    images = np.moveaxis(np.asarray(stack, dtype=np.float64), -1, 0)[inside]
    problem = _Problem(
        images - images.mean(axis=(1, 2), keepdims=True),
        alpha[inside],
        semiangle_rad,
        wavelength_angstrom,
        step_angstrom_yx,
        periodic,
    )
    blank = np.full(stack.shape[:2], np.nan)
    if len(images) < 9 or min(stack.shape[:2]) < 8:
        few = f"{len(images)} bright-field images of {stack.shape[:2]} positions; 9 of 8 x 8 are needed"
        return ParallaxFit(Lens(0, 0, 0, 0, False), *(math.inf,) * 3, 0.0, few, blank)
    found = []
    for start in _search(problem, largest_shift_fraction):
        matrix, spectra = _refine(problem, start, 2)
        if len(spectra.q):
            found.append((_significance(spectra, np.zeros((2, 2))), matrix, spectra))
    if found:
        found.sort(key=lambda item: (not _round(item[1]), -item[0]))
        significance, matrix, spectra = found[0]
        matrix, spectra = _refine(problem, matrix, 3)
    if not found or not len(spectra.q):
        small = f"what all images share of {stack.shape[:2]} positions holds no detail; scan a larger field"
        return ParallaxFit(Lens(0, 0, 0, 0, False), *(math.inf,) * 3, 0.0, small, blank)
    found[0] = (significance, matrix, spectra)
    sigma = _uncertainty(spectra, matrix)
    reason = _doubt(problem, found, sigma, largest_shift_fraction)
    mean = images.mean(axis=0)
    level = float(np.asarray(stack, dtype=np.float64)[..., inside].mean())
    image = 1 + _shifted(problem, matrix).mean(axis=0) / level if mean.size else blank
    return ParallaxFit(lens_of(matrix), *sigma, significance, reason, image)


class _Problem(NamedTuple):
    images: np.ndarray
    alpha: np.ndarray
    semiangle: float
    wavelength: float
    step: tuple[float, float]
    periodic: bool

    @property
    def shape(self) -> tuple[int, int]:
        return (self.images.shape[1], self.images.shape[2])

    @property
    def limit(self) -> float:
        """Largest spatial frequency with a signal and without the scan's aliases, in 1/Å."""
        return min(2 * self.semiangle / self.wavelength, 0.5 / max(self.step))


def _spectra(images: np.ndarray, alpha: np.ndarray, step: tuple[float, float], limit: float, window: bool) -> _Spectra:
    if window:
        images = images * np.multiply.outer(*(_taper(count) for count in images.shape[1:]))
    transforms = np.fft.rfft2(images)
    q_y = np.fft.fftfreq(images.shape[1], step[0])[:, None]
    q_x = np.fft.rfftfreq(images.shape[2], step[1])[None, :]
    q_y, q_x = np.broadcast_arrays(q_y, q_x)
    # A drift of the beam current is in all images alike and would say that nothing moves.
    lowest = 1.5 / max(n * d for n, d in zip(images.shape[1:], step, strict=True))
    kept = (np.hypot(q_y, q_x) > lowest) & (np.hypot(q_y, q_x) < limit) & ((q_x > 0) | (q_y > 0))
    q = np.stack([q_x[kept], q_y[kept]], axis=-1)
    return _Spectra(transforms[:, kept].astype(np.complex64), q, alpha, np.ones(len(q)))


def _transfer(problem: _Problem, q: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Return (image, q): how a weak phase of frequency q appears in each image, but for the shift.

    i (A(k - q) exp(-i b) - A(k + q) exp(i b)) with b = pi lambda q (C1 + A1) q (Rodenburg, McCallum and Nellist,
    Ultramicroscopy 48, 304, 1993). Where one sideband alone falls into the disc the phase is not that of a shift, and
    taking it for one would bias C1.
    """
    lens = lens_of(matrix)
    cosine, sine = math.cos(lens.rotation_rad), math.sin(lens.rotation_rad)
    turned = q @ np.array([[cosine, sine], [-sine, cosine]])
    square = (turned**2).sum(axis=1)
    azimuth = np.arctan2(turned[:, 1], turned[:, 0]) - lens.phi12_rad
    b = math.pi * problem.wavelength * square * (lens.c1_angstrom + lens.c12_angstrom * np.cos(2 * azimuth))
    beam = problem.wavelength * turned
    alpha = problem.alpha[:, ::-1] if lens.transposed else problem.alpha
    soft = problem.semiangle * math.sqrt(math.pi / len(alpha))  # the width of a superpixel
    minus, plus = (
        np.clip((problem.semiangle - np.hypot(*np.moveaxis(alpha[:, None] + sign * beam, -1, 0))) / soft + 0.5, 0, 1)
        for sign in (-1, 1)
    )
    return 1j * (minus * np.exp(-1j * b) - plus * np.exp(1j * b))


def _search(problem: _Problem, fraction: float) -> list[np.ndarray]:
    """Return the best few matrices of a round lens on a grid of defocus, rotation and handedness."""
    starts = []
    binning = 1
    while binning == 1 or min(problem.shape) // binning >= 32:
        starts += _search_binned(problem, fraction, binning)
        binning *= 2
    starts.sort(key=lambda item: -item[0])
    best: list[np.ndarray] = []
    for _, matrix in starts:
        apart = [np.linalg.norm(matrix - other) > 0.35 * np.linalg.norm(other) for other in best]
        if all(apart):
            best.append(matrix)
    return best[:3]


def _search_binned(problem: _Problem, fraction: float, binning: int) -> list[tuple[float, np.ndarray]]:
    rows, columns = (min(n // binning, 128) for n in problem.shape)
    cut = problem.images[:, : rows * binning, : columns * binning]
    small = cut.reshape(len(cut), rows, binning, columns, binning).mean(axis=(2, 4))
    step = (problem.step[0] * binning, problem.step[1] * binning)
    block = np.floor(problem.alpha / (problem.semiangle / 3) + 0.5).astype(int) @ np.array([64, 1])
    labels, member = np.unique(block, return_inverse=True)
    merge = (np.arange(len(labels))[:, None] == member[None]).astype(float)
    alpha = merge @ problem.alpha / merge.sum(axis=1, keepdims=True)
    limit = min(problem.limit, 0.35 / max(step))
    coarse = _spectra(np.tensordot(merge, small, 1), alpha, step, limit, not problem.periodic)
    low = np.argsort(np.hypot(*coarse.q.T))[:400]
    power = (np.abs(coarse.values[:, low]) ** 2).sum(axis=0)
    coarse = _Spectra(coarse.values[:, low], coarse.q[low], alpha, 1 / (power + power.mean()))
    reach_px = max(2.0, min(16.0, fraction * min(rows, columns)))
    found = []
    for shift in np.arange(0.75, reach_px, 0.6):
        size = shift * max(step) / problem.semiangle
        turns = np.arange(0, 2 * math.pi, min(math.radians(20), 1.0 / shift))
        for mirror in (np.eye(2), _MIRROR):
            ramps = [size * np.array([[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]]) @ mirror for t in turns]
            values = [_significance(coarse, matrix) for matrix in ramps]
            peaks = [i for i, v in enumerate(values) if v >= values[i - 1] and v >= values[(i + 1) % len(values)]]
            found += [(values[i], ramps[i]) for i in sorted(peaks, key=lambda i: -values[i])[:2]]
    return found


def _aligned_sum(spectra: _Spectra, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # Single precision: the phases are a few turns at most, and this is where the time goes.
    phase = ((2 * math.pi) * (spectra.alpha @ matrix.T) @ spectra.q.T).astype(np.float32)
    ramp = np.empty(phase.shape, dtype=np.complex64)
    np.cos(phase, out=ramp.real)
    np.sin(phase, out=ramp.imag)
    aligned = spectra.values * ramp
    return aligned, aligned.sum(axis=0, dtype=np.complex128)


def _significance(spectra: _Spectra, matrix: np.ndarray) -> float:
    """Return the agreement of the images beyond chance, in standard deviations of pure noise."""
    _, total = _aligned_sum(spectra, matrix)
    own = np.abs(spectra.values) ** 2
    alone = own.sum(axis=0)
    pairs = np.maximum(alone**2 - (own**2).sum(axis=0), 0.0)
    spread = math.sqrt(float(np.sum(spectra.weight**2 * pairs)))
    return float(np.sum(spectra.weight * (np.abs(total) ** 2 - alone))) / spread if spread > 0 else 0.0


def _gradients(spectra: _Spectra, matrix: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the weighted power of the aligned sum, and its gradient in the matrix by image (image, 2, 2)."""
    aligned, total = _aligned_sum(spectra, matrix)
    pull = (-4 * math.pi) * ((aligned * total.conj()).imag * spectra.weight) @ spectra.q
    return float(np.sum(spectra.weight * np.abs(total) ** 2)), pull[:, :, None] * spectra.alpha[:, None, :]


def _refine(problem: _Problem, matrix: np.ndarray, times: int) -> tuple[np.ndarray, _Spectra]:
    """Return the refined matrix and the last spectra, which are empty where a small field has none."""
    for _ in range(times):
        matrix, spectra = _refine_once(problem, matrix)
        if not len(spectra.q):
            break
    return matrix, spectra


def _refine_once(problem: _Problem, matrix: np.ndarray) -> tuple[np.ndarray, _Spectra]:
    """Align by ``matrix``, cut to what all images share, and fit what shift is left."""
    shifted = _shifted(problem, matrix)
    if not problem.periodic:
        reach = np.abs(problem.alpha @ matrix.T).max(axis=0)[::-1] / problem.step
        edge = [min(math.ceil(r) + 1, n // 3) for r, n in zip(reach, problem.shape, strict=True)]
        shifted = shifted[:, edge[0] : problem.shape[0] - edge[0], edge[1] : problem.shape[1] - edge[1]]
    spectra = _spectra(shifted, problem.alpha, problem.step, problem.limit, not problem.periodic)
    if not len(spectra.q):
        return matrix, spectra
    spectra = spectra._replace(
        values=spectra.values * _transfer(problem, spectra.q, matrix).conj().astype(np.complex64)
    )
    spectra = spectra._replace(weight=_wiener(spectra))
    scale = np.abs(problem.alpha).max()
    value, _ = _gradients(spectra, np.zeros((2, 2)))

    def misfit(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        power, gradients = _gradients(spectra, parameters.reshape(2, 2) / scale)
        return -power / value, -gradients.sum(axis=0).ravel() / (value * scale)

    with warnings.catch_warnings():  # a search that stops early is judged below
        warnings.filterwarnings("ignore", message="The line search algorithm did not converge")
        solution = scipy.optimize.minimize(misfit, np.zeros(4), jac=True, method="BFGS", options={"maxiter": 40})
    change = solution.x.reshape(2, 2) / scale
    if np.abs(problem.alpha @ change.T).max() > 3 * max(problem.step):  # it ran away: keep what there was
        return matrix, spectra
    return matrix + change, spectra


def _wiener(spectra: _Spectra) -> np.ndarray:
    """Return weights (q): the part of the power that the images share, in rings of spatial frequency."""
    _, total = _aligned_sum(spectra, np.zeros((2, 2)))
    alone = (np.abs(spectra.values) ** 2).sum(axis=0)
    radius = np.hypot(*spectra.q.T)
    ring = np.minimum((radius / radius.max() * 12).astype(int), 11)
    shared = np.bincount(ring, np.abs(total) ** 2 - alone, 12)
    own = np.bincount(ring, alone, 12)
    part = np.maximum(shared, 0) / np.maximum(np.maximum(shared, 0) + own, 1e-300)
    level = own / np.maximum(np.bincount(ring, minlength=12), 1)
    # Without noise the faintest frequencies would count most, and with them what the thin-object model leaves out.
    weight = (part / np.maximum(level + _FLOOR * level.max(), 1e-300))[ring]
    return weight if weight.any() else np.ones_like(weight)


def _shifted(problem: _Problem, matrix: np.ndarray) -> np.ndarray:
    """Return the images with their shifts taken back."""
    shifts = problem.alpha @ matrix.T
    q_y = np.fft.fftfreq(problem.shape[0], problem.step[0])[None, :, None]
    q_x = np.fft.rfftfreq(problem.shape[1], problem.step[1])[None, None, :]
    phase = q_x * shifts[:, 0, None, None] + q_y * shifts[:, 1, None, None]
    return np.fft.irfft2(np.fft.rfft2(problem.images) * np.exp(2j * math.pi * phase), s=problem.shape)


def _uncertainty(spectra: _Spectra, matrix: np.ndarray) -> tuple[float, float, float]:
    """Return one standard deviation of C1, C12 and rotation, from how far the images pull apart (sandwich estimate)."""
    size = 1e-2 / max(float(np.abs(spectra.q).max() * np.abs(spectra.alpha).max()), 1e-12)
    _, gradients = _gradients(spectra, np.zeros((2, 2)))
    score = gradients.reshape(len(gradients), 4)
    curvature = np.empty((4, 4))
    for i in range(4):
        change = np.zeros(4)
        change[i] = size
        ahead, behind = (_gradients(spectra, sign * change.reshape(2, 2))[1].sum(axis=0).ravel() for sign in (1, -1))
        curvature[i] = (ahead - behind) / (2 * size)
    curvature = 0.5 * (curvature + curvature.T)
    if np.linalg.eigvalsh(curvature).max() >= 0:
        return (math.inf, math.inf, math.inf)  # not a maximum
    inverse = np.linalg.inv(curvature)
    covariance = inverse @ (score.T @ score) @ inverse
    draws = np.random.default_rng(0).multivariate_normal(np.zeros(4), covariance, 256).reshape(-1, 2, 2)
    best = lens_of(matrix)
    lenses = [lens_of(matrix + draw) for draw in draws]
    turn = np.array([math.remainder(lens.rotation_rad - best.rotation_rad, math.pi) for lens in lenses])
    defocus = np.array([abs(lens.c1_angstrom) - abs(best.c1_angstrom) for lens in lenses])
    astigmatism = np.array([lens.c12_angstrom for lens in lenses])
    return tuple(float(np.sqrt(np.mean(v**2))) for v in (defocus, astigmatism - astigmatism.mean(), turn))  # type: ignore[return-value]


def _doubt(
    problem: _Problem,
    found: list[tuple[float, np.ndarray, _Spectra]],
    sigma: tuple[float, float, float],
    fraction: float,
) -> str:
    """Say why the best of the fits ``found`` is not to be believed; nothing if it is."""
    significance, matrix, _ = found[0]
    c1 = abs(lens_of(matrix).c1_angstrom)
    shift = c1 * problem.semiangle
    if significance < LEAST_SIGNIFICANCE:
        return f"the images agree no better than noise ({significance:.1f} standard deviations); more dose is needed"
    if not _round(matrix):
        return "the best fit is no nearly round lens (astigmatism above a third of C1)"
    if shift < max(problem.step):
        return (
            f"near focus: the images shift by {shift:.2g} Å at the rim of the disc, less than a step of the scan "
            f"({max(problem.step):.2g} Å)"
        )
    if shift > 1.2 * fraction * max(n * d for n, d in zip(problem.shape, problem.step, strict=True)):
        return "the shifts are as large as was looked for; give largest_shift_fraction or scan a larger field"
    others = [(value, other) for value, other, _ in found[1:] if _round(other)]
    rivals = [value for value, other in others if np.linalg.norm(other - matrix) > 0.1 * np.linalg.norm(matrix)]
    if rivals and max(rivals) > _RIVAL * significance:
        return "two solutions fit alike (a periodic specimen in a small field)"
    if sigma[0] > 0.1 * c1 or sigma[2] > math.radians(5):
        return f"the counts leave C1 open by {sigma[0]:.2g} Å and the rotation by {math.degrees(sigma[2]):.2g} deg"
    return ""


def _round(matrix: np.ndarray) -> bool:
    """Whether astigmatism is below a third of C1: beyond, the fit has rather locked on to a periodicity."""
    lens = lens_of(matrix)
    return lens.c12_angstrom < abs(lens.c1_angstrom) / 3


def _taper(count: int) -> np.ndarray:
    """Rise and fall over a twentieth of the field at each end."""
    ramp = np.minimum(np.arange(count) + 0.5, count - 0.5 - np.arange(count)) / max(1.0, count / 20)
    return np.sin(0.5 * math.pi * np.minimum(ramp, 1.0)) ** 2
