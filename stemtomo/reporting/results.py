"""What a store holds, as the report wants it: datasets and provenance by group, and thumbnails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from stemtomo.io.nodes import read_attrs
from stemtomo.io.schema import GROUPS, tilt_name
from stemtomo.io.store import Store
from stemtomo.pipeline.run import group_of, recorded_runs


class Results:
    """The complete results of one store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.tilt_count = store.tilt_count
        self.runs = recorded_runs(store)
        #: Tilts that have begun to be recorded; of those still to come nothing is known.
        self.begun = [i for i in range(self.tilt_count) if read_attrs(store.path / "tilt" / tilt_name(i))]

    def groups(self, stage: str) -> list[str]:
        """Return the names of the groups that ``stage`` makes, one per tilt or one for all."""
        group = group_of(stage)
        per_tilt = GROUPS[group].per_tilt
        return [f"{group}/{tilt_name(index)}" for index in range(self.tilt_count)] if per_tilt else [group]

    def has(self, group: str) -> bool:
        """Whether ``group`` is complete."""
        return self.store.fingerprint(group) is not None

    def complete(self, stage: str) -> int:
        """Return how many of the groups of ``stage`` are complete."""
        return sum(self.has(group) for group in self.groups(stage))

    def read(self, group: str) -> xr.Dataset | None:
        """Return the lazy dataset of ``group``, ``None`` if it is not complete."""
        return self.store.read(group) if self.has(group) else None

    def tilts_with(self, group: str) -> list[int]:
        """Return the tilts for which the per-tilt ``group`` is complete."""
        return [index for index in range(self.tilt_count) if self.has(f"{group}/{tilt_name(index)}")]

    def provenance(self, stage: str) -> list[tuple[str, Mapping[str, Any]]]:
        """Return ``(group, provenance)`` of every complete group of ``stage``."""
        records = ((group, self.store.provenance(group)) for group in self.groups(stage))
        return [(group, record) for group, record in records if record is not None]


def thumbnail(array: xr.DataArray | np.ndarray, limit: int) -> tuple[np.ndarray, int]:
    """Return every n-th pixel of the last two axes so that neither exceeds ``limit``, and n."""
    stride = max(1, -(-max(array.shape[-2:]) // limit))
    return np.asarray(array[..., ::stride, ::stride]), stride
