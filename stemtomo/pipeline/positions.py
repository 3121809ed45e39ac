"""What ptychography says about the scan of a tilt whose probe positions it refined."""

from __future__ import annotations

from typing import Any

import numpy as np

from stemtomo.algorithms.ptychography import solver
from stemtomo.algorithms.ptychography.positions import Positions, affine_fit
from stemtomo.backend import to_host
from stemtomo.pipeline.config import PtychographySettings

#: Share of the epochs with moving positions in which the scan keeps its affine shape, where it may change at all.
_AFFINE_AFTER = 2 / 3


def position_phases(settings: PtychographySettings, epochs: int) -> tuple[int | None, int | None]:
    """Return the first epochs that move the positions, and let the scan change its affine shape; ``None`` for never."""
    first = settings.refine_positions_from_epoch
    if first is None or first >= epochs:
        return None, None
    return first, first + round(_AFFINE_AFTER * (epochs - first)) if settings.refine_scan_affine else None


def position_variables(told_angstrom: np.ndarray, state: solver.State) -> dict[str, tuple[tuple[str], np.ndarray]]:
    """Return the refined positions as variables of the result, in Å."""
    refined = told_angstrom + _moved(told_angstrom, state)
    return {name: (("position",), refined[:, n]) for n, name in enumerate(("position_x", "position_y"))}


def affine_attrs(told_angstrom: np.ndarray, state: solver.State) -> dict[str, Any]:
    """Return scale, rotation and shear of the refined scan, and how far single positions lie off it, rms in pm."""
    moved = _moved(told_angstrom, state)
    affine = affine_fit(told_angstrom, told_angstrom + moved)
    off = told_angstrom + moved - told_angstrom @ affine.matrix.T - affine.shift_angstrom
    return {**affine.to_attrs(), "jitter_rms_pm": float(100 * np.sqrt((off**2).mean()))}


def _moved(told_angstrom: np.ndarray, state: solver.State) -> np.ndarray:
    moved = state.extra.get(Positions.name)
    return np.zeros_like(told_angstrom) if moved is None else to_host(moved)
