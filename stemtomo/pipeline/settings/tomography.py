"""What projections, align and tomography are told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stemtomo.pipeline.experiment import Count, NonNegative, Pair, Positive, Section


class ProjectionSettings(Section):
    """[projections]: phase sums made comparable between tilts."""

    illumination_fraction: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="A pixel counts as measured from this fraction of the typical illumination.",
    )
    field_angstrom: Positive | Pair | None = Field(
        default=None, description="Field of the projections in Å: one number or [y, x]; the scanned field if not given."
    )

    background: Literal["plane", "level", "none"] = Field(
        default="plane", description="What is taken off so that vacuum is zero: a plane, a constant, nothing."
    )


class AlignmentSettings(Section):
    """[alignment]: shifts of the projections against one another."""

    enabled: bool = Field(default=True, description="Estimate the shifts; else they are zero.")
    methods: tuple[Literal["centre_of_mass", "common_line"], ...] = Field(
        default=("centre_of_mass", "common_line"), description="Estimates in the order they are applied."
    )
    largest_border_fraction: float = Field(
        default=0.1,
        gt=0,
        le=1,
        description="The specimen counts as wholly in view while the border is fainter than this part of its brightest "
        "tenth; else neighbouring tilts are correlated instead.",
    )


class TomographySettings(Section):
    """[tomography]: the volume from the projections."""

    iterations: Count = Field(default=200, description="Iterations of the accelerated gradient.")
    blocks: Count | None = Field(
        default=None,
        description="Slabs that the volume is cut into along y; as many as are worth a worker each if not given.",
    )
    depth_angstrom: Positive | None = Field(
        default=None, description="Extent of the volume along the beam at zero tilt; that along x if not given."
    )
    degree: Literal[1, 2] = Field(default=2, description="B-spline of the volume: 1 (linear) or 2 (quadratic).")
    element_width_px: float = Field(
        default=0.5,
        ge=0,
        le=3,
        description="Width (sigma) in voxels of the Gaussians that the volume is a sum of, beyond the B-spline; "
        "more for noisy projections, less than the narrowest atom.",
    )
    positivity: bool = Field(default=True, description="Keep the potential non-negative.")
    soft_threshold_rad: NonNegative = Field(
        default=0.0, description="Penalty on every voxel, in rad of its gradient: takes a faint haze away."
    )
    support: Literal["none", "seen"] = Field(
        default="none", description="Where the volume may be: everywhere, or only where every tilt looked."
    )
    refine_shifts: bool = Field(
        default=True,
        description="Refine the shift of every projection against the volume, in the first half of the iterations; "
        "only if the specimen is wholly in view.",
    )
    checkpoint_every: Count = Field(default=25, description="Iterations between two checkpoints.")
