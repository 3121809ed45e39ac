"""All stages in order: from the input to atoms, doing only what is missing, and what it cost."""

from __future__ import annotations

import difflib
import functools
import importlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from stemtomo.distributed import Executor
from stemtomo.distributed import executor as default_executor
from stemtomo.distributed.interruption import stop_here
from stemtomo.errors import ConfigurationError
from stemtomo.io.durable import replace_json
from stemtomo.io.provenance import package_versions
from stemtomo.io.schema import GROUPS
from stemtomo.io.store import Store
from stemtomo.locations import is_object
from stemtomo.pipeline.config import STAGES, Configuration, Section, StageSettings
from stemtomo.pipeline.plan import plan, worker_limits
from stemtomo.pipeline.progress import Progress, Silent
from stemtomo.pipeline.settings.atoms import AtomSettings
from stemtomo.pipeline.streaming import require_streamable

_MODULES = {"align": "alignment", "find_atoms": "atoms"}
_Settings = TypeVar("_Settings", bound=StageSettings)
_SCORES = ("recall", "precision", "rmsd_pm", "species_accuracy")


def run(
    configuration: Configuration | str | Path,
    *,
    until: str | None = None,
    tilts: Sequence[int] | None = None,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> dict[str, Any]:
    """Run every stage of ``configuration`` up to and with ``until``; each does only what is missing or out of date.

    Parameters
    ----------
    configuration
        A TOML file, or what :func:`stemtomo.pipeline.references.load_configuration` made of one.
    until
        Name of the last stage (of :data:`stemtomo.pipeline.config.STAGES`); all if not given, the score where
        ``score.truth`` is.
    tilts
        Numbers of the tilts that ptychography reconstructs, all if not given; with ``until="ptychography"`` alone, as
        the stages after it need every tilt.
    executor
        Where the work is done; the active Dask client, else threads.

    Returns
    -------
    dict
        JSON-able: see :func:`run_stages`, and the numbers of ``ingest`` among the stages.

    Raises
    ------
    ConfigurationError, FormatError, AcquisitionError
        If the configuration and the input do not fit together; nothing was computed.
    MemoryPlanError
        If the plan does not fit the memory; nothing was computed.
    StoreError
        If the store cannot be written or is of a newer schema.
    """
    from stemtomo.pipeline.ingest_series import ingest
    from stemtomo.pipeline.references import load_configuration

    if not isinstance(configuration, Configuration):
        configuration = load_configuration(configuration)
    _require_stage(until)
    _require_truth(configuration)
    if tilts is not None and until != "ptychography":
        raise ConfigurationError("tilts are chosen for ptychography alone: give until = 'ptychography' with them")
    _require_files(configuration)
    executor = executor or default_executor()
    limits = worker_limits(executor, configuration.resources)
    plan(configuration, executor.workers, until, limits).check(*limits)
    ledger = _Ledger(executor)
    _require_tilts(len(configuration.theta_deg()), tilts)
    ledger.stage("ingest", functools.partial(ingest, configuration, executor=executor, progress=progress))
    store = Store.open(configuration.store_path, "r+")
    return _run_on(store, with_dose(configuration), until, progress or Silent(), executor, ledger, tilts)


def run_stages(
    store: Store,
    settings: StageSettings | None = None,
    *,
    until: str | None = None,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> dict[str, Any]:
    """Run the stages after ``ingest`` on a ``store`` that has its frames, up to and with ``until``.

    Returns
    -------
    dict
        ``name``, ``store``, ``until``; ``recall``, ``precision``, ``rmsd_pm``, ``species_accuracy`` (``None`` without a
        truth); ``loss`` by stage (per tilt where there is one for each); ``stages``: the numbers of each with its
        ``wall_s``, ``cpu_s`` and ``peak_rss_mb``; and the same three for the whole call. CPU seconds are those of all
        processes at work, the peak is that of the largest of them in MB (1e6 bytes).
    """
    _require_stage(until)
    settings = settings or StageSettings()
    _require_truth(settings)
    executor = executor or default_executor()
    return _run_on(store, settings, until, progress or Silent(), executor, _Ledger(executor))


def stage_verb(stage: str) -> Callable[..., dict[str, Any]]:
    """Return the function of ``stage``, imported when asked for."""
    module = importlib.import_module(f"stemtomo.pipeline.{_MODULES.get(stage, stage)}")
    verb: Callable[..., dict[str, Any]] = getattr(module, stage)
    return verb


def stage_settings(store: Store, stage: str, overrides: Iterable[str] = ()) -> Section:
    """Return the settings that ``stage`` had last time in ``store``, or its defaults, with ``overrides`` applied.

    Parameters
    ----------
    overrides
        Strings ``key=value`` of the stage's section, see :func:`stemtomo.pipeline.references.load_configuration`.

    Raises
    ------
    ConfigurationError
        For an unknown key or a value that is not allowed.
    """
    from stemtomo.pipeline.references import override_section

    section = STAGES[stage]
    members = store.members(group_of(stage))
    made = (store.provenance(members[0]) or {}) if members else {}
    known: type[Section] = StageSettings.model_fields[section].annotation  # type: ignore[assignment]
    start = {key: value for key, value in made.get("configuration", {}).items() if key in known.model_fields}
    if stage == "score":
        start.pop("truth", None)  # its record keeps the name of the file alone
    return override_section(section, start, overrides)


def group_of(stage: str) -> str:
    """Return the group of a store that ``stage`` makes."""
    return next(name for name, schema in GROUPS.items() if schema.stage == stage)


def recorded_runs(store: Store) -> list[dict[str, Any]]:
    """Return what the runs on ``store`` that came to their end took, oldest first."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(_record_folder(store).glob("*.json"))]


class _Ledger:
    """Numbers and costs of the stages of one run."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._began = time.perf_counter()
        self._used = executor.usage()
        self.time_utc = datetime.now(UTC).isoformat(timespec="seconds")
        self.stages: dict[str, dict[str, Any]] = {}

    def stage(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Do ``work`` and keep its numbers with what it took."""
        began, used = time.perf_counter(), self._executor.usage()
        numbers = work()
        self.stages[name] = {**numbers, **self._cost(began, used.cpu_seconds)}

    def total(self) -> dict[str, float]:
        """Return what everything since the beginning took."""
        return self._cost(self._began, self._used.cpu_seconds)

    def _cost(self, began: float, cpu_seconds: float) -> dict[str, float]:
        used = self._executor.usage()
        return {
            "wall_s": round(time.perf_counter() - began, 3),
            "cpu_s": round(used.cpu_seconds - cpu_seconds, 3),
            "peak_rss_mb": round(used.peak_rss_mb, 1),
        }


def _run_on(
    store: Store,
    settings: StageSettings,
    until: str | None,
    progress: Progress,
    executor: Executor,
    ledger: _Ledger,
    tilts: Sequence[int] | None = None,
) -> dict[str, Any]:
    settings = with_memory(settings)
    for stage, section in list(STAGES.items())[1:]:
        if until == "ingest" or (stage == "score" and settings.score.truth is None):
            break
        if stage in skipped_stages(settings) and stage != until:
            continue
        stop_here(f"before the stage {stage}")
        told = getattr(settings, section)
        if stage == "find_atoms":
            told = _volume_of_now(store, told, settings)
        arguments = (store, told)
        chosen = {"tilts": tilts} if stage == "ptychography" and tilts is not None else {}
        work = functools.partial(stage_verb(stage), *arguments, executor=executor, progress=progress, **chosen)
        ledger.stage(stage, work)
        if stage == until:
            break
    result = {
        "name": store.name,
        "store": str(store.path),
        "until": until or "score",
        **{key: ledger.stages.get("score", {}).get(key) for key in _SCORES},
        **ledger.total(),
        "loss": {stage: numbers["loss"] for stage, numbers in ledger.stages.items() if "loss" in numbers},
        "stages": {
            stage: {k: v for k, v in numbers.items() if k != "loss"} for stage, numbers in ledger.stages.items()
        },
    }
    _record(store, result, ledger.time_utc)
    return result


def _volume_of_now(store: Store, told: AtomSettings, settings: StageSettings) -> AtomSettings:
    """Return the settings of atoms with the volume that a run makes: where joint is off, not that of a run before."""
    left = told.volume == "auto" and not settings.joint.enabled and store.fingerprint("joint") is not None
    return told.model_copy(update={"volume": "tomography"}) if left else told


def skipped_stages(settings: StageSettings) -> frozenset[str]:
    """Return the stages that are left out: the joint way, or the sequential one where joint starts from zero."""
    if not settings.joint.enabled:
        return frozenset({"joint"})
    if settings.joint.start == "sequential":
        return frozenset()
    return frozenset({"ptychography", "projections", "align", "tomography"})


def _record(store: Store, result: dict[str, Any], time_utc: str) -> None:
    """Keep what a run took beside the results; their own provenance cannot tell tasks that share a process apart."""
    kept = {key: value for key, value in result.items() if key not in ("loss", "stages", "store")}
    cost = ("wall_s", "cpu_s", "peak_rss_mb")
    stages = {stage: {key: numbers[key] for key in cost} for stage, numbers in result["stages"].items()}
    folder = _record_folder(store)
    folder.mkdir(exist_ok=True)
    name = f"{time_utc.replace(':', '').replace('+0000', 'Z')}-{time.monotonic_ns():020d}.json"
    replace_json(folder / name, {**kept, "stages": stages, "time_utc": time_utc, "versions": package_versions()})


def _record_folder(store: Store) -> Path:
    return store.path / ".runs"


def _require_stage(until: str | None) -> None:
    if until is not None and until not in STAGES:
        close = difflib.get_close_matches(until, [*STAGES, *STAGES.values()], n=1)
        hint = (
            f" (did you mean {next((s for s, c in STAGES.items() if close[0] in (s, c)), close[0])}?)" if close else ""
        )
        raise ConfigurationError(f"until = {until!r} is not a stage{hint}; allowed: {', '.join(STAGES)}")


def _require_tilts(count: int, tilts: Sequence[int] | None) -> None:
    beyond = [tilt for tilt in tilts or () if not 0 <= tilt < count]
    if beyond:
        raise ConfigurationError(f"tilts {beyond} are not in a series of {count}, counted from 0")


def _require_files(configuration: Configuration) -> None:
    """Refuse now what cannot be kept in files, or not in a bucket."""
    if "tomography" not in skipped_stages(configuration):
        require_streamable(configuration.tomography)
    if is_object(configuration.store_path) and configuration.tomography.stream == "always":
        raise ConfigurationError(
            f"{configuration.store_path}: tomography.stream = 'always' keeps the volume in files that are read in "
            "parts, which object storage has not; set 'auto' or 'never', or use a store on a file system"
        )


def _require_truth(settings: StageSettings) -> None:
    """Read the known atoms now: an unreadable file should not be found out at the end."""
    if settings.score.truth is not None:
        from stemtomo.io.export import read_atoms

        read_atoms(settings.score.truth)


def with_dose(configuration: Configuration) -> Configuration:
    """Hand the known dose to the stages that start from it, unless they were told their own."""
    electrons = configuration.dose.electrons_per_pattern
    return _handed(configuration, ("ptychography", "joint"), "electrons_per_pattern", electrons)


def with_memory(settings: _Settings) -> _Settings:
    """Hand the memory that the run may use to the stages that fit tiles or blocks to it, unless they have their own."""
    return _handed(settings, ("ptychography", "tomography"), "memory_gib", settings.resources.memory_gib)


def _handed(settings: _Settings, stages: tuple[str, ...], key: str, value: float | None) -> _Settings:
    """Return ``settings`` with ``value`` as ``key`` of those ``stages`` that have none; as they are without a value."""
    sections = {name: getattr(settings, name) for name in stages}
    told = {
        name: section.model_copy(update={key: value})
        for name, section in sections.items()
        if value is not None and getattr(section, key) is None
    }
    return settings.model_copy(update=told)
