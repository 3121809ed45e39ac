"""Where a store lies: a folder, or a prefix of a bucket, ``s3://bucket/series.zarr``, that is used like one.

An :class:`ObjectPath` has the part of :class:`pathlib.Path` that stores and checkpoints need. What object storage lacks
is left out or said here: folders are not made (names have slashes in them), a file is replaced by one request, as a
whole or not at all, and a folder cannot be renamed in one step. So a result is written to its place with its mark last.

Endpoint and credentials are those of the environment of each process (``AWS_ENDPOINT_URL``, ``AWS_REGION``,
``AWS_ACCESS_KEY_ID`` ...). Requests that fail are repeated, with pauses that grow, for ``STEMTOMO_S3_PATIENCE_S``
(120 s); then one error says so.
"""

from __future__ import annotations

import functools
import io
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from stemtomo.errors import ConfigurationError, RefusedError, UnreachableError

SCHEME = "s3://"
PATIENCE_VARIABLE = "STEMTOMO_S3_PATIENCE_S"
_PATIENCE_S = 120.0
_ATTEMPT_S = 30.0
_LONGEST_PAUSE_S = 10.0
_WHOLE_BYTES = 64 * 2**20
"""Objects to this size are read by one request: shards are, as they are stored."""

_Answer = TypeVar("_Answer")


def location(path: str | os.PathLike[str] | ObjectPath) -> Path:
    """Return ``path`` as a path: a :class:`pathlib.Path`, or an :class:`ObjectPath` for ``s3://bucket/name``.

    The object path stands in for the other: it has the methods that stores and checkpoints call.
    """
    if isinstance(path, ObjectPath):
        return cast(Path, path)
    text = os.fspath(path)
    found = re.fullmatch(r"s3:/{1,2}([^/]+)/*(.*?)/*", text)  # pathlib makes one slash of two
    if found is None:
        if text.startswith("s3:"):
            raise ConfigurationError(f"{text}: names no bucket; expected s3://bucket/name.zarr")
        return Path(text)
    return cast(Path, ObjectPath(found[1], found[2]))


def local_path(path: str | os.PathLike[str] | ObjectPath, what: str) -> Path:
    """Return ``path``, of ``what``, which is on a file system.

    Raises
    ------
    ConfigurationError
        If it is in object storage.
    """
    found = location(path)
    if is_object(found):
        raise ConfigurationError(f"{found}: {what} on a file system only, not in a bucket; give a local path")
    return found


def is_object(path: object) -> bool:
    """Whether ``path`` is in object storage."""
    return isinstance(path, ObjectPath)


@dataclass(frozen=True, order=True)
class ObjectPath:
    """An object of a bucket, or the prefix of several, with the methods of a path that stores need.

    Raises
    ------
    UnreachableError
        By every method, if the storage does not answer for as long as we are patient; RefusedError if it refuses.
    """

    bucket: str
    key: str = ""

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: object) -> ObjectPath:
        return ObjectPath(self.bucket, "/".join(part for part in (self.key, str(name).strip("/")) if part))

    @property
    def name(self) -> str:
        """Last part of the key."""
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """Name without its ending."""
        return Path(self.name).stem

    @property
    def parent(self) -> ObjectPath:
        """What the object lies in."""
        return ObjectPath(self.bucket, self.key.rpartition("/")[0])

    def with_name(self, name: str) -> ObjectPath:
        """Return the path beside this one."""
        return self.parent / name

    def expanduser(self) -> ObjectPath:
        """Return this path."""
        return self

    def absolute(self) -> ObjectPath:
        """Return this path."""
        return self

    def exists(self) -> bool:
        """Whether there is such an object, or one below it."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Whether there is such an object."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether there are objects below."""
        return bool(self._listed(delimited=True, first=True))

    def iterdir(self) -> Iterator[ObjectPath]:
        """Yield what lies directly in here."""
        for key, _size in self._listed(delimited=True):
            yield ObjectPath(self.bucket, key)

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """Yield what lies directly in here and has a name that fits, or with ``**/`` before it at any depth."""
        deep = pattern.startswith("**/")
        found = self._listed(delimited=not deep)
        for path in (ObjectPath(self.bucket, key) for key, _size in found):
            if fnmatchcase(path.name, pattern.removeprefix("**/")):
                yield path

    def sizes(self) -> dict[str, int]:
        """Return the sizes in bytes of all objects at and below, by what their key has beyond this one's."""
        found = {key.removeprefix(self.key).lstrip("/"): size for key, size in self._listed(delimited=False)}
        return found if found or not self.is_file() else {"": self.stat().st_size}

    def stat(self) -> os.stat_result:
        """Return the size in bytes as ``st_size``; times and owners are not known."""
        meta = _answered(self, lambda store: _obstore().head(store, self.key))
        return os.stat_result((0o100644, 0, 0, 1, 0, 0, int(meta["size"]), 0, 0, 0))

    def read_bytes(self) -> bytes:
        """Return the whole object."""
        return _answered(self, lambda store: bytes(_obstore().get(store, self.key).bytes()))

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return the whole object as text."""
        return self.read_bytes().decode(encoding)

    def read_at(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset`` on."""
        if length == 0:
            return b""
        return _answered(self, lambda store: bytes(_obstore().get_range(store, self.key, start=offset, length=length)))

    def write_bytes(self, data: bytes) -> int:
        """Replace the object; it is stored when this returns."""
        _answered(self, lambda store: _obstore().put(store, self.key, data, use_multipart=len(data) > _WHOLE_BYTES))
        return len(data)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object; one that is not there is no error, as the storage does not tell."""
        del missing_ok
        _answered(self, lambda store: _obstore().delete(store, self.key))

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: there are no folders."""

    def rmdir(self) -> None:
        """Do nothing: a folder is not there once nothing is in it."""

    def _listed(self, delimited: bool, first: bool = False) -> list[tuple[str, int]]:
        """Return keys and sizes below; only what lies directly in here where ``delimited``."""
        prefix = f"{self.key}/" if self.key else ""

        def ask(store: Any) -> list[tuple[str, int]]:
            if delimited:
                found = _obstore().list_with_delimiter(store, prefix or None)
                folders = [(str(name).rstrip("/"), 0) for name in found["common_prefixes"]]
                return folders + [(meta["path"], int(meta["size"])) for meta in found["objects"]]
            chunks = _obstore().list(store, prefix or None)
            return [(meta["path"], int(meta["size"])) for chunk in chunks for meta in chunk]

        found = sorted(_answered(self, ask))
        return found[:1] if first else found


@contextmanager
def reader(path: Path, whole: bool = True) -> Iterator[tuple[int, Callable[[int, int], bytes]]]:
    """Open the file ``path``; yield its size and a function of offset and length that reads.

    Parameters
    ----------
    whole
        Whether most of it will be read; an object is then fetched by one request.

    Raises
    ------
    FileNotFoundError
        If there is none.
    """
    if isinstance(path, ObjectPath):
        size = path.stat().st_size
        if whole and size <= _WHOLE_BYTES:
            data = path.read_bytes()
            yield size, lambda offset, length: data[offset : offset + length]
        else:
            yield size, path.read_at
        return
    with path.open("rb", buffering=0) as stream:
        descriptor = stream.fileno()
        yield os.fstat(descriptor).st_size, lambda offset, length: os.pread(descriptor, length, offset)


@contextmanager
def replacing_object(path: ObjectPath) -> Iterator[IO[bytes]]:
    """Yield a file whose content becomes the object ``path`` at the end, if no error comes before."""
    with io.BytesIO() as file:
        yield file
        path.write_bytes(file.getvalue())


def replace_object(path: ObjectPath, buffers: Sequence[bytes]) -> None:
    """Replace the object ``path`` by ``buffers`` one after another."""
    path.write_bytes(b"".join(buffers))


@contextmanager
def published(target: ObjectPath, mark: str) -> Iterator[Path]:
    """Yield an empty local folder; at the end its files become the objects below ``target``, in place of what is there.

    The object named ``mark`` goes first and comes last: whoever looks for it never finds old and new objects together.
    A kill on the way leaves no mark. The folder is in ``TMPDIR``.
    """
    with tempfile.TemporaryDirectory(prefix="stemtomo-") as temporary:
        folder = Path(temporary) / "group"
        folder.mkdir()
        yield folder
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        (target / mark).unlink()
        for name in target.sizes().keys() - files.keys():
            (target / name).unlink()
        for name in sorted(files, key=lambda name: (name == mark, name)):
            (target / name).write_bytes(files[name].read_bytes())


def remove_tree(path: Path) -> None:
    """Remove everything at and below ``path``; what cannot be removed is left."""
    if isinstance(path, ObjectPath):
        for name in path.sizes():
            (path / name).unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


# -- requests ---------------------------------------------------------------------------------------------------------


def _obstore() -> Any:
    try:
        import obstore
    except ImportError as error:
        raise ConfigurationError("stores on S3 need obstore: pip install 'stemtomo[s3]'") from error
    return obstore


def _settings() -> tuple[str | None, float]:
    """Return the endpoint and the patience in seconds as the environment says."""
    text = os.environ.get(PATIENCE_VARIABLE, str(_PATIENCE_S))
    try:
        patience = float(text)
        timedelta(seconds=patience)
    except (ValueError, OverflowError):
        raise ConfigurationError(f"{PATIENCE_VARIABLE}={text}: expected a number of seconds") from None
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"), patience


@functools.lru_cache(maxsize=64)
def _bucket(bucket: str, prefix: str, settings: tuple[str | None, float]) -> Any:
    """Return the client of ``bucket``; it keeps connections open, so each process has one for each prefix in use."""
    _obstore()
    from obstore.store import S3Store

    endpoint, patience = settings
    attempt = timedelta(seconds=min(_ATTEMPT_S, max(1.0, patience)))
    options: dict[str, Any] = {"timeout": attempt, "connect_timeout": min(attempt, timedelta(seconds=5))}
    where: dict[str, Any] = {}
    if endpoint is not None:
        where = {"endpoint": endpoint, "virtual_hosted_style_request": False}
        options["allow_http"] = endpoint.startswith("http://")
    backoff = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=_LONGEST_PAUSE_S), "base": 2}
    retries = {"max_retries": 30, "retry_timeout": timedelta(seconds=patience), "backoff": backoff}
    return S3Store(bucket, prefix=prefix or None, client_options=options, retry_config=retries, **where)


def client_of(path: ObjectPath) -> Any:
    """Return the client for what lies below ``path``."""
    return _bucket(path.bucket, path.key, _settings())


def pauses() -> Iterator[float]:
    """Yield the pauses in seconds between attempts at one request; they grow, and do not end."""
    pause = 0.1
    while True:
        yield pause
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def _answered(path: ObjectPath, ask: Callable[[Any], _Answer]) -> _Answer:
    """Return the answer to a request; the client repeats failed ones, and here those that broke off in the middle."""
    store, began = client_of(ObjectPath(path.bucket)), time.monotonic()
    for pause in pauses():
        try:
            return ask(store)
        except Exception as error:
            final = gives_up(error, path, time.monotonic() - began + pause)
            if final is not None:
                raise final from None
        time.sleep(pause)
    raise AssertionError("pauses do not end")


def gives_up(error: Exception, path: ObjectPath, seconds: float) -> Exception | None:
    """Return what to raise for an ``error`` of a request after ``seconds``; ``None`` if it is worth another attempt."""
    _obstore()
    from obstore.exceptions import BaseError, NotFoundError, PermissionDeniedError, UnauthenticatedError

    if isinstance(error, UnreachableError) or not isinstance(error, (BaseError, OSError)):
        return error
    if "NoSuchBucket" in str(error):
        return RefusedError(f"{path}: there is no bucket {path.bucket}; make it first")
    if isinstance(error, (FileNotFoundError, NotFoundError)):
        return FileNotFoundError(str(path))
    if isinstance(error, (PermissionDeniedError, UnauthenticatedError, PermissionError)):
        return RefusedError(
            f"{path}: access is denied ({_short(error)}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the "
            "rights on the bucket"
        )
    return unreachable(error, path) if seconds > _settings()[1] else None


def unreachable(error: Exception, path: ObjectPath) -> UnreachableError:
    """Return what to say when the client of the storage gives up with ``error``."""
    endpoint, patience = _settings()
    return UnreachableError(
        f"{path}: the storage {endpoint or 'of AWS'} did not answer for {patience:g} s ({_short(error)}). "
        "What is finished is kept; run the same command again to continue"
    )


def _short(error: BaseException) -> str:
    """Return the first sentence of an error of the client, which is a page long."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    found = re.search(r'message: "([^"]+)"|source: ([^{}]{5,100})', text)
    return (found[1] or found[2] if found else text[:160]).strip()
