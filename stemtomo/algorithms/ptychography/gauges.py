"""How tiles that were reconstructed on their own lie against each other, and what each gives up to fit the others.

Patterns leave a constant phase of every slice free, and with a probe or positions of its own also a ramp and a
translation of the object. Neighbours are compared where both see the object; each difference comes with its scatter,
from leaving out one block of pixels after another, so that noise which is alike over some pixels is not counted as
many measurements. The gauges of all tiles are the least squares over all differences with a prior of zero mean: its
width is what the differences show beyond their scatter, so that noise alone moves no tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph
import scipy.sparse.linalg

from stemtomo.backend import Array, array_namespace, fft2, ifft2, to_device_of, to_host

#: Edge in pixels of the blocks that are left out, and the largest translation that is looked for.
_BLOCK_PX, _REACH_PX = 16, 8
_ROUNDS, _SIGNIFICANT, _HUBER = 6, 3.0, 3.0
#: Most tiles whose phases are synchronised by a dense matrix.
_DENSE = 200
#: Shifts below this many pixels leave the rim of an overlap as it is.
_STILL_PX = 0.02


class Gauge(NamedTuple):
    """What a tile has more than the object: u(r) = phase_rad + ramp · (r - centre) + u_object(r - shift)."""

    phase_rad: np.ndarray
    """(slice,)."""
    ramp_rad_per_px: np.ndarray
    """(2,), y and x, in every slice."""
    shift_px: np.ndarray
    """(2,), y and x."""


class Difference(NamedTuple):
    """The gauge of tile ``first`` less that of tile ``second``, as measured where they overlap."""

    first: int
    second: int
    centre_px: np.ndarray
    """(2,), y and x: where the ramp of the difference is zero."""
    gauge: Gauge
    variance: Gauge
    """Of each number of the gauge, infinite where the overlap does not tell it."""
    leverage: Gauge
    """What that variance is in units of the noise of a pixel: it depends on the shape of the overlap alone."""


def difference(
    first: np.ndarray,
    second: np.ndarray,
    weight: np.ndarray,
    pair: tuple[int, int],
    corner_px: tuple[int, int] = (0, 0),
) -> Difference:
    """Return how the same pixels of two tiles differ.

    Parameters
    ----------
    first, second
        u (slice, y, x) where the tiles overlap; of complex ones the phase, their real part.
    weight
        (y, x), how much is known of each pixel by both.
    corner_px
        Where the first of these pixels lies.
    """
    u, v = np.asarray(first.real, np.float64), np.asarray(second.real, np.float64)
    slices, height, width = u.shape
    y, x = np.indices((height, width), dtype=np.float64)
    total = weight.sum()
    middle = np.array([(weight * y).sum(), (weight * x).sum()]) / total if total > 0 else np.zeros(2)
    plane = np.stack([y - middle[0], x - middle[1]])
    shift = _coarse_shift(u.sum(axis=0), v.sum(axis=0), weight)
    ramp = _coarse_ramp(u - shifted(v, shift), weight)
    phase = np.zeros(slices)
    variance = leverage = np.full(slices + 4, np.inf)
    for _ in range(_ROUNDS):
        moved, seen = shifted(v, shift), _inside(weight, shift)
        off = np.exp(1j * (u - moved - np.tensordot(ramp, plane, 1)))
        phase = np.angle((seen * off).sum(axis=(1, 2)))
        left = np.angle(off * np.exp(-1j * phase)[:, None, None])
        found, variance, leverage = _fit(left, (u + moved) / 2, plane, seen)
        phase, ramp = phase + found[:slices], ramp + found[slices : slices + 2]
        shift = np.clip(shift + found[slices + 2 :], -2 * _REACH_PX, 2 * _REACH_PX)
    split = [Gauge(a[:slices], a[slices : slices + 2], a[slices + 2 :]) for a in (variance, leverage)]
    return Difference(*pair, middle + corner_px, Gauge(phase, ramp, shift), *split)


def solve(differences: Sequence[Difference], centres_px: np.ndarray, slices: int) -> list[Gauge]:
    """Return the gauge of every tile, whose mean over the tiles is close to zero.

    Parameters
    ----------
    centres_px
        (tile, 2), y and x: where the ramp of a tile is zero, in the pixels of ``Difference.centre_px``.
    """
    count = len(centres_px)
    zero = Gauge(np.zeros(slices), np.zeros(2), np.zeros(2))
    measured = [d for d in differences if np.isfinite(d.variance.phase_rad).all()]
    if not measured:
        return [zero] * count
    pairs = np.array([(d.first, d.second) for d in measured])
    ramps = _spread(pairs, count, *_columns(measured, "ramp_rad_per_px"))
    shifts = _spread(pairs, count, *_columns(measured, "shift_px"))
    places = np.array([d.centre_px for d in measured])
    arms = [places - centres_px[pairs[:, side]] for side in (0, 1)]
    # At the place of each difference, phases differ by those of the tiles and by what their ramps add up to there.
    moved = shifts[pairs[:, 0]] - shifts[pairs[:, 1]]
    leaning = (ramps[pairs[:, 0]] * arms[0]).sum(axis=1) - (ramps[pairs[:, 1]] * (arms[1] - moved)).sum(axis=1)
    phases, variances = _columns(measured, "phase_rad")
    phases = phases - leaning[:, None]
    start = np.stack([_synchronised(pairs, count, p, v) for p, v in zip(phases.T, variances.T, strict=True)], axis=1)
    step = start[pairs[:, 0]] - start[pairs[:, 1]]
    phases = step + np.angle(np.exp(1j * (phases - step)))
    found = _spread(pairs, count, phases, variances)
    return [Gauge(*each) for each in zip(found, ramps, shifts, strict=True)]


def without(phase: Array, gauge: Gauge, centre_px: np.ndarray) -> Array:
    """Return u (slice, y, x) of a tile less its gauge; ``centre_px`` is where its ramp is zero, in its own pixels."""
    moved = shifted(phase, -gauge.shift_px) if np.any(gauge.shift_px) else phase
    y, x = (np.arange(n) - c for n, c in zip(phase.shape[1:], centre_px, strict=True))
    ramp = gauge.ramp_rad_per_px[0] * y[:, None] + gauge.ramp_rad_per_px[1] * x
    return (moved - to_device_of(gauge.phase_rad[:, None, None] + ramp, phase)).astype(phase.dtype)


def without_ramp_to(probe: Array, told: Array) -> Array:
    """Return the modes (mode, y, x) of ``probe`` without the ramp that they have more than those of ``told``.

    Patterns do not tell a ramp of the probe against one of the object: exp(i g·r) of all modes, the one that comes
    closest to ``told`` in least squares, goes.
    """
    height, width = probe.shape[1:]
    y, x = np.indices((height, width)) - np.array([height / 2, width / 2])[:, None, None]
    basis = np.stack([np.ones((height, width)), y / height, x / width])
    modes, wanted = (np.asarray(to_host(each), np.complex128) for each in (probe, told))
    turns = np.array([np.angle((modes * wanted.conj()).sum()), 0.0, 0.0])
    normal = np.einsum("ayx,byx,myx->ab", basis, basis, np.abs(modes) ** 2)
    for _ in range(_ROUNDS):
        turned = modes * np.exp(-1j * np.tensordot(turns, basis, 1))
        turns = turns + np.linalg.solve(normal, np.einsum("ayx,myx->a", basis, (wanted.conj() * turned).imag))
    turns[0] = 0.0
    ramp = np.exp(-1j * np.tensordot(turns, basis, 1))
    return (probe * to_device_of(ramp, probe)).astype(probe.dtype)


def turn_to(probe: Array, told: Array) -> Array:
    """Return the unitary matrix (mode, mode) that turns modes (mode, y, x) until they are next to those told.

    The intensities of patterns are the same for all turns, so that modes of several fits are no sum before that.
    """
    xp = array_namespace(probe)
    overlap = told.reshape(len(told), -1) @ probe.reshape(len(probe), -1).conj().T
    left, _, right = xp.linalg.svd(overlap)
    return left @ right


def turned(modes: Array, turn: Array) -> Array:
    """Return modes (mode, y, x) turned by a matrix (mode, mode)."""
    return (turn @ modes.reshape(len(modes), -1)).reshape(modes.shape)


def shifted(phase: Array, shift_px: np.ndarray) -> Array:
    """Return u (slice, y, x) moved by ``shift_px`` (y, x), by Fourier ramps of each layer mirrored at its edges."""
    if not np.any(shift_px):
        return phase
    xp = array_namespace(phase)
    height, width = phase.shape[1:]
    # Without mirrors what leaves one edge would come in at the other, with a step between.
    mirrored = xp.concatenate([phase, phase[:, ::-1]], axis=1)
    mirrored = xp.concatenate([mirrored, mirrored[:, :, ::-1]], axis=2)
    ky, kx = (np.fft.fftfreq(2 * n) for n in (height, width))
    ramp = np.exp(-2j * np.pi * (ky[:, None] * shift_px[0] + kx * shift_px[1]))
    moved = ifft2(fft2(mirrored.astype(np.complex128)) * to_device_of(ramp, mirrored))[:, :height, :width]
    return (moved if xp.iscomplexobj(phase) else moved.real).astype(phase.dtype)


def blended(mean: Array, transmission: Array) -> Array:
    """Return u (slice, y, x) of the blended ``transmission``, on the branch of the phase on which ``mean`` u lies."""
    xp = array_namespace(mean)
    phase = mean.real + xp.angle(transmission * xp.exp(-1j * mean.real))
    if not xp.iscomplexobj(mean):
        return phase.astype(mean.dtype)
    size = xp.abs(transmission)
    return (phase - 1j * xp.log(xp.where(size > 0, size, 1))).astype(mean.dtype)


def _inside(weight: np.ndarray, shift_px: np.ndarray) -> np.ndarray:
    """Return ``weight`` (y, x), zero at the rim that a shift brings in from outside."""
    rim = 0 if np.abs(shift_px).max() < _STILL_PX else int(np.ceil(np.abs(shift_px).max())) + 1
    if rim == 0 or min(weight.shape) <= 3 * rim:
        return weight
    kept = np.zeros_like(weight)
    kept[rim:-rim, rim:-rim] = weight[rim:-rim, rim:-rim]
    return kept


def _fit(
    left: np.ndarray, picture: np.ndarray, plane: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what is left of phases, ramp and translation, their variances by leaving out blocks, and leverages."""
    slices, height, width = left.shape
    count = slices + 4
    edges = [np.arange(0, n, _BLOCK_PX) for n in (height, width)]
    blocks = len(edges[0]) * len(edges[1])
    normal, right = np.zeros((blocks, count, count)), np.zeros((blocks, count))
    ones = np.ones((1, height, width))
    for index in range(slices):
        slope = np.stack(np.gradient(picture[index]))
        basis = np.concatenate([ones, plane, -slope])
        where = np.r_[index, slices : slices + 4]
        for a, one in zip(where, basis, strict=True):
            right[:, a] += _per_block(weight * one * left[index], edges)
            for b, other in zip(where, basis, strict=True):
                normal[:, a, b] += _per_block(weight * one * other, edges)
    size = np.sqrt(np.diagonal(normal.sum(axis=0)))
    told = size > 1e-9 * size.max(initial=0.0)
    size = np.where(told, size, 1)
    normal, right = normal / np.outer(size, size), right / size
    floor = 1e-6 * np.eye(count)
    whole_normal, whole_right = normal.sum(axis=0) + floor, right.sum(axis=0)
    found = np.linalg.solve(whole_normal, whole_right) / size
    used = np.flatnonzero(np.trace(normal, axis1=1, axis2=2) > 1e-6)
    if len(used) < 3:
        return found, np.full(count, np.inf), np.full(count, np.inf)
    without_one = np.linalg.solve(whole_normal - normal[used], (whole_right - right[used])[..., None])[..., 0] / size
    spread = (len(used) - 1) / len(used) * ((without_one - without_one.mean(axis=0)) ** 2).sum(axis=0)
    leverage = np.diagonal(np.linalg.inv(whole_normal)) / size**2
    # A difference of nothing at all still has the scatter of rounding.
    return np.where(told, found, 0), np.where(told, spread + 1e-16 * leverage, np.inf), leverage


def _per_block(image: np.ndarray, edges: Sequence[np.ndarray]) -> np.ndarray:
    return np.add.reduceat(np.add.reduceat(image, edges[0], axis=0), edges[1], axis=1).ravel()


def _coarse_shift(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Whole pixels by which ``first`` lies beyond ``second``, where their slopes agree best; zero without slopes."""
    window = weight / max(weight.max(), 1e-30)
    slopes = [[(slope - slope.mean()) * window for slope in np.gradient(image)] for image in (first, second)]
    shape = [2 * n for n in first.shape]
    found = sum(
        np.fft.irfft2(np.fft.rfft2(a, shape) * np.fft.rfft2(b, shape).conj(), shape)
        for a, b in zip(*slopes, strict=True)
    )
    reach = [min(_REACH_PX, n // 4) for n in first.shape]
    near = np.roll(np.asarray(found), reach, axis=(0, 1))[: 2 * reach[0] + 1, : 2 * reach[1] + 1]
    if near.max() <= 1.000001 * near[tuple(reach)]:
        return np.zeros(2)
    return np.array(np.unravel_index(int(near.argmax()), near.shape), np.float64) - reach


def _coarse_ramp(off: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Slope (2,), y and x in rad per pixel, of phase differences (slice, y, x), from their strongest frequency."""
    shape = [4 * n for n in weight.shape]
    power = (np.abs(np.fft.fft2(weight * np.exp(1j * off), shape)) ** 2).sum(axis=0)
    best = np.unravel_index(int(power.argmax()), power.shape)
    return np.array([2 * np.pi * np.fft.fftfreq(n)[k] for n, k in zip(shape, best, strict=True)])


def _columns(measured: Sequence[Difference], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the values (pair, kind) and their variances, of noise that is the same in all overlaps.

    Few blocks tell the noise of one overlap badly: what all tell together goes with the leverage of each.
    """
    values, variance, leverage = (
        np.array([getattr(getattr(d, part), name) for d in measured]) for part in ("gauge", "variance", "leverage")
    )
    known = np.isfinite(variance)
    noise = (np.where(known, variance, 0) / leverage).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    return values, np.where(known, noise * leverage, np.inf)


def _spread(pairs: np.ndarray, count: int, values: np.ndarray, variances: np.ndarray) -> np.ndarray:
    """Return the (tile, kind) values whose differences (pair, kind) are known with ``variances``, shrunk to zero."""
    found = np.zeros((count, values.shape[1]))
    for kind in range(values.shape[1]):
        known = np.isfinite(variances[:, kind])
        told, variance, ends = values[known, kind], variances[known, kind], pairs[known]
        if not known.any() or (told**2 / variance).mean() <= _SIGNIFICANT**2:
            continue  # nothing, or less than three times what noise alone makes of it: left as they are
        signs, rows = np.tile([1.0, -1.0], len(told)), np.repeat(np.arange(len(told)), 2)
        tied = scipy.sparse.csr_matrix((signs, (rows, ends.ravel())), shape=(len(told), count))
        prior = float((told**2 - variance).mean() / 2)
        prior = prior if prior > 0 else float(np.median(variance))
        trust = np.ones(len(told))
        for _ in range(3):  # Huber's weights: a pair whose measurement went wrong does not pull its tiles along
            weights = scipy.sparse.diags(trust / variance)
            normal = tied.T @ weights @ tied + scipy.sparse.identity(count) / prior
            found[:, kind] = scipy.sparse.linalg.spsolve(normal.tocsc(), tied.T @ (weights @ told))
            size = np.abs(told - tied @ found[:, kind]) / np.sqrt(variance)
            usual = max(1.4826 * float(np.median(size)), 1e-6)
            trust = np.minimum(1, _HUBER * usual / np.maximum(size, 1e-30))
    return found


def _synchronised(pairs: np.ndarray, count: int, phases: np.ndarray, variances: np.ndarray) -> np.ndarray:
    """Return phases (tile,) close to those whose differences are ``phases`` up to whole turns.

    They are those of the leading eigenvector of the Hermitian matrix of the differences (angular synchronisation;
    Singer, Appl. Comput. Harmon. Anal. 30, 20 (2011)).
    """
    weight = 1 / (variances + np.median(variances) + 1e-12)
    degree = np.bincount(pairs.ravel(), np.repeat(weight, 2), minlength=count)
    scale = 1 / np.sqrt(np.where(degree > 0, degree, 1))
    told = scale[pairs[:, 0]] * scale[pairs[:, 1]] * weight * np.exp(1j * phases)
    ends = (np.r_[pairs[:, 0], pairs[:, 1]], np.r_[pairs[:, 1], pairs[:, 0]])
    matrix = scipy.sparse.csr_matrix((np.r_[told, told.conj()], ends), shape=(count, count))
    # Tiles that no chain of differences ties to others have leading eigenvectors of their own.
    islands, island = scipy.sparse.csgraph.connected_components(abs(matrix), directed=False)
    found = np.zeros(count)
    for number in range(islands):
        members = np.flatnonzero(island == number)
        leading = _leading_eigenvector(matrix[members][:, members])
        found[members] = np.angle(leading * np.exp(-1j * np.angle(leading.sum())))
    return found


def _leading_eigenvector(matrix: scipy.sparse.csr_matrix) -> np.ndarray:
    size = matrix.shape[0]
    if size <= _DENSE:
        return np.asarray(np.linalg.eigh(matrix.toarray())[1][:, -1])
    return np.asarray(
        scipy.sparse.linalg.eigsh(matrix, 1, which="LA", v0=np.ones(size, np.complex128), tol=1e-6)[1][:, 0]
    )
