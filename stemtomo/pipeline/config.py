"""What a run is told: one frozen, validated model per section of the TOML file. Units stand in the names.

What was measured is in :mod:`stemtomo.pipeline.experiment`; reading files, overrides and references in
:mod:`stemtomo.pipeline.references`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from stemtomo.pipeline.experiment import (
    Count,
    Experiment,
    Finite,
    InputSettings,
    NonNegative,
    Pair,
    Positive,
    Section,
    SeriesSettings,
)

__all__ = [
    "STAGES",
    "AlignmentSettings",
    "AtomSettings",
    "CalibrationSettings",
    "Configuration",
    "Count",
    "Finite",
    "IngestSettings",
    "InputSettings",
    "NonNegative",
    "Positive",
    "ProjectionSettings",
    "PtychographySettings",
    "QuicklookSettings",
    "ResourceSettings",
    "ScoreSettings",
    "Section",
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
    "find_atoms": "atoms",
    "score": "score",
}


class IngestSettings(Section):
    """[ingest]: how the frames are laid out in the store."""

    shard_mib: Positive = Field(
        default=128.0, description="Size of one shard (one write, one task) in MiB before compression."
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

    @model_validator(mode="after")
    def _one_sign(self) -> CalibrationSettings:
        if self.c1_sign is not None and self.rotation_near_deg is not None:
            raise ValueError("c1_sign and rotation_near_deg fix the same sign; give one of them")
        return self


class PtychographySettings(Section):
    """[ptychography]: multislice phase retrieval at each tilt."""

    slices: Count = Field(default=1, description="Slices along the beam.")
    slice_thickness_angstrom: Positive | None = Field(
        default=None, description="Thickness of a slice in Å; needed for more than one slice."
    )
    epochs: Count = Field(default=20, description="Passes over all patterns of a tilt.")
    batches: Count = Field(default=8, description="Batches of positions in one epoch.")
    settling_epochs: int = Field(
        default=10, ge=0, description="Last epochs, with one batch of all positions, that settle the noise of batches."
    )
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

    @model_validator(mode="after")
    def _thickness_known(self) -> PtychographySettings:
        if self.slices > 1 and self.slice_thickness_angstrom is None:
            raise ValueError("slice_thickness_angstrom is needed for more than one slice")
        return self


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


class AtomSettings(Section):
    """[atoms]: atoms in the volume and their species."""

    species: tuple[str, ...] | Count = Field(
        default=1, description="Chemical symbols, lightest first, or the number of classes."
    )
    smoothing_angstrom: NonNegative = Field(
        default=0.3, description="Width (sigma) in Å of the smoothing before maxima are searched."
    )
    minimum_distance_angstrom: Positive = Field(default=1.5, description="Smallest distance in Å between two atoms.")
    threshold: float = Field(
        default=0.25, gt=0, lt=1, description="Faintest maximum that is an atom, as a fraction of the bright ones."
    )
    refine: bool = Field(
        default=True, description="Refine positions and intensities against the projections, as Gaussian atoms."
    )
    refine_iterations: Count = Field(default=60, description="Iterations of that refinement.")


class ScoreSettings(Section):
    """[score]: comparison with known atoms."""

    truth: Path | None = Field(
        default=None,
        description="Known atoms: XYZ, or .npz with atoms_xyz_A and atomic_numbers; relative to the TOML file.",
    )
    match_radius_angstrom: Positive = Field(default=0.75, description="Largest distance in Å of a match.")


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
        return self.series.store if self.series.store is not None else Path(f"{self.series.name}.zarr")
