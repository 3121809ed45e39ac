"""The report: one self-contained HTML file on everything that a store holds."""

from __future__ import annotations

from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from stemtomo import __version__
from stemtomo.errors import StoreError
from stemtomo.io.durable import replace_text
from stemtomo.io.store import Store
from stemtomo.locations import is_object, local_path
from stemtomo.pipeline.config import OPTIONAL_STAGES, STAGES
from stemtomo.reporting import (
    alignment,
    analysis,
    calibration,
    experiment,
    joint,
    local_orbital,
    markup,
    resolution,
    specimen,
)
from stemtomo.reporting.markup import Raw
from stemtomo.reporting.results import Results

_TITLES = {
    "experiment": "Experiment",
    "quicklook": "First look",
    "calibration": "Calibration",
    "ptychography": "Ptychography",
    "projections": "Projections",
    "alignment": "Alignment",
    "volume": "Volume",
    "joint": "Joint tomography",
    "local_orbital": "Local orbitals",
    "resolution": "Resolution",
    "atoms": "Atoms",
    "order": "Order",
    "lattice": "Lattice",
    "strain": "Strain",
    "tracking": "States",
    "score": "Score",
    "provenance": "Provenance",
}

_SCORES = (
    ("recall", "", "recall", 3),
    ("precision", "", "precision", 3),
    ("rmsd_pm", "pm", "RMSD", 2),
    ("species_accuracy", "", "species accuracy", 3),
)


def report(store: Store | str | Path, out: str | Path | None = None) -> Path:
    """Write the report on ``store`` and return its path.

    The file needs nothing beside itself: pictures and the script that turns the atoms are inside. Stages that are not
    complete are named and left out.

    Parameters
    ----------
    store
        An open store, or the path of one.
    out
        HTML file to write, replaced if it exists; ``<name>-report.html`` beside the store if not given, in the
        current folder where the store is in object storage.

    Raises
    ------
    StoreError
        If the store cannot be read, or the file not be written.
    """
    opened = store if isinstance(store, Store) else Store.open(store)
    name = f"{opened.path.stem}-report.html"
    beside = Path(name) if is_object(opened.path) else opened.path.with_name(name)
    path = local_path(out, "reports are written") if out is not None else beside
    page = render(Results(opened))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, page)  # jobs of one series may write theirs at the same time
    except OSError as error:
        raise StoreError(f"the report cannot be written to {path}: {error.strerror or error}") from error
    return path


def render(results: Results) -> str:
    """Return the page as text."""
    parts = sections(results)
    links = "".join(f'<a href="#{name}">{_TITLES[name]}</a>' for name, content in parts.items() if content)
    name = str(results.store.name)
    body = (
        f"<h1>{escape(name)}</h1>\n{markup.paragraph(_lead(results), 'soft lead')}<nav>{links}</nav>\n"
        + markup.tiles(_headline(results))
        + _missing(results)
        + "".join(parts.values())
    )
    script = f"<script>{_resource('atoms.js')}</script>" if any("data-atoms=" in p for p in parts.values()) else ""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(name)} - stemtomo report</title><link rel="icon" href="data:,">'
        f"<style>{_resource('style.css')}</style>"
    )
    footer = f"<footer>Written by stemtomo {__version__}. Store: {escape(str(results.store.path))}</footer>"
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n'
        f"<body><main>\n{body}{footer}\n</main>{script}</body></html>\n"
    )


def sections(results: Results) -> dict[str, str]:
    """Return the sections by name, empty where there is nothing; those on frames only for a store that has some."""
    of_frames = {
        "experiment": experiment.experiment,
        "quicklook": experiment.quicklook,
        "calibration": calibration.calibration,
        "ptychography": experiment.ptychography,
    }
    others = {
        "projections": experiment.projections,
        "alignment": alignment.alignment,
        "volume": specimen.volume,
        "joint": joint.joint,
        "local_orbital": local_orbital.local_orbital,
        "resolution": resolution.resolution,
        "atoms": specimen.atoms,
        "order": analysis.order,
        "lattice": analysis.lattice,
        "strain": analysis.strain,
        "tracking": analysis.tracking,
        "score": specimen.score,
        "provenance": provenance,
    }
    wanted = {**(of_frames if results.tilt_count else {}), **others}
    return {name: section(results) for name, section in wanted.items()}


def provenance(results: Results) -> str:
    """Return the section on what every stage was told and used, and what the runs took."""
    rows: list[tuple[object, ...]] = []
    configurations = []
    for stage in STAGES:
        records = results.provenance(stage)
        count = len(results.groups(stage))
        if not records:
            rows.append((stage, Raw('<span class="missing">missing</span>'), *("–",) * 5))
            continue
        first = records[0][1]
        state = "complete" if len(records) == count else f"{len(records)} of {count} tilts"
        mark = str(first["fingerprint"])[:12] + ("" if len(records) == 1 else f" and {len(records) - 1} more")
        rows.append(
            (
                str(first["stage"]),
                state,
                *_cost(results, stage),
                str(first["time_utc"])[:19],
                Raw(f"<code>{escape(mark)}</code>"),
            )
        )
        configurations.append(markup.details(str(first["stage"]), _record(first)))
    head = ("stage", "state", "wall time", "CPU time", "peak memory (MB)", "begun (UTC)", "fingerprint")
    explained = (
        "Times are those of the run that made the result, over all processes; the peak is that of the largest "
        "process up to the end of the stage. Below: what each stage was told, what it read, and the versions."
    )
    return markup.section(
        "provenance",
        "Configuration and provenance",
        markup.table(rows, head, numeric=(2, 3, 4)),
        markup.paragraph(explained, "soft"),
        *configurations,
    )


def _cost(results: Results, stage: str) -> tuple[str, str, str]:
    """Return wall time, CPU time and peak memory of ``stage`` in the run where it took longest."""
    costs = [run["stages"][stage] for run in results.runs if stage in run["stages"]]
    if not costs:
        return ("–", "–", "–")
    cost = max(costs, key=lambda cost: cost["wall_s"])
    wall, cpu = (" ".join(markup.duration(cost[key])) for key in ("wall_s", "cpu_s"))
    return (wall, cpu, markup.number(cost["peak_rss_mb"], 3))


def _record(record: Any) -> str:
    shown = {key: record[key] for key in ("configuration", "inputs", "versions") if key in record}
    return markup.code(shown)


def _lead(results: Results) -> str:
    count = results.tilt_count
    if not count:
        projections = results.read("projections")
        return (
            "A store without frames." if projections is None else f"{projections.sizes['tilt']} projections, no frames."
        )
    tilts = f"4D-STEM tilt series: {count} tilt{'s' if count != 1 else ''}, "
    if not results.begun:
        return f"{tilts}none recorded yet."
    scan, detector = results.store.scan(results.begun[0]), results.store.detector(results.begun[0])
    return (
        f"{tilts}"
        f"{scan.shape_yx[0]} × {scan.shape_yx[1]} probe positions, "
        f"{detector.shape_yx[0]} × {detector.shape_yx[1]} detector pixels."
    )


def _headline(results: Results) -> list[tuple[str, str, str]]:
    items = []
    atoms, score = results.read("atoms"), results.read("score")
    if atoms is not None:
        items.append((markup.number(atoms.sizes["atom"]), "", "atoms found"))
    if score is not None:
        for key, unit, label, digits in _SCORES:
            if score.attrs.get(key) is not None:
                items.append((f"{score.attrs[key]:.{digits}f}", unit, label))
    if results.runs:
        wall, cpu = (sum(run[key] for run in results.runs) for key in ("wall_s", "cpu_s"))
        items.append((*markup.duration(wall), "wall time"))
        items.append((*markup.duration(cpu), "CPU time"))
        items.append(
            (markup.number(max(run["peak_rss_mb"] for run in results.runs), 3), "MB", "peak memory of a process")
        )
    return items


def _missing(results: Results) -> str:
    expected = [stage for stage in STAGES if results.complete(stage) or stage not in OPTIONAL_STAGES]
    missing = [stage for stage in expected if results.complete(stage) < len(results.groups(stage))]
    if not missing or not results.tilt_count:
        return ""
    partial = [
        f"{stage} ({results.complete(stage)} of {len(results.groups(stage))} tilts)"
        if results.complete(stage)
        else stage
        for stage in missing
    ]
    return markup.note(
        f"Not complete: {', '.join(partial)}. This report shows what there is; run the series again to go on."
    )


def _resource(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
