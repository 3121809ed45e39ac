"""The store: one Zarr v3 hierarchy per tilt series, that holds the frames and every result made from them.

Rules that keep it whole: data first, then the mark ``complete``, which one atomic replacement sets; readers look at
marked groups only; frames are written shard by shard, each by one task, and recorded after they are on the disk.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import xarray as xr

from stemtomo.errors import StoreError
from stemtomo.io import results
from stemtomo.io.nodes import read_attrs, write_group
from stemtomo.io.provenance import Provenance, package_versions
from stemtomo.io.schema import GROUPS, SCHEMA_VERSION, group_schema
from stemtomo.io.tilts import Mode, StoredTilts
from stemtomo.locations import is_object, location

_VERSION_ATTR = "stemtomo_schema"


@dataclass(frozen=True)
class Store(StoredTilts):
    """Handle of a store: a path and a mode. It holds no file open, so tasks may carry it to other processes.

    Make one with :meth:`create` or :meth:`open`, which check what lies at the path. What was recorded is in
    :class:`~stemtomo.io.tilts.StoredTilts`; here are the store as a whole and the results.
    """

    # -- making and opening ---------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str | Path, name: str) -> Store:
        """Make an empty store for the series ``name`` at ``path`` and open it for writing.

        Raises
        ------
        StoreError
            If something is at ``path`` already, or it cannot be written.
        """
        path = location(path).expanduser().absolute()  # tasks may run in another folder
        if path.exists() and not (not is_object(path) and path.is_dir() and _is_unfinished(path)):
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
        path = location(path).expanduser().absolute()  # tasks may run in another folder
        if not path.exists():
            raise StoreError(f"{path}: no such store; ingest a series into it first")
        version = read_attrs(path).get(_VERSION_ATTR)
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
        return _VERSION_ATTR in read_attrs(location(path))

    @property
    def attrs(self) -> dict[str, Any]:
        """Attributes of the store: schema and package version, name, time of creation."""
        return read_attrs(self.path)

    @property
    def name(self) -> str:
        """Name of the series."""
        return str(self.attrs["name"])

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

    def require_current(self, group: str, *inputs: str) -> None:
        """Refuse a result that was made from other ``inputs`` than the store holds now: the two do not belong together.

        Inputs of which it keeps no record, as of a volume that was imported, are not compared.

        Raises
        ------
        StoreError
            If one differs; the text says which stage brings them together.
        """
        mark = self.provenance(group) or {}
        for name in inputs:
            used = (mark.get("inputs") or {}).get(name)
            if used is not None and used != self.fingerprint(name):
                raise StoreError(
                    f"{self.path}: {group} was made from another {name} than the one that is there now;"
                    f" run the stage {group_schema(group).stage!r} again"
                )

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

    def _require_result(self, group: str) -> None:
        schema = group_schema(group)
        if group.partition("/")[0] == "tilt" or schema.per_tilt != ("/" in group):
            name = group.partition("/")[0]
            advice = (
                "frames are read with frames(index)" if name == "tilt" else f"give {name}/NNN, the number of the tilt"
            )
            raise StoreError(f"{group!r} does not name a result; {advice}")


def _is_unfinished(path: Path) -> bool:
    """Whether ``path`` is what a killed :meth:`Store.create` leaves: a folder with at most temporary files."""
    return all(entry.name.endswith(".partial") for entry in path.iterdir())
