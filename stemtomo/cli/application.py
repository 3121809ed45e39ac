"""The application that the commands register with."""

from __future__ import annotations

from typing import Annotated

import typer

from stemtomo import __version__

app = typer.Typer(
    help="Raw 4D-STEM tilt series to three-dimensional volumes and atoms, out of core, on a laptop or a cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"stemtomo {__version__}")
        raise typer.Exit
