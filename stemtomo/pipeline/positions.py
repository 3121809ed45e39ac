"""Where ptychography refines the probe positions of a tilt, and what it says about the scan."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from stemtomo.algorithms.ptychography import solver
from stemtomo.algorithms.ptychography.positions import Positions, affine_fit, moved_grid, seen_curvature
from stemtomo.backend import Array, to_host
from stemtomo.pipeline.config import PtychographySettings

#: Share of the epochs with moving positions in which the scan keeps its affine shape, where it may change at all.
_AFFINE_AFTER = 2 / 3


def solve_with_positions(
    state: solver.State,
    model: solver.Model,
    counts: Array,
    told_angstrom: np.ndarray,
    settings: PtychographySettings,
    rules: Sequence[solver.Rule],
    batches: Sequence[int],
    seed: int,
    tied: bool,
    regularise: Callable[[solver.State, int], solver.State] | None = None,
) -> tuple[solver.State, solver.Model, list[float]]:
    """Run the solver, with positions from the epoch on that the settings say; return the model with them in it.

    Parameters
    ----------
    told_angstrom
        (position, 2), x and y, where the scan has the recorded positions.
    tied
        The slices stay tied.
    regularise
        Called after every update with the state and the epoch; returns the state to go on with.
    """
    epochs = len(rules)
    first, affine = position_phases(settings, epochs)
    bounds = [0, epochs if first is None else first, epochs]
    if affine is not None:
        bounds.insert(2, affine)
    losses: list[float] = []
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        parameters: list[solver.Parameter] = []
        if number and begin < end:
            moved = state.extra.get(Positions.name)
            now = model if moved is None else replace(model, grid=moved_grid(model.grid, to_host(moved)))
            curvature = seen_curvature(state, now)
            positions = Positions(told_angstrom, curvature, keep_affine=number == 2)
            parameters.append(positions)
            if moved is None:
                moved = positions.start(curvature)
            state = replace(state, extra={**state.extra, Positions.name: moved})
        state, some = solver.solve(
            state,
            model,
            counts,
            rules=rules[:end],
            batches=batches[:end],
            probe_start=settings.probe_update_start_epoch,
            seed=seed,
            tied_epochs=epochs if tied else 0,
            parameters=parameters,
            regularise=regularise,
            first_epoch=begin,
        )
        losses += some
    if Positions.name in state.extra:
        model = replace(model, grid=moved_grid(model.grid, to_host(state.extra[Positions.name])))
    return state, model, losses


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
