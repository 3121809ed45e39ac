"""Where a result comes from: the stage, its configuration and its inputs, and what it cost."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from stemtomo.errors import ConfigurationError, FormatError
from stemtomo.io.schema import SCHEMA_VERSION, stage_revision
from stemtomo.process import peak_rss_mb

_PACKAGES = ("stemtomo", "numpy", "scipy", "numba", "dask", "distributed", "xarray", "zarr", "numcodecs")
_SAMPLE_BYTES = 65536


@dataclass(frozen=True)
class Provenance:
    """What made a result. Stage and revision, configuration, inputs and schema decide if it is up to date.

    Parameters
    ----------
    stage
        Name of the stage, such as ``"ptychography"``.
    configuration
        The stage's settings, JSON-able (paths and NumPy scalars are converted).
    inputs
        Fingerprint of each input by its group or name; ``None`` for an input that does not exist.
    versions
        Versions of Python and of the packages that compute.
    time_utc
        When the stage began, ISO 8601.
    wall_s, cpu_s, peak_rss_mb
        Cost until :meth:`finish`: wall time in s, processor time in s (of the process that began the record; ``None``
        if another one finished it), peak memory of the finishing process in MB.
    """

    stage: str
    configuration: Mapping[str, Any]
    inputs: Mapping[str, str | None]
    versions: Mapping[str, str]
    time_utc: str
    wall_s: float | None = None
    cpu_s: float | None = None
    peak_rss_mb: float | None = None
    _began: tuple[float, float] = field(default=(0.0, 0.0), repr=False, compare=False)
    _process: tuple[str, int] = field(default=("", 0), repr=False, compare=False)

    @classmethod
    def start(
        cls, stage: str, configuration: Mapping[str, Any], inputs: Mapping[str, str | None] | None = None
    ) -> Provenance:
        """Begin the record of a run of ``stage``; the clock starts here.

        Raises
        ------
        ConfigurationError
            If the configuration holds something that JSON cannot.
        """
        return cls(
            stage=stage,
            configuration=plain(configuration, f"{stage} configuration"),
            inputs=dict(sorted((inputs or {}).items())),
            versions=package_versions(),
            time_utc=datetime.now(UTC).isoformat(timespec="seconds"),
            _began=(time.time(), time.process_time()),
            _process=_this_process(),
        )

    def finish(self) -> Provenance:
        """Return the record with its cost: wall and CPU time in s, peak memory of the process in MB (1e6 bytes)."""
        # A record may travel to the worker that ends the stage; its processor time is then not this process's.
        here = self._process == _this_process()
        return replace(
            self,
            wall_s=round(time.time() - self._began[0], 3),
            cpu_s=round(time.process_time() - self._began[1], 3) if here else None,
            peak_rss_mb=round(peak_rss_mb(), 1),
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of stage and revision, configuration, inputs and schema version; the same for the same work."""
        return fingerprint_of(
            {
                "stage": self.stage,
                "configuration": self.configuration,
                "inputs": self.inputs,
                "schema": SCHEMA_VERSION,
                "revision": stage_revision(self.stage),
            }
        )

    def to_attrs(self) -> dict[str, Any]:
        """Return JSON attributes, the fingerprint first: the mark ``complete`` of a result."""
        return {
            "fingerprint": self.fingerprint,
            "stage": self.stage,
            "configuration": dict(self.configuration),
            "inputs": dict(self.inputs),
            "versions": dict(self.versions),
            "time_utc": self.time_utc,
            "wall_s": self.wall_s,
            "cpu_s": self.cpu_s,
            "peak_rss_mb": self.peak_rss_mb,
        }


def _this_process() -> tuple[str, int]:
    return (platform.node(), os.getpid())


def fingerprint_of(content: Any) -> str:
    """SHA-256 (hex) of ``content`` as canonical JSON: the order of keys does not matter."""
    text = json.dumps(plain(content, "content"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_identity(path: Path) -> dict[str, Any]:
    """Return name, size, mtime and SHA-256 of both ends of ``path``: they tell files apart without reading them."""
    status = path.stat()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(_SAMPLE_BYTES))
        file.seek(max(0, status.st_size - _SAMPLE_BYTES))
        digest.update(file.read(_SAMPLE_BYTES))
    return {
        "file": path.name,
        "size_bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "head_tail_sha256": digest.hexdigest(),
    }


def file_digest(path: str | Path) -> str:
    """SHA-256 (hex) of all bytes of the file ``path``: for small files that a result is made from.

    Raises
    ------
    FormatError
        If it cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or error})") from error


@functools.cache
def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that take part in a computation."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    return versions


def plain(value: Any, what: str) -> Any:
    """Return ``value`` as what JSON holds: paths become text, tuples lists, NumPy numbers Python's.

    Raises
    ------
    ConfigurationError
        Naming ``what`` and the type that JSON cannot hold.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{what}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, what) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist(), what)
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ConfigurationError(f"{what} is a {type(value).__name__}, which JSON cannot hold; give numbers, text or lists")
