"""What resolution is told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stemtomo.pipeline.experiment import Positive, Section


class ResolutionSettings(Section):
    """What ``resolution`` does; not a section of a file, since no run makes half sets."""

    halves: Literal["none", "tilts", "positions"] = Field(
        default="none",
        description="Half sets: none; volumes from every other tilt; or all again from every other scan position.",
    )
    tilts: tuple[int, ...] | None = Field(
        default=None,
        description="With halves = 'positions': tilts to reconstruct, for their ring correlation alone; else all.",
    )
    cone_deg: float = Field(default=20.0, gt=0, le=90, description="Half angle of the cones along x, y and z.")
    significance: Positive = Field(
        default=5.0, description="Height of a spectral peak over its background, in standard deviations."
    )
    taper_fraction: float = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="Part of every axis over which images and volumes are faded out; 0 if periodic.",
    )
    mask: Literal["edges", "specimen"] = Field(
        default="edges",
        description="What is correlated: everything but faded edges, or the specimen alone, cut out softly; what the "
        "mask itself makes is taken off (randomised phases).",
    )
    voxel_angstrom: Positive | None = Field(
        default=None, description="Voxel of volumes from files that do not say it, in Å."
    )

    @model_validator(mode="after")
    def _tilts_are_of_half_scans(self) -> ResolutionSettings:
        if self.tilts is not None and self.halves != "positions":
            raise ValueError("tilts are chosen for half sets of positions alone: give halves = 'positions' with them")
        return self
