"""A mistilt for every position of a tilt in tiles: the search of one piece, with its vectors where the tiles are.

A vector is the object in the window of a tile and the values of its positions. The map is smooth over neighbours: tiles
send each other the values at their edges, two numbers a position, and then what slopes there say about these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stemtomo import backend
from stemtomo.algorithms.ptychography import adaptive, solver
from stemtomo.algorithms.ptychography.adaptive import Geometry, Stack
from stemtomo.algorithms.ptychography.mistilt import Data, object_scale, vacuum
from stemtomo.algorithms.ptychography.mistilt_map import LARGEST_STEP_RAD, MapFit, Smoothing, tilt_scale
from stemtomo.algorithms.ptychography.tiles import Rectangle
from stemtomo.algorithms.ptychography.windows import ObjectGrid
from stemtomo.algorithms.quasi_newton import Arrays, Iterate, Point, Vector, minimise
from stemtomo.backend import Array
from stemtomo.distributed import Executor, Handle, Parts
from stemtomo.io.store import Store
from stemtomo.pipeline.mistilt import Found, model_of, prepared
from stemtomo.pipeline.mistilt_map import MappedTilt, gaussian_of
from stemtomo.pipeline.phase_results import result_of_solved
from stemtomo.pipeline.ptychography import Job, checked_electrons, good_pixels
from stemtomo.pipeline.tile_fields import Patterns
from stemtomo.pipeline.tile_layout import Layout
from stemtomo.pipeline.tile_search import TileVectors
from stemtomo.pipeline.tile_steps import owned_pixels


@dataclass(frozen=True)
class Mapped:
    """What a tile holds fixed: its positions in ``stack``, the probe in its plane, and the mistilt of all tiles."""

    stack: Stack
    data: Data
    """Without patterns."""
    start: Geometry
    smoothing: Smoothing
    patterns: Patterns

    def at(self, tilt_rad_xy: np.ndarray) -> Geometry:
        """Return the geometry with these mistilts beside the one of the start."""
        return replace(self.start, tilt_rad_xy=np.asarray(self.start.tilt_rad_xy, dtype=np.float64) + tilt_rad_xy)


@dataclass(frozen=True)
class MapVectors(TileVectors):
    """Products and sums of vectors of an object and the values of positions, whose steps are limited."""

    def dot(self, a: Vector, b: Vector) -> float:
        """Return the real part of the product over all pixels and values."""
        numbers = list(range(len(a)))
        return float(a.executor.gather(a.map(map_dot, list(self.windows), each=[b, numbers]).sum()))

    def allowed(self, direction: Vector, largest_step: Any) -> float:
        """Return the share of ``direction`` by which no value moves more than it may."""
        reach = direction.executor.gather(direction.map(map_reach).reduce(max))
        return min(1.0, LARGEST_STEP_RAD / reach) if reach > 0 else 1.0


def fit_in_tiles(
    start: Parts,
    tiles: Parts,
    windows: Sequence[Rectangle],
    rectangles: Sequence[tuple[Rectangle, Rectangle]],
    iterations: int,
    on_iteration: Callable[[Iterate], bool],
) -> tuple[Parts, Parts]:
    """Return object and mistilts of every tile after the search from the objects ``start``, and its last vector.

    Parameters
    ----------
    tiles
        A :class:`Mapped` each.
    windows
        The window of the object that each tile sees.
    rectangles
        Of the scan: those of each tile, and of all positions near them.
    """
    executor, scans, wide = start.executor, [own for own, _ in rectangles], [near for _, near in rectangles]

    def tilts(vector: Parts, to: Executor) -> Parts:
        here = Parts(to, vector.handles, vector.places)
        return here.map(map_raster, each=[tiles]).exchange(scans, wide, beside=here)

    def evaluate(vector: Parts) -> tuple[float, Parts]:
        together = executor.together()
        near = tilts(vector, together)
        here = Parts(together, vector.handles, vector.places)
        work = here.map(map_gradients, each=[tiles, near])
        shares = work.exchange(scans, wide, beside=here, of="shares")
        slopes = work.halo_sum(windows, of="phase").map(map_slopes, each=[shares, tiles])
        *sent, loss = together.send([*slopes.handles, work.pick("loss").sum()])
        return float(executor.gather(loss)), Parts(executor, tuple(sent), vector.places)

    lit = tiles.map(start_illumination).halo_sum(windows)
    diagonal = lit.map(map_scale, lit.map(largest_of).reduce(max), each=[tiles])
    begin = start.map(map_vector, each=[tiles])
    found = minimise(evaluate, begin, diagonal, iterations, on_iteration=on_iteration, vectors=MapVectors(windows))
    vector: Parts = found.point
    return vector.map(map_piece, each=[tiles, tilts(vector, executor)]), vector


def reconstruct_map(
    job: Job,
    layout: Layout,
    patterns: Parts,
    counted: Handle,
    found: Handle,
    on_epoch: Callable[[int, float], None],
) -> None:
    """Fit object and map of a tilt whose ``patterns`` are in tiles, and write them; an epoch is an iteration.

    Parameters
    ----------
    counted
        Electrons of all patterns, and their number.
    found
        Where the search starts from.
    """
    executor, cut = patterns.executor, layout.tiles()
    numbers, windows = list(range(len(cut))), [tile.window for tile in cut]
    scan, losses = Store.open(layout.path).scan(layout.tilt), list[float]()
    gaussian = gaussian_of(scan, layout.settings)
    rectangles = [(tile.scan, gaussian.around(tile.scan, scan.shape_yx)) for tile in cut]
    count = float(executor.gather(counted)["patterns"])

    def follow(iterate: Iterate) -> bool:
        losses.append(iterate.loss / count)
        on_epoch(len(losses) - 1, losses[-1])
        return False

    tiles = patterns.map(make_mapped, layout, counted, found, each=[numbers])
    start = tiles.map(start_object, found, each=[windows])
    pieces, _ = fit_in_tiles(start, tiles, windows, rectangles, layout.settings.epochs, follow)
    mean = pieces.map(tilt_sum).sum()
    lit = tiles.map(mean_illumination, mean).sum_into(layout.grid().shape_yx, windows)
    told = {"losses": losses}
    executor.gather(executor.submit(publish_map, job, layout, counted, found, told, list(pieces.handles), lit))


# -- tasks, under the names that a dashboard shows ---------------------------------------------------------------------


def make_mapped(patterns: Patterns, layout: Layout, counted: dict[str, float], found: Found, index: int) -> Mapped:
    """Return what a tile holds fixed."""
    store, tile = Store.open(layout.path), layout.tiles()[index]
    gaussian = gaussian_of(store.scan(layout.tilt), layout.settings)
    stack, data = _prepared(layout, counted, tile.grid, backend.to_device if backend.gpu_available() else np.asarray)
    return Mapped(stack, data, found.geometry, Smoothing.of(gaussian, store.valid(layout.tilt), tile.scan), patterns)


def start_object(part: Mapped, found: Found, window: Rectangle) -> Array:
    """Return the first object of a tile: vacuum, or its window of what the search for the geometry found."""
    if found.phase is None:
        return vacuum(part.stack, part.data.probe)
    (y0, y1), (x0, x1) = window
    return found.phase[:, y0:y1, x0:x1].copy()


def start_illumination(part: Mapped) -> Array:
    """Return the illumination of a tile's window by its own positions, with the mistilt of the start."""
    return adaptive.illumination(part.data.probe, part.start, part.stack, _all(part))


def largest_of(lit: Array) -> float:
    """Return the largest illumination of a tile."""
    return float(lit.max())


def map_scale(lit: Array, peak: float, part: Mapped) -> Point:
    """Return the inverse diagonals of a tile that the search begins with."""
    scale = object_scale(part.start, part.stack, part.data, _all(part), lit, peak)
    return scale, tilt_scale(part.start, part.stack, part.data, part.smoothing)


def map_vector(phase: Array, part: Mapped) -> Point:
    """Return the first vector of a tile: its object, and no mistilt of its own for any position."""
    return phase, np.zeros((len(part.smoothing.where), 2))


def map_raster(vector: Point, part: Mapped) -> np.ndarray:
    """Return the values of a tile on the raster of its rectangle, (2, y, x)."""
    return part.smoothing.raster(vector[1])


def map_gradients(vector: Point, part: Mapped, near: np.ndarray) -> dict[str, Any]:
    """Return loss and slope of the object of a tile, and what its slopes say about the values ``near`` it."""
    tilt, grid = part.smoothing.smoothed(near), part.stack.grid
    slopes, phase, loss = np.zeros(tilt.shape), vector[0] * 0, 0.0
    for numbers, counts in part.patterns.groups(_all(part)):
        some = replace(grid, corners=grid.corners[numbers], shifts_px=grid.shifts_px[numbers])
        stack, trial = replace(part.stack, grid=some), part.at(tilt[numbers])
        told = (trial, stack, counts, np.arange(len(numbers)), part.data.mask)
        sums, moments = adaptive.gradients(vector[0], part.data.probe, *told)
        found = adaptive.geometry_slopes(moments.entry, moments.gaps, trial, stack, trial.tilt_rad_xy)
        slopes[numbers] = backend.to_host(found)[:, :2]
        phase, loss = phase + sums.phase, loss + sums.loss
    return {"phase": phase, "loss": loss, "shares": part.smoothing.shares(slopes)}


def map_slopes(phase: Array, shares: np.ndarray, part: Mapped) -> Point:
    """Return the gradient of a tile."""
    return phase, part.smoothing.adjoint(shares)


def map_dot(a: Point, windows: Sequence[Rectangle], b: Point, number: int) -> float:
    """Return what a tile adds to a product: the pixels that are its own, and its values."""
    return Arrays().dot((a[0] * owned_pixels(windows, number, a[0]), a[1]), b)


def map_reach(vector: Point) -> float:
    """Return the largest value of a tile."""
    return float(np.abs(vector[1]).max())


def map_piece(vector: Point, part: Mapped, near: np.ndarray) -> dict[str, np.ndarray]:
    """Return what the result holds of a tile, in host memory."""
    return {"phase": backend.to_host(vector[0]), "tilt": part.at(part.smoothing.smoothed(near)).tilt_rad_xy}


def tilt_sum(piece: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the sum of the mistilts of a tile, and their number."""
    return {"tilt": piece["tilt"].sum(axis=0), "positions": len(piece["tilt"])}


def mean_illumination(part: Mapped, sums: dict[str, Any]) -> Array:
    """Return the illumination of a tile's window by its own positions, with the mean mistilt."""
    mean = replace(part.start, tilt_rad_xy=sums["tilt"] / sums["positions"])
    return solver.illumination(adaptive.entering_probe(part.data.probe, mean, part.stack), part.stack.grid)


def publish_map(
    job: Job,
    layout: Layout,
    counted: dict[str, float],
    found: Found,
    told: dict[str, Any],
    pieces: list[dict[str, np.ndarray]],
    lit: Array,
) -> None:
    """Put the tiles together and write the result of the tilt."""
    store, tiles, grid = Store.open(job.path, "r+"), layout.tiles(), layout.grid()
    detector, optics = store.detector(job.tilt), store.optics(job.tilt)
    phase = np.zeros((len(pieces[0]["phase"]), *grid.shape_yx), pieces[0]["phase"].dtype)
    for tile, piece in zip(tiles, pieces, strict=True):
        (y0, y1), (x0, x1) = tile.window
        phase[:, y0:y1, x0:x1] = piece["phase"]  # tiles agree where they overlap
    order = np.argsort(np.concatenate([tile.where for tile in tiles]))
    tilt = np.concatenate([piece["tilt"] for piece in pieces])[order]
    stack, data = _prepared(layout, counted, grid, np.asarray)
    settings = job.settings.with_mean_slice(found.geometry.slice_thickness_angstrom)
    here = found._replace(probe=backend.to_host(found.probe))
    model = model_of(here, grid, detector, optics, settings, good_pixels(store, job.tilt, settings))
    fit = MapFit(replace(found.geometry, tilt_rad_xy=tilt), phase, told["losses"])
    mapped = MappedTilt(fit, stack, data, model)
    dataset = result_of_solved(mapped.solved(), settings, optics, detector, lit)
    dataset = dataset.assign(found.variables()).assign(mapped.variables())
    dataset = dataset.assign_attrs({**found.attrs(settings.slices), **mapped.attrs(), "tiles": list(layout.tiles_yx)})
    store.write(job.group, dataset, job.provenance)


def _prepared(
    layout: Layout, counted: dict[str, float], grid: ObjectGrid, place: Callable[[np.ndarray], Array]
) -> tuple[Stack, Data]:
    """Return tied slices and the probe in its plane, of the positions of ``grid``, where ``place`` puts arrays."""
    store, settings = Store.open(layout.path), layout.settings
    mean = counted["electrons"] / counted["patterns"]
    electrons = checked_electrons(str(layout.path), layout.tilt, mean, settings.electrons_per_pattern)
    mask = good_pixels(store, layout.tilt, settings)
    mask = None if mask is None else place(mask)
    return prepared(store.optics(layout.tilt), grid, place(np.zeros(0)), electrons, settings, mask)


def _all(part: Mapped) -> np.ndarray:
    return np.arange(len(part.smoothing.where))
