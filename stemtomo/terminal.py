"""What the command line shows: progress bars with the time that is left, and tables of numbers."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from stemtomo.io.durable import human_bytes
from stemtomo.pipeline.compare import HEAD, comparison_rows


class Bars:
    """Progress of the stages on stderr: bars on a terminal, one line per stage elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stderr)
        self._progress = Progress(
            TextColumn("{task.description:<13}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None
        self._began = time.monotonic()

    def __enter__(self) -> Bars:
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)

    def start(self, stage: str, total: int, unit: str = "") -> None:
        """Show a bar for ``stage``."""
        self._began = time.monotonic()
        self._task = self._progress.add_task(stage, total=total, unit=unit, numbers="")

    def advance(self, n: int = 1, **numbers: float) -> None:
        """Move the bar of the stage started last."""
        if self._task is None:
            return
        shown = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        self._progress.update(self._task, advance=n)
        if shown:
            self._progress.update(self._task, numbers=shown)

    def finish(self, stage: str) -> None:
        """Fill the bar of ``stage``."""
        if self._task is not None:
            task = next(task for task in self._progress.tasks if task.id == self._task)
            self._progress.update(self._task, completed=task.total)
        if not self._console.is_terminal:
            self._console.print(f"{stage}: done in {time.monotonic() - self._began:.1f} s", highlight=False)


def summary_table(numbers: Mapping[str, Any]) -> Table:
    """Return the table at the end of ``run`` and ``demo``."""
    table = Table(title=escape(f"{numbers['name']}: up to {numbers['until']}"), show_header=False, title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    atoms = numbers["stages"].get("find_atoms", {}).get("atoms")
    rows = [
        ("atoms", f"{atoms}" if isinstance(atoms, int) else None),
        ("recall", _fixed(numbers["recall"], ".4f")),
        ("precision", _fixed(numbers["precision"], ".4f")),
        ("RMSD", _fixed(numbers["rmsd_pm"], ".2f", " pm")),
        ("species accuracy", _fixed(numbers["species_accuracy"], ".4f")),
        ("wall time", _fixed(numbers["wall_s"], ".1f", " s")),
        ("CPU time", _fixed(numbers["cpu_s"], ".1f", " s")),
        ("peak memory of a process", _fixed(numbers["peak_rss_mb"], ".0f", " MB")),
    ]
    for name, value in rows:
        if value is not None:
            table.add_row(name, value)
    return table


def info_table(name: str, tilts: int, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of ``info``."""
    table = Table(title=escape(f"{name}: {tilts} tilts"), title_justify="left")
    for heading, right in (
        ("group", False),
        ("done", True),
        ("size", True),
        ("on disk", True),
        ("made (UTC)", False),
        ("arrays", False),
    ):
        table.add_column(
            heading, justify="right" if right else "left", no_wrap=heading in ("group", "done", "size", "on disk")
        )
    for row in rows:
        done = f"{row['done']}/{row['expected']}"
        sizes = (
            human_bytes(row["size_bytes"]) if row["done"] else "-",
            human_bytes(row["stored_bytes"]) if row["stored_bytes"] else "-",
        )
        table.add_row(
            row["group"],
            done,
            *sizes,
            (row["time_utc"] or "-")[:19],
            escape("\n".join(row["arrays"])) or f"missing: run {row['stage']}",
        )
    return table


def calibration_table(numbers: Mapping[str, Any]) -> Table:
    """Return the table of ``calibrate``: what was found and, in brackets, what the metadata say."""
    table = Table(title=escape("found [metadata]"), title_justify="left")
    for index, name in enumerate(HEAD):
        table.add_column(name, justify="right" if index else "left")
    for row in comparison_rows(numbers["tilts"]):
        table.add_row(*(escape(cell) for cell in row))
    return table


def numbers_table(numbers: Mapping[str, Any], most_rows: int = 20) -> Table:
    """Return a table of what an analysis found; long lists are cut, all of them are in the JSON."""
    table = Table(show_header=False)
    table.add_column("what")
    table.add_column("value")
    for name, value in _flat(numbers, ""):
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            for index, row in enumerate(value[:most_rows]):
                cells = ", ".join(f"{key} {_short(item)}" for key, item in row.items() if item is not None)
                table.add_row(f"{name} {index}", escape(cells))
            if len(value) > most_rows:
                table.add_row("", f"and {len(value) - most_rows} more")
        elif value is not None:
            table.add_row(name, escape(_short(value)))
    return table


def _flat(numbers: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in numbers.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}".replace("_", " "), value


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list | tuple):
        shown = ", ".join(_short(item) for item in value[:12])
        return f"[{shown}{', ...' if len(value) > 12 else ''}]"
    return str(value)


def resolution_table(numbers: Mapping[str, Any]) -> Table:
    """Return the table of ``resolution``, with a sentence on the wedge below."""
    from stemtomo.pipeline import resolution

    table = Table(caption=resolution.wedge_text(dict(numbers)) or None, caption_justify="left")
    for index, name in enumerate(resolution.HEAD):
        table.add_column(name, justify="right" if index else "left")
    for row in resolution.table_rows(dict(numbers)):
        table.add_row(*(escape(cell) for cell in row))
    return table


def _fixed(value: float | None, format_spec: str, unit: str = "") -> str | None:
    return None if value is None else f"{value:{format_spec}}{unit}"
