"""Settings as tables: name, unit, default, what is allowed, meaning; all told by the models themselves."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

#: Units by the end of a name; the longest end that fits counts.
_UNITS = {
    "per_square_angstrom": "1/Å²",
    "inv_angstrom": "1/Å",
    "angstrom": "Å",
    "deg": "°",
    "mrad": "mrad",
    "rad": "rad",
    "kev": "keV",
    "px": "px",
    "mib": "MiB",
    "gib": "GiB",
    "bytes": "bytes",
    "counts": "counts",
    "electrons_per_pattern": "electrons",
    "s": "s",
    "sigma": "σ",
    "voxels": "voxels",
}


class Parameter(NamedTuple):
    """One setting, as text."""

    name: str
    unit: str
    default: str
    allowed: str
    meaning: str


def parameters_of(model: type[BaseModel]) -> list[Parameter]:
    """Return the parameters of ``model``, in their order."""
    properties = model.model_json_schema()["properties"]
    return [
        Parameter(
            name,
            unit_of(name),
            "required" if field.is_required() else _value(field.get_default(call_default_factory=True)),
            _allowed(properties[name]),
            field.description or "",
        )
        for name, field in model.model_fields.items()
    ]


def unit_of(name: str) -> str:
    """Return the unit that ends ``name``, or nothing."""
    words = name.split("_")
    ends = ("_".join(words[start:]) for start in range(len(words)))
    return next((_UNITS[end] for end in ends if end in _UNITS), "")


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


def html_table(settings: BaseModel) -> str:
    """Return what ``settings`` say as an HTML table: name, value, unit, meaning."""
    from html import escape

    rows = "".join(
        f"<tr><td><code>{row.name}</code></td><td>{escape(_value(getattr(settings, row.name)))}</td>"
        f"<td>{row.unit}</td><td style='text-align:left'>{escape(row.meaning)}</td></tr>"
        for row in parameters_of(type(settings))
    )
    head = "<tr><th>name</th><th>value</th><th>unit</th><th>meaning</th></tr>"
    return f"<b>{type(settings).__name__}</b><table>{head}{rows}</table>"


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


def _value(value: Any) -> str:
    """Return ``value`` as TOML writes it."""
    if value is None:
        return "-"
    if isinstance(value, BaseModel):
        return type(value).__name__
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_value(each) for each in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_value(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (str, Path)):
        return json.dumps(str(value), ensure_ascii=False)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _allowed(schema: Mapping[str, Any]) -> str:
    """Return what a JSON schema allows in words."""
    if "anyOf" in schema:
        return " or ".join(_allowed(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{_value(one)}`" for one in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "boolean":
        return "`true`, `false`"
    if kind in ("number", "integer"):
        return ("number" if kind == "number" else "whole number") + _bounds(schema)
    if kind == "array":
        if "prefixItems" in schema:
            return "[" + ", ".join(_allowed(one) for one in schema["prefixItems"]) + "]"
        return "list of: " + _allowed(schema.get("items", {}))
    if kind == "object":
        return "table of: " + _allowed(schema.get("additionalProperties", {}))
    return "path" if schema.get("format") == "path" else "text"


def _bounds(schema: Mapping[str, Any]) -> str:
    signs = {"exclusiveMinimum": "> ", "minimum": "≥ ", "exclusiveMaximum": "< ", "maximum": "≤ "}
    bounds = [sign + f"{schema[key]:g}" for key, sign in signs.items() if key in schema]
    return " " + " and ".join(bounds) if bounds else ""
