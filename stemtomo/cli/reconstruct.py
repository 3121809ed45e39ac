"""The commands reconstruct and underway: ptychography with advice, and what it has reached while it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stemtomo.cli.application import app
from stemtomo.cli.options import DebugOption, JsonOption, SchedulerOption, SetOption, StoreArgument, WorkersOption
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


@app.command()
def underway(
    store: StoreArgument,
    tilt: Annotated[int, typer.Option("--tilt", metavar="N", help="Number of the tilt.")] = 0,
    image: Annotated[Path | None, typer.Option("--image", metavar="FILE.png", help="Draw the phase so far.")] = None,
    json_file: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Loss and phase of a reconstruction while it runs, from its last checkpoint."""
    with clear_errors(debug):
        require_folder(json_file)
        require_folder(image, "--image")
        from stemtomo.pipeline.underway import underway as look

        found = look(store, tilt)
        losses = [] if found is None else found["loss"].values.tolist()
        write_json({"tilt": tilt, "loss_per_pattern": losses}, json_file)
        if found is None:
            typer.echo(f"tilt {tilt}: no reconstruction is under way, or it has no checkpoint yet")
            return
        typer.echo(
            f"tilt {tilt}: {len(losses)} epochs, loss per pattern {losses[0]:.5g} at first, {losses[-1]:.5g} now"
        )
        if image is not None:
            from stemtomo.io.durable import replacing
            from stemtomo.reporting.figures import Picture, row

            pixel = found.attrs["pixel_angstrom"]
            picture = Picture(
                found["phase_sum"].values, f"tilt {tilt}, epoch {len(losses)}", "rad", (pixel[0], pixel[1])
            )
            with replacing(image) as partial:
                partial.write_bytes(row([picture]))
