"""What surrounds every command: clear errors and exit codes, the cluster, progress bars, numbers as JSON."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from stemtomo.errors import (
    ConfigurationError,
    RefusedError,
    StalledError,
    StemtomoError,
    UnfinishedError,
    UnreachableError,
)

if TYPE_CHECKING:
    from stemtomo.pipeline.progress import Progress

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_STALLED = 3
EXIT_UNFINISHED = 75
_PATIENCE_S = 20.0
"""Time for a scheduler to answer, in seconds."""

GRACE_S = 90.0
"""From the signal that asks a command to stop to the moment when it leaves wherever it is, in seconds."""


def exit_code(error: BaseException) -> int:
    """Return the exit code for ``error``."""
    if isinstance(error, (UnfinishedError, UnreachableError)) and not isinstance(error, RefusedError):
        return EXIT_UNFINISHED
    if isinstance(error, StalledError):
        return EXIT_STALLED
    return EXIT_BAD_INPUT if isinstance(error, StemtomoError | PermissionError) else EXIT_FAILED


@contextmanager
def clear_errors(debug: bool) -> Iterator[None]:
    """Turn an error into one message and an exit code."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        typer.echo("\nInterrupted. What is finished is kept; run the same command again to continue.", err=True)
        raise typer.Exit(EXIT_FAILED) from None
    except Exception as error:
        if debug:
            raise
        code = exit_code(error)
        if code == EXIT_FAILED:
            text = (
                f"{type(error).__name__}: {error}\n"
                "What is finished is kept; run the same command again to continue (--debug shows where it failed)."
            )
        else:
            text = str(error)
        typer.echo(text if isinstance(error, UnfinishedError) else f"Error: {text}", err=True)
        raise typer.Exit(code) from None


@contextmanager
def cluster(scheduler: str | None, workers: int | None, grace_s: float = GRACE_S) -> Iterator[None]:
    """Connect to a scheduler or start workers here; whatever runs inside finds the client by itself.

    SIGTERM and SIGUSR1 stop the work at its next checkpoint, after ``grace_s`` at the latest.
    """
    from stemtomo.distributed.interruption import stoppable

    with stoppable(grace_s, lambda text: typer.echo(text, err=True)), _client(scheduler, workers):
        yield


@contextmanager
def _client(scheduler: str | None, workers: int | None) -> Iterator[None]:
    if scheduler is not None and workers is not None:
        raise ConfigurationError(
            "--scheduler and --workers exclude each other: give the address of a cluster, or a number to start here"
        )
    if workers is not None:
        from stemtomo.distributed.local import local_cluster

        with local_cluster(workers):
            yield
        return
    if scheduler is None:
        yield
        return
    from distributed import Client
    from distributed.comm import resolve_address

    try:
        address = _address(scheduler)
        with suppress(OSError):  # the name of a host may be known later
            resolve_address(address)  # what is no address is refused here: a client that fails stays the active one
        client = Client(address, timeout=_PATIENCE_S)
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = str(error) or type(error).__name__
        raise ConfigurationError(
            f"--scheduler {scheduler}: no Dask scheduler answers there ({said}); expected an address such as "
            "tcp://host:8786, or the file that a scheduler has written, FILE.json"
        ) from None
    with client:
        yield


def _address(scheduler: str) -> str:
    """Return the address of ``scheduler``, or what its file says; a scheduler that is starting may still write it."""
    if not scheduler.endswith(".json"):
        return scheduler
    file, began = Path(scheduler), time.monotonic()
    while not file.exists() and time.monotonic() - began < _PATIENCE_S:
        time.sleep(0.1)
    return str(json.loads(file.read_text(encoding="utf-8"))["address"])


@contextmanager
def bars() -> Iterator[Progress]:
    """Show progress bars while inside."""
    from stemtomo.terminal import Bars

    with Bars() as shown:
        yield shown


def conclude(numbers: dict[str, Any], json_file: Path | None, debug: bool) -> None:
    """Print the numbers, write them, and write the report."""
    with clear_errors(debug):
        write_json(numbers, json_file)
        from stemtomo.reporting import report as write_report
        from stemtomo.terminal import summary_table

        path = write_report(numbers["store"])
        console = stdout()
        console.print(summary_table(numbers))
        for stage in numbers["stages"].values():
            if stage.get("note"):
                console.print(f"Note: {stage['note']}", soft_wrap=True, markup=False)
        console.print(f"Report: {path}", soft_wrap=True, highlight=False, markup=False)


def numbers_of(text: str | None) -> list[int] | None:
    """Return the whole numbers that ``text``, such as ``"0-3,7"``, lists; ``None`` for none."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not (first.isdecimal() and (last or first).isdecimal() and int(last or first) >= int(first)):
            raise ConfigurationError(f"--tilts {text}: {part!r} is no number or range; give them like 0-3,7")
        found.extend(range(int(first), int(last or first) + 1))
    return found


def require_folder(path: Path | None, option: str = "--json") -> None:
    """Raise ConfigurationError if a file cannot be written at ``path``, told as ``option``, before the work begins."""
    if path is None:
        return
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise ConfigurationError(f"{option} {path}: the folder {path.parent} does not exist or cannot be written")
    if path.is_dir():
        raise ConfigurationError(f"{option} {path}: is a folder; give the name of a file")


def write_json(numbers: dict[str, Any], path: Path | None) -> None:
    """Write ``numbers`` at ``path``, whole or not at all; numbers that are none (of work that diverged) are null."""
    if path is None:
        return
    from stemtomo.io.durable import replacing

    with replacing(path) as partial:
        partial.write_text(json.dumps(_finite(numbers), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """Return ``value`` with null in the place of what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def stdout() -> Any:
    """Return a console on standard output, 120 wide where it is not a terminal."""
    from rich.console import Console

    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120)
