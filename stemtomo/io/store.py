"""The store: one Zarr v3 hierarchy per tilt series, that holds the frames and every result made from them.

Rules that keep it whole: data first, then the mark ``complete``, which one atomic replacement sets; readers look at
marked groups only; frames are written shard by shard, each by one task, and recorded after they are on the disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
import zarr

from stemtomo.errors import StoreError
from stemtomo.geometry import Detector, Optics, Pose, Scan, TiltSeries
from stemtomo.io import frames as frame_arrays
from stemtomo.io import results
from stemtomo.io.durable import remove_partial_files
from stemtomo.io.nodes import MARK, clear_staging, read_attrs, read_node, staged, write_group
from stemtomo.io.provenance import Provenance, package_versions
from stemtomo.io.schema import GROUPS, SCHEMA_VERSION, SHARD_POSITIONS, group_schema, tilt_name

Mode = Literal["r", "r+"]
_VERSION_ATTR = "stemtomo_schema"


@dataclass(frozen=True)
class Store:
    """Handle of a store: a path and a mode. It holds no file open, so tasks may carry it to other processes.

    Make one with :meth:`create` or :meth:`open`, which check what lies at the path.
    """

    path: Path
    mode: Mode = "r"

    # -- making and opening ---------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str | Path, name: str) -> Store:
        """Make an empty store for the series ``name`` at ``path`` and open it for writing.

        Raises
        ------
        StoreError
            If something is at ``path`` already, or it cannot be written.
        """
        path = Path(path).expanduser().absolute()  # tasks may run in another folder
        if path.exists() and not (path.is_dir() and _is_unfinished(path)):
            what = "a store" if cls.is_store(path) else "something that is not a store"
            raise StoreError(f"{path}: there is {what} already; open it to continue, or choose another path")
        attrs = {
            _VERSION_ATTR: SCHEMA_VERSION,
            "stemtomo_version": package_versions()["stemtomo"],
            "name": name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        try:
            write_group(path, attrs)
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(f"{path}: a store cannot be made here ({error.strerror})") from error
        return cls(path, "r+")

    @classmethod
    def open(cls, path: str | Path, mode: Mode = "r") -> Store:
        """Open the store at ``path`` for reading (``"r"``) or for reading and writing (``"r+"``).

        Raises
        ------
        StoreError
            If nothing is at ``path``, it is not a store, or a later stemtomo wrote it.
        """
        path = Path(path).expanduser().absolute()  # tasks may run in another folder
        if not path.exists():
            raise StoreError(f"{path}: no such store; ingest a series into it first")
        node = read_node(path)
        version = None if node is None else node.get("attributes", {}).get(_VERSION_ATTR)
        if not isinstance(version, int):
            raise StoreError(
                f"{path}: is not a stemtomo store (no zarr.json with {_VERSION_ATTR}); "
                "give the folder that ingest wrote, usually NAME.zarr"
            )
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{path}: has store schema {version}, this stemtomo ({package_versions()['stemtomo']}) reads up to "
                f"{SCHEMA_VERSION}; update stemtomo"
            )
        return cls(path, mode)

    @classmethod
    def of(cls, store: Store | str | Path) -> Store:
        """Return ``store`` as it is, or the store at that path opened for reading and writing."""
        return store if isinstance(store, Store) else cls.open(store, "r+")

    @staticmethod
    def is_store(path: str | Path) -> bool:
        """Whether a store of any schema version lies at ``path``."""
        return _VERSION_ATTR in read_attrs(Path(path))

    @property
    def attrs(self) -> dict[str, Any]:
        """Attributes of the store: schema and package version, name, time of creation."""
        return read_attrs(self.path)

    @property
    def name(self) -> str:
        """Name of the series."""
        return str(self.attrs["name"])

    # -- tilts: geometry ------------------------------------------------------------------------------------------

    @property
    def tilt_count(self) -> int:
        """Number of tilts of the series, whether or not their frames have arrived; 0 before ingest."""
        return int(read_attrs(self.path / "tilt").get("count", 0))

    def declare_tilts(self, count: int) -> None:
        """Say that the series has ``count`` tilts; a changed count takes the mark of the whole series away."""
        self._require_writable("tilt")
        for folder in (self.path, self.path / "tilt"):
            remove_partial_files(folder, below=False)  # of a run that was killed here
        attrs = read_attrs(self.path / "tilt")
        if attrs.get("count") != count:
            write_group(self.path / "tilt", {"count": count})

    def tilt_attrs(self, index: int) -> dict[str, Any]:
        """Return the attributes of tilt ``index``: optics, scan, detector, pose, source, and its marks.

        Raises
        ------
        StoreError
            If the store does not have this tilt yet.
        """
        attrs = read_attrs(self._tilt(index))
        if "pose" not in attrs:
            raise StoreError(f"{self.path}: has no tilt {index} ({self.tilt_count} declared); run ingest first")
        return attrs

    def optics(self, index: int) -> Optics:
        """Return the optics of tilt ``index``."""
        return Optics.from_attrs(self.tilt_attrs(index)["optics"])

    def scan(self, index: int) -> Scan:
        """Return the scan of tilt ``index``."""
        return Scan.from_attrs(self.tilt_attrs(index)["scan"])

    def detector(self, index: int) -> Detector:
        """Return the detector of tilt ``index``."""
        return Detector.from_attrs(self.tilt_attrs(index)["detector"])

    def pose(self, index: int) -> Pose:
        """Return the pose of tilt ``index``."""
        return Pose.from_attrs(self.tilt_attrs(index)["pose"])

    def tilt_series(self) -> TiltSeries:
        """Return the poses of all tilts.

        Raises
        ------
        StoreError
            If the series has no tilts yet.
        """
        if self.tilt_count == 0:
            raise StoreError(f"{self.path}: has no tilts yet; run ingest first")
        return TiltSeries(tuple(self.pose(index) for index in range(self.tilt_count)))

    # -- tilts: frames --------------------------------------------------------------------------------------------

    def create_tilt(
        self,
        index: int,
        shape_yx_kykx: tuple[int, int, int, int],
        dtype: np.dtype | str,
        optics: Optics,
        scan: Scan,
        detector: Detector,
        pose: Pose,
        *,
        source: Mapping[str, Any] | None = None,
        shard_positions: int = SHARD_POSITIONS,
        codec: frame_arrays.FrameCodec = "auto",
    ) -> zarr.Array:
        """Make tilt ``index`` and its empty frames, or continue it if it is there with the same frames and source.

        Changed geometry replaces the old without touching frames; it takes away the mark, which depends on it.

        Parameters
        ----------
        shape_yx_kykx
            Shape of the frames (y, x, ky, kx).
        source
            Identity of the file that the frames come from.
        shard_positions
            Edge of a shard in scan positions, a multiple of 8.
        codec
            How chunks of a new tilt are coded, see ``docs/store.md``; one that is there keeps its own.

        Raises
        ------
        StoreError
            If the tilt exists with another shape, dtype or source, or cannot be written.
        """
        self._require_writable(f"tilt {index}")
        geometry = {
            "optics": optics.to_attrs(),
            "scan": scan.to_attrs(),
            "detector": detector.to_attrs(),
            "pose": pose.to_attrs(),
        }
        wanted: dict[str, Any] = {**geometry, "source": dict(source or {})}
        folder = self._tilt(index)
        current = read_attrs(folder)
        if not current:
            self._withdraw_series_mark()
            with staged(self.path, f"tilt/{tilt_name(index)}") as staging:
                array = frame_arrays.create(staging, shape_yx_kykx, np.dtype(dtype), shard_positions, codec)
                write_group(staging, {**wanted, **frame_arrays.progress_attrs(array, set())})
            return self._frames(index)
        array = self._frames(index)
        found = (array.shape, array.dtype, current.get("source"))
        if found != (tuple(shape_yx_kykx), np.dtype(dtype), wanted["source"]):
            raise StoreError(
                f"{folder}: holds frames {found[0]} {found[1]} from {found[2]}, "
                f"not {tuple(shape_yx_kykx)} {np.dtype(dtype)} from {wanted['source']}; ingest into another store"
            )
        if any(current.get(part) != value for part, value in geometry.items()):
            done = self.recorded_frames(index)
            self._withdraw_series_mark()
            kept = {key: current[key] for key in (frame_arrays.MISSING,) if key in current}
            write_group(folder, {**wanted, **kept, **frame_arrays.progress_attrs(array, done)})
        return array

    def frames(self, index: int, require_complete: bool = True) -> zarr.Array:
        """Return the frames of tilt ``index``, (y, x, ky, kx), opened for reading.

        Raises
        ------
        StoreError
            If the tilt is not there, or not all of its frames are (``require_complete``).
        """
        attrs = self.tilt_attrs(index)
        if require_complete and MARK not in attrs:
            array = self._frames(index)
            raise StoreError(
                f"{self.path}: tilt {index} is incomplete, {len(self.recorded_frames(index))} of "
                f"{frame_arrays.shard_count(array)} shards are in; run ingest again, it continues"
            )
        return self._frames(index, "r")

    def read_frames(self, index: int, y0: int, y1: int, x0: int, x1: int, require_complete: bool = True) -> np.ndarray:
        """Return the frames (y, x, ky, kx) of a block of the scan of tilt ``index``, faster than through Zarr.

        Raises
        ------
        StoreError
            If the tilt is not there or not complete, or a shard is damaged.
        """
        array = self.frames(index, require_complete)
        return frame_arrays.read_frames(array, self._tilt(index) / frame_arrays.FRAMES, (y0, y1, x0, x1))

    def write_frames(self, index: int, y0: int, x0: int, block: np.ndarray) -> None:
        """Write ``block`` (y, x, ky, kx), exactly one shard of the frames of tilt ``index``, at position (y0, x0).

        This is the one place where frames are written. A write that is not a whole shard would read, change and write
        it again, and lose what another task wrote meanwhile.

        Raises
        ------
        StoreError
            If the block is not one whole shard (cut at the end of the scan), has another dtype, or does not fit
            on the disk.
        """
        self._require_writable(f"tilt {index}")
        frame_arrays.write_shard(self._frames(index, "r+"), self._tilt(index) / frame_arrays.FRAMES, y0, x0, block)

    def recorded_frames(self, index: int) -> set[int]:
        """Return the numbers of the shards of tilt ``index`` that are on the disk (row by row over the shard grid)."""
        attrs = self.tilt_attrs(index)
        if MARK in attrs:
            return set(range(frame_arrays.shard_count(self._frames(index))))
        return frame_arrays.recorded(attrs)

    def record_frames(self, index: int, shards: Iterable[int]) -> None:
        """Replace the record of finished shards of tilt ``index``; one process does this for a series at a time."""
        self._require_writable(f"tilt {index}")
        attrs = self.tilt_attrs(index)
        write_group(self._tilt(index), {**attrs, **frame_arrays.progress_attrs(self._frames(index), set(shards))})

    def close_source(self, index: int, source: Mapping[str, Any], missing: Sequence[tuple[int, int]] = ()) -> None:
        """Say what the file of tilt ``index``, followed while it grew, is now that no more of it is expected.

        Parameters
        ----------
        source
            Its identity.
        missing
            Runs [start, stop) of scan positions, counted row by row, whose frames never came; they are stored as zeros.
        """
        self._require_writable(f"tilt {index}")
        attrs = {key: value for key, value in self.tilt_attrs(index).items() if key != frame_arrays.MISSING}
        attrs["source"] = dict(source)
        if missing:
            attrs[frame_arrays.MISSING] = [list(run) for run in missing]
        write_group(self._tilt(index), attrs)

    def valid(self, index: int) -> np.ndarray:
        """Return the mask (y, x), bool, of the scan positions of tilt ``index`` whose frame was recorded."""
        attrs = self.tilt_attrs(index)
        return frame_arrays.valid_positions(attrs, Scan.from_attrs(attrs["scan"]).shape_yx)

    def complete_tilt(self, index: int, provenance: Provenance) -> None:
        """Mark tilt ``index`` complete; the mark takes the place of the record of shards.

        Raises
        ------
        StoreError
            If a shard is missing.
        """
        self._require_writable(f"tilt {index}")
        done, expected = len(self.recorded_frames(index)), frame_arrays.shard_count(self._frames(index))
        if done != expected:
            raise StoreError(f"{self.path}: tilt {index} has {done} of {expected} shards, so it is not complete")
        attrs = {key: value for key, value in self.tilt_attrs(index).items() if key != frame_arrays.PROGRESS}
        write_group(self._tilt(index), {**attrs, MARK: provenance.to_attrs()})

    def complete_tilts(self, provenance: Provenance) -> None:
        """Mark the whole series complete (the group ``tilt``).

        Raises
        ------
        StoreError
            If a tilt is not complete.
        """
        self._require_writable("tilt")
        missing = [i for i in range(self.tilt_count) if self.fingerprint(f"tilt/{tilt_name(i)}") is None]
        if missing or self.tilt_count == 0:
            raise StoreError(f"{self.path}: tilts {missing} of {self.tilt_count} are not complete; run ingest again")
        attrs = read_attrs(self.path / "tilt")
        write_group(self.path / "tilt", {**attrs, MARK: provenance.finish().to_attrs()})

    def remove_leftovers(self, index: int) -> None:
        """Remove what a killed ingest of tilt ``index`` left behind. No other process may be writing this tilt."""
        self._require_writable(f"tilt {index}")
        clear_staging(self.path, f"tilt/{tilt_name(index)}")
        remove_partial_files(self._tilt(index))

    # -- results --------------------------------------------------------------------------------------------------

    def write(self, group: str, dataset: xr.Dataset, provenance: Provenance) -> None:
        """Store ``dataset`` as ``group``, in place of what was there, and mark it complete.

        The data go to a staging folder; the mark is set there last; then the folder takes its place. A killed write
        leaves nothing that a reader sees. Lazy (dask) variables are computed here.

        Parameters
        ----------
        group
            ``"volume"``, or ``"ptychography/007"`` for a result per tilt.
        dataset
            Variables and attributes of the schema; units are filled in.
        provenance
            Begun with :meth:`Provenance.start`; finished here unless it is.

        Raises
        ------
        StoreError
            If the dataset does not follow the schema, or the disk is full or forbidden.
        """
        self._require_writable(group)
        self._require_result(group)
        results.write(self.path, group, dataset, provenance)

    def read(self, group: str) -> xr.Dataset:
        """Return the result ``group``, lazy: nothing but metadata and index coordinates is read.

        Raises
        ------
        StoreError
            If the result is missing or incomplete; the text says which stage makes it.
        """
        self._require_result(group)
        if self.fingerprint(group) is None:
            stage = group_schema(group).stage
            state = "is not complete" if (self.path / group).exists() else "has not been made"
            raise StoreError(f"{self.path}: {group} {state}; run the stage {stage!r} first")
        return results.read(self.path, group)

    def is_complete(self, group: str, fingerprint: str) -> bool:
        """Whether ``group`` is finished and was made by the work that ``fingerprint`` names."""
        return self.fingerprint(group) == fingerprint

    def fingerprint(self, group: str) -> str | None:
        """Return the fingerprint of the finished ``group``, ``None`` if it is missing or not finished."""
        mark = self.provenance(group)
        return None if mark is None else str(mark["fingerprint"])

    def provenance(self, group: str) -> dict[str, Any] | None:
        """Return how the finished ``group`` was made (see :meth:`Provenance.to_attrs`), ``None`` if it is not."""
        group_schema(group)
        mark: dict[str, Any] | None = read_attrs(self.path / group).get(MARK)
        return mark

    def members(self, group: str) -> list[str]:
        """Return the finished members of a group with one per tilt (``["quicklook/000", ...]``), or ``[group]``."""
        if not group_schema(group).per_tilt:
            return [group] if self.fingerprint(group) else []
        names = [path.name for path in (self.path / group).glob("*") if re.fullmatch(r"\d{3,}", path.name)]
        return [member for name in sorted(names, key=int) if self.fingerprint(member := f"{group}/{name}")]

    def checkpoint_path(self, group: str) -> Path:
        """Return the folder where the stage that makes ``group`` may keep checkpoints until it is done."""
        group_schema(group)
        return self.path / ".checkpoints" / group.replace("/", "-")

    def info(self) -> list[dict[str, Any]]:
        """Return one row per group for a table: what is there, its dims, units, size and cost.

        Keys: ``group, stage, done, expected, arrays, size_bytes, stored_bytes, time_utc, wall_s``; ``done`` of
        ``expected`` members are finished, ``arrays`` says names, dims, dtypes and units of the first of them.
        """
        return [results.info_row(self.path, name, self.members(name), self._expected(name)) for name in GROUPS]

    # -- inside ---------------------------------------------------------------------------------------------------

    def _expected(self, group: str) -> int:
        return self.tilt_count if GROUPS[group].per_tilt else 1

    def _tilt(self, index: int) -> Path:
        return self.path / "tilt" / tilt_name(index)

    def _frames(self, index: int, mode: Literal["r", "r+"] = "r") -> zarr.Array:
        return frame_arrays.open_frames(self._tilt(index), mode)

    def _withdraw_series_mark(self) -> None:
        attrs = read_attrs(self.path / "tilt")
        if attrs.pop(MARK, None) is not None:
            write_group(self.path / "tilt", attrs)

    def _require_result(self, group: str) -> None:
        schema = group_schema(group)
        if group.partition("/")[0] == "tilt" or schema.per_tilt != ("/" in group):
            name = group.partition("/")[0]
            advice = (
                "frames are read with frames(index)" if name == "tilt" else f"give {name}/NNN, the number of the tilt"
            )
            raise StoreError(f"{group!r} does not name a result; {advice}")

    def _require_writable(self, what: str) -> None:
        if self.mode != "r+":
            raise StoreError(f"{self.path}: was opened for reading, {what} cannot be written; open it with mode 'r+'")


def _is_unfinished(path: Path) -> bool:
    """Whether ``path`` is what a killed :meth:`Store.create` leaves: a folder with at most temporary files."""
    return all(entry.name.endswith(".partial") for entry in path.iterdir())
