"""Checkpoints: the states of all parts on disk, complete or not there at all.

Layout of a checkpoint directory::

    step-00000040/part-00000.npz ...   states, written by the workers
    step-00000040/shared.npz           what is not in a part: loss history, probe, poses
    step-00000040/mark.json            step, fingerprint, files and their sizes; written last

Every file is written under another name in the same directory, flushed to the disk and renamed. A step without its
mark, or with a file that is missing or has another size, does not count.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from stemtomo.distributed.interruption import stop_here
from stemtomo.distributed.states import read_tree, write_tree
from stemtomo.distributed.trees import Tree
from stemtomo.errors import StoreError, UnreachableError
from stemtomo.locations import ObjectPath, location, remove_tree, replacing_object

FORMAT = 1
_MARK = "mark.json"
_SHARED = "shared.npz"


@dataclass(frozen=True)
class Mark:
    """A complete checkpoint: its step, the files of its parts and its shared state."""

    step: int
    parts: tuple[Path, ...]
    shared: Tree


class Checkpoint:
    """A directory that keeps the last complete checkpoint of one computation.

    Parameters
    ----------
    directory
        On a file system that this process and all workers see, or in object storage; made when first written to.
    fingerprint
        Identifies the data, the settings and the cut into parts; checkpoints of another fingerprint do not count.
    keep
        Complete checkpoints to keep.
    """

    def __init__(self, directory: str | os.PathLike[str], fingerprint: str = "", keep: int = 1) -> None:
        self.directory = location(directory)
        self.fingerprint = fingerprint
        self.keep = max(1, keep)

    def latest(self) -> Mark | None:
        """Return the last complete checkpoint, or ``None``. Damaged and incomplete ones are passed over."""
        for step in sorted(self._steps(), reverse=True):
            mark = self._read_mark(step)
            if mark is not None:
                return mark
        return None

    def begin(self, step: int, part_count: int) -> list[Path]:
        """Make room for ``step`` and return the file of each part; a checkpoint of this step ceases to count."""
        directory = self._directory_of(step)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / _MARK).unlink(missing_ok=True)
        except OSError as error:
            raise _not_written(directory, error) from error
        return [directory / f"part-{index:05d}.npz" for index in range(part_count)]

    def commit(self, step: int, sizes: Sequence[int], shared: Tree = None) -> Mark:
        """Declare ``step`` complete, now that its parts of ``sizes`` bytes are written, and remove older ones.

        Raises
        ------
        StoreError
            If a file cannot be written, or a worker's file is not visible from here.
        UnfinishedError
            If this process was asked to stop: the checkpoint is complete.
        """
        directory = self._directory_of(step)
        files = {f"part-{index:05d}.npz": int(size) for index, size in enumerate(sizes)}
        for name, size in files.items():
            if (found := _size_of(directory / name)) != size:
                raise StoreError(
                    f"a worker wrote {size} bytes to {directory / name}, but this process finds {found or 'none'}; "
                    "put the checkpoint directory on a file system that all workers and this process share"
                )
        files[_SHARED] = write_state(directory / _SHARED, shared)
        text = json.dumps({"format": FORMAT, "step": step, "fingerprint": self.fingerprint, "files": files}, indent=1)
        try:
            with _replaced(directory / _MARK) as file:
                file.write(text.encode())
        except OSError as error:
            raise _not_written(directory / _MARK, error) from error
        mark = self._read_mark(step)
        if mark is None:
            raise StoreError(f"{directory} changed while it was written; does another process use the same directory?")
        self._remove_others(step)
        stop_here(f"with a checkpoint of step {step} in {directory.parent}")
        return mark

    def discard(self, step: int) -> None:
        """Remove what was written of ``step``."""
        remove_tree(self._directory_of(step))

    def clear(self) -> None:
        """Remove all checkpoints: the result they lead to is published."""
        for step in self._steps():
            self.discard(step)

    def _remove_others(self, step: int) -> None:
        steps = self._steps()
        complete = sorted(other for other in steps if other <= step and self._read_mark(other) is not None)
        for other in set(steps) - set(complete[-self.keep :]):
            self.discard(other)

    def _directory_of(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def _steps(self) -> list[int]:
        names = [path.name.removeprefix("step-") for path in self.directory.glob("step-*")]
        return [int(name) for name in names if name.isdecimal()]

    def _read_mark(self, step: int) -> Mark | None:
        directory = self._directory_of(step)
        try:
            mark = json.loads((directory / _MARK).read_text())
            files = dict(mark["files"])
            valid = mark["format"] == FORMAT and mark["step"] == step and mark["fingerprint"] == self.fingerprint
            if not valid or any(_size_of(directory / name) != size for name, size in files.items()):
                return None
            shared = read_state(directory / _SHARED)
        except UnreachableError:
            raise  # nothing can be said of it
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return Mark(step, tuple(directory / name for name in sorted(files) if name != _SHARED), shared)


def write_state(path: str | os.PathLike[str], state: Tree) -> int:
    """Write ``state`` to ``path`` in one atomic step and return the size of the file in bytes.

    Parameters
    ----------
    state
        A tree of arrays (NumPy or CuPy), numbers, strings and ``None``.

    Raises
    ------
    StoreError
        If it cannot be written; what was at ``path`` is untouched.
    TypeError
        If the state holds anything else.
    """
    path = location(path)
    try:
        with _replaced(path) as file:
            write_tree(file, state)
        return path.stat().st_size
    except OSError as error:
        raise _not_written(path, error) from error


def read_state(path: str | os.PathLike[str]) -> Tree:
    """Return the state that :func:`write_state` wrote to ``path``.

    Raises
    ------
    StoreError
        If the file is missing or damaged.
    """
    try:
        return read_tree(location(path))
    except UnreachableError:
        raise
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise StoreError(
            f"the checkpoint file {path} cannot be read ({error}); remove its directory to go on without it"
        ) from error


@contextmanager
def _replaced(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file that takes the place of ``path`` when, and only if, all of it is on the disk."""
    if isinstance(path, ObjectPath):
        with replacing_object(path) as file:
            yield file
        return
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name itself survives a power cut
    finally:
        os.close(directory)


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except UnreachableError:
        raise
    except OSError:
        return None


def _not_written(path: Path, error: OSError) -> StoreError:
    if isinstance(error, StoreError):
        return error
    try:
        free = f" ({shutil.disk_usage(path if path.is_dir() else path.parent).free / 1e9:.3g} GB free)"
    except OSError:
        free = ""
    return StoreError(
        f"the checkpoint {path} cannot be written: {error.strerror or error}{free}. The one before it is untouched; "
        "make room or choose another directory, then run again to go on from there"
    )
