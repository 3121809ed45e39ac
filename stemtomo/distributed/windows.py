"""Windows: rectangles of a global index space, and sums of what parts hold in them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, TypeAlias

import numpy as np

from stemtomo.backend import Array, array_namespace
from stemtomo.distributed.trees import Tree, map_tree

Window: TypeAlias = tuple[tuple[int, int], ...]
"""``((start, stop), ...)`` on the trailing axes of a global array: 1 to 3 axes, pixels start <= i < stop."""


def full_window(shape: Sequence[int]) -> Window:
    """Return the window that holds all of ``shape``."""
    return tuple((0, int(length)) for length in shape)


def window_shape(window: Window) -> tuple[int, ...]:
    """Return the number of pixels of ``window`` along each of its axes."""
    return tuple(stop - start for start, stop in window)


def bounding_window(windows: Sequence[Window]) -> Window:
    """Return the smallest window that holds all ``windows``."""
    return tuple((min(s for s, _ in pairs), max(e for _, e in pairs)) for pairs in zip(*windows, strict=True))


def grown(window: Window, margin: int, within: Window) -> Window:
    """Return ``window`` with ``margin`` more pixels on every side, as far as ``within`` reaches."""
    return tuple(
        (max(low, start - margin), min(high, stop + margin))
        for (start, stop), (low, high) in zip(window, within, strict=True)
    )


def intersection(a: Window, b: Window) -> Window | None:
    """Return the pixels that both windows hold, or ``None``."""
    common = tuple((max(a0, b0), min(a1, b1)) for (a0, a1), (b0, b1) in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None


def checked(windows: Sequence[Sequence[Sequence[int]]], count: int) -> list[Window]:
    """Return ``windows`` as plain integers, one for each of ``count`` parts and all of one rank.

    Raises
    ------
    ValueError
        If the number, the rank or the order of start and stop is wrong.
    """
    plain: list[Window] = [tuple((int(start), int(stop)) for start, stop in window) for window in windows]
    if len(plain) != count:
        raise ValueError(f"{len(plain)} windows were given for {count} parts; give one per part")
    for index, window in enumerate(plain):
        if len(window) != len(plain[0]) or not 1 <= len(window) <= 3:
            raise ValueError(f"window {index} is {window}; windows have one to three axes, all the same number")
        if any(start > stop for start, stop in window):
            raise ValueError(f"window {index} is {window}; start must not exceed stop")
    return plain


def overlapping(sources: Sequence[Window], targets: Sequence[Window]) -> list[list[int]]:
    """For each target, list the sources that share a pixel with it, in ascending order."""
    a = np.asarray(sources)[None]
    b = np.asarray(targets)[:, None]
    shared = np.minimum(a[..., 1], b[..., 1]) > np.maximum(a[..., 0], b[..., 0])
    return [np.flatnonzero(row).tolist() for row in shared.all(axis=-1)]


def assemble(
    target: Window, windows: Sequence[Window], values: Sequence[Tree], entries: Sequence[Hashable] | None = None
) -> Tree:
    """Sum, in the given order, what ``values`` hold inside ``target``; zero where none of them reaches.

    Parameters
    ----------
    target
        The window of the result.
    windows
        Where each value lies.
    values
        Trees of arrays of shape (..., *window shape); ``None`` contributes nothing.
    entries
        Per value, the entry of it that holds the tree, or ``None`` where it is the tree.

    Returns
    -------
    Tree of arrays of shape (..., *target shape); ``None`` if every value is ``None``. A single value that fills the
    target is returned as it is.
    """
    if entries is not None:
        values = [value if entry is None else value[entry] for value, entry in zip(values, entries, strict=True)]
    present = [(window, value) for window, value in zip(windows, values, strict=True) if value is not None]
    if not present:
        return None
    if len(present) == 1 and present[0][0] == target:
        return present[0][1]
    where = [window for window, _ in present]
    return map_tree(lambda *arrays: _assemble_leaf(target, where, arrays), *(value for _, value in present))


def cut(array: Tree, window: Window) -> Tree:
    """Return a copy of the rectangle ``window`` of the trailing axes of every array of a tree."""

    def leaf(full: Array) -> Array:
        whole = full_window(full.shape[-len(window) :])
        if len(whole) < len(window) or bounding_window((window, whole)) != whole:
            raise ValueError(f"the window {window} reaches beyond an array of shape {full.shape}")
        return full if window == whole else full[_slices(window, whole)].copy()

    return map_tree(leaf, array)


def _assemble_leaf(target: Window, windows: Sequence[Window], arrays: Sequence[Array]) -> Array:
    rank = len(target)
    for window, array in zip(windows, arrays, strict=True):
        if tuple(array.shape[-rank:]) != window_shape(window):
            raise ValueError(f"a part's array of shape {array.shape} does not fit its window {window}")
    if len(arrays) == 1 and intersection(target, windows[0]) == target:
        return arrays[0][_slices(target, windows[0])].copy()  # a view would keep the whole array in memory
    xp = array_namespace(*arrays)
    total = xp.zeros(arrays[0].shape[:-rank] + window_shape(target), np.result_type(*(array.dtype for array in arrays)))
    for window, array in zip(windows, arrays, strict=True):
        common = intersection(target, window)
        if common is not None:
            total[_slices(common, target)] += array[_slices(common, window)]
    return total


def _slices(window: Window, origin: Window) -> tuple[Any, ...]:
    pairs = zip(window, origin, strict=True)
    return (..., *(slice(start - first, stop - first) for (start, stop), (first, _) in pairs))
