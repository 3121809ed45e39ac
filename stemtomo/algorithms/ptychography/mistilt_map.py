"""Extended adaptive propagator: a mistilt of its own for every position, smooth along the scan.

A bent crystal, or grains beside one another, have no single mistilt. The map is theta = theta_0 + S v with a Gaussian S
over neighbouring positions, so that the search sees the smoothed map and its exact gradient, S^T of that of every
position. A probe that lights two grains at once has no tilt of its own: the map is blurred by the width of the probe,
and says nothing in vacuum, where it follows its neighbours. Source: Sha et al., Sci. Adv. 8, eabn2275 (2022).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from stemtomo.algorithms.ptychography import adaptive
from stemtomo.algorithms.ptychography.adaptive import Geometry, Stack
from stemtomo.algorithms.ptychography.mistilt import Data, inverse_curvatures, object_scale, vacuum
from stemtomo.algorithms.ptychography.tiles import Rectangle
from stemtomo.algorithms.quasi_newton import Iterate, Point, minimise
from stemtomo.backend import Array, to_host

#: Largest change of a mistilt in an iteration.
LARGEST_STEP_RAD = 2e-3
#: The kernel is cut where it has fallen to exp(-4.5).
_CUT = 3.0


@dataclass(frozen=True)
class RasterGaussian:
    """A Gaussian over the neighbours of a raster, cut at three standard deviations; of a step along y and x in Å."""

    step_angstrom_yx: tuple[float, float]
    width_angstrom: float

    @property
    def reach_yx(self) -> tuple[int, int]:
        """Positions along y and x that it reaches."""
        y, x = (int(_CUT * self.width_angstrom / step + 1e-9) for step in self.step_angstrom_yx)
        return y, x

    def around(self, own: Rectangle, shape_yx: tuple[int, int]) -> Rectangle:
        """Return the rectangle of a scan of ``shape_yx`` that positions in the rectangle ``own`` reach."""
        y, x = (
            (max(0, start - reach), min(length, stop + reach))
            for (start, stop), reach, length in zip(own, self.reach_yx, shape_yx, strict=True)
        )
        return y, x

    def spread(self, raster: np.ndarray, power: int = 1) -> np.ndarray:
        """Return the sum of a raster (..., y, x) over neighbours, weighted with a ``power`` of the Gaussian.

        It is its own adjoint, and adds in the same order at every position, whatever part of a scan the raster is.
        """
        down, height = self.reach_yx[0], raster.shape[-2]
        y, x = (
            step * np.arange(-reach, reach + 1)
            for step, reach in zip(self.step_angstrom_yx, self.reach_yx, strict=True)
        )
        square = (y[:, None] ** 2 + x**2) / self.width_angstrom**2
        weights = np.where(square <= _CUT**2 * (1 + 1e-9), np.exp(-0.5 * power * square), 0.0)
        found = np.zeros(raster.shape)
        for line, offset in zip(weights, range(-down, down + 1), strict=True):
            first, last = max(0, -offset), min(height, height - offset)
            if first < last:
                rows = raster[..., first + offset : last + offset, :]
                found[..., first:last, :] += ndimage.correlate1d(
                    rows, line, axis=-1, output=np.float64, mode="constant"
                )
        return found


@dataclass(frozen=True)
class Smoothing:
    """The rows of S, and of its adjoint, that belong to the recorded positions in a rectangle of a scan.

    What its positions add to a raster of the rectangle ``own`` is needed in the rectangle ``wide`` of all of theirs.
    """

    gaussian: RasterGaussian
    own: Rectangle
    wide: Rectangle
    where: np.ndarray
    """(position,) flat indices into the rectangle ``own``."""
    norm: np.ndarray
    """(position,): sum of the Gaussian over recorded neighbours."""
    weight: np.ndarray
    """(position,): sum of the squares of a column of S."""

    @classmethod
    def of(cls, gaussian: RasterGaussian, valid: np.ndarray, own: Rectangle | None = None) -> Smoothing:
        """Return that of the rectangle ``own``, or all, of a scan whose recorded positions ``valid`` (y, x) says."""
        whole = ((0, valid.shape[0]), (0, valid.shape[1]))
        own = whole if own is None else own
        wide = gaussian.around(own, (valid.shape[0], valid.shape[1]))
        wider = gaussian.around(wide, (valid.shape[0], valid.shape[1]))
        mask = _part(valid, wider, whole).astype(np.float64)
        norm = _part(gaussian.spread(mask), wide, wider)
        recorded = _part(mask, wide, wider)
        square = np.where(recorded > 0, 1 / np.maximum(norm, np.finfo(float).tiny) ** 2, 0.0)
        weight = _part(gaussian.spread(square, 2), own, wide)
        where = np.flatnonzero(_part(valid, own, whole))
        return cls(gaussian, own, wide, where, _part(norm, own, wide).ravel()[where], weight.ravel()[where])

    def raster(self, values: np.ndarray) -> np.ndarray:
        """Return values (position, axis) on the raster of the rectangle, (axis, y, x), zero where none is recorded."""
        (y0, y1), (x0, x1) = self.own
        found = np.zeros((values.shape[1], (y1 - y0) * (x1 - x0)))
        found[:, self.where] = values.T
        return found.reshape(-1, y1 - y0, x1 - x0)

    def smoothed(self, wide: np.ndarray) -> np.ndarray:
        """Return S of the values whose rasters make up ``wide`` (axis, y, x), (position, axis)."""
        return self._own(wide) / self.norm[:, None]

    def shares(self, slopes: np.ndarray) -> np.ndarray:
        """Return what slopes (position, axis) add to those of the values near them, as a raster (axis, y, x)."""
        return self.raster(slopes / self.norm[:, None])

    def adjoint(self, wide: np.ndarray) -> np.ndarray:
        """Return S^T of the slopes whose shares make up ``wide`` (axis, y, x), (position, axis)."""
        return self._own(wide)

    def _own(self, wide: np.ndarray) -> np.ndarray:
        return _part(self.gaussian.spread(wide), self.own, self.wide).reshape(len(wide), -1)[:, self.where].T


def _part(raster: np.ndarray, own: Rectangle, of: Rectangle) -> np.ndarray:
    y, x = (slice(start - first, stop - first) for (start, stop), (first, _) in zip(own, of, strict=True))
    return raster[..., y, x]


class MapFit(NamedTuple):
    """A fitted map of mistilts."""

    geometry: Geometry
    """With a mistilt (position, 2) in rad, x and y."""
    phase: Array
    """u of the tied slices, (1, Y, X)."""
    losses: list[float]
    """Per pattern, after every iteration."""


def fit_map(
    start: Geometry,
    stack: Stack,
    data: Data,
    smoothing: Smoothing,
    iterations: int,
    phase: Array | None = None,
    on_iteration: Callable[[int, float], bool | None] | None = None,
) -> MapFit:
    """Fit the object and a mistilt per position, from one mistilt ``start`` for all.

    Parameters
    ----------
    stack
        With tied slices: free ones trade any drift for a tilt.
    smoothing
        That of all patterns.

    Raises
    ------
    ValueError
        If slices are free.
    """
    if not stack.tied:
        raise ValueError("a map of mistilts needs tied slices: free ones trade any drift for a tilt")
    everything = np.arange(len(smoothing.where))
    base = np.asarray(start.tilt_rad_xy, dtype=np.float64)

    def geometry_at(values: np.ndarray) -> Geometry:
        return replace(start, tilt_rad_xy=base + smoothing.smoothed(smoothing.raster(values)))

    def evaluate(point: Point) -> tuple[float, Point]:
        trial = geometry_at(point[1])
        sums, moments = adaptive.gradients(point[0], data.probe, trial, stack, data.counts, everything, data.mask)
        slopes = to_host(adaptive.geometry_slopes(moments.entry, moments.gaps, trial, stack, trial.tilt_rad_xy))
        return sums.loss, (sums.phase, smoothing.adjoint(smoothing.shares(slopes[:, :2])))

    losses: list[float] = []

    def follow(iterate: Iterate) -> bool:
        losses.append(iterate.loss / len(everything))
        return bool(on_iteration and on_iteration(len(losses) - 1, losses[-1]))

    found = minimise(
        evaluate,
        (vacuum(stack, data.probe) if phase is None else phase, np.zeros((len(everything), 2))),
        (object_scale(start, stack, data, everything), tilt_scale(start, stack, data, smoothing)),
        iterations,
        largest_step=(None, LARGEST_STEP_RAD),
        on_iteration=follow,
    )
    return MapFit(geometry_at(found.point[1]), found.point[0], losses)


def tilt_scale(start: Geometry, stack: Stack, data: Data, smoothing: Smoothing) -> np.ndarray:
    """Return the inverse curvature of every value, (position, 1): a value moves all positions that it reaches."""
    return float(inverse_curvatures(start, stack, data, 1)[0]) / np.maximum(smoothing.weight, 1e-3)[:, None]
