"""What ingest, watch, quicklook and calibrate are told."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from stemtomo.pipeline.experiment import Count, Finite, NonNegative, Positive, Section


class IngestSettings(Section):
    """[ingest]: how the frames are laid out in the store."""

    shard_mib: Positive = Field(
        default=128.0, description="Size of one shard (one write, one task) in MiB before compression."
    )
    codec: Literal["auto", "lz4", "zstd"] = Field(
        default="auto",
        description="How frames are packed: auto, counts by their density (read by stemtomo and Zarr beside it); lz4 "
        "or zstd behind bitshuffle, which every Zarr reader knows.",
    )
    missing: Literal["stop", "mask"] = Field(
        default="stop",
        description="Frames that were lost or never came: stop, or leave their positions out with a mask.",
    )
    crop: tuple[int, int, int, int] | None = Field(
        default=None, description="Pixels of the detector that are kept, [ky0, ky1, kx0, kx1), before binning."
    )
    bin: int = Field(default=1, ge=1, le=64, description="Edge of the squares of pixels that are added up.")
    dead_pixels: Path | None = Field(
        default=None,
        description="An .npy (ky, kx) that is true where a pixel is dead or hot; its value becomes the median of its "
        "neighbours.",
    )
    narrow: bool = Field(
        default=False,
        description="Store whole numbers in the smallest type that holds them all; looks at all frames first.",
    )
    nonfinite_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the values of a tilt that may be NaN or infinite; they become the median of their "
        "neighbours.",
    )
    saturation_counts: Positive | None = Field(
        default=None, description="Counts at which a pixel is saturated; the largest of the type if not given."
    )


class QuicklookSettings(Section):
    """[quicklook]: the first look, one pass over the frames."""

    bright_field_fraction: float = Field(
        default=1.0, gt=0, le=4, description="Outer radius of the bright field in convergence semiangles."
    )
    annular_fraction: float = Field(
        default=0.5, ge=0, lt=1, description="Inner radius of the annular bright field in convergence semiangles."
    )
    dark_field_fraction: float = Field(
        default=1.1, gt=0, description="Inner radius of the dark field in convergence semiangles."
    )
    superpixels: int = Field(
        default=150,
        ge=0,
        le=4096,
        description="About how many blocks of the disc the bright-field stack has; 0 for no stack.",
    )


class CalibrationSettings(Section):
    """What is known beforehand of what ``calibrate`` looks for; not a section of a file, since no run calibrates."""

    c1_sign: Literal["positive", "negative"] | None = Field(
        default=None, description="Known sign of C1 (positive is overfocus); the data alone cannot tell it."
    )
    rotation_near_deg: Finite | None = Field(
        default=None, description="Scan rotation known within 90 degrees, from an earlier run; fixes the same sign."
    )
    require: tuple[Literal["disc", "rotation", "c1"], ...] = Field(
        default=(), description="What must be found: CalibrationError where the data do not tell it."
    )
    largest_shift_fraction: float = Field(
        default=0.2, gt=0, le=0.4, description="Largest parallax shift looked for, as a part of the scanned field."
    )
    refine: bool = Field(
        default=False,
        description="Fit C1, thickness and mistilt to patterns by multislice, for specimens too thick for parallax.",
    )
    refine_patterns: int = Field(
        default=256, ge=64, description="Patterns of a tilt that take part in that, from the middle of the scan."
    )
    refine_iterations: Count = Field(default=50, description="Most iterations of that; it ends when nothing moves.")
    refine_slices: int = Field(default=6, ge=3, description="Slices of that fit, all alike.")
    thickness_angstrom: Positive | None = Field(
        default=None, description="Thickness in Å at which that begins; the depth of focus if not given."
    )

    @model_validator(mode="after")
    def _one_sign(self) -> CalibrationSettings:
        if self.c1_sign is not None and self.rotation_near_deg is not None:
            raise ValueError("c1_sign and rotation_near_deg fix the same sign; give one of them")
        return self


class WatchSettings(Section):
    """[watch]: following an acquisition while it is written."""

    poll_s: Positive = Field(default=1.0, description="Seconds between two looks at files that brought nothing new.")
    deadline_s: Positive = Field(
        default=600.0, description="Seconds without any new frame after which the acquisition counts as stalled."
    )
    settle_s: Positive = Field(
        default=10.0,
        description="Seconds without a change after which a file counts as finished whose format does not say how many "
        "frames are whole.",
    )
    publish_s: NonNegative = Field(default=2.0, description="Least time in seconds between two interim images.")
    missing: Literal["stop", "mask"] = Field(
        default="stop",
        description="At the deadline: stop, or close the tilts that have begun and leave their missing positions out.",
    )
    then_run: bool = Field(
        default=False, description="Reconstruct every tilt as soon as it is complete, and run all stages in the end."
    )
