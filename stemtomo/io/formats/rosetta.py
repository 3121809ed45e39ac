"""Every other format, through RosettaSciIO: opened lazily where its reader can, else the whole signal at each read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stemtomo.errors import FormatError
from stemtomo.io.formats.optional import require
from stemtomo.io.provenance import file_identity
from stemtomo.io.untrusted import reading

PREFIX = "rosettasciio"


@dataclass(frozen=True)
class Signal:
    """One signal of a file, as RosettaSciIO returns it; a :class:`stemtomo.io.formats.datasets.Handle`.

    An image (2 axes) is one frame, at one position. ``lazy`` says whether the reader reads only what is asked for.
    """

    path: Path
    plugin: str
    number: int
    title: str
    signal_shape: tuple[int, ...]
    dtype: np.dtype
    lazy: bool

    @property
    def where(self) -> str:
        """File and signal, for messages."""
        return f"{self.path}[{self.title or self.number}]"

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes; an image has two more, of length 1."""
        return (1, 1, *self.signal_shape) if len(self.signal_shape) == 2 else self.signal_shape

    @contextmanager
    def open(self) -> Iterator[Any]:
        """Yield the signal's array: a Dask array if the reader is lazy, computed where it is sliced."""
        array = _read(self.path, self.plugin, self.lazy)[self.number]["data"]
        with reading(self.where, f"what RosettaSciIO's reader {self.plugin} takes"):
            yield _Computed(array.reshape(self.shape))

    def identity(self) -> dict[str, Any]:
        """Return the identity of the file, and the signal in it."""
        return {**file_identity(self.path), "array": f"{self.number}: {self.title}", "reader": self.plugin}


@dataclass(frozen=True)
class _Computed:
    """Slices of an array as NumPy arrays; a Dask graph is worked off here, and not on the cluster."""

    array: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes."""
        return tuple(self.array.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        part = self.array[index]
        return np.asarray(part.compute(scheduler="synchronous") if hasattr(part, "compute") else part)


_PREFERRED = {"mrc": "MRC"}
"""Reader of a suffix that several take: MRCZ reads compressed variants, and needs a package more."""

_NEVER_LAZY = {"pantarhei"}
"""Readers whose lazy way is wrong: that of PantaRhei maps compressed members as if they were not (0.15.0)."""


def plugins(path: Path) -> list[str]:
    """Return the names of the readers that take files called like ``path``; none without RosettaSciIO."""
    try:
        rsciio = require("rsciio", path)
    except FormatError:
        return []
    suffix = path.suffix.lower().lstrip(".")
    if suffix in _PREFERRED:
        return [_PREFERRED[suffix]]
    return [entry["name"] for entry in rsciio.IO_PLUGINS if suffix in entry["file_extensions"]]


def signals(path: Path, plugin: str | None = None) -> tuple[Signal, ...]:
    """Return the signals of ``path``; ``plugin`` is RosettaSciIO's name of the reader, needed if several would take it.

    Raises
    ------
    FormatError
        If RosettaSciIO is not installed, has no reader or several, or its reader fails.
    """
    if plugin is None:
        names = plugins(path)
        if len(names) != 1:
            require("rsciio", path)
            listed = f"has several readers for it, {', '.join(names)}; give" if names else "knows no such file; check"
            raise FormatError(f"{path}: RosettaSciIO {listed} format = '{PREFIX}:NAME'")
        plugin = names[0]
    try:
        lazy = plugin.lower() not in _NEVER_LAZY
        found = _read(path, plugin, lazy)
    except NotImplementedError:  # how RosettaSciIO says that a reader cannot be lazy
        found, lazy = _read(path, plugin, False), False
    return tuple(
        Signal(
            path,
            plugin,
            number,
            str(entry["metadata"].get("General", {}).get("title", "")),
            tuple(int(length) for length in entry["data"].shape),
            np.dtype(entry["data"].dtype),
            lazy,
        )
        for number, entry in enumerate(found)
    )


def find_signal(path: Path, plugin: str | None = None, name: str | None = None) -> Signal:
    """Return the signal ``name`` (title, or number from 0) of ``path``; the only one, or the only one of 4 axes.

    Raises
    ------
    FormatError
        If there is no such signal, or none was named and the choice is open; listing them.
    """
    found = signals(path, plugin)
    if name is not None:
        chosen = [one for one in found if name in (one.title, str(one.number))]
    else:
        chosen = [one for one in found if len(one.signal_shape) >= 4] if len(found) > 1 else list(found)
    if len(chosen) == 1:
        return chosen[0]
    listed = ", ".join(f"{one.number} {one.title!r} {list(one.signal_shape)} {one.dtype}" for one in found[:12])
    said = "no signal was named" if name is None else f"the name {name!r} fits {len(chosen)} signals"
    raise FormatError(f"{path}: {said}; it holds {listed or 'none'}: give its title or number as input.array")


def _read(path: Path, plugin: str, lazy: bool) -> list[dict[str, Any]]:
    rsciio = require("rsciio", path)
    modules = {entry["name"].lower(): entry["api"] for entry in rsciio.IO_PLUGINS}
    if plugin.lower() not in modules:
        raise FormatError(f"{path}: RosettaSciIO has no reader {plugin!r}; it has {', '.join(sorted(modules))}")
    reader = require(modules[plugin.lower()], path)
    # What a reader cannot do lazily it may do otherwise.
    with reading(path, f"what RosettaSciIO's reader {plugin} takes", passing=(NotImplementedError,) if lazy else ()):
        return list(reader.file_reader(str(path), lazy=lazy))
