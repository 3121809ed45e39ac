"""Following a growing source: every whole record once, in blocks, and a name for whatever goes wrong."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from stemtomo.distributed.follow import Follower, State, stall_message
from stemtomo.errors import AcquisitionError, StalledError
from tests.clock import ScriptedClock


class Records:
    """A source whose length and name tests set."""

    def __init__(self, expected: int, ready: int | None = None) -> None:
        self.where, self.n_expected, self.count, self.inode = "a.raw", expected, ready, 7

    def ready(self) -> int:
        if self.count is None:
            raise FileNotFoundError
        return self.count

    def identity(self) -> dict[str, int]:
        if self.count is None:
            raise FileNotFoundError
        return {"inode": self.inode}


def growing(source: Records, counts: list[int]) -> ScriptedClock:
    return ScriptedClock([lambda n=n: setattr(source, "count", n) for n in counts])


def tail(
    source: Records,
    start: int = 0,
    block: int = 1,
    *,
    clock: ScriptedClock,
    poll_s: float = 1.0,
    deadline_s: float = 600.0,
) -> Iterator[tuple[int, int]]:
    """Yield what a follower tells of one source until it is complete, as a watch does of several."""
    follower, last = Follower(source, start, block), clock.now()
    while True:
        seen = follower.ready
        ranges = follower.poll()
        yield from ranges
        if follower.state is State.COMPLETE:
            return
        if ranges or follower.ready > seen:
            last = clock.now()
        elif clock.now() - last >= deadline_s:
            raise StalledError(stall_message(source, follower.ready, deadline_s))
        else:
            clock.sleep(poll_s)


def test_random_growth_gives_every_record_once_in_aligned_blocks() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        expected, block = int(rng.integers(1, 400)), int(rng.integers(1, 50))
        steps = np.unique(np.append(rng.integers(0, expected + 1, 12), expected)).tolist()
        source = Records(expected)
        ranges = list(tail(source, 0, block, clock=growing(source, steps), deadline_s=50))
        assert [i for start, stop in ranges for i in range(start, stop)] == list(range(expected))
        assert all(start % block == 0 and stop - start == block for start, stop in ranges[:-1])


def test_receivers_out_of_step_count_as_far_as_the_slowest() -> None:
    class Sectors(Records):
        received = (0, 0, 0, 0)

        def ready(self) -> int:
            return min(self.received)

    source = Sectors(64, ready=0)
    rng = np.random.default_rng(5)
    ahead = np.sort(rng.integers(0, 65, (20, 4)), axis=0).tolist()
    steps = [lambda now=now: setattr(source, "received", now) for now in [*ahead, (64, 64, 64, 64)]]
    got = []
    for start, stop in tail(source, 0, 8, clock=ScriptedClock(steps)):
        assert stop <= min(source.received)
        got += range(start, stop)
    assert got == list(range(64))


def test_a_restart_takes_up_at_its_mark() -> None:
    source = Records(20, ready=12)
    assert list(tail(source, 8, 4, clock=growing(source, [20]))) == [(8, 12), (12, 16), (16, 20)]
    with pytest.raises(ValueError, match="not a multiple"):
        Follower(source, 3, 4)


def test_a_source_that_appears_late_is_waited_for() -> None:
    source = Records(4)
    clock = ScriptedClock([lambda: None] * 30 + [lambda: setattr(source, "count", 4)])
    assert list(tail(source, 0, 4, clock=clock, poll_s=1, deadline_s=60)) == [(0, 4)]
    assert clock.pauses == 31


def test_a_stall_is_told_with_its_counts_and_what_came_before_is_kept() -> None:
    source = Records(6000, ready=2050)
    clock = ScriptedClock()
    ranges = tail(source, 0, 1024, clock=clock, poll_s=0.5, deadline_s=5)
    assert [next(ranges), next(ranges)] == [(0, 1024), (1024, 2048)]
    with pytest.raises(StalledError, match=r"a.raw: no new frame for 5 s; it has 2050 of 6000 frames"):
        next(ranges)
    assert clock.time == pytest.approx(5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 100}, "shrank from 1300 to 100 frames"),
        ({"inode": 8}, "was replaced while it was followed: it was inode 7, now it is inode 8"),
        ({"count": 6001}, "holds 6001 frames, 1 more than the 6000 of its scan"),
        ({"count": None}, "is no longer there"),
    ],
)
def test_what_breaks_is_named(change: dict[str, int | None], message: str) -> None:
    source = Records(6000, ready=1300)
    follower = Follower(source, 0, 100)
    assert follower.state is State.WAITING
    assert len(follower.poll()) == 13
    assert follower.state is State.GROWING
    for name, value in change.items():
        setattr(source, name, value)
    with pytest.raises(AcquisitionError, match=message):
        follower.poll()
    assert follower.state is State.BROKEN


def test_an_earlier_run_remembers_who_the_source_was() -> None:
    with pytest.raises(AcquisitionError, match=r"inode 3.*inode 7"):
        Follower(Records(5, ready=2), identity={"inode": 3}).poll()
    with pytest.raises(AcquisitionError, match="no longer there"):
        Follower(Records(5), identity={"inode": 3}).poll()
