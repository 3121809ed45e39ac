"""Commands on atoms: list and write them, order, strain, lattice, states followed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from stemtomo.cli.application import app
from stemtomo.cli.options import DebugOption, JsonOption, SchedulerOption, StageSetOption, WorkersOption
from stemtomo.cli.shell import bars, clear_errors, cluster, require_folder, stdout, write_json

SourceArgument = Annotated[
    Path, typer.Argument(metavar="SOURCE", help="Store, or file of atoms: .xyz, .npz, .parquet, .cif, .pdb ...")
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="Write the atoms with the result: .parquet or .xyz (also .cif, .pdb)."),
]


@app.command()
def atoms(
    source: SourceArgument,
    out: OutOption = None,
    json_file: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Say what atoms a store or file holds; write them as XYZ, CIF, PDB or Parquet."""
    with clear_errors(debug):
        require_folder(json_file)
        from stemtomo.pipeline.structure import atom_summary

        numbers = atom_summary(source, out)
        write_json(numbers, json_file)
        _print(numbers)


def _add_analysis(name: str, summary: str) -> None:
    def command(
        source: SourceArgument,
        overrides: StageSetOption = None,
        out: OutOption = None,
        json_file: JsonOption = None,
        scheduler: SchedulerOption = None,
        workers: WorkersOption = None,
        debug: DebugOption = False,
    ) -> None:
        _run(name, source, overrides, out, json_file, (scheduler, workers), debug)

    command.__doc__ = summary
    app.command(name)(command)


for _name, _summary in (
    ("order", "Pair distribution, coordination, Steinhardt order, chemical order and grains of atoms."),
    ("lattice", "Register a known crystal (--set crystal=fcc --set a_angstrom=4.08); missing sites, displacements."),
    ("strain", "Displacement field and strain tensor against a crystal (--set crystal=fcc --set a_angstrom=4.08)."),
):
    _add_analysis(_name, _summary)


@app.command()
def track(
    sources: Annotated[
        list[Path], typer.Argument(metavar="STATE...", help="Stores or files of atoms, in the order of time.")
    ],
    overrides: StageSetOption = None,
    out: OutOption = None,
    json_file: JsonOption = None,
    scheduler: SchedulerOption = None,
    workers: WorkersOption = None,
    debug: DebugOption = False,
) -> None:
    """Follow nuclei of ordered atoms through several states of one specimen."""
    _run("track", sources, overrides, out, json_file, (scheduler, workers), debug)


def _run(
    name: str,
    source: Any,
    overrides: list[str] | None,
    out: Path | None,
    json_file: Path | None,
    where: tuple[str | None, int | None],
    debug: bool,
) -> None:
    with clear_errors(debug), cluster(*where):
        require_folder(json_file)
        require_folder(out, "--out")
        import importlib

        from stemtomo.pipeline.references import override_section
        from stemtomo.pipeline.settings.analysis import AnalysisSettings

        settings = override_section(name, {}, overrides or [], AnalysisSettings)
        verb: Callable[..., dict[str, Any]] = getattr(importlib.import_module(f"stemtomo.pipeline.{name}"), name)
        with bars() as progress:
            numbers = verb(source, settings, out=out, progress=progress)
        write_json(numbers, json_file)
        _print(numbers)


def _print(numbers: dict[str, Any]) -> None:
    from stemtomo.terminal import numbers_table

    stdout().print(numbers_table(numbers))
