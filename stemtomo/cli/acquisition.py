"""Commands on what the detector gives: watch, calibrate."""

from __future__ import annotations

import json
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Annotated, Any

import typer

from stemtomo.cli.application import app
from stemtomo.cli.options import DebugOption, JsonOption, SchedulerOption, SetOption, StoreArgument, WorkersOption
from stemtomo.cli.shell import bars, clear_errors, cluster, require_folder, stdout, write_json


@app.command()
def watch(
    source: Annotated[Path, typer.Argument(metavar="DIR_OR_FILE", help="Growing file, or folder of growing files.")],
    store: StoreArgument,
    config: Annotated[Path, typer.Option("--config", metavar="SERIES.toml", help="Configuration of the series.")],
    deadline: Annotated[float | None, typer.Option("--deadline", metavar="S", help="Stalled after S seconds.")] = None,
    poll: Annotated[float | None, typer.Option("--poll", metavar="S", help="Look every S seconds.")] = None,
    missing: Annotated[
        str | None, typer.Option("--missing", metavar="stop|mask", help="What to do with frames that never come.")
    ] = None,
    then_run: Annotated[
        bool, typer.Option("--then-run", help="Reconstruct each tilt when it is complete, and go on to the atoms.")
    ] = False,
    overrides: SetOption = None,
    json_file: JsonOption = None,
    scheduler: SchedulerOption = None,
    workers: WorkersOption = None,
    debug: DebugOption = False,
) -> None:
    """Take an acquisition into a store while it is recorded; run again to continue where it ended."""
    with clear_errors(debug), cluster(scheduler, workers):
        require_folder(json_file)
        from stemtomo.errors import AcquisitionWarning
        from stemtomo.pipeline.references import load_configuration
        from stemtomo.pipeline.watch import watch as follow

        told = {"deadline_s": deadline, "poll_s": poll, "missing": missing, "then_run": then_run or None}
        given = [f"watch.{key}={json.dumps(value)}" for key, value in told.items() if value is not None]
        given.append(f"input.path={json.dumps(str(source))}")
        configuration = load_configuration(config, [*(overrides or []), *given])
        with bars() as progress, warnings.catch_warnings():
            warnings.simplefilter("always", AcquisitionWarning)
            warnings.showwarning = _say  # when it comes up: the end may be an error
            reports = follow(source, store, configuration, progress=progress)
            numbers = _last_value(reports)
        write_json(numbers, json_file)
        missed = f", {numbers['missing_frames']} missing" if numbers["missing_frames"] else ""
        typer.echo(f"{store}: {numbers['tilts']} tilts, {numbers['frames']} frames{missed}")


@app.command()
def calibrate(
    store: StoreArgument,
    c1_sign: Annotated[
        str | None,
        typer.Option("--c1-sign", metavar="SIGN", help="Known sign of C1: positive (overfocus) or negative."),
    ] = None,
    rotation_near: Annotated[
        float | None, typer.Option("--rotation-near", metavar="DEG", help="Scan rotation, known within 90 degrees.")
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option("--require", metavar="WHAT", help="Fail unless disc, rotation or c1 is found. May be repeated."),
    ] = None,
    refine: Annotated[
        bool,
        typer.Option("--refine", help="Fit C1, thickness and mistilt by multislice: about 40 CPU s a tilt."),
    ] = False,
    thickness: Annotated[
        float | None, typer.Option("--thickness", metavar="ANGSTROM", help="Thickness at which --refine begins.")
    ] = None,
    json_file: JsonOption = None,
    scheduler: SchedulerOption = None,
    workers: WorkersOption = None,
    debug: DebugOption = False,
) -> None:
    """Disc, descan, scan rotation, C1 and astigmatism of every tilt from its quicklook, beside the metadata."""
    with clear_errors(debug), cluster(scheduler, workers):
        require_folder(json_file)
        from stemtomo.io.store import Store
        from stemtomo.pipeline.calibrate import calibrate as calibrate_store
        from stemtomo.pipeline.compare import outlier_notes, refined_notes
        from stemtomo.pipeline.references import settings_told
        from stemtomo.pipeline.settings import CalibrationSettings
        from stemtomo.terminal import calibration_table

        told = {"c1_sign": c1_sign, "rotation_near_deg": rotation_near, "require": tuple(require or ())}
        told |= {"refine": refine, "thickness_angstrom": thickness}
        settings = settings_told(CalibrationSettings, "calibrate", told)
        with bars() as progress:
            numbers = calibrate_store(Store.open(store, "r+"), settings, progress=progress)
        write_json(numbers, json_file)
        console = stdout()
        console.print(calibration_table(numbers))
        for note in (*refined_notes(numbers["tilts"]), *outlier_notes(numbers["series"])):
            console.print(note, soft_wrap=True, highlight=False, markup=False)
        for reason in sorted({text for tilt in numbers["tilts"] for text in tilt["undetermined"].values()}):
            console.print(f"Undetermined: {reason}", soft_wrap=True, highlight=False, markup=False)


def _say(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"Warning: {message}", err=True)


def _last_value(reports: Generator[Any, None, dict[str, Any]]) -> dict[str, Any]:
    """Exhaust ``reports`` and return what they end with; troubles are said as they come up."""
    said: set[str] = set()
    while True:
        try:
            partial = next(reports)
        except StopIteration as end:
            return dict(end.value)
        for problem in partial.problems:
            if problem not in said:
                typer.echo(f"Warning: {problem}", err=True)
                said.add(problem)
