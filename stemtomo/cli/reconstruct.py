"""The command reconstruct: ptychography of a series or a store, with advice."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stemtomo.cli.application import app
from stemtomo.cli.options import DebugOption, JsonOption, SchedulerOption, SetOption, WorkersOption
from stemtomo.cli.shell import bars, clear_errors, cluster, require_folder, write_json


@app.command()
def reconstruct(
    source: Annotated[Path, typer.Argument(metavar="SERIES.toml|STORE", help="Configuration, or store with frames.")],
    overrides: SetOption = None,
    json_file: JsonOption = None,
    scheduler: SchedulerOption = None,
    workers: WorkersOption = None,
    debug: DebugOption = False,
) -> None:
    """Phase of every tilt by ptychography, and what to change where it went wrong."""
    with clear_errors(debug), cluster(scheduler, workers):
        require_folder(json_file)
        from stemtomo.io.store import Store

        with bars() as progress:
            if Store.is_store(source):
                from stemtomo.pipeline.run import stage_settings, stage_verb

                store = Store.open(source, "r+")
                keys = [key.removeprefix("ptychography.") for key in overrides or []]
                settings = stage_settings(store, "ptychography", keys)
                numbers = stage_verb("ptychography")(store, settings, progress=progress)
            else:
                from stemtomo.pipeline.references import load_configuration
                from stemtomo.pipeline.run import run

                configuration = load_configuration(source, overrides or [])
                result = run(configuration, until="ptychography", progress=progress)
                numbers = {**result["stages"]["ptychography"], "loss": result["loss"]["ptychography"]}
        write_json(numbers, json_file)
        for tilt, (losses, floor) in enumerate(zip(numbers["loss"], numbers["noise_floor"], strict=True)):
            typer.echo(f"tilt {tilt}: loss {losses[-1]:.4g} after {len(losses)} epochs, counting noise {floor:.4g}")
            for sentence in numbers["advice"][tilt]:
                typer.echo(f"tilt {tilt}: {sentence}", err=True)
