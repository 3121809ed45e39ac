"""What joint tomography is told."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from stemtomo.pipeline.experiment import Count, NonNegative, Positive, Section


class JointSettings(Section):
    """[joint]: the volume straight from all patterns (MSET), after or in place of the sequential way."""

    enabled: bool = Field(default=False, description="Run this stage.")
    start: Literal["zero", "sequential"] = Field(
        default="zero",
        description="Start from an empty volume, the probes of the metadata and the poses of the series, without "
        "ptychography and tomography; or from their volume, probes and shifts.",
    )
    slice_thickness_angstrom: Positive | None = Field(
        default=None,
        description="Thickness of a slice in Å, made a whole number of voxels; a tenth of the depth of field if not "
        "given, and at least a voxel.",
    )
    single_slice: bool = Field(default=False, description="One slice per tilt (SSET): the projection approximation.")
    extent_angstrom: Positive | None = Field(
        default=None, description="Edge of the box along x and z in Å; that of the scanned field if not given."
    )
    single_slice_epochs: int = Field(
        default=6, ge=0, description="First sweeps with one slice per tilt: cheap, and they find the support."
    )
    sweeps: int = Field(default=4, ge=0, description="Sweeps over the tilts, one tilt at a time.")
    settling_sweeps: int = Field(
        default=4, ge=0, description="Last sweeps, each with half the step of the one before and one batch per tilt."
    )
    accelerated_epochs: int = Field(
        default=0, ge=0, description="Epochs of the accelerated gradient over all tilts together, after the sweeps."
    )
    batches: int = Field(
        default=4, ge=0, description="Batches of patterns per tilt and sweep; 0 for one pattern at a time (published)."
    )
    step: Positive = Field(default=1.0, description="Step of the preconditioned gradient.")
    damping: float = Field(
        default=0.1, gt=0, le=1, description="Share of the peak illumination in the preconditioner; slows dark pixels."
    )
    low_frequency_gain: float = Field(
        default=10.0,
        ge=1,
        description="Most by which steps of low frequencies, which patterns hardly tell, are lengthened; 1 for none.",
    )
    whole_illumination: bool = Field(
        default=False, description="Precondition with the illumination of all positions (published), not the batch's."
    )
    loss: Literal["amplitude", "anscombe", "poisson"] = Field(
        default="poisson",
        description="Misfit. Poisson is the likelihood of counts, also of less than one electron per pixel, where the "
        "roots of the others are biased.",
    )
    most_electrons: Positive = Field(
        default=2e4,
        description="Patterns of more electrons are compared as if they had so many: their weak pixels, where the "
        "model is wrong by more than noise, would lead a search from zero astray. No effect on loss = 'amplitude'.",
    )
    mask_bad_pixels: bool = Field(
        default=True, description="Leave out pixels that a calibration of the tilt has found dead or hot."
    )
    electrons_per_pattern: Positive | None = Field(
        default=None, description="Electrons of the probe; the mean of the patterns if not given."
    )
    detector_padding: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share by which the waves' windows are at least larger than the detector, and voxels smaller, so "
        "that what scatters beyond it does not fold back.",
    )
    soft_edge: bool = Field(default=True, description="Aperture whose edge pixels count by their area inside.")
    probe: Literal["fixed", "shared", "free"] = Field(
        default="fixed", description="Refine no probe, one for all tilts, or one per tilt."
    )
    probe_step: NonNegative = Field(default=0.1, description="Step of the probe.")
    refine_shifts: bool = Field(default=False, description="Refine the shift of every tilt after the first sweeps.")
    refine_focus: bool = Field(default=False, description="Refine C1 of every tilt, while tilts are cut into slices.")
    refine_angles: bool = Field(
        default=False, description="Refine the three angles of every tilt, while tilts are cut into slices."
    )
    positivity: bool = Field(default=True, description="Keep the potential non-negative.")
    vacuum_level: bool | Literal["auto"] = Field(
        default="auto",
        description="Take the phase of its vacuum off every tilt: no pattern knows it, and a haze would fill the box. "
        '"auto": not off tilts whose field the outline of the specimen fills.',
    )
    soft_threshold_rad: NonNegative = Field(
        default=0.0, description="Penalty on every voxel in rad per sweep: takes a faint haze away."
    )
    tv_weight_rad: NonNegative = Field(
        default=0.0, description="Weight of the total variation in rad per voxel, after every epoch."
    )
    element_width_px: float = Field(
        default=0.0,
        ge=0,
        le=3,
        description="Width (sigma) in voxels of the Gaussians that the volume is a sum of; for noisy patterns.",
    )
    support: Literal["auto", "none"] = Field(
        default="auto", description="Where the volume may be: around what the first sweeps show, or everywhere."
    )
    check_tilt_sign: bool = Field(
        default=False,
        description="Reconstruct both hands shortly and say whether the signs of the tilts fit: a wrong one mirrors "
        "the volume in z at a loss that is only slightly higher.",
    )
    tiles: Count | None = Field(
        default=None, description="Parts that the positions of a tilt are cut into; by their number if not given."
    )
    resident: bool = Field(
        default=True, description="Hold the patterns of all tilts in memory; else each visit reads its own again."
    )
    precision: Literal["single", "double"] = Field(default="single", description="Of volume and waves.")
    seed: int = Field(default=0, ge=0, description="Seed of the order of tilts and batches.")
    checkpoint_every: Count = Field(default=2, description="Epochs between two checkpoints.")

    HOW: ClassVar[frozenset[str]] = frozenset({"enabled", "tiles", "resident", "checkpoint_every"})

    @model_validator(mode="after")
    def _propagation_tells_the_hand(self) -> Self:
        if self.check_tilt_sign and self.single_slice:
            raise ValueError(
                "check_tilt_sign needs propagation through the specimen, and single_slice has none: set one to false"
            )
        return self
