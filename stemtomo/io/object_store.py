"""The store of Zarr for what lies below an :class:`~stemtomo.locations.ObjectPath`, as patient as the path itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from zarr.storage import ObjectStore

from stemtomo.locations import ObjectPath, client_of, gives_up, pauses

_Answer = TypeVar("_Answer")


def zarr_store(path: Path) -> Any:
    """Return what Zarr and xarray open for the folder ``path``."""
    return PatientStore(path) if isinstance(path, ObjectPath) else str(path)


class PatientStore(ObjectStore):
    """Objects below ``path``. It travels to other processes as the path alone: each has its own credentials."""

    def __init__(self, path: ObjectPath, read_only: bool = False) -> None:
        super().__init__(client_of(path), read_only=read_only)
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return PatientStore, (self.path, self.read_only)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PatientStore) and (self.path, self.read_only) == (other.path, other.read_only)

    def __hash__(self) -> int:
        return hash((self.path, self.read_only))

    def __str__(self) -> str:
        return str(self.path)

    def with_read_only(self, read_only: bool = False) -> PatientStore:
        """Return the same store with or without the right to write."""
        return PatientStore(self.path, read_only)

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        """Return an object or a part of it, ``None`` if it is not there."""
        return await self._answered(key, lambda: super(PatientStore, self).get(key, prototype, byte_range))

    async def get_partial_values(self, prototype: Any, key_ranges: Iterable[tuple[str, Any]]) -> list[Any]:
        """Return parts of objects."""
        wanted = list(key_ranges)
        return [await self.get(key, prototype, byte_range) for key, byte_range in wanted]

    async def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        return await self._answered(key, lambda: super(PatientStore, self).exists(key))

    async def set(self, key: str, value: Any) -> None:
        """Replace an object."""
        await self._answered(key, lambda: super(PatientStore, self).set(key, value))

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names directly below ``prefix``."""

        async def names() -> list[str]:
            return [name async for name in super(PatientStore, self).list_dir(prefix)]

        for name in await self._answered(prefix, names):
            yield name

    async def _answered(self, key: str, ask: Callable[[], Awaitable[_Answer]]) -> _Answer:
        began = time.monotonic()
        for pause in pauses():
            try:
                return await ask()
            except FileNotFoundError:
                raise
            except Exception as error:
                final = gives_up(error, self.path / key, time.monotonic() - began + pause)
                if final is not None:
                    raise final from None
            await asyncio.sleep(pause)
        raise AssertionError("pauses do not end")
