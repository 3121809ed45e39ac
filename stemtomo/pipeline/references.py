"""Reading a configuration: TOML, overrides, references into the data, and errors a person can act on.

A value of the form ``"@metadata:KEY"`` is looked up in the JSON file beside the input, ``"@data:KEY"`` in the input
``.npz``. ``KEY`` may walk into lists and tables (``tilts.0.theta``). A product of such references and plain numbers,
``"0.1 * @metadata:step_nm"``, converts units. So one TOML file serves every data set of one layout.
"""

from __future__ import annotations

import difflib
import json
import math
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from stemtomo.errors import ConfigurationError
from stemtomo.io.series import angles_in_names, field_of
from stemtomo.io.untrusted import reading
from stemtomo.pipeline.config import Configuration, Section, StageSettings

ANGLE = "theta_deg"
_Told = TypeVar("_Told", bound=BaseModel)
_LARGEST_REFERENCED = 100_000  # numbers; a reference is for angles and positions, not for frames


def load_configuration(path: str | Path, overrides: Iterable[str] = ()) -> Configuration:
    """Read the TOML file at ``path``, apply ``overrides`` and resolve its references.

    Parameters
    ----------
    path
        TOML file. Relative ``input.path``, ``score.truth`` and ``ingest.dead_pixels`` in it are taken from its folder.
    overrides
        Strings ``section.key=value``; the value is TOML, or a plain string where it is not. Relative paths in
        them are taken from the current folder.

    Raises
    ------
    ConfigurationError
        Naming the file, the key, the value and what is allowed.
    """
    path = Path(path)
    raw = _read_toml(path)
    for section, key in (("input", "path"), ("score", "truth"), ("ingest", "dead_pixels")):
        value = raw.get(section, {}).get(key) if isinstance(raw.get(section), dict) else None
        if isinstance(value, str) and not is_reference(value):
            raw[section][key] = str(path.parent / Path(value).expanduser())
    for override in overrides:
        _apply_override(raw, override)
    raw.setdefault("series", {})
    if isinstance(raw["series"], dict):
        raw["series"].setdefault("name", path.stem)
    return parse_configuration(raw, where=str(path))


def parse_configuration(raw: Mapping[str, Any], where: str = "configuration") -> Configuration:
    """Resolve the references of the nested mapping ``raw`` and validate it; ``where`` opens the text of errors.

    Raises
    ------
    ConfigurationError
        Naming the key, the value and what is allowed.
    """
    _check_keys(raw, Configuration, where, "")
    raw = _take_angles(raw)
    resolved = _resolve(raw, _References(raw, where), "")
    try:
        return Configuration.model_validate(resolved)
    except ValidationError as error:
        raise ConfigurationError(f"{where}: " + "; ".join(_explain_all(error.errors(), Configuration))) from None


def override_section(
    section: str, start: Mapping[str, Any], overrides: Iterable[str], model: type[Section] = StageSettings
) -> Section:
    """Return the settings of ``section`` of ``model``: ``start`` with ``overrides``, ``key=value``, applied.

    Raises
    ------
    ConfigurationError
        Naming the key, the value and what is allowed.
    """
    raw: dict[str, Any] = {section: dict(start)}
    for override in overrides:
        _apply_override(raw, override if override.startswith(f"{section}.") else f"{section}.{override}")
    _check_keys(raw, model, "--set", "")
    try:
        settings: Section = getattr(model.model_validate(raw), section)
    except ValidationError as error:
        raise ConfigurationError("; ".join(_explain_all(error.errors(), model))) from None
    return settings


def settings_told(model: type[_Told], command: str, given: Mapping[str, Any]) -> _Told:
    """Return the settings ``model`` from what a ``command`` line says; ``None`` for what it does not.

    Raises
    ------
    ConfigurationError
        For a value that is not allowed.
    """
    try:
        return model.model_validate({key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise ConfigurationError(f"{command}: {problems}") from None


def is_reference(value: object) -> bool:
    """Whether ``value`` is text that points into the metadata or the data."""
    return isinstance(value, str) and ("@metadata:" in value or "@data:" in value)


def _take_angles(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Take the angles from the names of the files where input.files has them and tilts does not.

    One file per tilt is said with input.files alone; a list or a pattern as input.path is refused, with that advice.
    """
    section = raw["input"] if isinstance(raw.get("input"), Mapping) else {}
    path, files = section.get("path"), section.get("files")
    unclear = isinstance(path, str) and not is_reference(path) and ("*" in path or "{" in path)
    if isinstance(path, list) or (unclear and not Path(str(path)).exists()):
        raise ConfigurationError(
            f"input.path = {path!r}: one file per tilt is said with the folder as input.path and the names as "
            f"input.files, 'tilt_{{{ANGLE}}}.mib' or a list in the order of tilts.theta_deg; the order of names is not "
            "that of angles"
        )
    tilts = raw.get("tilts") or {}
    known = isinstance(tilts, Mapping) and ("theta_deg" in tilts or "euler_zyx_deg" in tilts)
    if known or not isinstance(files, str) or not isinstance(path, str) or field_of(files) != ANGLE:
        return raw
    return {**raw, "tilts": {**tilts, "theta_deg": list(angles_in_names(Path(path).expanduser(), files))}}


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: cannot be read as text ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path}: not valid TOML: {error}") from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = [key.strip() for key in name.split(".")]
    if not equals or len(keys) < 2 or not all(keys):
        raise ConfigurationError(f"--set {override!r}: expected section.key=value, such as ptychography.epochs=50")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table = raw
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigurationError(f"--set {override!r}: {key} is a value, not a section")
    table[keys[-1]] = value


class _References:
    """The metadata and the input that references of one configuration point into; opened when first needed."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        section = raw.get("input", {})
        self._where = where
        path = section.get("path", "")
        self._input = Path(str(path)).expanduser()
        folder = self._input if section.get("files") else self._input.parent
        self._metadata_path = folder / Path(str(section.get("metadata", "metadata.json"))).expanduser()

    @cached_property
    def _metadata(self) -> Any:
        try:
            return json.loads(self._metadata_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigurationError(
                f"{self._where}: a value refers to @metadata, but {self._metadata_path} does not exist; "
                "set input.path (and input.metadata) to the data"
            ) from None
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{self._metadata_path}: not readable as JSON ({error})") from None

    def look_up(self, kind: str, key: str, for_key: str) -> Any:
        """Return the value behind ``@kind:key``, asked for by the configuration key ``for_key``."""
        if kind == "metadata":
            return _walk(self._metadata, key, f"{self._where}: {for_key} = '@metadata:{key}'", str(self._metadata_path))
        what = f"{self._where}: {for_key} = '@data:{key}'"
        member, _, rest = key.partition(".")
        with (
            reading(
                f"{what}: {self._input}", ".npz", "name another input, or the value itself", error=ConfigurationError
            ),
            np.load(self._input, allow_pickle=False) as archive,
        ):
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("not an .npz")
            if member not in archive.files:
                raise ConfigurationError(f"{what}: {self._input} has {', '.join(archive.files)}")
            size = _member_size(archive, member)
            if size > _LARGEST_REFERENCED:
                raise ConfigurationError(f"{what}: {size} numbers are too many for a configuration")
            value = archive[member].tolist()
        return _walk(value, rest, what, str(self._input)) if rest else value


def _member_size(archive: np.lib.npyio.NpzFile, member: str) -> int:
    """Count of numbers of ``member``, from its header alone: frames must not be read by mistake."""
    assert archive.zip is not None  # open: the caller is inside its with block
    with archive.zip.open(f"{member}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return math.prod(read(stream)[0])


def _walk(value: Any, key: str, what: str, file: str) -> Any:
    """Follow ``key`` (dots between table keys and list indices) into ``value``."""
    if isinstance(value, dict) and key in value:
        return value[key]
    for part in key.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.lstrip("-").isdigit() and -len(value) <= int(part) < len(value):
            value = value[int(part)]
        else:
            names = list(value) if isinstance(value, dict) else []
            raise ConfigurationError(f"{what}: {file} has no {part!r}{_suggest(part, names)}")
    return value


def _resolve(value: Any, references: _References, key: str) -> Any:
    if isinstance(value, Mapping):
        return {name: _resolve(item, references, f"{key}.{name}" if key else name) for name, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, references, f"{key}.{index}") for index, item in enumerate(value)]
    if not is_reference(value):
        return value
    factors = [_factor(part.strip(), references, key) for part in value.split("*")]
    if len(factors) == 1:
        return factors[0]
    try:
        product = np.prod(np.broadcast_arrays(*(np.asarray(factor, dtype=float) for factor in factors)), axis=0)
    except (TypeError, ValueError):
        raise ConfigurationError(f"{key} = {value!r}: only numbers can be multiplied, found {factors}") from None
    return product.tolist()


def _factor(text: str, references: _References, key: str) -> Any:
    for kind in ("metadata", "data"):
        if text.startswith(f"@{kind}:"):
            return references.look_up(kind, text.partition(":")[2], key)
    try:
        return float(text)
    except ValueError:
        raise ConfigurationError(
            f"{key}: {text!r} is neither a number nor a reference @metadata:KEY or @data:KEY"
        ) from None


def _check_keys(raw: Mapping[str, Any], model: type[BaseModel], where: str, prefix: str) -> None:
    """Refuse unknown keys before references are looked up, so that a typing error is reported as such."""
    names = list(model.model_fields)
    for name, value in raw.items():
        if name not in names:
            kind = "key" if prefix else "section"
            raise ConfigurationError(
                f"{where}: unknown {kind} {prefix}{name}{_suggest(name, names)}; allowed: {', '.join(names)}"
            )
        section = _section_of(model.model_fields[name].annotation)
        if section is not None:
            if not isinstance(value, Mapping):
                raise ConfigurationError(f"{where}: {prefix}{name} = {value!r} should be a section, [{name}]")
            _check_keys(value, section, where, f"{prefix}{name}.")


def _section_of(annotation: Any) -> type[BaseModel] | None:
    candidates = (
        typing.get_args(annotation)
        if typing.get_origin(annotation) in (typing.Union, types.UnionType)
        else (annotation,)
    )
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _suggest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _explain_all(details: Sequence[Any], root: type[BaseModel]) -> list[str]:
    """One sentence per key of ``root``; of several findings for one (one per allowed type) its meaning says more."""
    by_key: dict[tuple[Any, ...], list[Any]] = {}
    for detail in details:
        by_key.setdefault(tuple(detail["loc"][:2]), []).append(detail)
    return [_explain(found[0], root, several=len(found) > 1) for found in by_key.values()]


def _explain(detail: Any, root: type[BaseModel], several: bool) -> str:
    """One sentence for one finding of pydantic: key, value, what is allowed, what the key means."""
    model: type[BaseModel] | None = root
    names: list[str] = []
    meaning = ""
    for part in detail["loc"]:
        if model is not None and part in model.model_fields:
            info = model.model_fields[part]
            meaning = (info.description or "").rstrip(".")
            model = _section_of(info.annotation)
            names.append(part)
        elif isinstance(part, int) and not several:
            names.append(str(part))
    key = ".".join(names)
    if detail["type"] == "missing":
        return f"the section [{key}] is missing" if len(names) == 1 else f"{key} is missing: {meaning}"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if isinstance(detail["input"], Mapping):  # a check of a whole section: its text says which keys
        return f"{key}: {message}"
    shown = textwrap.shorten(repr(detail["input"]), 80, placeholder=" ...")
    return f"{key} = {shown} is not allowed: {meaning}" if several else f"{key} = {shown}: {message} ({meaning})"
