"""Ending early and cleanly: a signal asks, and the work stops where everything done so far is on the disk.

Batch systems warn before they kill. A signal belongs to the whole process, so this is the one thing that is kept for
all of it: whether a stop was asked for. Threads that work look here after every checkpoint, the thread that drives them
after every finished piece of work.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from stemtomo.errors import UnfinishedError

EXIT_UNFINISHED = 75
"""Exit code of work that was stopped and goes on when it is run again (EX_TEMPFAIL of sysexits.h)."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_asked = threading.Event()


def stop_here(what: str) -> None:
    """Leave the work here if a stop was asked for; ``what`` is on the disk.

    Raises
    ------
    UnfinishedError
        If so.
    """
    if _asked.is_set():
        raise UnfinishedError(f"Stopped as asked, {what}. Run the same command again to continue there.")


@contextmanager
def stoppable(grace_s: float, say: Callable[[str], None]) -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 ask the work to stop; without effect outside the main thread.

    Parameters
    ----------
    grace_s
        Time from the signal to the moment when the process leaves with :data:`EXIT_UNFINISHED` wherever it is, in
        seconds: what is complete is on the disk anyway. A second signal does the same.
    say
        Takes what is to be told to the user.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked.clear()
    timers: list[threading.Timer] = []

    def leave(why: str) -> None:
        say(f"Stopped {why}; what is finished and the last checkpoints are kept. Run the same command again.")
        os._exit(EXIT_UNFINISHED)  # threads that compute cannot be stopped in any other way

    def asked(number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if _asked.is_set():
            leave(f"at once, {name} came again")
        _asked.set()
        say(f"{name}: stopping at the next checkpoint, in {grace_s:g} s at the latest.")
        timers.append(threading.Timer(grace_s, leave, (f"{grace_s:g} s after {name}, no checkpoint came before",)))
        timers[0].daemon = True
        timers[0].start()

    before = {number: signal.signal(number, asked) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        # Threads of a pool end at their next checkpoint, which may be later than the grace: the timer stays for them.
        if timers and threading.active_count() <= 2:
            timers[0].cancel()
