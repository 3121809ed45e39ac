"""Where each probe position's window lies on the grid of the object."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class ObjectGrid:
    """The pixel grid of an object and the window of every position in it.

    Parameters
    ----------
    shape_yx
        Object pixels; the rotation centre is index n // 2 of each axis.
    pixel_angstrom_yx
        Object pixel in Å.
    window_yx
        Pixels of a window (those of the detector).
    corners
        (position, 2), rows and columns of each window's first pixel, int64.
    shifts_px
        (position, 2), x and y, what is left of the position below a pixel, within ±0.5.
    periodic
        Whether windows wrap around the object.
    """

    shape_yx: tuple[int, int]
    pixel_angstrom_yx: tuple[float, float]
    window_yx: tuple[int, int]
    corners: np.ndarray
    shifts_px: np.ndarray
    periodic: bool = False

    @property
    def on_pixels(self) -> bool:
        """Whether every position falls on a pixel, so that no probe has to be shifted."""
        return bool(np.abs(self.shifts_px).max(initial=0.0) < 1e-6)


def tile(grid: ObjectGrid, where: np.ndarray) -> tuple[ObjectGrid, tuple[tuple[int, int], tuple[int, int]]]:
    """Return the grid of the positions ``where`` alone, and the window ((y0, y1), (x0, x1)) of the object it covers.

    Tiles own disjoint positions; their windows overlap by what the patterns reach.

    Raises
    ------
    ValueError
        For a periodic object, whose windows wrap.
    """
    if grid.periodic:
        raise ValueError("a periodic object cannot be cut into tiles: its windows wrap around")
    first = grid.corners[where].min(axis=0)
    last = grid.corners[where].max(axis=0) + np.asarray(grid.window_yx)
    shape = (int(last[0] - first[0]), int(last[1] - first[1]))
    local = replace(grid, shape_yx=shape, corners=grid.corners[where] - first, shifts_px=grid.shifts_px[where])
    return local, ((int(first[0]), int(last[0])), (int(first[1]), int(last[1])))


def object_grid(
    positions_angstrom: np.ndarray,
    window_yx: tuple[int, int],
    pixel_angstrom_yx: tuple[float, float],
    period_angstrom_yx: tuple[float, float] | None = None,
    margin_px: int = 2,
) -> ObjectGrid:
    """Lay the smallest object grid that holds every window, symmetric about the rotation centre.

    Parameters
    ----------
    positions_angstrom
        (position, 2), columns x, y; the rotation centre is (0, 0).
    period_angstrom_yx
        Repeat of a periodic specimen, which must be a whole number of pixels; ``None`` for an open one.
    margin_px
        Pixels added on every side, so that positions may be refined.

    Raises
    ------
    ValueError
        If the period is not a whole number of pixels.
    """
    pixels = positions_angstrom[:, ::-1] / np.asarray(pixel_angstrom_yx)
    whole = np.rint(pixels).astype(np.int64)
    shifts_px = np.ascontiguousarray((pixels - whole)[:, ::-1])
    half = np.asarray(window_yx) // 2
    if period_angstrom_yx is not None:
        shape = np.asarray(period_angstrom_yx) / np.asarray(pixel_angstrom_yx)
        if np.abs(shape - np.rint(shape)).max() > 1e-3:
            raise ValueError(
                f"the period of the specimen is {tuple(shape)} pixels (y, x); a periodic object needs whole pixels"
            )
        size = np.rint(shape).astype(int)
    else:
        reach = np.maximum(-(whole - half).min(axis=0), (whole - half + np.asarray(window_yx)).max(axis=0)) + margin_px
        size = 2 * reach
    corners = whole - half + size // 2
    return ObjectGrid(
        shape_yx=(int(size[0]), int(size[1])),
        pixel_angstrom_yx=pixel_angstrom_yx,
        window_yx=window_yx,
        corners=np.ascontiguousarray(corners),
        shifts_px=shifts_px,
        periodic=period_angstrom_yx is not None,
    )


def spread_batches(count: int, batches: int, seed: int) -> list[np.ndarray]:
    """Split ``count`` positions into ``batches`` that each cover the whole scan: sorted indices of random subsets."""
    order = np.random.default_rng(seed).permutation(count)
    return [np.sort(order[start::batches]) for start in range(min(batches, count))]
