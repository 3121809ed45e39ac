"""Following a source that grows: which whole records have come, when it is complete, when it stalls or breaks.

Nothing here knows formats or files: a source says how many records it holds and who it is. The state is found by
polling, which works on network file systems where notifications do not, and time comes from a clock that tests replace.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Protocol

from stemtomo.errors import AcquisitionError


class State(StrEnum):
    """Where an acquisition is."""

    WAITING = "waiting"
    GROWING = "growing"
    COMPLETE = "complete"
    BROKEN = "broken"


class Clock(Protocol):
    """Time, and how it is waited for."""

    def now(self) -> float:
        """Return seconds from any fixed moment on."""
        ...

    def sleep(self, seconds: float) -> None:
        """Return after ``seconds``."""
        ...


class WallClock:
    """The clock on the wall."""

    def now(self) -> float:
        """Return the seconds of a clock that is never set back."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)


class Growing(Protocol):
    """A sequence of records that is being written. A missing file raises ``FileNotFoundError``."""

    @property
    def where(self) -> str:
        """Name for messages."""
        ...

    @property
    def n_expected(self) -> int:
        """Records in the end."""
        ...

    def ready(self) -> int:
        """Return the number of whole records from the first one on; more than expected if there are too many."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """Return what stays the same while the source grows, and differs in another one."""
        ...


class Follower:
    """What is known of one growing source; every call of :meth:`poll` looks again.

    Parameters
    ----------
    source
        The records.
    start
        First record that is wanted, a multiple of ``block``.
    block
        Records that are handed out together; the last block may be shorter.
    identity
        What the source was when an earlier process began to follow it.

    Attributes
    ----------
    state
        Whether it has stalled is for whoever has a clock to say.
    ready
        Whole records seen so far.
    """

    def __init__(
        self, source: Growing, start: int = 0, block: int = 1, identity: Mapping[str, Any] | None = None
    ) -> None:
        if block < 1 or start % block:
            raise ValueError(f"start {start} is not a multiple of the block of {block} records")
        self.source = source
        self.state = State.WAITING
        self.ready = 0
        self._next = start
        self._block = block
        self._identity = None if identity is None else dict(identity)

    def poll(self) -> list[tuple[int, int]]:
        """Look at the source, and return the ranges [start, stop) of whole blocks that are new.

        Raises
        ------
        AcquisitionError
            If the source was replaced, shrank, disappeared, or holds more records than expected.
        """
        if self.state is State.COMPLETE:
            return []
        try:
            self.check()
            ready = self.source.ready()
        except FileNotFoundError:
            if self.state is State.WAITING and self._identity is None:
                return []
            raise self._broken("is no longer there; what was read of it is kept") from None
        expected = self.source.n_expected
        if ready < self.ready:
            raise self._broken(
                f"shrank from {self.ready} to {ready} frames; something writes to it again or cut it off: "
                "finished shards are kept"
            )
        if ready > expected:
            raise self._broken(
                f"holds {ready} frames, {ready - expected} more than the {expected} of its scan; correct the shape of "
                "the scan or the offset, frames are never dropped silently"
            )
        self.ready = ready
        self.state = State.COMPLETE if ready == expected else State.GROWING
        return self._whole_blocks()

    def check(self) -> None:
        """Check that the source is still the one that was seen first.

        Raises
        ------
        AcquisitionError
            With both identities.
        FileNotFoundError
            If it is gone.
        """
        found = dict(self.source.identity())
        if self._identity is None:
            self._identity = found
        elif found != self._identity:
            raise self._broken(
                f"was replaced while it was followed: it was {_listed(self._identity)}, now it is {_listed(found)}; "
                "finished shards are kept. Follow the new one into another store, or remove this one"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """What the source was when it was first seen; empty before."""
        return dict(self._identity or {})

    def _whole_blocks(self) -> list[tuple[int, int]]:
        ranges = []
        while self._next < self.ready:
            stop = min(self._next + self._block, self.source.n_expected)
            if stop > self.ready:
                break
            ranges.append((self._next, stop))
            self._next = stop
        return ranges

    def _broken(self, what: str) -> AcquisitionError:
        self.state = State.BROKEN
        return AcquisitionError(f"{self.source.where}: {what}")


def stall_message(source: Growing, ready: int, deadline_s: float) -> str:
    """Return the text for a source that brought nothing for ``deadline_s`` seconds."""
    partial = int(getattr(source, "partial_bytes", int)())
    ends = f"ends inside frame {ready}" if partial else f"has {ready}"
    return (
        f"{source.where}: no new frame for {deadline_s:g} s; it {ends} of {source.n_expected} frames. Run the same "
        "command again to continue when it grows, or pass missing='mask' to keep what there is"
    )


def _listed(identity: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in identity.items())
