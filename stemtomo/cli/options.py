"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

StoreArgument = Annotated[Path, typer.Argument(metavar="STORE", help="Store, usually NAME.zarr.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key: section.key=value. May be repeated."),
]
StageSetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the stage. May be repeated.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers there as JSON.")]
SchedulerOption = Annotated[
    str | None,
    typer.Option(
        "--scheduler", metavar="ADDRESS", help="Dask scheduler to work on, such as tcp://host:8786, or its FILE.json."
    ),
]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="Worker processes to start on this machine, in place of threads.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
