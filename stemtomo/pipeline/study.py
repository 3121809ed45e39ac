"""The verb ``study``: what an experiment would find, simulated over dose, defocus, step and tilt range.

Every combination is simulated from known atoms, reconstructed in every way that is asked for, traced blindly and
scored: the study of Lee et al., Phys. Rev. Applied 19, 054062 (2023), for any specimen.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from stemtomo.distributed import Executor
from stemtomo.distributed import executor as default_executor
from stemtomo.errors import ConfigurationError
from stemtomo.io.durable import replace_json
from stemtomo.io.store import Store
from stemtomo.locations import local_path
from stemtomo.pipeline.config import Finite, Positive, ScoreSettings, Section, StageSettings
from stemtomo.pipeline.progress import Progress, Silent
from stemtomo.pipeline.references import override_section
from stemtomo.pipeline.run import run_stages
from stemtomo.pipeline.simulate import SimulationSettings, simulate
from stemtomo.pipeline.specimen import Specimen, kept_specimen

Way = Literal["joint", "single_slice", "sequential"]
TABLE = "study.json"
TRUTH = "truth.xyz"
_SCORES = ("recall", "precision", "rmsd_pm", "species_accuracy")
#: Numbers that a study varies, with how they are written.
VARIED = {
    "dose_per_square_angstrom": "dose (e/Å²)",
    "defocus_c1_angstrom": "C1 (Å)",
    "scan_step_angstrom": "step (Å)",
    "tilt_range_deg": "tilts to ± (deg)",
}


class StudySettings(Section):
    """What a study varies, and how it reconstructs; what it does not vary is that of the simulation."""

    dose_per_square_angstrom: tuple[Positive, ...] = Field(
        default=(), description="Electrons per Å² of the whole series."
    )
    defocus_c1_angstrom: tuple[Finite, ...] = Field(default=(), description="C1 in Å, positive for overfocus.")
    scan_step_angstrom: tuple[Positive, ...] = Field(
        default=(), description="Distance between positions in Å; the field stays as wide."
    )
    tilt_range_deg: tuple[Positive, ...] = Field(
        default=(), description="Largest tilt in degrees; as many tilts, spread evenly from minus to plus."
    )
    ways: tuple[Way, ...] = Field(default=("joint", "sequential"), min_length=1, description="Ways to reconstruct.")

    @staticmethod
    def label(chosen: Mapping[str, float]) -> str:
        """Return the name of a combination, which is that of its store."""
        return "-".join(f"{name.split('_')[0]}{value:g}" for name, value in chosen.items()) or "as-given"

    def conditions(self, simulation: SimulationSettings) -> list[tuple[dict[str, float], SimulationSettings]]:
        """Return every combination: what it varies, and the settings of its simulation."""
        varied = {name: values for name in VARIED if (values := getattr(self, name))}
        found = []
        for values in itertools.product(*varied.values()):
            chosen = dict(zip(varied, values, strict=True))
            found.append((chosen, _simulation(simulation, chosen)))
        return found


def study(
    folder: str | Path,
    specimen: Specimen,
    settings: StudySettings | None = None,
    *,
    simulation: SimulationSettings | None = None,
    stages: StageSettings | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Simulate, reconstruct and score every combination of ``settings``; run again, it continues.

    Parameters
    ----------
    folder
        Folder to make or to continue: a store per combination, ``truth.xyz`` and ``study.json``.
    specimen
        Known atoms in sample coordinates.
    simulation
        What is not varied.
    stages
        Settings of the reconstruction; the ways, species and truth are set here.

    Returns
    -------
    dict
        ``rows``: one per combination and way: what is varied, ``way``, ``recall``, ``precision``, ``rmsd_pm``,
        ``species_accuracy`` (``None`` where no atom was found, and ``failed`` says why) and ``cpu_s``; ``varied``.

    Raises
    ------
    ConfigurationError
        If the specimen does not fit the settings, or ``folder`` holds the atoms of another one.
    StoreError
        If ``folder`` holds another study.
    """
    settings, simulation = settings or StudySettings(), simulation or SimulationSettings()
    workers, watcher = executor or default_executor(), progress or Silent()
    folder = local_path(folder, "a study writes")
    truth = kept_specimen(folder / TRUTH, specimen)
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    for chosen, simulated in settings.conditions(simulation):
        path = folder / f"{settings.label(chosen)}.zarr"
        simulate(path, specimen, simulated, name=settings.label(chosen), executor=workers, progress=watcher)
        for way in settings.ways:
            told = _told(stages or StageSettings(), way, specimen, truth, simulated)
            rows.append({**chosen, "way": way, **_scored(Store.open(path, "r+"), told, workers, watcher)})
            result = {"specimen": specimen.description, "varied": list(chosen), "rows": rows}
            replace_json(folder / TABLE, result)
    return result


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table of a study as text."""
    varied = [name for name in VARIED if name in rows[0]]
    head = [*(VARIED[name] for name in varied), "way", "recall", "precision", "RMSD (pm)", "species", "CPU s"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for row in rows:
        numbers = ["-" if row[key] is None else f"{row[key]:.3g}" for key in (*_SCORES, "cpu_s")]
        lines.append(" | ".join([*(f"{row[name]:g}" for name in varied), row["way"], *numbers]))
    return "\n".join(f"| {line} |" for line in lines)


def _simulation(simulation: SimulationSettings, chosen: dict[str, float]) -> SimulationSettings:
    changes: dict[str, Any] = {key: value for key, value in chosen.items() if key in SimulationSettings.model_fields}
    if "scan_step_angstrom" in chosen:
        extent = [count * simulation.scan_step_angstrom for count in simulation.scan_shape]
        changes["scan_shape"] = tuple(max(1, round(length / chosen["scan_step_angstrom"])) for length in extent)
    if "tilt_range_deg" in chosen:
        count, reach = len(simulation.tilt_deg), chosen["tilt_range_deg"]
        if count < 2:
            raise ConfigurationError(f"a tilt range of {reach:g} degrees needs more than one tilt, got {count}")
        changes["tilt_deg"] = tuple(-reach + 2 * reach * index / (count - 1) for index in range(count))
    return SimulationSettings.model_validate({**simulation.model_dump(), **changes})


def _told(
    stages: StageSettings, way: Way, specimen: Specimen, truth: Path, simulated: SimulationSettings
) -> StageSettings:
    jointly = way != "sequential"
    electrons = simulated.electrons_per_pattern
    joint = {"enabled": jointly, "single_slice": way == "single_slice", "electrons_per_pattern": electrons}
    atoms = {"species": specimen.species, "volume": "joint" if jointly else "tomography"}
    return stages.model_copy(
        update={
            "joint": stages.joint.model_copy(update=joint),
            "ptychography": stages.ptychography.model_copy(update={"electrons_per_pattern": electrons}),
            "atoms": stages.atoms.model_copy(update=atoms),
            "score": ScoreSettings.model_validate({**stages.score.model_dump(), "truth": truth}),
        }
    )


def _scored(store: Store, told: StageSettings, executor: Executor, progress: Progress) -> dict[str, Any]:
    used = executor.usage().cpu_seconds
    try:
        numbers = run_stages(store, told, executor=executor, progress=progress)
        found = {key: numbers[key] for key in _SCORES}
    except ConfigurationError as error:  # a volume without atoms is an answer, too
        found = {**dict.fromkeys(_SCORES), "failed": str(error)}
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in found.items()}
    return {**finite, "cpu_s": round(executor.usage().cpu_seconds - used, 2)}


def study_settings(
    varied: Mapping[str, str | None], ways: str, overrides: Iterable[str] = ()
) -> tuple[StudySettings, SimulationSettings, StageSettings]:
    """Return the settings of a study from texts: values and ways between commas, and ``section.key=value``.

    Raises
    ------
    ConfigurationError
        Naming the value and what is allowed.
    """
    lists = [f"study.{name}=[{values}]" for name, values in varied.items() if values]
    if ways != "none":
        lists.append(f"study.ways={json.dumps(ways.split(','))}")
    sections: dict[str, list[str]] = {}
    for override in (*lists, *overrides):
        sections.setdefault(override.partition(".")[0], []).append(override)
    chosen = override_section("study", {}, sections.pop("study", []), _Sections)
    simulation = override_section("simulation", {}, sections.pop("simulation", []), _Sections)
    assert isinstance(chosen, StudySettings)
    assert isinstance(simulation, SimulationSettings)
    stages = StageSettings()
    for section, texts in sections.items():
        if section not in StageSettings.model_fields:
            allowed = ", ".join(("simulation", *StageSettings.model_fields))
            raise ConfigurationError(f"--set {texts[0]}: {section!r} is not a section; allowed: {allowed}")
        stages = stages.model_copy(update={section: override_section(section, {}, texts)})
    return chosen, simulation, stages


class _Sections(Section):
    """The sections that a study adds to those of the stages."""

    study: StudySettings = StudySettings()
    simulation: SimulationSettings = SimulationSettings()
