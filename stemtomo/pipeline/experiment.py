"""The sections of a configuration on what was measured: input, optics, scan, detector, poses and dose.

Degrees, mrad and keV are for the edge; the builders of :class:`Experiment` hand out the frozen objects of
:mod:`stemtomo.geometry` in Å and rad.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from stemtomo.errors import ConfigurationError, FormatError
from stemtomo.geometry import Detector, Optics, Scan, ScanOrigin, TiltSeries

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0)]
Pair = tuple[Positive, Positive]


class Section(BaseModel):
    """Base of every section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    #: What changes where and how a result is computed, but not the result beyond rounding.
    HOW: ClassVar[frozenset[str]] = frozenset()

    def how(self) -> frozenset[str]:
        """Return the names of the settings that do not change the result: a run may go on with others."""
        return self.HOW

    def result_settings(self) -> dict[str, Any]:
        """Return the settings that a result depends on: what it is made again for."""
        return self.model_dump(exclude=set(self.how()))

    def _repr_html_(self) -> str:
        """Return a table for notebooks: name, value, unit, meaning."""
        from stemtomo.pipeline.parameters import html_table

        return html_table(self)


class SeriesSettings(Section):
    """[series]: what the result is called and where it is kept."""

    name: str = Field(
        default="series", min_length=1, description="Name of the series, written into the store and the report."
    )
    store: Path | None = Field(
        default=None,
        description="Store to make or continue, relative to the current folder; the name with .zarr if not given.",
    )


class InputSettings(Section):
    """[input]: the detector frames as they come."""

    path: Path = Field(
        description="File with the frames, or the folder of input.files; relative to the TOML file.",
    )
    format: str | None = Field(
        default=None, description="Name of the format, such as 'merlin' or 'hdf5'; told from the file if not given."
    )
    files: str | tuple[str, ...] | None = Field(
        default=None,
        description="One file per tilt in the folder input.path: their names in the order of the tilts, or one name "
        "with {theta_deg}, {tilt} (from 0) or {number} (from 1) in it. With {theta_deg} in the names of files that are "
        "there, tilts.theta_deg may be left out.",
    )
    array: str | None = Field(
        default=None,
        description="Member of an .npz, dataset of an HDF5 file or array of a Zarr group that holds the frames; needed "
        "if there are several.",
    )
    axes: tuple[str, ...] = Field(
        default=("tilt", "y", "x", "ky", "kx"),
        description="Order of the axes in the file: tilt, y, x, ky, kx in any order; 'position' may stand for y and x.",
    )
    metadata: Path = Field(
        default=Path("metadata.json"), description="JSON file that @metadata: references read, relative to the input."
    )
    dtype: str | None = Field(default=None, description="Type of a pixel of a raw binary file, such as '<u2'.")
    shape: tuple[Count, ...] | None = Field(
        default=None, description="Length of each of the axes of a raw binary file."
    )
    offset_bytes: int = Field(default=0, ge=0, description="Bytes before the first frame of a raw binary file.")
    skip: int = Field(default=0, ge=0, description="Frames recorded before the first position of the scan.")
    flyback: int = Field(default=0, ge=0, description="Frames recorded after each line of the scan, to leave out.")
    channel: str | int | None = Field(
        default=None, description="Threshold of a DECTRIS file that has several: its name, or its number from 1."
    )

    @field_validator("axes", mode="before")
    @classmethod
    def _split_axes(cls, value: object) -> object:
        """Accept ``"tilt,y,x,ky,kx"`` beside a list."""
        return tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else value

    @field_validator("axes")
    @classmethod
    def _known_axes(cls, axes: tuple[str, ...]) -> tuple[str, ...]:
        allowed = (
            {"tilt", "y", "x", "ky", "kx"},
            {"tilt", "position", "ky", "kx"},
            {"y", "x", "ky", "kx"},
            {"position", "ky", "kx"},
        )
        if len(set(axes)) != len(axes) or set(axes) not in allowed:
            raise ValueError("must be tilt, y, x, ky, kx, each once")
        return axes


class OpticsSettings(Section):
    """[optics]: the probe-forming optics."""

    energy_kev: float = Field(gt=0, le=3000, description="Beam energy in keV.")
    semiangle_mrad: float = Field(gt=0, lt=500, description="Convergence semiangle in mrad.")
    defocus_c1_angstrom: Finite = Field(
        default=0.0, description="C1 = -defocus in Å; positive is overfocus (crossover before the plane)."
    )
    defocus_plane_z_angstrom: Finite = Field(
        default=0.0,
        description="Laboratory z in Å of the plane that C1 refers to; the rotation centre is 0, the beam goes to +z.",
    )
    aberrations: dict[str, Finite] = Field(
        default_factory=dict, description="Further coefficients by name: C12, C30 ... in Å, phi12 ... in rad."
    )

    @field_validator("aberrations")
    @classmethod
    def _no_second_defocus(cls, value: dict[str, float]) -> dict[str, float]:
        if "C10" in value:
            raise ValueError("C10 is defocus_c1_angstrom; give it there alone")
        return value


class ScanSettings(Section):
    """[scan]: the raster of probe positions."""

    shape: tuple[Count, Count] | None = Field(
        default=None, description="Positions along y and x; taken from the frames if they have both axes."
    )
    step_angstrom: Positive | Pair = Field(description="Distance between neighbours in Å: one number, or [y, x].")
    rotation_deg: Finite = Field(
        default=0.0,
        description="Angle in degrees from the laboratory axes to the scan axes, right-handed about the beam.",
    )
    origin: ScanOrigin = Field(
        default="centre",
        description="Which index is at the rotation centre: 'centre' is (n - 1) / 2, 'pixel' is n // 2.",
    )
    periodic: bool = Field(
        default=False, description="The specimen repeats after the scanned field (a simulated supercell)."
    )


class DetectorSettings(Section):
    """[detector]: the pixelated detector."""

    pixel_inv_angstrom: Positive = Field(description="Reciprocal size of a pixel in 1/Å.")
    beam_centre_px: tuple[Finite, Finite] | None = Field(
        default=None,
        description="Index [ky, kx] of the undiffracted beam, after the axes are put in order; n // 2 if not given.",
    )


class TiltSettings(Section):
    """[tilts]: one orientation per tilt, R = Rz(phi) Ry(theta) Rx(psi)."""

    theta_deg: tuple[Finite, ...] | None = Field(default=None, description="Tilt about y in degrees, one per tilt.")
    phi_deg: tuple[Finite, ...] | None = Field(
        default=None, description="Turn about z in degrees, one per tilt; zero if not given."
    )
    psi_deg: tuple[Finite, ...] | None = Field(
        default=None, description="Turn about x in degrees, one per tilt; zero if not given."
    )
    euler_zyx_deg: tuple[tuple[Finite, Finite, Finite], ...] | None = Field(
        default=None, description="Rows [phi, theta, psi] in degrees in place of the lists."
    )

    @model_validator(mode="after")
    def _one_way(self) -> TiltSettings:
        lists = (self.theta_deg, self.phi_deg, self.psi_deg)
        if self.euler_zyx_deg is not None and any(values is not None for values in lists):
            raise ValueError("give either euler_zyx_deg or theta_deg with phi_deg and psi_deg, not both")
        if self.euler_zyx_deg is None and self.theta_deg is None:
            raise ValueError(
                "no angles: give theta_deg (degrees, one number per tilt) or euler_zyx_deg (rows [phi, theta, psi])"
            )
        return self


class DoseSettings(Section):
    """[dose]: electrons, where the patterns alone do not say."""

    electrons_per_pattern: Positive | None = Field(
        default=None, description="Incident electrons per pattern; the mean of the patterns if not given."
    )


class Experiment(Section):
    """Everything that was measured, and how."""

    input: InputSettings
    optics: OpticsSettings
    scan: ScanSettings
    detector: DetectorSettings
    tilts: TiltSettings
    dose: DoseSettings = DoseSettings()

    def to_optics(self) -> Optics:
        """Return the optics in eV, rad and Å."""
        return Optics(
            energy_ev=self.optics.energy_kev * 1e3,
            semiangle_rad=self.optics.semiangle_mrad * 1e-3,
            aberrations={"C10": self.optics.defocus_c1_angstrom, **self.optics.aberrations},
            defocus_plane_z_angstrom=self.optics.defocus_plane_z_angstrom,
        )

    def to_scan(self, shape_yx: tuple[int, int] | None = None) -> Scan:
        """Return the scan; ``shape_yx`` is that of the frames, ``None`` where they hold one axis of positions.

        Raises
        ------
        FormatError
            If the frames and ``scan.shape`` differ.
        ConfigurationError
            If neither says the shape.
        """
        shape = self.scan.shape
        if shape is not None and shape_yx is not None and tuple(shape) != tuple(shape_yx):
            raise FormatError(
                f"scan.shape is {list(shape)} (y, x), {math.prod(shape)} positions, "
                f"but {self.input.path} holds {list(shape_yx)} (y, x), "
                f"{math.prod(shape_yx)} frames per tilt; correct scan.shape or input.axes"
            )
        shape = shape_yx if shape_yx is not None else shape
        if shape is None:
            raise ConfigurationError(
                f"scan.shape is missing: the frames of {self.input.path} have one axis of positions; give [y, x]"
            )
        step = self.scan.step_angstrom
        return Scan(
            shape_yx=(int(shape[0]), int(shape[1])),
            step_angstrom_yx=step if isinstance(step, tuple) else (step, step),
            rotation_rad=math.radians(self.scan.rotation_deg),
            origin=self.scan.origin,
            periodic=self.scan.periodic,
        )

    def to_detector(self, shape_yx: tuple[int, int]) -> Detector:
        """Return the detector of frames of ``shape_yx`` (ky, kx) pixels."""
        return Detector(
            shape_yx=(int(shape_yx[0]), int(shape_yx[1])),
            pixel_inv_angstrom=self.detector.pixel_inv_angstrom,
            beam_centre_px_yx=self.detector.beam_centre_px,
        )

    def theta_deg(self) -> tuple[float, ...]:
        """Return the tilt angle about y of every tilt in degrees."""
        if self.tilts.euler_zyx_deg is not None:
            return tuple(row[1] for row in self.tilts.euler_zyx_deg)
        return self.tilts.theta_deg or ()

    def to_tilts(self, count: int | None = None) -> TiltSeries:
        """Return the poses; ``count`` is the number of tilts in the frames.

        Raises
        ------
        ConfigurationError
            If an angle is missing, too many, given twice or not within a turn.
        """
        tilts = self.tilts
        if tilts.euler_zyx_deg is not None:
            phi, theta, psi = (tuple(row[i] for row in tilts.euler_zyx_deg) for i in range(3))
            lists = {"euler_zyx_deg": theta}
        else:
            theta, phi, psi = tilts.theta_deg or (), tilts.phi_deg or (), tilts.psi_deg or ()
            zeros = (0.0,) * len(theta)
            lists = {"theta_deg": theta, "phi_deg": phi or zeros, "psi_deg": psi or zeros}
            phi, psi = phi or zeros, psi or zeros
        for key, values in lists.items():
            wanted = len(theta) if count is None else count
            if len(values) != wanted:
                what = "an angle is missing" if len(values) < wanted else "there are too many angles"
                raise ConfigurationError(
                    f"tilts.{key} has {len(values)} angles for {wanted} tilts: {what}; "
                    "give one per tilt, in the order of the frames"
                )
        return TiltSeries.from_degrees(theta, phi, psi)
