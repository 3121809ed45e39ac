"""What a run is told: one frozen, validated model per section of the TOML file. Units stand in the names.

Those of the stages are in :mod:`stemtomo.pipeline.settings`, what was measured in :mod:`stemtomo.pipeline.experiment`;
reading files, overrides and references in :mod:`stemtomo.pipeline.references`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from stemtomo.locations import location
from stemtomo.pipeline.experiment import (
    Count,
    Experiment,
    Finite,
    InputSettings,
    NonNegative,
    Positive,
    Section,
    SeriesSettings,
)
from stemtomo.pipeline.settings import (
    AlignmentSettings,
    AtomSettings,
    CalibrationSettings,
    IngestSettings,
    JointSettings,
    ProjectionSettings,
    PtychographySettings,
    QuicklookSettings,
    ResolutionSettings,
    ScoreSettings,
    StackSettings,
    TomographySettings,
    WatchSettings,
)

__all__ = [
    "OPTIONAL_STAGES",
    "STAGES",
    "AlignmentSettings",
    "AtomSettings",
    "CalibrationSettings",
    "Configuration",
    "Count",
    "Finite",
    "IngestSettings",
    "InputSettings",
    "JointSettings",
    "NonNegative",
    "Positive",
    "ProjectionSettings",
    "PtychographySettings",
    "QuicklookSettings",
    "ResolutionSettings",
    "ResourceSettings",
    "ScoreSettings",
    "Section",
    "StackSettings",
    "StageSettings",
    "TomographySettings",
    "WatchSettings",
]


#: Stages in the order they run, with the section that configures each.
STAGES: Mapping[str, str] = {
    "ingest": "ingest",
    "quicklook": "quicklook",
    "ptychography": "ptychography",
    "projections": "projections",
    "align": "alignment",
    "tomography": "tomography",
    "joint": "joint",
    "find_atoms": "atoms",
    "score": "score",
}

#: Stages that a run leaves out unless the configuration asks for them.
OPTIONAL_STAGES = frozenset({"joint", "score"})


class ResourceSettings(Section):
    """[resources]: what the run may use."""

    memory_gib: Positive | None = Field(
        default=None, description="Memory that a plan must fit, in GiB; what the machine has if not given."
    )


class StageSettings(Section):
    """The sections of the stages that work on a store with frames, whoever put them there."""

    quicklook: QuicklookSettings = QuicklookSettings()
    ptychography: PtychographySettings = PtychographySettings()
    projections: ProjectionSettings = ProjectionSettings()
    alignment: AlignmentSettings = AlignmentSettings()
    tomography: TomographySettings = TomographySettings()
    joint: JointSettings = JointSettings()
    atoms: AtomSettings = AtomSettings()
    score: ScoreSettings = ScoreSettings()
    resources: ResourceSettings = ResourceSettings()


class Configuration(StageSettings, Experiment):
    """All sections of a TOML file.

    :func:`stemtomo.pipeline.references.load_configuration` reads one from a TOML file.
    """

    series: SeriesSettings = SeriesSettings()
    ingest: IngestSettings = IngestSettings()
    watch: WatchSettings = WatchSettings()

    @property
    def store_path(self) -> Path:
        """Where the store is made or continued."""
        return location(self.series.store) if self.series.store is not None else Path(f"{self.series.name}.zarr")
