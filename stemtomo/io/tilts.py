"""The tilts of a store: geometry and frames of each, the record of finished shards, and the marks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr

from stemtomo.errors import StoreError
from stemtomo.geometry import Detector, Optics, Pose, Scan, TiltSeries
from stemtomo.io import frames as frame_arrays
from stemtomo.io.durable import remove_partial_files
from stemtomo.io.nodes import MARK, clear_staging, read_attrs, staged, write_group
from stemtomo.io.provenance import Provenance
from stemtomo.io.schema import SHARD_POSITIONS, group_schema, tilt_name
from stemtomo.io.shards import Piece
from stemtomo.io.untrusted import DAMAGED, reading

Mode = Literal["r", "r+"]


@dataclass(frozen=True)
class StoredTilts:
    """The part of a :class:`~stemtomo.io.store.Store` that holds what was recorded.

    It holds no file open, so tasks may carry it to other processes.
    """

    path: Path
    mode: Mode = "r"

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
        with self._reading(index, "metadata"):
            return Optics.from_attrs(self.tilt_attrs(index)["optics"])

    def scan(self, index: int) -> Scan:
        """Return the scan of tilt ``index``."""
        with self._reading(index, "metadata"):
            return Scan.from_attrs(self.tilt_attrs(index)["scan"])

    def detector(self, index: int) -> Detector:
        """Return the detector of tilt ``index``."""
        with self._reading(index, "metadata"):
            return Detector.from_attrs(self.tilt_attrs(index)["detector"])

    def pose(self, index: int) -> Pose:
        """Return the pose of tilt ``index``."""
        with self._reading(index, "metadata"):
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
        told: dict[str, Any] = {"optics": optics, "scan": scan, "detector": detector, "pose": pose}
        geometry = {name: part.to_attrs() for name, part in told.items()}
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
            kept = {key: current[key] for key in (frame_arrays.MISSING, frame_arrays.NOTED) if key in current}
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

    def read_frames(self, index: int, part: tuple[slice | int, ...] = ()) -> np.ndarray:
        """Return the frames of tilt ``index``, (y, x, ky, kx), or a ``part`` of them.

        Raises
        ------
        StoreError
            If they are not complete (see :meth:`frames`), or a shard on the disk is damaged or gone.
        """
        array = self.frames(index)
        with self._reading(index, "frames"):
            return frame_arrays.read_part(array, self._tilt(index) / frame_arrays.FRAMES, part)

    def write_frames(self, index: int, y0: int, x0: int, block: np.ndarray) -> None:
        """Write ``block`` (y, x, ky, kx), exactly one shard of the frames of tilt ``index``, at position (y0, x0).

        See :meth:`write_pieces`.
        """
        self.write_pieces(index, y0, x0, [(y0, x0, block)])

    def write_pieces(self, index: int, y0: int, x0: int, pieces: Iterable[Piece]) -> None:
        """Write exactly one shard of the frames of tilt ``index``, at position (y0, x0), from pieces of it.

        This is the one place where frames are written. A write that is not a whole shard would read, change and write
        it again, and lose what another task wrote meanwhile. Each piece is compressed before the next one is taken, so
        pieces from a generator are never in memory together.

        Parameters
        ----------
        pieces
            First row and column, in positions of the scan, and frames (y, x, ky, kx) of rectangles of whole chunks
            (``CHUNK_POSITIONS``, cut at the end of the scan) that together make the shard.

        Raises
        ------
        StoreError
            If the pieces are not one whole shard (cut at the end of the scan), have another dtype, or do not fit
            on the disk.
        """
        self._require_writable(f"tilt {index}")
        frame_arrays.write_shard(self._frames(index, "r+"), self._tilt(index) / frame_arrays.FRAMES, y0, x0, pieces)

    def read_pieces(self, index: int, y0: int, x0: int, wanted: np.ndarray | None = None) -> Iterator[Piece]:
        """Yield the shard at position (y0, x0) of the frames of tilt ``index`` in pieces, row by row.

        Each piece is a rectangle of chunks that is expanded when it is its turn: three times as fast as reading the
        shard through Zarr, and with a fraction of the memory. Whether the tilt is complete is not asked.

        Parameters
        ----------
        wanted
            (y, x) bool over the shard; pieces without a position that is wanted are passed over. All unless given.

        Yields
        ------
        First row and column, in positions of the scan, and frames (y, x, ky, kx).
        """
        return frame_arrays.read_shard(self._frames(index), self._tilt(index) / frame_arrays.FRAMES, y0, x0, wanted)

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
        return frame_arrays.valid_positions(self.tilt_attrs(index), self.scan(index).shape_yx)

    def complete_tilt(self, index: int, provenance: Provenance, noted: Mapping[str, Any] | None = None) -> None:
        """Mark tilt ``index`` complete; the mark takes the place of the record of shards.

        Parameters
        ----------
        noted
            What was counted of its frames while they were copied; kept as the attribute ``noted``.

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
        if noted is not None:
            attrs[frame_arrays.NOTED] = dict(noted)
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

    # -- marks ----------------------------------------------------------------------------------------------------

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

    # -- inside ---------------------------------------------------------------------------------------------------

    def _reading(self, index: int, what: str) -> AbstractContextManager[None]:
        return reading(f"{self.path}, tilt {index}", what, DAMAGED, (OSError,), StoreError)

    def _tilt(self, index: int) -> Path:
        return self.path / "tilt" / tilt_name(index)

    def _frames(self, index: int, mode: Literal["r", "r+"] = "r") -> zarr.Array:
        with self._reading(index, "frames"):
            return frame_arrays.open_frames(self._tilt(index), mode)

    def _withdraw_series_mark(self) -> None:
        attrs = read_attrs(self.path / "tilt")
        if attrs.pop(MARK, None) is not None:
            write_group(self.path / "tilt", attrs)

    def _require_writable(self, what: str) -> None:
        if self.mode != "r+":
            raise StoreError(f"{self.path}: was opened for reading, {what} cannot be written; open it with mode 'r+'")
