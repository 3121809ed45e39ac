"""The patterns of a tile in joint tomography: where they are, what they count, and the gradients that they give."""

from __future__ import annotations

from typing import Any

import numpy as np

from stemtomo import backend
from stemtomo.algorithms.joint import solver
from stemtomo.algorithms.joint.view import View
from stemtomo.algorithms.ptychography.solver import Model
from stemtomo.backend import Array
from stemtomo.errors import FormatError
from stemtomo.io.store import Store
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.pipeline.joint_parts import Tilt
from stemtomo.pipeline.ptychography import checked_electrons, good_pixels
from stemtomo.pipeline.settings.joint import JointSettings
from stemtomo.pipeline.tile_fields import Resident, Streamed


def load_tile(job: tuple[Tilt, int], settings: JointSettings) -> dict[str, Any]:
    """Return the state of one tile: its own patterns, in memory or where they are, and the pixels that tell."""
    tilt, index = job
    where, store = tilt.tiles[index], Store.open(tilt.path)
    rows = tilt.recorded[where] // store.scan(tilt.number).shape_yx[1]
    rectangle = ((int(rows[0]), int(rows[-1]) + 1), (0, store.scan(tilt.number).shape_yx[1]))
    streamed = Streamed(store.path, tilt.number, rectangle, tilt.recorded[where])
    patterns = streamed.resident() if settings.resident else streamed
    mask = good_pixels(store, tilt.number, settings)
    mask = backend.to_device(mask) if mask is not None and backend.gpu_available() else mask
    state = {"tilt": tilt, "numbers": where, "grid": tilt.local(where)[0], "patterns": patterns, "mask": mask}
    return {**state, "most_electrons": settings.most_electrons}


def tile_counted(state: dict[str, Any]) -> dict[str, Any]:
    """Return the sum of the patterns of a tile, (qy, qx) float64, and their number.

    Raises
    ------
    FormatError
        If a pattern holds no electrons at all.
    """
    tilt: Tilt = state["tilt"]
    total, numbers = np.zeros(tilt.detector_yx), state["numbers"]
    for where, counts in state["patterns"].groups(np.arange(len(numbers))):
        empty = np.flatnonzero(backend.to_host(counts.reshape(len(counts), -1).max(axis=1)) <= 0)
        if empty.size:
            raise FormatError(
                f"{tilt.path}: tilt {tilt.number} has {empty.size} patterns without a single electron, the first at"
                f" scan position {int(tilt.recorded[numbers[where[empty[0]]]])}; the beam was blanked or frames were"
                " lost: leave this tilt out"
            )
        total += backend.to_host(counts.sum(axis=0, dtype=np.float64))
    return {"pattern": total, "positions": len(numbers)}


def tilt_electrons(counted: dict[str, Any], tilt: Tilt, settings: JointSettings) -> float:
    """Return the electrons of the probe of ``tilt``, from the sum of its patterns.

    A pixel that tells nothing counts as its neighbours do: electrons fall there too.
    """
    mean = counted["pattern"] / counted["positions"]
    good = good_pixels(Store.open(tilt.path), tilt.number, settings)
    mean = mean if good is None else _filled(mean, good)
    return checked_electrons(tilt.path, tilt.number, float(mean.sum()), settings.electrons_per_pattern)


def tile_gradients(
    state: dict[str, Any], view: View, loss: str, wanted: np.ndarray | None, probe: Array, slices: Array
) -> dict[str, Any]:
    """Return the sums of one tile over the positions ``wanted`` (``None`` is all), split into windows and totals.

    ``probe`` is the wave at the view's first slice.
    """
    tilt: Tilt = state["tilt"]
    batch = state["numbers"] if wanted is None else wanted
    if not np.isin(state["numbers"], batch).any():
        return {"windows": None, "totals": None}
    wavelength = wavelength_angstrom(tilt.optics.energy_ev)
    dtype = np.dtype(probe.dtype)
    gaps = tuple(backend.to_device_of(gap, probe) for gap in view.propagators(tilt.grid.window_yx, wavelength, dtype))
    model = Model(
        state["grid"],
        gaps,
        loss,  # type: ignore[arg-type]
        "phase",
        tilt.detector_yx,
        state["mask"],
        floor_factor=max(1.0, float((abs(probe) ** 2).sum(dtype=np.float64)) / state["most_electrons"]),
    )
    patterns = state["patterns"]
    counts = patterns.counts if isinstance(patterns, Resident) else patterns.groups
    sums = solver.gradients(solver.Patterns(model, counts, state["numbers"]), slices, probe, batch)
    assert sums is not None
    windows = {"phase": sums["phase"], "illumination": sums["illumination"]}
    return {"windows": windows, "totals": {key: sums[key] for key in ("probe", "loss", "positions")}}


def _filled(pattern: np.ndarray, good: np.ndarray) -> np.ndarray:
    """Return ``pattern`` (qy, qx) with the mean of the nearest ``good`` pixels where these are not good."""
    known, values = good.astype(float), np.where(good, pattern, 0.0)
    while not known.all() and known.any():
        weight, total = _around(known), _around(values)
        found = (known == 0) & (weight > 0)
        values, known = np.where(found, total / np.maximum(weight, 1), values), np.where(found, 1.0, known)
    return values


def _around(field: np.ndarray) -> np.ndarray:
    """Return the sum over each pixel and its eight neighbours, round the edges."""
    rows = field + np.roll(field, 1, axis=0) + np.roll(field, -1, axis=0)
    found: np.ndarray = rows + np.roll(rows, 1, axis=1) + np.roll(rows, -1, axis=1)
    return found
