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
        default="auto", description="Volume to trace: that of joint tomography where there is one, else of tomography."
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
