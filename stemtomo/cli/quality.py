"""Commands on how good a result is: resolution."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from stemtomo.cli.application import app
from stemtomo.cli.options import DebugOption, JsonOption, SchedulerOption, WorkersOption
from stemtomo.cli.shell import bars, clear_errors, cluster, require_folder, stdout, write_json


@app.command()
def resolution(
    volume: Annotated[Path, typer.Argument(metavar="VOLUME", help="Store with a volume, or an .mrc or .npy file.")],
    other: Annotated[
        Path | None, typer.Argument(metavar="OTHER", help="Volume of the other half of the data, to compare with.")
    ] = None,
    halves: Annotated[
        str | None,
        typer.Option("--halves", metavar="none|tilts|positions", help="Half sets to reconstruct from the store."),
    ] = None,
    tilt: Annotated[
        list[int] | None,
        typer.Option("--tilt", metavar="N", help="With positions: this tilt alone, no volume. May be repeated."),
    ] = None,
    mask: Annotated[
        str | None,
        typer.Option("--mask", metavar="edges|specimen", help="What is correlated; the edges are faded out."),
    ] = None,
    cone: Annotated[
        float | None, typer.Option("--cone", metavar="DEG", help="Half angle of directional cones.")
    ] = None,
    significance: Annotated[
        float | None, typer.Option("--significance", metavar="SD", help="Height of a peak over its background.")
    ] = None,
    voxel: Annotated[
        float | None, typer.Option("--voxel", metavar="ANGSTROM", help="Voxel of a file that does not say it.")
    ] = None,
    json_file: JsonOption = None,
    scheduler: SchedulerOption = None,
    workers: WorkersOption = None,
    debug: DebugOption = False,
) -> None:
    """Resolution along every axis, missing wedge, and how far two halves of the data agree (FSC, FRC)."""
    with clear_errors(debug), cluster(scheduler, workers):
        require_folder(json_file)
        from stemtomo.pipeline.references import settings_told
        from stemtomo.pipeline.resolution import resolution as measure
        from stemtomo.pipeline.settings import ResolutionSettings
        from stemtomo.terminal import resolution_table

        told = {
            "halves": halves,
            "tilts": tuple(tilt) if tilt else None,
            "mask": mask,
            "cone_deg": cone,
            "significance": significance,
            "voxel_angstrom": voxel,
        }
        settings = settings_told(ResolutionSettings, "resolution", told)
        with bars() as progress:
            numbers: dict[str, Any] = measure(volume, other, settings, progress=progress)
        write_json(numbers, json_file)
        stdout().print(resolution_table(numbers))
