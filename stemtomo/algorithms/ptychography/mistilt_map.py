"""Extended adaptive propagator: a mistilt of its own for every position, smooth along the scan.

A bent crystal, or grains beside one another, have no single mistilt. The map is theta = theta_0 + S v with a Gaussian S
over neighbouring positions, so that the search sees the smoothed map and its exact gradient, S^T of that of every
position. A probe that lights two grains at once has no tilt of its own: the map is blurred by the width of the probe,
and says nothing in vacuum, where it follows its neighbours. Source: Sha et al., Sci. Adv. 8, eabn2275 (2022).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.spatial import cKDTree

from stemtomo.algorithms.ptychography import adaptive
from stemtomo.algorithms.ptychography.adaptive import Geometry, Stack
from stemtomo.algorithms.ptychography.mistilt import Data, inverse_curvatures, object_scale, vacuum
from stemtomo.algorithms.quasi_newton import Iterate, Point, minimise
from stemtomo.backend import Array, to_host

_LARGEST_STEP_RAD = 2e-3
#: The kernel is cut where it has fallen to exp(-4.5).
_CUT = 3.0


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
    positions_angstrom: np.ndarray,
    smoothing_angstrom: float,
    iterations: int,
    phase: Array | None = None,
    on_iteration: Callable[[int, float], bool | None] | None = None,
) -> MapFit:
    """Fit the object and a mistilt per position, from one mistilt ``start`` for all.

    Parameters
    ----------
    stack
        With tied slices: free ones trade any drift for a tilt.
    positions_angstrom
        (position, 2), x and y, of all patterns.
    smoothing_angstrom
        Standard deviation of the Gaussian over neighbouring positions.

    Raises
    ------
    ValueError
        If slices are free.
    """
    if not stack.tied:
        raise ValueError("a map of mistilts needs tied slices: free ones trade any drift for a tilt")
    smoothing = kernel(positions_angstrom, smoothing_angstrom)
    everything = np.arange(len(positions_angstrom))
    base = np.asarray(start.tilt_rad_xy, dtype=np.float64)

    def geometry_at(values: np.ndarray) -> Geometry:
        return replace(start, tilt_rad_xy=base + smoothing @ values)

    def evaluate(point: Point) -> tuple[float, Point]:
        trial = geometry_at(point[1])
        sums, moments = adaptive.gradients(point[0], data.probe, trial, stack, data.counts, everything, data.mask)
        slopes = to_host(adaptive.geometry_slopes(moments.entry, moments.gaps, trial, stack, trial.tilt_rad_xy))
        return sums.loss, (sums.phase, smoothing.T @ slopes[:, :2])

    losses: list[float] = []

    def follow(iterate: Iterate) -> bool:
        losses.append(iterate.loss / len(everything))
        return bool(on_iteration and on_iteration(len(losses) - 1, losses[-1]))

    # A value moves all positions that its kernel reaches, and its curvature is theirs, weighted.
    weight = np.asarray(smoothing.power(2).sum(axis=0)).ravel()
    tilt_scale = float(inverse_curvatures(start, stack, data, 1)[0]) / np.maximum(weight, 1e-3)[:, None]
    found = minimise(
        evaluate,
        (vacuum(stack, data.probe) if phase is None else phase, np.zeros((len(everything), 2))),
        (object_scale(start, stack, data, everything), tilt_scale),
        iterations,
        largest_step=(None, _LARGEST_STEP_RAD),
        on_iteration=follow,
    )
    return MapFit(geometry_at(found.point[1]), found.point[0], losses)


def kernel(positions_angstrom: np.ndarray, width_angstrom: float) -> sparse.csr_array:
    """Return the Gaussian over neighbouring positions as a matrix (position, position); its rows add to one."""
    tree = cKDTree(positions_angstrom)
    pairs = tree.sparse_distance_matrix(tree, _CUT * width_angstrom, output_type="coo_matrix")
    weights = np.exp(-0.5 * (pairs.data / width_angstrom) ** 2)
    found = sparse.csr_array((weights, (pairs.row, pairs.col)), shape=pairs.shape)
    # Positions at no distance, such as each from itself, may be left out of a sparse matrix of distances.
    found = found - sparse.diags_array(found.diagonal()) + sparse.eye_array(len(positions_angstrom))
    return sparse.csr_array(sparse.diags_array(1 / np.asarray(found.sum(axis=1)).ravel()) @ found)
