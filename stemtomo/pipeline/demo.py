"""The verb ``demo``: the whole pipeline on a simulated nanoparticle, from electrons to scored atoms."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from stemtomo.distributed import Executor
from stemtomo.distributed import executor as default_executor
from stemtomo.io.store import Store
from stemtomo.locations import local_path
from stemtomo.pipeline.config import AtomSettings, ScoreSettings, StageSettings
from stemtomo.pipeline.progress import Progress
from stemtomo.pipeline.run import run_stages
from stemtomo.pipeline.simulate import SimulationSettings, simulate
from stemtomo.pipeline.specimen import Specimen, core_shell_nanoparticle, kept_specimen

STORE = "demo.zarr"
TRUTH = "truth.xyz"


def demo(
    out: str | Path = "stemtomo-demo",
    *,
    specimen: Specimen | None = None,
    simulation: SimulationSettings | None = None,
    settings: StageSettings | None = None,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> dict[str, Any]:
    """Simulate a 4D-STEM tilt series of a nanoparticle, reconstruct it, and score the atoms that were found.

    The folder ``out`` gets ``demo.zarr``, the store, and ``truth.xyz``, the atoms, which no stage but the score sees.
    Run again, it continues where it was stopped.

    Parameters
    ----------
    out
        Folder to make or to continue.
    specimen
        Atoms to simulate; :func:`~stemtomo.pipeline.specimen.core_shell_nanoparticle` if not given.
    simulation
        Optics, scan, tilts, dose; see :class:`~stemtomo.pipeline.simulate.SimulationSettings`.
    settings
        Of the stages. Species and truth are those of the specimen, whatever they say.

    Returns
    -------
    dict
        As :func:`stemtomo.pipeline.run.run`, with the numbers of ``simulate`` among the stages, and ``truth``, the path
        of the known atoms.

    Raises
    ------
    ConfigurationError
        If ``out`` holds the truth of another specimen.
    StoreError
        If ``out`` holds another simulation, or cannot be written.
    """
    folder = local_path(out, "the demo writes")
    executor = executor or default_executor()
    specimen = specimen or core_shell_nanoparticle()
    began, used = time.perf_counter(), executor.usage()
    truth = kept_specimen(folder / TRUTH, specimen)
    simulated = simulate(folder / STORE, specimen, simulation, name="demo", progress=progress, executor=executor)
    wall, after = time.perf_counter() - began, executor.usage()
    store = Store.open(folder / STORE, "r+")
    result = run_stages(store, _staged(settings, specimen, truth), progress=progress, executor=executor)
    cost = {
        "wall_s": round(wall, 3),
        "cpu_s": round(after.cpu_seconds - used.cpu_seconds, 3),
        "peak_rss_mb": round(after.peak_rss_mb, 1),
    }
    return {
        **result,
        "truth": str(truth),
        "wall_s": round(result["wall_s"] + wall, 3),
        "cpu_s": round(result["cpu_s"] + cost["cpu_s"], 3),
        "stages": {"simulate": {**simulated, **cost}, **result["stages"]},
    }


def _staged(settings: StageSettings | None, specimen: Specimen, truth: Path) -> StageSettings:
    """Return the settings of the stages with the specimen's species and truth."""
    settings = settings or StageSettings()
    atoms = {**settings.atoms.model_dump(), "species": specimen.species}
    score = {**settings.score.model_dump(), "truth": truth}
    changes = {"atoms": AtomSettings.model_validate(atoms), "score": ScoreSettings.model_validate(score)}
    return settings.model_copy(update=changes)
