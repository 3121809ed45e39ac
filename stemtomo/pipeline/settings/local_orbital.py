"""What local-orbital tomography is told."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from stemtomo.pipeline.experiment import Count, Finite, NonNegative, Positive, Section


class LocalOrbitalSettings(Section):
    """[local_orbital]: atoms straight from a tilt series of incoherent images at one focus or several (dLOT, nLOT)."""

    model: Literal["linear", "rigid", "adaptive"] = Field(
        default="adaptive",
        description="What the probe does over depth: nothing (conventional tomography), what the optics say, or what "
        "the images say, for every focal section apart.",
    )
    slice_thickness_angstrom: Positive = Field(default=4.0, description="Distance of slices along the beam in Å.")
    window_angstrom: Positive = Field(default=11.0, description="Edge of the window that holds the probe, in Å.")
    start_defocus_angstrom: tuple[Finite, ...] | None = Field(
        default=None,
        description="Per section, what to add to the metadata's C1 to begin with, in Å; looked for over the depth "
        "of the specimen if not given.",
    )
    source_size_angstrom: NonNegative = Field(
        default=0.0, description="Standard deviation in Å of the image of the source, in the first probe."
    )
    atoms: Path | None = Field(
        default=None, description="File of atoms to begin with; traced in a linear reconstruction if not given."
    )
    coarse_iterations: Count = Field(default=30, description="Iterations of that reconstruction.")
    width_angstrom: Positive = Field(
        default=0.45, description="Standard deviation in Å of an atom, to begin with: motion and size."
    )
    species: Count = Field(
        default=1, description="Kinds of atoms, told apart by their intensities; numbered from the faintest."
    )
    widths: Literal["none", "shared", "species", "atom"] = Field(
        default="shared", description="Refine no width, one for all atoms, for each species, or for each atom."
    )
    minimum_distance_angstrom: Positive = Field(default=1.6, description="Closest pair of atoms in Å.")
    insertion: float = Field(
        default=0.3,
        gt=0,
        description="Intensity in the residual at which an atom is inserted, of the median atom of the faintest "
        "species.",
    )
    pruning: float = Field(
        default=0.4, ge=0, lt=1, description="Faintest atom that is kept, of the median atom of the faintest species."
    )
    rounds: int = Field(
        default=10,
        ge=0,
        description="Most rounds in which atoms come and go, before the probes; they end where the list stands.",
    )
    atom_iterations: Count = Field(default=14, description="Iterations of each search over the atoms.")
    probe_searches: int = Field(default=3, ge=0, description="Searches over atoms and probes together.")
    probe_iterations: Count = Field(default=15, description="Iterations of each of these.")
    last_iterations: Count = Field(default=40, description="Most iterations of the last search, over all that is free.")
    still_pm: NonNegative = Field(
        default=0.02, description="Root mean square of the atoms' way over 5 iterations at which a search ends, in pm."
    )
    refine_shifts: bool = Field(default=True, description="Refine where each image lies.")
    refine_angles: bool = Field(default=False, description="Refine how each image is turned, at the end.")
    tilt_iterations: Count = Field(default=25, description="Iterations of that search.")
    held_out: float = Field(
        default=0.0, ge=0, lt=0.5, description="Share of the images that only test the model; their misfit is reported."
    )
    images_per_part: Count = Field(default=12, description="Images that a worker sums over at once.")
    atoms_per_block: Count = Field(
        default=65536, description="Atoms whose derivatives are summed over the parts at once."
    )
    precision: Literal["single", "double"] = Field(default="single", description="Of images and convolutions.")


class FocalSettings(Section):
    """Sections of what works on focal tilt series."""

    local_orbital: LocalOrbitalSettings = LocalOrbitalSettings()
