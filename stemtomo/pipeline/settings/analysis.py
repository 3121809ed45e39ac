"""What the analyses of atoms are told: order, lattice, strain, tracking."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stemtomo.pipeline.experiment import Count, Positive, Section

_BLOCK = Field(default=100_000, ge=1000, description="Atoms that are worked on at once.")


class OrderSettings(Section):
    """[order]: bond-orientational order, pair distribution, coordination, chemical order and grains."""

    cutoff_angstrom: Positive | None = Field(
        default=None, description="Neighbours are closer than this, in Å; the first valley of g(r) if not given."
    )
    threshold: float = Field(default=0.5, gt=0, le=1, description="Least normalised order of a crystalline atom.")
    pair_distance_angstrom: Positive = Field(default=12.0, description="Largest distance of g(r) in Å.")
    pair_step_angstrom: Positive = Field(default=0.05, description="Bin of g(r) in Å.")
    chemical: bool | None = Field(
        default=None,
        description="Find L1_0 and L1_2 order on an fcc lattice; done if not given and there are two species.",
    )
    species: tuple[str, str] | None = Field(
        default=None, description="The two species A and B of chemical order; needed if there are more."
    )
    chemical_threshold: float = Field(
        default=0.5, gt=0, le=1, description="Least chemical order of an atom of an ordered grain."
    )
    smallest_grain: Count = Field(default=13, description="Fewest atoms of a grain or crystalline region.")
    atoms_per_block: int = _BLOCK


class CrystalSettings(Section):
    """The crystal that atoms or a volume are registered with."""

    crystal: str = Field(
        default="fcc",
        description="fcc, bcc, sc, diamond, zincblende, rocksalt, cscl, L1_0, L1_2, perovskite, spinel, or a CIF file.",
    )
    a_angstrom: Positive | None = Field(
        default=None, description="Edge of its cell in Å; needed unless a CIF file says it."
    )
    c_angstrom: Positive | None = Field(default=None, description="Third edge in Å of a tetragonal one.")
    crystal_species: tuple[str, ...] = Field(
        default=(), description="An element for each kind of site in the order of the formula; one for all if empty."
    )
    sites: tuple[str, ...] | None = Field(
        default=None, description="Elements whose sites are looked at; the others are then not among the atoms."
    )


class LatticeSettings(CrystalSettings):
    """[lattice]: registration with a known crystal, occupied and missing sites, displacements."""

    source: Literal["atoms", "volume"] = Field(default="atoms", description="Register the atoms, or the volume itself.")
    missing_wedge_axis: Literal["x", "y", "z"] = Field(
        default="z", description="Axis along which the missing wedge blurs: the beam's of the untilted specimen."
    )
    highest_inv_angstrom: Positive = Field(
        default=1.0, description="Bragg peaks of the volume up to this frequency in 1/Å are used."
    )
    occupation_threshold: float = Field(
        default=0.4, gt=0, lt=1, description="Least occupation of a site of the volume that is not missing."
    )
    travel: float = Field(
        default=0.5, gt=0, le=0.5, description="Furthest maximum from its site, in distances of nearest neighbours."
    )


class StrainSettings(CrystalSettings):
    """[strain]: displacement field and strain tensor against a registered crystal."""

    smoothing_angstrom: Positive = Field(
        default=4.0, description="Standard deviation in Å of the Gaussian over which strain is fitted."
    )
    reference: Literal["crystal", "mean"] = Field(
        default="crystal", description="Strain against the cell as given, or against the specimen's own mean cell."
    )
    atoms_per_block: int = _BLOCK


class TrackSettings(Section):
    """[track]: several states of one specimen, their common core, and nuclei of ordered atoms."""

    order: Literal["bond", "chemical"] = Field(
        default="bond", description="Nuclei are of bond-orientational, or of chemical order."
    )
    cutoff_angstrom: Positive | None = Field(
        default=None, description="Neighbours are closer than this, in Å; the first valley of g(r) if not given."
    )
    threshold: float = Field(default=0.5, gt=0, le=1, description="Least order of an atom of a nucleus.")
    smallest_nucleus: Count = Field(default=13, description="Fewest atoms of a nucleus.")
    species: tuple[str, str] | None = Field(
        default=None, description="The two species A and B of chemical order; needed if there are more."
    )
    rotation_deg: float = Field(default=10.0, ge=0, le=180, description="Largest rotation between states in degrees.")
    match_radius_angstrom: Positive | None = Field(
        default=None,
        description="Largest distance in Å of an atom that stayed; half of that of neighbours if not given.",
    )
    least_share: float = Field(
        default=0.2, gt=0, le=1, description="Nuclei that share this part of the smaller one are related."
    )
    change: float = Field(default=0.2, gt=0, description="Relative change of size that is growth or shrinkage.")


class AnalysisSettings(Section):
    """The sections of the analyses of atoms."""

    order: OrderSettings = OrderSettings()
    lattice: LatticeSettings = LatticeSettings()
    strain: StrainSettings = StrainSettings()
    track: TrackSettings = TrackSettings()
