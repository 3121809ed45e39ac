"""What ptychography is told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stemtomo.pipeline.experiment import Count, NonNegative, Positive, Section


class PtychographySettings(Section):
    """[ptychography]: multislice phase retrieval at each tilt."""

    slices: Count = Field(default=1, description="Slices along the beam.")
    slice_thickness_angstrom: Positive | None = Field(
        default=None, description="Thickness of a slice in Å; needed for more than one slice."
    )
    epochs: Count = Field(default=20, description="Passes over all patterns of a tilt.")
    batches: Count | None = Field(
        default=None,
        description="Batches of positions in one epoch; if not given 8, or as many as make 80 steps of the epochs "
        "before the settling ones.",
    )
    settling_epochs: int | None = Field(
        default=None,
        ge=0,
        description="Last epochs, with one batch of all positions, that settle the noise of batches; those after the "
        "first 5, at most 10, if not given.",
    )
    detector_padding: NonNegative | None = Field(
        default=None,
        description="Share by which windows are larger than the detector, so that what is scattered beyond it does "
        "not fold back; if not given 1/8 for several slices and none for one slice or a periodic specimen.",
    )
    depth_blur_angstrom: NonNegative | None = Field(
        default=None,
        description="Gaussian blur along the beam, in Å, that keeps slices closer than the depth of field alike; half "
        "of lambda / alpha² if not given.",
    )
    probe_modes: Count = Field(default=1, description="Modes of the probe, for partial coherence.")
    step: Positive = Field(default=1.0, description="Step of the preconditioned gradient of the object.")
    probe_step: NonNegative = Field(default=0.1, description="Step of the preconditioned gradient of the probe.")
    momentum: float = Field(default=0.5, ge=0, lt=1, description="Momentum of object and probe (Nesterov).")
    damping: float = Field(
        default=0.1, gt=0, le=1, description="Share of the peak illumination in the preconditioner; slows dark pixels."
    )
    electrons_per_pattern: Positive | None = Field(
        default=None, description="Electrons of the first probe; the mean of the patterns if not given."
    )
    object: Literal["phase", "complex"] = Field(
        default="phase", description="A pure phase object, or amplitude and phase."
    )
    loss: Literal["amplitude", "anscombe", "poisson"] = Field(
        default="anscombe",
        description="Misfit of square roots of counts, plain or variance-stabilised; or the Poisson likelihood.",
    )
    probe_update_start_epoch: int = Field(
        default=5, ge=0, description="First epoch that refines the probe; beyond the last epoch for never."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the order of the batches.")

    def settling_of(self, epochs: int) -> int:
        """Return the whole-scan epochs at the end of ``epochs``."""
        return min(10, max(0, epochs - 5)) if self.settling_epochs is None else self.settling_epochs

    @property
    def batches_per_epoch(self) -> int:
        """Batches of an epoch before the settling ones."""
        stirred = max(1, self.epochs - self.settling_of(self.epochs))
        return max(8, 80 // stirred) if self.batches is None else self.batches

    @model_validator(mode="after")
    def _thickness_known(self) -> PtychographySettings:
        if self.slices > 1 and self.slice_thickness_angstrom is None:
            raise ValueError("slice_thickness_angstrom is needed for more than one slice")
        return self
