"""What ptychography is told."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from stemtomo.pipeline.experiment import Count, Finite, NonNegative, Positive, Section

#: What is asked of the object beside the patterns.
_CONSTRAINTS = (
    "positive_phase",
    "amplitude_limits",
    "tv_weight_rad",
    "kz_filter",
    "vacuum_percentile",
    "notch_scan_raster",
)
#: What a search for a map of mistilts knows nothing of.
_BESIDE_A_MAP = (
    *_CONSTRAINTS,
    "refine_positions_from_epoch",
    "background",
    "detector_blur_px",
    "probe_variations",
    "held_out",
)


class PtychographySettings(Section):
    """[ptychography]: multislice phase retrieval at each tilt."""

    slices: Count = Field(default=1, description="Slices along the beam.")
    slice_thickness_angstrom: Positive | tuple[Positive, ...] | None = Field(
        default=None,
        description="Thickness of a slice in Å, or a list of them along the beam, one per slice, each of which "
        "acts in its middle; needed for more than one slice.",
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
    rule: Literal["nesterov", "lsqml", "adam", "lbfgs"] = Field(
        default="nesterov",
        description="How object and probe move: preconditioned gradient with momentum; with lengths by least squares; "
        "Adam; or nesterov first, then L-BFGS in the settling epochs.",
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
    c1_at: Literal["plane", "entrance"] = Field(
        default="plane",
        description="What C1 refers to: optics.defocus_plane_z_angstrom of the laboratory, whose z = 0 is the middle "
        "of the specimen, or the specimen's entrance surface, however thick it is.",
    )
    mistilt_mrad: tuple[Finite, Finite] = Field(
        default=(0.0, 0.0),
        description="Mistilt [x, y] in mrad, or where the search for it starts: positive where columns drift to +x, +y "
        "with depth.",
    )
    refine_mistilt: bool = Field(default=False, description="Find the mistilt from the patterns, with tied slices.")
    refine_thickness: bool = Field(
        default=False, description="Find the thickness of the slices too; slice_thickness_angstrom is where to start."
    )
    mistilt_patterns: Count = Field(
        default=1024, description="Patterns of a tilt that take part in that, from the middle of the scan."
    )
    mistilt_iterations: Count = Field(
        default=80, description="Most iterations of that over a quarter of these patterns; it ends when nothing moves."
    )
    mistilt_map_smoothing_angstrom: Positive | None = Field(
        default=None,
        description="Find a mistilt for every position, smooth over this distance, for bent crystals and grains; every "
        "epoch is then an iteration of that search, with tied slices and the probe as it is told.",
    )
    refine_positions_from_epoch: int | None = Field(
        default=None, ge=0, description="First epoch that refines the probe positions; never if not given."
    )
    refine_scan_affine: bool = Field(
        default=False,
        description="Let scale, rotation and shear of the scan change too, in the last third of these epochs; they "
        "trade with defocus.",
    )
    background: Literal["none", "uniform", "pixels"] = Field(
        default="none",
        description="Electrons that the detector counts beside the waves: refined as one number, or pixel by pixel.",
    )
    background_from_epoch: int = Field(default=5, ge=0, description="First epoch that refines the background.")
    detector_blur_px: NonNegative = Field(
        default=0.0, description="Standard deviation of the detector's point spread, in its pixels."
    )
    mask_bad_pixels: bool = Field(
        default=True, description="Leave out pixels that a calibration of the tilt has found dead or hot."
    )
    probe_variations: int = Field(
        default=0, ge=0, le=9, description="Modes in which the probe may vary along the scan (OPR)."
    )
    probe_variations_from_epoch: int = Field(default=8, ge=0, description="First epoch that refines these.")
    held_out: float = Field(
        default=0.0, ge=0, le=0.5, description="Share of the patterns that are not fitted but tell when to stop."
    )
    held_out_patience: Count = Field(
        default=5, description="Epochs without a lower loss of held-out patterns after which the best one is taken."
    )
    positive_phase: bool = Field(default=False, description="No phase below zero in any slice.")
    amplitude_limits: tuple[Positive, Positive] | None = Field(
        default=None, description="Bounds of |t| in every slice of a complex object, such as [0.9, 1.02]."
    )
    tv_weight_rad: NonNegative = Field(
        default=0.0, description="Weight of the total variation of the phase of a slice, applied after every epoch."
    )
    kz_filter: NonNegative = Field(
        default=0.0,
        description="Strength of the filter of high frequencies along the beam at low ones across it, as used "
        "elsewhere; the blur depth_blur_angstrom is there without it.",
    )
    vacuum_percentile: float | None = Field(
        default=None, ge=0, le=100, description="Percentile of the phase of lit pixels that is zero in every slice."
    )
    notch_scan_raster: bool = Field(
        default=False,
        description="Take the frequencies of the scan's raster out of the object, and what the specimen has there.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the order of the batches.")
    tiles: Literal["auto"] | tuple[Count, Count] = Field(
        default="auto",
        description="Tiles [rows, columns] into which the scan of a tilt is cut, over all workers; as few as fit "
        "the workers where a tilt does not fit one, if auto. The result does not depend on it beyond rounding.",
    )
    tile_mode: Literal["exact", "stitch"] = Field(
        default="exact",
        description="Tiles that exchange sums at every step, the same as one piece to rounding; or tiles on their own, "
        "put together afterwards, for clusters whose network or scheduler is slow.",
    )
    stitch_halo: Count | None = Field(
        default=None,
        description="Scan positions of their neighbours that tiles on their own see, too; 4/3 of the probe's diameter "
        "if not given.",
    )
    stitch_probe_positions: Count = Field(
        default=32,
        description="Edge, in scan positions, of the part in the middle of the scan that the probe of tiles on their "
        "own is fitted to.",
    )
    stitch_meet_epochs: Count = Field(
        default=2,
        description="Epochs after which tiles on their own meet: each goes on with the blend of all in its window, and "
        "with the mean of their probes.",
    )
    stitch_polish_epochs: Count | None = Field(
        default=None,
        description="Last epochs that tiles which were on their own go on with as exact ones; the settling epochs, of "
        "one step each, if not given.",
    )
    frames: Literal["auto", "memory", "store"] = Field(
        default="auto",
        description="Where the patterns of tiles are: held in memory, or read from the store whenever they are needed; "
        "held if they fit, if auto.",
    )
    batch_block: Count = Field(
        default=1,
        description="Edge, in scan positions, of the squares of neighbours that batches are made of. 8, the chunk of "
        "the store, reads every pattern of a scan that is not in memory once in an epoch instead of once in a batch.",
    )
    checkpoint_every: Count = Field(default=5, description="Epochs between two checkpoints of a tilt.")
    memory_gib: Positive | None = Field(
        default=None,
        description="Memory of all workers together that auto may fill; what they have, or resources.memory_gib, if "
        "not given.",
    )

    HOW: ClassVar[frozenset[str]] = frozenset({"tiles", "frames", "checkpoint_every", "memory_gib"})

    def how(self) -> frozenset[str]:
        """Return the names of the settings that do not change the result: the cut does if tiles are stitched."""
        if self.tile_mode == "stitch":
            return self.HOW - {"tiles"}
        stitching = {name for name in type(self).model_fields if name.startswith("stitch_")}
        return self.HOW | {"tile_mode"} | stitching

    def settling_of(self, epochs: int) -> int:
        """Return the whole-scan epochs at the end of ``epochs``."""
        return min(10, max(0, epochs - 5)) if self.settling_epochs is None else min(epochs, self.settling_epochs)

    @property
    def mean_slice_angstrom(self) -> float:
        """Mean thickness of the slices; zero where none is told."""
        told = self.slice_thickness_angstrom
        return sum(told) / len(told) if isinstance(told, tuple) else told or 0.0

    @property
    def slice_weights(self) -> tuple[float, ...] | None:
        """Thickness of every slice over their mean, where they differ."""
        told = self.slice_thickness_angstrom
        if not isinstance(told, tuple) or len(set(told)) == 1:
            return None
        return tuple(each / self.mean_slice_angstrom for each in told)

    @property
    def filters_whole_object(self) -> bool:
        """Whether something looks at the whole object after an epoch."""
        return self.kz_filter > 0 or self.vacuum_percentile is not None or self.notch_scan_raster

    def with_mean_slice(self, angstrom: float) -> PtychographySettings:
        """Return these settings with slices of that mean thickness, in the same proportions."""
        weights = self.slice_weights
        each = angstrom if weights is None else tuple(weight * angstrom for weight in weights)
        return self.model_copy(update={"slice_thickness_angstrom": each})

    @property
    def batches_per_epoch(self) -> int:
        """Batches of an epoch before the settling ones."""
        stirred = max(1, self.epochs - self.settling_of(self.epochs))
        return max(8, 80 // stirred) if self.batches is None else self.batches

    @model_validator(mode="after")
    def _thickness_known(self) -> PtychographySettings:
        if self.slices > 1 and self.slice_thickness_angstrom is None:
            raise ValueError("slice_thickness_angstrom is needed for more than one slice")
        told = self.slice_thickness_angstrom
        if isinstance(told, tuple) and len(told) != self.slices:
            raise ValueError(f"slice_thickness_angstrom lists {len(told)} slices, but slices is {self.slices}")
        if self.slice_weights is not None and self.kz_filter > 0:
            raise ValueError("kz_filter needs slices of one thickness; depth_blur_angstrom blurs unequal ones")
        if self.amplitude_limits is not None and not self.amplitude_limits[0] < self.amplitude_limits[1]:
            raise ValueError("amplitude_limits are [least, largest] |t|, the first below the second")
        if self.amplitude_limits is not None and self.object == "phase":
            raise ValueError('amplitude_limits need object = "complex": a phase object has |t| = 1')
        if (self.refine_mistilt or self.refine_thickness) and self.slices < 3:
            raise ValueError("refine_mistilt and refine_thickness need at least 3 slices: one slice has no depth")
        if self.mistilt_map_smoothing_angstrom is not None and self.slices < 3:
            raise ValueError("mistilt_map_smoothing_angstrom needs at least 3 slices: one slice has no depth")
        return self

    @model_validator(mode="after")
    def _nothing_ignored(self) -> PtychographySettings:
        searches = self.rule == "lbfgs" and self.settling_of(self.epochs) > 0
        if searches and (asked := self._asked(_CONSTRAINTS)):
            raise ValueError(f'the search of rule = "lbfgs" does not keep {asked}: leave one of them out')
        if self.mistilt_map_smoothing_angstrom is not None and (asked := self._asked(_BESIDE_A_MAP)):
            raise ValueError(f"a map of mistilts is found without {asked}: leave one of them out")
        return self

    def _asked(self, names: tuple[str, ...]) -> str:
        """Return which of ``names`` are not as they are unless told."""
        return ", ".join(name for name in names if getattr(self, name) != type(self).model_fields[name].default)
