"""One command per stage that works on a store with frames."""

from __future__ import annotations

import typer

from stemtomo.cli.application import app
from stemtomo.cli.options import DebugOption, JsonOption, SchedulerOption, StageSetOption, StoreArgument, WorkersOption
from stemtomo.cli.shell import bars, clear_errors, cluster, require_folder, write_json


def _add_stage(stage: str, summary: str) -> None:
    def command(
        store: StoreArgument,
        overrides: StageSetOption = None,
        json_file: JsonOption = None,
        scheduler: SchedulerOption = None,
        workers: WorkersOption = None,
        debug: DebugOption = False,
    ) -> None:
        with clear_errors(debug), cluster(scheduler, workers):
            require_folder(json_file)
            from stemtomo.io.store import Store
            from stemtomo.pipeline.run import stage_settings, stage_verb

            opened = Store.open(store, "r+")
            settings = stage_settings(opened, stage, overrides or [])
            with bars() as progress:
                numbers = stage_verb(stage)(opened, settings, progress=progress)
            write_json(numbers, json_file)
            if numbers.get("note"):
                typer.echo(f"Note: {numbers['note']}")
            for diagnosis in numbers.get("diagnoses", []):
                typer.echo(f"{diagnosis['name']}: {diagnosis['text']}", err=True)

    command.__doc__ = f"{summary} Settings are those of the last time, unless overridden."
    app.command(stage.replace("_", "-"))(command)


for _stage, _summary in (
    ("quicklook", "Mean pattern, virtual images and centre of mass of every tilt."),
    ("ptychography", "Phase of every tilt."),
    ("projections", "Phases made comparable between tilts."),
    ("align", "Shifts of the projections against one another."),
    ("tomography", "Volume from the projections."),
    ("joint", "Volume straight from all patterns, by multislice through the turned volume."),
    ("find_atoms", "Atoms in the volume and their species."),
    ("score", "Atoms against known ones (--set truth=FILE)."),
):
    _add_stage(_stage, _summary)
