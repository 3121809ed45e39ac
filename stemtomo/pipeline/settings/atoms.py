"""What find_atoms and score are told."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from stemtomo.pipeline.experiment import Count, NonNegative, Positive, Section


class AtomSettings(Section):
    """[atoms]: atoms in the volume and their species."""

    species: tuple[str, ...] | Count = Field(
        default=1, description="Chemical symbols, lightest first, or the number of classes."
    )
    volume: Literal["auto", "tomography", "joint"] = Field(
        default="auto",
        description="Volume to trace: that of joint tomography where there is one and a run makes it, else the other.",
    )
    smoothing_angstrom: NonNegative = Field(
        default=0.3, description="Width (sigma) in Å of the smoothing before maxima are searched."
    )
    minimum_distance_angstrom: Positive = Field(default=1.5, description="Smallest distance in Å between two atoms.")
    threshold: float = Field(
        default=0.25, gt=0, lt=1, description="Faintest maximum that is an atom, as a fraction of the bright ones."
    )
    reach_angstrom: Positive | None = Field(
        default=None,
        description="Leave out faint maxima farther than this in Å from every bright one: noise around a specimen "
        "whose bright atoms are everywhere. For few electrons, about the distance of neighbours; none to keep all.",
    )
    margin_angstrom: NonNegative = Field(
        default=0.0,
        description="Maxima closer than this to a face of the volume, which may cut the atom, are left out.",
    )
    upsampling: Count = Field(
        default=1, description="Samples per voxel along each axis, interpolated within the band of the volume."
    )
    deconvolution_angstrom: NonNegative = Field(
        default=0.0,
        description="Width (sigma) in Å of an atom, which is deconvolved to a sharper one before maxima are searched; "
        "0 for none. For atoms that run into one another.",
    )
    deconvolution_noise: float = Field(
        default=0.01,
        gt=0,
        le=1,
        description="Power of the noise over that of sharp atoms, for the deconvolution; the smaller, the sharper.",
    )
    fit: Literal["gaussian", "polynomial"] = Field(
        default="gaussian", description="Fit of each maximum: a Gaussian, or a polynomial of fourth order."
    )
    block_voxels: Count | None = Field(
        default=None,
        description="Edge in voxels of the blocks that the volume is traced in; as large as memory allows, if not "
        "given. It does not change the atoms.",
    )
    non_atoms: bool = Field(
        default=False,
        description="Look for one class more than there are species, and leave the faintest out as no atoms.",
    )
    reclassify_radius_angstrom: NonNegative = Field(
        default=0.0,
        description="Compare each atom's profile in the volume with the mean profiles of the species within this "
        "distance in Å (10 is usual), for brightness that drifts through the specimen; 0 for one level everywhere.",
    )
    refine: bool = Field(
        default=True, description="Refine positions and intensities against the projections, as Gaussian atoms."
    )
    background_angstrom: NonNegative | None = Field(
        default=None,
        description="Width (sigma) in Å of the running mean that projections are compared without in that refinement: "
        "tails of potentials, which Gaussian atoms have not, and background; 0 for none. If not given, three times an "
        "atom's width where atoms leave more behind that varies slowly than white noise would.",
    )
    refine_iterations: Count = Field(default=60, description="Iterations of that refinement.")
    refine_model: Literal["projections", "multislice"] = Field(
        default="projections",
        description="What atoms are refined against last: projections, or, for those of a joint volume, the "
        "diffraction patterns themselves, by multislice through the atoms.",
    )
    multislice_iterations: Count = Field(
        default=12, description="Iterations of that by multislice; each costs about as much as a sweep of joint."
    )
    complete: bool = Field(
        default=True,
        description="While refining, add atoms where the projections show more than the atoms found, and drop those "
        "that they do not show.",
    )
    insertion_fraction: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="Faintest peak of the residual at which an atom is added, as a fraction of a light atom.",
    )
    pruning_fraction: float = Field(
        default=0.6, gt=0, lt=1, description="Faintest atom kept after refinement, as a fraction of a light atom."
    )
    completion_rounds: Count = Field(default=12, description="Most rounds of adding and dropping, in each of 2 phases.")
    widths: Literal["class", "atom"] = Field(
        default="class", description="Widths (B factors) refined: one for each class, or one for each atom."
    )
    intensity_spread: Positive | None = Field(
        default=None,
        description="Relative spread expected of the intensities within a class, as a prior of the last refinement; "
        "none if not given.",
    )
    weigh_noise: bool = Field(
        default=True, description="Weigh pixels of the projections by their noise, estimated from the residual."
    )
    uncertainty: bool = Field(
        default=True, description="Give each refined position a standard deviation, calibrated by halves of the tilts."
    )


class ScoreSettings(Section):
    """[score]: comparison with known atoms."""

    truth: Path | None = Field(
        default=None,
        description="Known atoms: XYZ, or .npz with atoms_xyz_A and atomic_numbers; relative to the TOML file.",
    )
    match_radius_angstrom: Positive = Field(default=0.75, description="Largest distance in Å of a match.")
