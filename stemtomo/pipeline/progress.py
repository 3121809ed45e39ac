"""How long-running verbs report where they are, without knowing who is watching."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """What a watcher of a pipeline implements; every call is cheap and comes from the thread that called the verb."""

    def start(self, stage: str, total: int, unit: str = "") -> None:
        """Say that ``stage`` begins and takes ``total`` steps of ``unit`` (such as ``"tilt"`` or ``"iteration"``)."""
        ...

    def advance(self, n: int = 1, **numbers: float) -> None:
        """Say that ``n`` more steps of the stage started last are done; ``numbers`` are shown beside (``loss=...``)."""
        ...

    def finish(self, stage: str) -> None:
        """Say that ``stage`` is over, whether or not all its steps were needed."""
        ...


class Silent:
    """The watcher that is not there: the default of every verb."""

    def start(self, stage: str, total: int, unit: str = "") -> None:
        """Do nothing."""

    def advance(self, n: int = 1, **numbers: float) -> None:
        """Do nothing."""

    def finish(self, stage: str) -> None:
        """Do nothing."""
