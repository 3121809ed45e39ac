"""What projections, align and tomography are told."""

from __future__ import annotations

import itertools
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from stemtomo.pipeline.experiment import Count, NonNegative, Pair, Positive, Section


class StackSettings(Section):
    """What is known of a tilt stack that comes from another program."""

    pixel_angstrom: Positive | None = Field(default=None, description="Pixel in Å; what the file says if not given.")
    energy_kev: Positive | None = Field(
        default=None,
        description="The images are phases in rad, taken at this energy; without it they are intensities, and the "
        "volume is in their unit per Å.",
    )
    array: str | None = Field(default=None, description="Member of an .npz; its only stack if not given.")
    background: Literal["none", "level", "plane"] = Field(
        default="none", description="What is taken off every image so that vacuum is zero."
    )
    axis: Literal["y", "x"] = Field(
        default="y", description="Axis of the images along which the tilt axis lies; x transposes them."
    )
    axis_deg: float = Field(default=0.0, description="Turn of the tilt axis in the plane of the images, added to phi.")
    scale: float = Field(default=1.0, description="Factor of the images; -1 for dark objects on bright ground.")
    scan_matrix: tuple[float, float, float, float] | None = Field(
        default=None,
        description="Linear distortion of the scan, xx, xy, yx, yy: the image shows the specimen at this matrix times "
        "the distance from its centre; taken out by cubic splines.",
    )
    nan_as_missing: bool = Field(
        default=False, description="Pixels that are no numbers were not measured; else they are refused."
    )


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
    phase: Literal["stored", "unwrapped"] = Field(
        default="stored",
        description="The sum that ptychography stored, which never wraps; or the angles of the object's slices, "
        "unwrapped where they exceed 2 rad (for objects from elsewhere).",
    )
    denoise: Literal["none", "lowrank", "bm3d", "auto"] = Field(
        default="none",
        description="Filter: 'lowrank' (free), 'bm3d' (package bm3d, for non-commercial use only), 'auto' (bm3d where "
        "it is installed, else lowrank). The unfiltered phase is kept beside.",
    )
    noise: Literal["auto", "vacuum", "halves", "white"] = Field(
        default="auto",
        description="Where the filters learn the spectrum of the noise: from vacuum, from half scans (made by "
        "stemtomo resolution), from the finest detail as if it were white; 'auto' for the first of them that there is.",
    )
    fourier_sparsity: NonNegative = Field(
        default=0.0,
        description="Keep only frequencies above this many medians of their ring (3 to 6), and what deviates locally; "
        "0 for all frequencies.",
    )
    sparsity_keep_inv_angstrom: NonNegative = Field(
        default=0.3, description="Frequencies in 1/Å up to which all are kept by the sparsity constraint."
    )
    sparsity_radius_inv_angstrom: NonNegative | None = Field(
        default=None,
        description="Radius in 1/Å kept around every peak; 1.5 over the size of the specimen if not given.",
    )
    column_width_angstrom: Positive = Field(
        default=0.5, description="Width (sigma) in Å of an atomic column, through which deviations are looked for."
    )
    protect_above_sigma: Positive = Field(
        default=4.0,
        description="Where the sparse image deviates by more than this many standard deviations of the noise (defects, "
        "surfaces), the constraint leaves everything as it is.",
    )


class AlignmentSettings(Section):
    """[alignment]: shifts of the projections against one another."""

    enabled: bool = Field(default=True, description="Estimate the shifts; else they are zero.")
    methods: tuple[Literal["centre_of_mass", "common_line", "projection_matching", "atom_matching"], ...] = Field(
        default=("centre_of_mass", "common_line"),
        description="Estimates in the order they are applied; projection_matching is slow and for noise as strong "
        "as the specimen, atom_matching behind it for specimens of atoms.",
    )
    atom_distance_angstrom: Positive = Field(
        default=1.7, description="Least distance of two atoms in Å (atom_matching)."
    )
    matching_rounds: Count = Field(default=18, description="Rounds of projection_matching, a volume each.")
    matching_reach_px: Positive = Field(
        default=4.0, description="How far both matchings look around the shifts before them, in (binned) pixels."
    )
    largest_border_fraction: float = Field(
        default=0.1,
        gt=0,
        le=1,
        description="The specimen counts as wholly in view while the border is fainter than this part of its brightest "
        "tenth; else neighbouring tilts are correlated instead.",
    )
    normalise: Literal["none", "tilt", "rows"] = Field(
        default="none",
        description="Bring the projections of a specimen wholly in view to one scale: a factor per tilt, or one that "
        "varies smoothly along the tilt axis (rows; for tilts about y).",
    )
    refine_angles: bool = Field(
        default=False,
        description="Refine shifts and angles of all projections together with a coarse volume; for a specimen that is "
        "wholly in view.",
    )
    refine_in_plane: bool = Field(default=True, description="Turns in the plane of the image too (refine_angles).")
    refine_magnification: bool = Field(default=False, description="Magnifications too (refine_angles).")
    angle_prior_deg: Positive = Field(
        default=2.0, description="How far the true angles may be from those given: their standard deviation."
    )
    joint_bins: tuple[Count, ...] | None = Field(
        default=None,
        description="Pixels that are binned at each scale of the joint refinement, coarse to fine; if not given those "
        "that leave 48 to 128 pixels.",
    )
    joint_iterations: Count = Field(
        default=120, description="Iterations of the joint refinement at the coarsest scale; half at the others."
    )
    clip_fraction: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Part of the brightest pixel at which the joint refinement cuts.",
    )

    @model_validator(mode="after")
    def _coarse_to_fine(self) -> AlignmentSettings:
        bins = self.joint_bins
        if bins is not None and (not bins or any(after >= before for before, after in itertools.pairwise(bins))):
            raise ValueError(f"joint_bins go from coarse to fine, each less than the one before, not {list(bins)}")
        return self


class TomographySettings(Section):
    """[tomography]: the volume from the projections."""

    method: Literal["fista", "fista_tv", "resire", "sirt", "cgls", "wbp", "genfire"] = Field(
        default="fista",
        description="fista: accelerated non-negative gradient; fista_tv: with total variation; resire: plain gradient; "
        "sirt; cgls: conjugate gradients, unconstrained; wbp: weighted back-projection; genfire: Fourier iteration.",
    )
    iterations: Count = Field(default=200, description="Iterations, of the methods that iterate.")
    blocks: Count | None = Field(
        default=None,
        description="Slabs that the volume is cut into along y; as many as are worth a worker each if not given.",
    )
    depth_angstrom: Positive | None = Field(
        default=None, description="Extent of the volume along the beam at zero tilt; that along x if not given."
    )
    degree: Literal[1, 2, 3] = Field(
        default=2, description="B-spline of the volume: 1 (linear), 2 (quadratic) or 3 (cubic: finer detail, slower)."
    )
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
    tv_weight_rad: NonNegative = Field(
        default=0.01, description="Weight of the total variation (fista_tv), in rad of its gradient."
    )
    free_fraction: float = Field(
        default=0.0, ge=0, lt=0.5, description="Part of the pixels that is held out and predicted (R-free)."
    )
    extended: bool = Field(
        default=False,
        description="The specimen goes on beyond the images: reconstruct all that the tilts saw of it within the "
        "depth, and keep what lies under the images. Give depth_angstrom.",
    )
    mask: Literal["none", "substrate"] = Field(
        default="none",
        description="substrate: find the specimen in a coarse volume first, and take what lies outside its projections "
        "off the images.",
    )
    mask_bin: Count | None = Field(
        default=None, description="Pixels binned for the coarse volume of the mask; to at most 64 if not given."
    )
    mask_threshold: float = Field(
        default=0.25, gt=0, lt=1, description="Part of its brightest voxels above which the coarse volume is specimen."
    )
    mask_blur_px: Positive = Field(
        default=1.5, description="Width (sigma) in coarse voxels of the blur of the mask, its margin."
    )
    oversampling: float = Field(
        default=2.0, ge=1, le=4, description="Edge of the Fourier grid over the volume's (genfire)."
    )
    gridding: Literal["fft", "dft"] = Field(
        default="dft", description="How projections are put on the grid (genfire): by samples, or exactly and slower."
    )
    gridding_reach_px: float = Field(
        default=0.3, gt=0, le=1.5, description="Largest distance of a grid point from a projection's plane (genfire)."
    )
    resolution_extension: bool = Field(default=True, description="Enforce low frequencies first (genfire).")
    support: Literal["none", "seen"] = Field(
        default="none", description="Where the volume may be: everywhere, or only where every tilt looked."
    )
    refine_shifts: bool | Literal["auto"] = Field(
        default="auto",
        description="Refine the shift of every projection against the volume, in the first half of the iterations; "
        "only if the specimen is wholly in view. auto: not behind alignment by projection_matching or atom_matching, "
        "as it begins with a blur of 4 px and would lose what they found under noise.",
    )
    stream: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Keep the volume in files, a few blocks at a time in memory (all methods but genfire): where it "
        "would fill most of the workers' memory, always, never.",
    )
    memory_gib: Positive | None = Field(
        default=None,
        description="Memory of all workers together by which stream = 'auto' decides; what they have, or "
        "resources.memory_gib, if not given.",
    )
    checkpoint_every: Count = Field(default=25, description="Iterations between two checkpoints.")

    HOW: ClassVar[frozenset[str]] = frozenset({"memory_gib", "checkpoint_every"})

    @model_validator(mode="after")
    def _nothing_ignored(self) -> TomographySettings:
        descents = ("fista", "fista_tv", "resire", "sirt")
        asked = {
            "refine_shifts = true": (self.refine_shifts is True, descents[:2]),
            "soft_threshold_rad": (self.soft_threshold_rad > 0, descents),
            "free_fraction": (self.free_fraction > 0, (*descents, "cgls")),
            'support = "seen"': (self.support == "seen", (*descents, "cgls", "wbp")),
        }
        for name, (told, methods) in asked.items():
            if told and self.method not in methods:
                raise ValueError(f"{name} is for method {', '.join(methods)}; {self.method} knows nothing of it")
        return self
