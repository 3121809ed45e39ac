"""The verb ``underway``: phase and loss of a reconstruction that still runs, from its last checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from stemtomo.backend import to_host
from stemtomo.distributed import Checkpoint
from stemtomo.io.schema import tilt_name
from stemtomo.io.store import Store


def underway(store: Store | str | Path, tilt: int = 0) -> xr.Dataset | None:
    """Return what ``ptychography`` has reached on a tilt that it has not finished; ``None`` where nothing is kept.

    ``phase_sum`` (y, x) in rad with ``pixel_angstrom``, ``loss`` (epoch) per pattern. It is as old as the last
    checkpoint (``ptychography.checkpoint_every``). A tilt in tiles keeps its phase in pieces and is not shown.
    """
    store = Store.of(store)
    directory = store.checkpoint_path(f"ptychography/{tilt_name(tilt)}")
    marks = sorted(directory.glob("step-*/mark.json"))
    if not marks:
        return None
    try:
        fingerprint = json.loads(marks[-1].read_text())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # just being replaced
    mark = Checkpoint(directory, fingerprint).latest()
    saved: Any = None if mark is None else mark.shared
    if saved is None or "shown" not in saved:
        return None
    phase = np.asarray(to_host(saved["state"]["phase"])).real
    # Tied slices share one layer, whose weights are 1 on average.
    layers = int(saved["shown"]["slices"]) if len(phase) == 1 else 1
    return xr.Dataset(
        {
            "phase_sum": (("y", "x"), (layers * phase.sum(axis=0)).astype(np.float32), {"units": "rad"}),
            "loss": (("epoch",), np.asarray(saved["losses"], dtype=np.float64)),
        },
        attrs={"pixel_angstrom": [float(p) for p in saved["shown"]["pixel_angstrom"]], "tilt": tilt},
    )
