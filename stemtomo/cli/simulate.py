"""The command simulate: a series of known atoms, and what could be found of them over dose, defocus, step and tilts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stemtomo.cli.application import app
from stemtomo.cli.options import DebugOption, JsonOption, SchedulerOption, WorkersOption
from stemtomo.cli.shell import bars, clear_errors, cluster, require_folder, write_json


@app.command()
def simulate(
    structure: Annotated[Path, typer.Argument(metavar="STRUCTURE", help="Atoms: .xyz, .npz, .cif, .pdb, or of ASE.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for stores, table and picture.")] = Path(
        "stemtomo-study"
    ),
    dose: Annotated[str | None, typer.Option(metavar="V,...", help="Electrons per Å² of the whole series.")] = None,
    defocus: Annotated[str | None, typer.Option(metavar="V,...", help="C1 in Å, positive for overfocus.")] = None,
    step: Annotated[str | None, typer.Option(metavar="V,...", help="Distance between positions in Å.")] = None,
    tilt_range: Annotated[str | None, typer.Option(metavar="V,...", help="Largest tilt in degrees.")] = None,
    way: Annotated[str, typer.Option(metavar="WAY,...", help="joint, single_slice, sequential; or none.")] = "joint",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="simulation.key=value or section.key=value of a stage."),
    ] = None,
    json_file: JsonOption = None,
    scheduler: SchedulerOption = None,
    workers: WorkersOption = None,
    debug: DebugOption = False,
) -> None:
    """Simulate tilt series of known atoms, reconstruct and score them: a table and a picture for planning."""
    with clear_errors(debug), cluster(scheduler, workers):
        require_folder(json_file)
        from stemtomo.pipeline.simulate import simulate as simulate_series
        from stemtomo.pipeline.specimen import specimen_of
        from stemtomo.pipeline.study import markdown, study, study_settings

        specimen = specimen_of(structure)
        varied = {
            "dose_per_square_angstrom": dose,
            "defocus_c1_angstrom": defocus,
            "scan_step_angstrom": step,
            "tilt_range_deg": tilt_range,
        }
        settings, simulation, stages = study_settings(varied, way, overrides or [])
        with bars() as progress:
            if way == "none":
                made = []
                for chosen, one in settings.conditions(simulation):
                    name = settings.label(chosen)
                    made.append(out / f"{name}.zarr")
                    simulate_series(made[-1], specimen, one, name=name, progress=progress)
                write_json({"stores": [str(path) for path in made]}, json_file)
                typer.echo(f"Simulated into {out}")
                return
            found = study(out, specimen, settings, simulation=simulation, stages=stages, progress=progress)
        write_json(found, json_file)
        from stemtomo.reporting.study import study_picture

        typer.echo(markdown(found["rows"]))
        picture = study_picture(found["rows"])
        if picture is not None:
            (out / "study.png").write_bytes(picture)
            typer.echo(f"Picture: {out / 'study.png'}")
