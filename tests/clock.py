"""A clock for tests: nobody waits, and every pause lets the next thing happen."""

from __future__ import annotations

from collections.abc import Callable, Iterable


class ScriptedClock:
    """Time passes only in :meth:`sleep`; each pause then calls the next of ``steps``."""

    def __init__(self, steps: Iterable[Callable[[], object]] = ()) -> None:
        self.time = 0.0
        self.steps = list(steps)
        self.pauses = 0

    def now(self) -> float:
        """Return the time."""
        return self.time

    def sleep(self, seconds: float) -> None:
        """Let time pass and the next step happen."""
        self.time += seconds
        self.pauses += 1
        if self.steps:
            self.steps.pop(0)()
