"""Half sets of a series: every other tilt, or every other scan position; stores of their own inside the store.

They lie in ``.halves/`` and may be removed when nothing runs. The half of the positions links to the frames of the
whole: no pattern is copied, positions of the other half count as never recorded.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr

from stemtomo.distributed import Executor
from stemtomo.errors import ConfigurationError
from stemtomo.io import frames as frame_arrays
from stemtomo.io.nodes import MARK, read_attrs, write_group
from stemtomo.io.provenance import Provenance
from stemtomo.io.schema import tilt_name
from stemtomo.io.store import Store
from stemtomo.locations import is_object
from stemtomo.pipeline.config import ProjectionSettings
from stemtomo.pipeline.progress import Progress
from stemtomo.pipeline.projections import HALVES, projections
from stemtomo.pipeline.ptychography import ptychography
from stemtomo.pipeline.run import stage_settings
from stemtomo.pipeline.tomography import tomography

_FOLDER = ".halves"


def half_scans(store: Store, tilts: list[int], executor: Executor, progress: Progress) -> None:
    """Reconstruct ``tilts`` twice, from the two colours of a chequerboard of scan positions; keep both phase sums."""
    settings = stage_settings(store, "ptychography")
    pairs: list[Store] = []
    for parity in (0, 1):
        half = _half_store(store, f"positions-{parity}")
        half.declare_tilts(store.tilt_count)
        for tilt in range(store.tilt_count):
            _link(store, half, tilt, parity)
            _copy_calibration(store, half, tilt)
        ptychography(half, settings, executor=executor, progress=progress, tilts=tilts)  # type: ignore[arg-type]
        pairs.append(half)
    for tilt in tilts:
        group, source = f"{HALVES}/{tilt_name(tilt)}", f"ptychography/{tilt_name(tilt)}"
        inputs = {f"half {index}": half.fingerprint(source) for index, half in enumerate(pairs)}
        provenance = Provenance.start("half_scans", {}, inputs)
        if not store.is_complete(group, provenance.fingerprint):
            results = [half.read(source) for half in pairs]
            variables = {
                name: (("y", "x"), result["phase_sum"].values)
                for name, result in zip(("first", "second"), results, strict=True)
            }
            attrs = {"pixel_angstrom": results[0].attrs["pixel_angstrom"]}
            store.write(group, xr.Dataset(variables, attrs=attrs), provenance)


def position_volumes(store: Store, executor: Executor, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
    """Return the volumes (z, y, x) of the two halves of the positions; :func:`half_scans` of all tilts comes first."""
    settings = stage_settings(store, "projections")
    plain = settings.model_copy(update={"denoise": "none", "fourier_sparsity": 0.0})
    volumes = []
    for parity in (0, 1):
        half = _half_store(store, f"positions-{parity}")
        projections(half, ProjectionSettings.model_validate(plain.model_dump()), executor=executor, progress=progress)
        _write_alignment(store, half, slice(None))
        volumes.append(_volume(store, half, executor, progress))
    return volumes[0], volumes[1]


def tilt_volumes(store: Store, executor: Executor, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
    """Return the volumes (z, y, x) from the even and from the odd tilts, of unfiltered phases."""
    volumes = []
    for parity in (0, 1):
        half, chosen = _half_store(store, f"tilts-{parity}"), slice(parity, None, 2)
        whole = store.read("projections").compute()
        if "phase_raw" in whole:
            whole = whole.assign(phase=whole["phase_raw"]).drop_vars("phase_raw")
        _write_part(half, "projections", "projections", whole.isel(tilt=chosen), store.fingerprint("projections"))
        _write_alignment(store, half, chosen)
        volumes.append(_volume(store, half, executor, progress))
    return volumes[0], volumes[1]


def _half_store(store: Store, name: str) -> Store:
    if is_object(store.path):
        raise ConfigurationError(
            f"{store.path}: half sets link to the frames of the store, which object storage cannot; copy the store to "
            "a file system for the resolution from half sets"
        )
    path = store.path / _FOLDER / f"{name}.zarr"
    if Store.is_store(path):
        return Store.open(path, "r+")
    path.parent.mkdir(exist_ok=True)
    return Store.create(path, f"{store.name}, {name}")


def _link(store: Store, half: Store, tilt: int, parity: int) -> None:
    """Make ``tilt`` in ``half``: frames linked, those of the other colour missing."""
    source, folder = (one.path / "tilt" / tilt_name(tilt) for one in (store, half))
    mark = Provenance.start("ingest", {"half": parity}, {"tilt": store.fingerprint(f"tilt/{tilt_name(tilt)}")})
    if half.fingerprint(f"tilt/{tilt_name(tilt)}") == mark.fingerprint:
        return
    valid = store.valid(tilt)
    colour = np.indices(valid.shape).sum(axis=0) % 2 == parity
    attrs = {key: value for key, value in read_attrs(source).items() if key not in (MARK, frame_arrays.MISSING)}
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / frame_arrays.FRAMES
    link.unlink(missing_ok=True)
    link.symlink_to(Path("../../../..", *(source / frame_arrays.FRAMES).relative_to(store.path).parts))
    missing = _runs(~(valid & colour).ravel())
    write_group(folder, {**attrs, frame_arrays.MISSING: missing, MARK: mark.finish().to_attrs()})


def _copy_calibration(store: Store, half: Store, tilt: int) -> None:
    """Tell ``half`` which pixels of ``tilt`` are bad: what the whole leaves out, its halves leave out."""
    group = f"calibration/{tilt_name(tilt)}"
    if store.fingerprint(group) is not None:
        _write_part(half, group, "calibrate", store.read(group).compute(), store.fingerprint(group))


def _runs(mask: np.ndarray) -> list[list[int]]:
    """Return the runs [start, stop) of ``mask``."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [[int(start), int(stop)] for start, stop in edges.reshape(-1, 2)]


def _write_alignment(store: Store, half: Store, chosen: slice) -> None:
    """Give ``half`` the shifts of the whole, refined where they were: halves aligned apart could not be compared."""
    alignment = store.read("alignment").compute()
    volume = store.read("volume")
    inputs = store.fingerprint("alignment")
    for name in ("shift_x_angstrom", "shift_y_angstrom"):
        if name in volume:
            alignment[name] = (("tilt",), volume[name].values, alignment[name].attrs)
            inputs = store.fingerprint("volume")
    _write_part(half, "alignment", "align", alignment.isel(tilt=chosen), inputs)


def _write_part(half: Store, group: str, stage: str, dataset: xr.Dataset, fingerprint: str | None) -> None:
    provenance = Provenance.start(stage, {"half": half.name}, {"whole": fingerprint})
    if not half.is_complete(group, provenance.fingerprint):
        half.write(group, dataset, provenance)


def _volume(store: Store, half: Store, executor: Executor, progress: Progress) -> np.ndarray:
    settings = stage_settings(store, "tomography").model_copy(update={"refine_shifts": False})
    tomography(half, settings, executor=executor, progress=progress)  # type: ignore[arg-type]
    return np.asarray(half.read("volume")["potential"].values)
