"""Commands on a whole series: demo, run, info, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from stemtomo.cli.application import app
from stemtomo.cli.options import DebugOption, JsonOption, SchedulerOption, SetOption, StoreArgument, WorkersOption
from stemtomo.cli.shell import (
    GRACE_S,
    bars,
    clear_errors,
    cluster,
    conclude,
    numbers_of,
    require_folder,
    stdout,
    write_json,
)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the store and the report.")] = Path(
        "stemtomo-demo"
    ),
    json_file: JsonOption = None,
    scheduler: SchedulerOption = None,
    workers: WorkersOption = None,
    debug: DebugOption = False,
) -> None:
    """Simulate a tilt series of a nanoparticle, reconstruct it, and compare with what was simulated."""
    with clear_errors(debug), cluster(scheduler, workers), bars() as progress:
        require_folder(json_file)
        from stemtomo.pipeline.demo import demo as run_demo

        numbers = run_demo(out, progress=progress)
    conclude(numbers, json_file, debug)


@app.command()
def run(
    series: Annotated[Path, typer.Argument(metavar="SERIES.toml", help="Configuration of the series.")],
    only_plan: Annotated[
        bool, typer.Option("--plan", help="Print tasks, memory and bytes of every stage; touch nothing.")
    ] = False,
    overrides: SetOption = None,
    until: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Last stage to run.")] = None,
    tilts: Annotated[
        str | None,
        typer.Option(
            "--tilts", metavar="N,N-N", help="Tilts of ptychography, counted from 0; with --until ptychography."
        ),
    ] = None,
    grace_s: Annotated[
        float,
        typer.Option("--grace-s", min=0, help="Seconds from SIGTERM to the end without a checkpoint."),
    ] = GRACE_S,
    truth: Annotated[
        Path | None, typer.Option("--truth", metavar="FILE", help="Known atoms to score against: .xyz or .npz.")
    ] = None,
    json_file: JsonOption = None,
    scheduler: SchedulerOption = None,
    workers: WorkersOption = None,
    debug: DebugOption = False,
) -> None:
    """Take a series from detector frames to atoms; run again to continue where it ended."""
    with clear_errors(debug), cluster(scheduler, workers, grace_s):
        require_folder(json_file)
        from stemtomo.pipeline.references import load_configuration

        given = list(overrides or [])
        if truth is not None:
            given.append(f"score.truth={json.dumps(str(truth))}")
        configuration = load_configuration(series, given)
        if only_plan:
            _print_plan(configuration, json_file)
            return
        from stemtomo.pipeline.run import run as run_series

        with bars() as progress:
            numbers = run_series(configuration, until=until, tilts=numbers_of(tilts), progress=progress)
    conclude(numbers, json_file, debug)


@app.command()
def info(
    store: StoreArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
    debug: DebugOption = False,
) -> None:
    """Say what a store holds: frames, results, units, sizes; or what arrays are in a detector's file."""
    with clear_errors(debug):
        from stemtomo.io.store import Store

        if store.exists() and not Store.is_store(store):
            from stemtomo.io.formats.registry import contents, identify

            found = {"file": str(store), "format": identify(store), "arrays": contents(store)}
            typer.echo(json.dumps(found, indent=1) if as_json else _listed(found))
            return
        opened = Store.open(store)
        rows = opened.info()
        if as_json:
            typer.echo(json.dumps({**opened.attrs, "tilts": opened.tilt_count, "groups": rows}, indent=1))
            return
        from stemtomo.terminal import info_table

        stdout().print(info_table(opened.name, opened.tilt_count, rows))


def _listed(found: dict[str, Any]) -> str:
    """One line for each array of a detector's file."""
    lines = [f"{found['file']}: {found['format']}"]
    for row in found["arrays"]:
        shape = " x ".join(str(length) for length in row["shape"])
        scan = row.get("scan", ())
        said = f", scan {scan[0]} x {scan[1]}" if scan else "" if scan == () else ", scan not said: give scan.shape"
        lines.append(f"  {row['array'] or 'frames'}  {shape}  {row['dtype']}{said}")
    return "\n".join(lines)


@app.command()
def report(
    store: StoreArgument,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="HTML file to write; NAME-report.html beside the store if not given."
        ),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Write everything a store holds into one HTML file."""
    with clear_errors(debug):
        from stemtomo.reporting import report as write_report

        typer.echo(str(write_report(store, out)))


def _print_plan(configuration: Any, json_file: Path | None) -> None:
    from stemtomo.distributed import executor
    from stemtomo.pipeline.plan import plan, worker_limits

    workers = executor()
    limit, count, threads = worker_limits(workers, configuration.resources)
    planned = plan(configuration, workers.workers, limits=(limit, count, threads), executor=workers)
    write_json(planned.to_dict(), json_file)
    typer.echo(str(planned))
    planned.check(limit, count, threads)
    typer.echo(f"Fits {count} worker(s) of {threads} thread(s) with {limit / 2**30:.1f} GiB each.")
    typer.echo(f"Store: {configuration.store_path}")
