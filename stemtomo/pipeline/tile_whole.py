"""What looks at a whole object that is in tiles: once an epoch its layers are put together, changed, and cut again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from stemtomo.algorithms.ptychography import solver
from stemtomo.algorithms.ptychography.constraints import Constraints
from stemtomo.algorithms.ptychography.tiles import Rectangle
from stemtomo.backend import Array
from stemtomo.distributed import Parts
from stemtomo.pipeline.tile_fields import Field
from stemtomo.pipeline.tile_steps import owned_pixels


@dataclass(frozen=True)
class WholeFilter:
    """Constraints that no window of an object can keep on its own.

    Parameters
    ----------
    constraints
        What is done after an epoch to all layers of the object.
    shape_yx
        Of the whole object.
    """

    constraints: Constraints
    shape_yx: tuple[int, int]

    def applied(self, states: Parts, fields: Parts, windows: Sequence[Rectangle]) -> Parts:
        """Return the states of all tiles behind the filter, which is one task that holds the whole object."""
        numbers = list(range(len(states)))
        # Every pixel comes from one tile: those that share it hold the same value.
        phase = states.map(tile_owned_phase, list(windows), each=[numbers]).sum_into(self.shape_yx, windows)
        lit = None
        if self.constraints.vacuum_percentile is not None:
            lit = states.map(tile_told_illumination, each=[fields]).sum_into(self.shape_yx, windows)
        whole = states.executor.submit_at(None, object_filtered, phase, lit, self.constraints)
        return states.map(tile_with_phase, each=[states.cut(whole, windows)])


# -- tasks, under the names that a dashboard shows ---------------------------------------------------------------------


def tile_owned_phase(state: solver.State, windows: Sequence[Rectangle], number: int) -> Array:
    """Return u of a tile, zero where a tile before it holds the same pixels."""
    return state.phase * owned_pixels(windows, number, state.phase)


def tile_told_illumination(state: solver.State, part: Field) -> Array:
    """Return the illumination of a tile's window by its own positions, where the scan has them."""
    return solver.illumination(state.probe, part.model.grid)


def object_filtered(phase: Array, lit: Array | None, constraints: Constraints) -> Array:
    """Return u (layer, Y, X) of the whole object behind ``constraints``; ``lit`` is its illumination, if that tells."""
    state = solver.State(phase, np.zeros((1, 1, 1)))
    return constraints.after_epoch(state, phase[0].real if lit is None else lit).phase


def tile_with_phase(state: solver.State, phase: Array) -> solver.State:
    """Return the state of a tile with another object."""
    return replace(state, phase=phase)
