"""The command line. The only module that prints; everything it calls is imported when a command needs it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stemtomo import __version__
from stemtomo.errors import AcquisitionError, ConfigurationError, StalledError, StemtomoError, StoreError

if TYPE_CHECKING:
    from stemtomo.pipeline.progress import Progress

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_STALLED = 3

app = typer.Typer(
    help="Raw 4D-STEM tilt series to three-dimensional volumes and atoms, out of core, on a laptop or a cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

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
    typer.Option("--scheduler", metavar="ADDRESS", help="Dask scheduler to work on, such as tcp://host:8786."),
]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="Worker processes to start on this machine, in place of threads.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main() -> None:
    """Run the command line."""
    app()


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"stemtomo {__version__}")
        raise typer.Exit


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
    with _clear_errors(debug), _cluster(scheduler, workers), _bars() as progress:
        _require_folder(json_file)
        from stemtomo.pipeline.demo import demo as run_demo

        numbers = run_demo(out, progress=progress)
    _conclude(numbers, json_file, debug)


@app.command()
def run(
    series: Annotated[Path, typer.Argument(metavar="SERIES.toml", help="Configuration of the series.")],
    only_plan: Annotated[
        bool, typer.Option("--plan", help="Print tasks, memory and bytes of every stage; touch nothing.")
    ] = False,
    overrides: SetOption = None,
    until: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Last stage to run.")] = None,
    truth: Annotated[
        Path | None, typer.Option("--truth", metavar="FILE", help="Known atoms to score against: .xyz or .npz.")
    ] = None,
    json_file: JsonOption = None,
    scheduler: SchedulerOption = None,
    workers: WorkersOption = None,
    debug: DebugOption = False,
) -> None:
    """Take a series from detector frames to atoms; run again to continue where it ended."""
    with _clear_errors(debug), _cluster(scheduler, workers):
        _require_folder(json_file)
        from stemtomo.pipeline.references import load_configuration

        given = list(overrides or [])
        if truth is not None:
            given.append(f"score.truth={json.dumps(str(truth))}")
        configuration = load_configuration(series, given)
        if only_plan:
            _print_plan(configuration, json_file)
            return
        from stemtomo.pipeline.run import run as run_series

        with _bars() as progress:
            numbers = run_series(configuration, until=until, progress=progress)
    _conclude(numbers, json_file, debug)


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
    with _clear_errors(debug), _cluster(scheduler, workers):
        _require_folder(json_file)
        from stemtomo.pipeline.references import load_configuration
        from stemtomo.pipeline.watch import watch as follow

        told = {"deadline_s": deadline, "poll_s": poll, "missing": missing, "then_run": then_run or None}
        given = [f"watch.{key}={json.dumps(value)}" for key, value in told.items() if value is not None]
        given.append(f"input.path={json.dumps(str(source))}")
        configuration = load_configuration(config, [*(overrides or []), *given])
        with _bars() as progress:
            reports = follow(source, store, configuration, progress=progress)
            numbers = _last_value(reports)
        _write_json(numbers, json_file)
        missed = f", {numbers['missing_frames']} missing" if numbers["missing_frames"] else ""
        typer.echo(f"{store}: {numbers['tilts']} tilts, {numbers['frames']} frames{missed}")


@app.command()
def info(
    store: StoreArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
    debug: DebugOption = False,
) -> None:
    """Say what a store holds: frames, results, units, sizes; or what arrays are in a detector's file."""
    with _clear_errors(debug):
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

        _stdout().print(info_table(opened.name, opened.tilt_count, rows))


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
    with _clear_errors(debug):
        from stemtomo.reporting import report as write_report

        typer.echo(str(write_report(store, out)))


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
    json_file: JsonOption = None,
    scheduler: SchedulerOption = None,
    workers: WorkersOption = None,
    debug: DebugOption = False,
) -> None:
    """Disc, descan, scan rotation, C1 and astigmatism of every tilt from its quicklook, beside the metadata."""
    with _clear_errors(debug), _cluster(scheduler, workers):
        _require_folder(json_file)
        from stemtomo.io.store import Store
        from stemtomo.pipeline.calibrate import calibrate as calibrate_store
        from stemtomo.pipeline.calibrate import known_beforehand
        from stemtomo.pipeline.compare import outlier_notes
        from stemtomo.terminal import calibration_table

        settings = known_beforehand(c1_sign, rotation_near, require or ())
        with _bars() as progress:
            numbers = calibrate_store(Store.open(store, "r+"), settings, progress=progress)
        _write_json(numbers, json_file)
        console = _stdout()
        console.print(calibration_table(numbers))
        for note in outlier_notes(numbers["series"]):
            console.print(f"Outlier: {note}", soft_wrap=True, highlight=False)
        for reason in sorted({text for tilt in numbers["tilts"] for text in tilt["undetermined"].values()}):
            console.print(f"Undetermined: {reason}", soft_wrap=True, highlight=False)


def _add_stage(stage: str, summary: str) -> None:
    def command(
        store: StoreArgument,
        overrides: StageSetOption = None,
        json_file: JsonOption = None,
        scheduler: SchedulerOption = None,
        workers: WorkersOption = None,
        debug: DebugOption = False,
    ) -> None:
        with _clear_errors(debug), _cluster(scheduler, workers):
            _require_folder(json_file)
            from stemtomo.io.store import Store
            from stemtomo.pipeline.run import stage_settings, stage_verb

            opened = Store.open(store, "r+")
            settings = stage_settings(opened, stage, overrides or [])
            with _bars() as progress:
                numbers = stage_verb(stage)(opened, settings, progress=progress)
            _write_json(numbers, json_file)

    command.__doc__ = f"{summary} Settings are those of the last time, unless overridden."
    app.command(stage.replace("_", "-"))(command)


for _stage, _summary in (
    ("quicklook", "Mean pattern, virtual images and centre of mass of every tilt."),
    ("ptychography", "Phase of every tilt."),
    ("projections", "Phases made comparable between tilts."),
    ("align", "Shifts of the projections against one another."),
    ("tomography", "Volume from the projections."),
    ("find_atoms", "Atoms in the volume and their species."),
    ("score", "Atoms against known ones (--set truth=FILE)."),
):
    _add_stage(_stage, _summary)


# -- what all commands share ------------------------------------------------------------------------------------------


def exit_code(error: BaseException, acquiring: bool = False) -> int:
    """Return the exit code for ``error``; while a source still grows (``acquiring``), missing frames mean a stall."""
    if isinstance(error, StalledError) or (isinstance(error, AcquisitionError) and acquiring):
        return EXIT_STALLED
    return EXIT_BAD_INPUT if isinstance(error, StemtomoError) else EXIT_FAILED


@contextmanager
def _clear_errors(debug: bool) -> Iterator[None]:
    """Turn an error into one message and an exit code."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        typer.echo("\nInterrupted. What is finished is kept; run the same command again to continue.", err=True)
        raise typer.Exit(EXIT_FAILED) from None
    except Exception as error:
        if debug:
            raise
        code = exit_code(error)
        if code == EXIT_FAILED:
            text = (
                f"{type(error).__name__}: {error}\n"
                "What is finished is kept; run the same command again to continue (--debug shows where it failed)."
            )
        else:
            text = str(error)
        typer.echo(f"Error: {text}", err=True)
        raise typer.Exit(code) from None


@contextmanager
def _cluster(scheduler: str | None, workers: int | None) -> Iterator[None]:
    """Connect to a scheduler or start workers here; whatever runs inside finds the client by itself."""
    if scheduler is None and workers is None:
        yield
        return
    if scheduler is not None and workers is not None:
        raise ConfigurationError(
            "--scheduler and --workers exclude each other: give the address of a cluster, or a number to start here"
        )
    from distributed import Client, LocalCluster

    if scheduler is not None:
        try:
            client = Client(scheduler, timeout="20s")
        except OSError as error:
            raise ConfigurationError(f"--scheduler {scheduler}: no Dask scheduler answers there ({error})") from None
        with client:
            yield
        return
    with LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster):
        yield


@contextmanager
def _bars() -> Iterator[Progress]:
    from stemtomo.terminal import Bars

    with Bars() as bars:
        yield bars


def _conclude(numbers: dict[str, Any], json_file: Path | None, debug: bool) -> None:
    """Print the numbers, write them, and write the report."""
    with _clear_errors(debug):
        _write_json(numbers, json_file)
        from stemtomo.reporting import report as write_report
        from stemtomo.terminal import summary_table

        path = write_report(numbers["store"])
        console = _stdout()
        console.print(summary_table(numbers))
        note = numbers["stages"].get("score", {}).get("note")
        if note:
            console.print(f"Note: {note}", soft_wrap=True)
        console.print(f"Report: {path}", soft_wrap=True, highlight=False)


def _print_plan(configuration: Any, json_file: Path | None) -> None:
    from stemtomo.distributed import executor
    from stemtomo.pipeline.plan import plan, worker_limits

    workers = executor()
    planned = plan(configuration, workers.workers)
    _write_json(planned.to_dict(), json_file)
    typer.echo(str(planned))
    limit, count, threads = worker_limits(workers, configuration.resources)
    planned.check(limit, count, threads)
    typer.echo(f"Fits {count} worker(s) of {threads} thread(s) with {limit / 2**30:.1f} GiB each.")
    typer.echo(f"Store: {configuration.store_path}")


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


def _require_folder(path: Path | None) -> None:
    if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise ConfigurationError(f"--json {path}: the folder {path.parent} does not exist or cannot be written")


def _write_json(numbers: dict[str, Any], path: Path | None) -> None:
    if path is None:
        return
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(numbers, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise StoreError(f"--json {path}: cannot be written ({error.strerror or error})") from None


def _stdout() -> Any:
    from rich.console import Console

    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120)


if __name__ == "__main__":
    main()
