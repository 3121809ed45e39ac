"""The verb ``ingest`` on a configured series: what ``stemtomo ingest SERIES.toml`` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stemtomo.distributed import Executor
from stemtomo.errors import ConfigurationError
from stemtomo.io.store import Store
from stemtomo.pipeline.config import Configuration
from stemtomo.pipeline.ingest import ingest as ingest_frames
from stemtomo.pipeline.ingest import open_input
from stemtomo.pipeline.progress import Progress


def ingest(
    series: Configuration | str | Path,
    store: Store | str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Copy the frames of a series into its store; call it again to continue where it ended.

    Parameters
    ----------
    series
        A TOML file, or what :func:`stemtomo.load_configuration` made of one.
    store
        Where the frames go; ``series.store`` or the name of the series unless given.
    overrides
        Strings ``section.key=value``, such as ``"ingest.bin=2"``; only with a TOML file.
    executor
        Where the work is done; the active Dask client, else threads.

    Returns
    -------
    dict
        See :func:`stemtomo.pipeline.ingest.ingest`; and ``store``, its path.

    Raises
    ------
    ConfigurationError, FormatError, AcquisitionError, StoreError
        See :func:`stemtomo.pipeline.ingest.ingest`.
    """
    from stemtomo.pipeline.references import load_configuration

    if overrides and isinstance(series, Configuration):
        raise ConfigurationError(
            f"overrides = {list(overrides)} are for a TOML file; give them to load_configuration, which made the series"
        )
    told = series if isinstance(series, Configuration) else load_configuration(series, overrides)
    source = open_input(told.input, told.scan.shape, told.theta_deg())
    geometry = (
        told.to_optics(),
        told.to_scan((source.shape[1], source.shape[2])),
        told.to_detector((source.shape[3], source.shape[4])),
        told.to_tilts(source.shape[0]),
    )
    store = told.store_path if store is None else store
    numbers = ingest_frames(
        store, source, *geometry, told.ingest, name=told.series.name, executor=executor, progress=progress
    )
    return {"store": str(store.path if isinstance(store, Store) else store), **numbers}
