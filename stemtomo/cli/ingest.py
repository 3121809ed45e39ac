"""The command ingest."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated

import typer

from stemtomo.cli.application import app
from stemtomo.cli.options import DebugOption, JsonOption, SchedulerOption, SetOption, WorkersOption
from stemtomo.cli.shell import bars, clear_errors, cluster, require_folder, write_json


@app.command()
def ingest(
    series: Annotated[Path, typer.Argument(metavar="SERIES.toml", help="Configuration of the series.")],
    store: Annotated[
        Path | None,
        typer.Argument(metavar="[STORE]", help="Store to make or continue; that of the series if not given."),
    ] = None,
    missing: Annotated[
        str | None, typer.Option("--missing", metavar="stop|mask", help="What to do with frames that were lost.")
    ] = None,
    overrides: SetOption = None,
    json_file: JsonOption = None,
    scheduler: SchedulerOption = None,
    workers: WorkersOption = None,
    debug: DebugOption = False,
) -> None:
    """Copy the frames of a finished acquisition into a store; run again to continue where it ended."""
    with clear_errors(debug), cluster(scheduler, workers):
        require_folder(json_file)
        from stemtomo.errors import AcquisitionWarning
        from stemtomo.pipeline.ingest_series import ingest as ingest_configured

        given = [*(overrides or []), *([] if missing is None else [f"ingest.missing={json.dumps(missing)}"])]
        with bars() as progress, warnings.catch_warnings():
            warnings.simplefilter("ignore", AcquisitionWarning)  # said below
            numbers = ingest_configured(series, store, overrides=given, progress=progress)
        write_json(numbers, json_file)
        for text in numbers["warnings"]:
            typer.echo(f"Warning: {text}", err=True)
        missed = f", {numbers['missing_frames']} missing" if numbers["missing_frames"] else ""
        typer.echo(
            f"{numbers['store']}: {numbers['tilts']} tilts, {numbers['frames']} frames{missed}, "
            f"{numbers['compression_ratio']:.1f} times smaller"
        )
