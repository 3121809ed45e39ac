"""Settings of the stages: one frozen, validated model per section of the TOML file. Units stand in the names."""

from __future__ import annotations

from stemtomo.pipeline.settings.acquisition import CalibrationSettings, IngestSettings, QuicklookSettings, WatchSettings
from stemtomo.pipeline.settings.atoms import AtomSettings, ScoreSettings
from stemtomo.pipeline.settings.joint import JointSettings
from stemtomo.pipeline.settings.ptychography import PtychographySettings
from stemtomo.pipeline.settings.resolution import ResolutionSettings
from stemtomo.pipeline.settings.tomography import (
    AlignmentSettings,
    ProjectionSettings,
    StackSettings,
    TomographySettings,
)

__all__ = [
    "AlignmentSettings",
    "AtomSettings",
    "CalibrationSettings",
    "IngestSettings",
    "JointSettings",
    "ProjectionSettings",
    "PtychographySettings",
    "QuicklookSettings",
    "ResolutionSettings",
    "ScoreSettings",
    "StackSettings",
    "TomographySettings",
    "WatchSettings",
]
