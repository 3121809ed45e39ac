"""The page of all settings: what the models say of themselves, section by section."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping

from pydantic import BaseModel

from stemtomo.pipeline.parameters import Parameter, parameters_of


def sections() -> Iterator[tuple[str, str, Mapping[str, type[BaseModel]]]]:
    """Yield heading, introduction and models by name of every group of settings."""
    from stemtomo.pipeline.config import Configuration
    from stemtomo.pipeline.settings import CalibrationSettings, ResolutionSettings, StackSettings
    from stemtomo.pipeline.settings.analysis import AnalysisSettings
    from stemtomo.pipeline.settings.local_orbital import FocalSettings
    from stemtomo.pipeline.simulate import SimulationSettings
    from stemtomo.pipeline.study import StudySettings

    yield (
        "Sections of a series file",
        "Read by `stemtomo run`, `ingest`, `watch` and `reconstruct`; `--set section.key=value` overrides a key. "
        "A command of one stage takes its keys without the section: `--set key=value`.",
        _models(Configuration),
    )
    yield (
        "Analyses of atoms",
        "Keys of `stemtomo order`, `lattice`, `strain` and `track`: `--set key=value`.",
        _models(AnalysisSettings),
    )
    yield "Local orbitals", "Keys of `stemtomo local-orbital`: `--set key=value`.", _models(FocalSettings)
    yield (
        "Simulation and studies",
        "Keys of `stemtomo simulate`: `--set simulation.key=value`; what a study varies has options of its own.",
        {"simulation": SimulationSettings, "study": StudySettings},
    )
    yield (
        "Options of single commands",
        "Given as options (`--c1-sign`, `--cone`, `--axis-deg` ...), in Python as settings.",
        {"calibrate": CalibrationSettings, "resolution": ResolutionSettings, "import-stack": StackSettings},
    )


def parameter_page() -> str:
    """Return all settings as one page of Markdown."""
    lines = [
        "# Parameters",
        "",
        "Made from the settings that the program itself checks. A unit stands at the end of a name; `-` is not given. "
        "An unknown key, and a value that is not allowed, is refused with the name of the key.",
    ]
    for heading, introduction, models in sections():
        lines += ["", f"## {heading}", "", introduction]
        for name, model in models.items():
            lines += ["", f"### {name}", "", _summary(model), "", *_table(parameters_of(model))]
    return "\n".join(lines) + "\n"


def _models(settings: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Return the models that are the sections of ``settings``."""
    found = {}
    for name, field in settings.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found[name] = kind
    return found


def _summary(model: type[BaseModel]) -> str:
    text = (inspect.getdoc(model) or "").partition("\n\n")[0].replace("\n", " ")
    _, bracket, rest = text.partition("]: ")
    said = rest if bracket else text
    return said[:1].upper() + said[1:]


def _table(rows: list[Parameter]) -> Iterator[str]:
    yield "| name | unit | default | allowed | meaning |"
    yield "|---|---|---|---|---|"
    for row in rows:
        cells = (f"`{row.name}`", row.unit, f"`{row.default}`", row.allowed, row.meaning)
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("<u", "&lt;u") for cell in cells) + " |"
