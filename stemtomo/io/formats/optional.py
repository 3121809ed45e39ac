"""Packages that only some formats need: imported when such a file is opened, with a clear message where absent."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stemtomo.errors import FormatError
from stemtomo.io.untrusted import reading

EXTRA = "pip install 'stemtomo[formats]'"


def require(module: str, path: Path) -> Any:
    """Import ``module``, which is needed to read ``path``.

    Raises
    ------
    FormatError
        Naming the package and how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        needed = (error.name or module).partition(".")[0]
        raise FormatError(f"{path}: reading it needs the package {needed}, which is not installed; {EXTRA}") from error


@contextmanager
def open_hdf5(path: Path) -> Iterator[Any]:
    """Open the HDF5 file ``path`` for reading, with the filters of hdf5plugin where that is installed.

    A file that is being written in SWMR mode is opened for that (``file.swmr_mode``); its datasets must be refreshed.

    Raises
    ------
    FormatError
        If h5py is not installed, or the library cannot open the file or read from it; with what to check.
    """
    h5py = require("h5py", path)
    try:
        importlib.import_module("hdf5plugin")
        hint = "it is damaged, still being written or copied, or compressed with a filter that is not installed"
    except ImportError:
        hint = f"it may be compressed, and hdf5plugin is not installed ({EXTRA}); or it is damaged or still copied"
    with reading(path, "HDF5", hint), _opened(h5py, path) as file:
        yield file


def _opened(h5py: Any, path: Path) -> Any:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        if "already open for" not in str(error):  # the flag of a writer, in SWMR mode or not
            raise
        try:
            return h5py.File(path, "r", libver="latest", swmr=True)
        except OSError:
            raise error from None
