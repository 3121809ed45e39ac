"""How far an acquisition is: frames in, lag and rate, as a report after every shard."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from stemtomo.distributed.follow import Clock


@dataclass(frozen=True)
class Partial:
    """Where an acquisition is, after a shard was recorded.

    Parameters
    ----------
    tilt
        Tilt of the shard.
    frames, ready, expected
        Frames in the store, whole in the files, and in the end.
    lag_frames, lag_s
        Frames that wait for the store or for their shard to fill, and since when the first of them does.
    frames_per_s, bytes_per_s
        What this call has put into the store so far, per second.
    tilts_complete, tilts
        Tilts that are complete, and all.
    problems
        Files that are not followed, and why.
    """

    tilt: int
    frames: int
    ready: int
    expected: int
    lag_frames: int
    lag_s: float
    frames_per_s: float
    bytes_per_s: float
    tilts_complete: int
    tilts: int
    problems: tuple[str, ...] = ()


@dataclass
class Meter:
    """Counts frames, and knows since when the oldest one waits.

    Parameters
    ----------
    clock
        Time of the acquisition; rates are those of this process.
    tilts, frames_per_tilt, frame_bytes
        Extent of the series.
    """

    clock: Clock
    tilts: int
    frames_per_tilt: int
    frame_bytes: int
    frames: int = 0
    copied: int = 0
    began: float = field(default_factory=time.perf_counter)
    _ready: deque[tuple[float, int]] = field(default_factory=deque)

    @property
    def seconds(self) -> float:
        """Seconds since the beginning, for rates."""
        return max(time.perf_counter() - self.began, 1e-9)

    def saw(self, ready: int) -> None:
        """Say that now ``ready`` frames are whole in the files."""
        if not self._ready or ready > self._ready[-1][1]:
            self._ready.append((self.clock.now(), ready))

    def report(self, tilt: int, frames: int, ready: int, complete: int, problems: tuple[str, ...]) -> Partial:
        """Count ``frames`` more of ``tilt`` in the store, and say where everything is."""
        self.frames += frames
        self.copied += frames
        while self._ready and self._ready[0][1] <= self.frames:
            self._ready.popleft()
        seconds = self.seconds
        return Partial(
            tilt=tilt,
            frames=self.frames,
            ready=ready,
            expected=self.tilts * self.frames_per_tilt,
            lag_frames=max(0, ready - self.frames),
            lag_s=self.clock.now() - self._ready[0][0] if self._ready else 0.0,
            frames_per_s=self.copied / seconds,
            bytes_per_s=self.copied * self.frame_bytes / seconds,
            tilts_complete=complete,
            tilts=self.tilts,
            problems=problems,
        )
