"""Writing so that a kill or a full disk leaves the old content or the new one, and an error that says which disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from stemtomo.errors import StoreError
from stemtomo.locations import ObjectPath, is_object, replace_object

PARTIAL_SUFFIX = ".partial"
"""Ending of every temporary file, ours and Zarr's; what a killed process leaves behind is recognised by it."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


def human_bytes(count: float) -> str:
    """Return ``count`` bytes in decimal units, as disks are sold: ``3.02 TB``."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"


def free_bytes(path: Path) -> int:
    """Free bytes of the disk that holds ``path`` or, where it does not exist yet, its nearest existing parent.

    Object storage has no end.
    """
    if is_object(path):
        return sys.maxsize
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


@contextmanager
def storage_errors(path: Path, needed_bytes: int) -> Iterator[None]:
    """Turn a full or forbidden disk met while writing ``needed_bytes`` to ``path`` into a :class:`StoreError`."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise StoreError(
                f"{path}: the disk is full or a quota is reached ({error.strerror}): {human_bytes(needed_bytes)} "
                f"needed for this write, {human_bytes(free_bytes(path))} free; make room and run again, "
                "finished results are kept"
            ) from error
        if error.errno in _FORBIDDEN:
            raise StoreError(
                f"{path}: writing is not allowed ({error.strerror}); {human_bytes(needed_bytes)} needed, "
                f"{human_bytes(free_bytes(path))} free; correct the permissions or choose another store"
            ) from error
        raise


def replace_json(path: Path, content: dict[str, Any]) -> None:
    """Replace the file ``path`` by ``content`` as JSON: after a kill or a power cut it holds the old or the new.

    Raises
    ------
    StoreError
        If the disk is full or writing is not allowed; the old file is untouched.
    """
    replace_text(path, json.dumps(content, indent=1) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Replace the file ``path`` by ``text`` in one step, like :func:`replace_json`."""
    data = text.encode()
    with storage_errors(path, len(data)):
        replace_bytes(path, [data])


def replace_bytes(path: Path, buffers: Sequence[bytes]) -> None:
    """Replace the file ``path`` by ``buffers`` one after another in one step; errors are those of the system."""
    if isinstance(path, ObjectPath):
        replace_object(path, buffers)
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        with temporary.open("wb") as file:
            file.writelines(buffers)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def replacing(path: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """Yield the name of a file to write; when that is whole and on the disk, it takes the place of ``path``.

    It has the ending of ``path``, by which some writers choose the format.

    Raises
    ------
    StoreError
        If it cannot be written; what was at ``path`` is untouched, and nothing is left beside it.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        with storage_errors(path, needed_bytes):
            yield temporary
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def sync(path: Path) -> None:
    """Wait until the file or directory ``path`` is on the disk; nothing to do where it does not exist."""
    if is_object(path):  # a request that was answered is stored
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a directory and need not
            raise
    finally:
        os.close(descriptor)


def sync_up(folder: Path, top: Path) -> None:
    """Wait until the names of ``folder``, and of the folders above it up to ``top``, are on the disk.

    A file that was synced is lost in a power cut all the same, if the name of a new folder above it is not there yet.
    """
    while folder != top:
        sync(folder)
        folder = folder.parent
    sync(top)


def make_folder(path: Path) -> None:
    """Make the folder ``path`` and those above it that are missing; their names are on the disk when this returns."""
    if is_object(path):  # there are no folders
        return
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    path.mkdir(parents=True, exist_ok=True)
    if existing != path:
        sync_up(path.parent, existing)


def sync_tree(root: Path) -> None:
    """Wait until every file and directory under ``root`` is on the disk."""
    if is_object(root):
        return
    for folder, _folders, files in os.walk(root):
        for name in files:
            sync(Path(folder) / name)
        sync(Path(folder))


def remove_partial_files(root: Path, below: bool = True) -> None:
    """Remove the temporary files that a killed writer left in ``root`` and, if ``below``, in the folders under it."""
    if is_object(root):  # there are none
        return
    for path in root.rglob(f"*{PARTIAL_SUFFIX}") if below else root.glob(f"*{PARTIAL_SUFFIX}"):
        path.unlink(missing_ok=True)


def stored_bytes(root: Path) -> int:
    """Bytes that the files under ``root`` hold."""
    if isinstance(root, ObjectPath):
        return sum(root.sizes().values())
    total = 0
    for folder, _folders, files in os.walk(root):
        for name in files:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:  # replaced while we walk
                continue
    return total
