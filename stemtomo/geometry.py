"""What an experiment is: optics, scan, detector and poses. Frozen, validated, in Å and rad; degrees at the edges.

Conventions: the beam runs along +z of a right-handed laboratory frame; positions and atoms are columns x, y, z.
A pose is R = Rz(phi) Ry(theta) Rx(psi), right-handed and active, and a feature at sample position r is seen in the
laboratory at R^T r. The sign of the tilt is invisible to projections: (theta, z) and (-theta, -z) give the same
images, so a wrong sign of the angles mirrors the volume in z.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np

from stemtomo.errors import ConfigurationError

ScanOrigin = Literal["centre", "pixel"]


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigurationError(f"{name} is {value!r}; allowed: {allowed}")


def _finite_positive(name: str, value: float, unit: str) -> None:
    _require(math.isfinite(value) and value > 0, name, value, f"a positive number of {unit}")


@dataclass(frozen=True)
class Optics:
    """The probe-forming optics.

    Parameters
    ----------
    energy_ev
        Beam energy in eV.
    semiangle_rad
        Convergence semiangle in rad.
    aberrations
        Coefficients by name: ``C10`` (C1, = -defocus; positive is overfocus, the crossover lies before the reference
        plane), ``C30`` ... in Å; the azimuths ``phi12`` ... in rad. See :mod:`stemtomo.physics.aberrations`.
    defocus_plane_z_angstrom
        Laboratory z of the plane that C10 refers to; the rotation centre is z = 0.
    """

    energy_ev: float
    semiangle_rad: float
    aberrations: Mapping[str, float] = field(default_factory=dict)
    defocus_plane_z_angstrom: float = 0.0

    def __post_init__(self) -> None:
        _finite_positive("optics.energy_ev", self.energy_ev, "eV")
        _require(0 < self.semiangle_rad < 0.5, "optics.semiangle_rad", self.semiangle_rad, "0 to 0.5 rad")
        for name, value in self.aberrations.items():
            _require(
                math.isfinite(value), f"optics.aberrations.{name}", value, "a finite number (Å, or rad for an azimuth)"
            )
        _require(
            math.isfinite(self.defocus_plane_z_angstrom),
            "optics.defocus_plane_z_angstrom",
            self.defocus_plane_z_angstrom,
            "finite Å",
        )

    @property
    def c1_angstrom(self) -> float:
        """Defocus coefficient C1 (C10) in Å, positive for overfocus."""
        return float(self.aberrations.get("C10", 0.0))

    def to_attrs(self) -> dict[str, Any]:
        """Return JSON attributes with units in the names."""
        return {
            "energy_kev": self.energy_ev / 1e3,
            "semiangle_mrad": self.semiangle_rad * 1e3,
            "aberrations_angstrom_rad": dict(self.aberrations),
            "defocus_plane_z_angstrom": self.defocus_plane_z_angstrom,
        }

    @classmethod
    def from_attrs(cls, attrs: Mapping[str, Any]) -> Optics:
        """Rebuild from :meth:`to_attrs`."""
        return cls(
            energy_ev=attrs["energy_kev"] * 1e3,
            semiangle_rad=attrs["semiangle_mrad"] / 1e3,
            aberrations=dict(attrs["aberrations_angstrom_rad"]),
            defocus_plane_z_angstrom=attrs["defocus_plane_z_angstrom"],
        )


@dataclass(frozen=True)
class Scan:
    """A raster of probe positions.

    Parameters
    ----------
    shape_yx
        Number of positions along y (slow) and x (fast).
    step_angstrom_yx
        Distance between neighbours in Å.
    rotation_rad
        Angle by which the scan axes are turned, right-handed about the beam, from the laboratory axes.
    origin
        Which scan index sits at the rotation centre: ``"centre"`` is (n - 1) / 2, ``"pixel"`` is n // 2.
    periodic
        The specimen repeats after ``shape * step`` (simulated supercells); else it ends where the scan ends.
    """

    shape_yx: tuple[int, int]
    step_angstrom_yx: tuple[float, float]
    rotation_rad: float = 0.0
    origin: ScanOrigin = "centre"
    periodic: bool = False

    def __post_init__(self) -> None:
        for count in self.shape_yx:
            _require(int(count) == count and count > 0, "scan.shape_yx", self.shape_yx, "two positive whole numbers")
        for step in self.step_angstrom_yx:
            _finite_positive("scan.step_angstrom_yx", step, "Å")
        _require(math.isfinite(self.rotation_rad), "scan.rotation_rad", self.rotation_rad, "a finite angle")
        _require(self.origin in ("centre", "pixel"), "scan.origin", self.origin, "'centre' or 'pixel'")

    @property
    def count(self) -> int:
        """Number of positions."""
        return self.shape_yx[0] * self.shape_yx[1]

    @property
    def extent_angstrom_yx(self) -> tuple[float, float]:
        """Scanned field (count times step) in Å."""
        return (self.shape_yx[0] * self.step_angstrom_yx[0], self.shape_yx[1] * self.step_angstrom_yx[1])

    def positions(self) -> np.ndarray:
        """Return the laboratory positions, (count, 2), columns x, y in Å, x fastest; the rotation centre is (0, 0)."""
        axes = []
        for count, step in zip(self.shape_yx, self.step_angstrom_yx, strict=True):
            zero = (count - 1) / 2 if self.origin == "centre" else count // 2
            axes.append((np.arange(count) - zero) * step)
        y, x = np.meshgrid(*axes, indexing="ij")
        cosine, sine = math.cos(self.rotation_rad), math.sin(self.rotation_rad)
        return np.stack([cosine * x - sine * y, sine * x + cosine * y], axis=-1).reshape(-1, 2)

    def to_attrs(self) -> dict[str, Any]:
        """Return JSON attributes with units in the names."""
        return {
            "shape_yx": list(self.shape_yx),
            "step_angstrom_yx": list(self.step_angstrom_yx),
            "rotation_deg": math.degrees(self.rotation_rad),
            "origin": self.origin,
            "periodic": self.periodic,
        }

    @classmethod
    def from_attrs(cls, attrs: Mapping[str, Any]) -> Scan:
        """Rebuild from :meth:`to_attrs`."""
        return cls(
            shape_yx=(int(attrs["shape_yx"][0]), int(attrs["shape_yx"][1])),
            step_angstrom_yx=(float(attrs["step_angstrom_yx"][0]), float(attrs["step_angstrom_yx"][1])),
            rotation_rad=math.radians(attrs["rotation_deg"]),
            origin=attrs["origin"],
            periodic=attrs["periodic"],
        )


@dataclass(frozen=True)
class Detector:
    """A pixelated detector in the far field.

    Parameters
    ----------
    shape_yx
        Pixels along ky and kx.
    pixel_inv_angstrom
        Reciprocal pixel in 1/Å, the same along ky and kx.
    beam_centre_px_yx
        Index of the undiffracted beam; ``None`` is the pixel n // 2 of each axis.
    """

    shape_yx: tuple[int, int]
    pixel_inv_angstrom: float
    beam_centre_px_yx: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for count in self.shape_yx:
            _require(int(count) == count and count > 1, "detector.shape_yx", self.shape_yx, "two whole numbers above 1")
        _finite_positive("detector.pixel_inv_angstrom", self.pixel_inv_angstrom, "1/Å")
        for centre, count in zip(self.centre_yx, self.shape_yx, strict=True):
            _require(
                0 <= centre < count, "detector.beam_centre_px_yx", self.beam_centre_px_yx, f"inside 0 to {count - 1}"
            )

    @property
    def centre_yx(self) -> tuple[float, float]:
        """Index of the undiffracted beam along ky and kx."""
        if self.beam_centre_px_yx is None:
            return (float(self.shape_yx[0] // 2), float(self.shape_yx[1] // 2))
        return self.beam_centre_px_yx

    @property
    def object_pixel_angstrom_yx(self) -> tuple[float, float]:
        """Real-space pixel that the detector's extent allows: 1 / (n dk), in Å."""
        return (1 / (self.shape_yx[0] * self.pixel_inv_angstrom), 1 / (self.shape_yx[1] * self.pixel_inv_angstrom))

    def to_attrs(self) -> dict[str, Any]:
        """Return JSON attributes with units in the names."""
        return {
            "shape_yx": list(self.shape_yx),
            "pixel_inv_angstrom": self.pixel_inv_angstrom,
            "beam_centre_px_yx": list(self.centre_yx),
        }

    @classmethod
    def from_attrs(cls, attrs: Mapping[str, Any]) -> Detector:
        """Rebuild from :meth:`to_attrs`."""
        return cls(
            shape_yx=(int(attrs["shape_yx"][0]), int(attrs["shape_yx"][1])),
            pixel_inv_angstrom=float(attrs["pixel_inv_angstrom"]),
            beam_centre_px_yx=(float(attrs["beam_centre_px_yx"][0]), float(attrs["beam_centre_px_yx"][1])),
        )


def rotation_about(axis: Literal["x", "y", "z"], angle_rad: float) -> np.ndarray:
    """Return the right-handed active rotation matrix (3, 3) about ``axis``, acting on columns (x, y, z)."""
    cosine, sine = math.cos(angle_rad), math.sin(angle_rad)
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = cosine
    matrix[i, j], matrix[j, i] = -sine, sine
    return matrix


@dataclass(frozen=True)
class Pose:
    """Orientation of the sample and its shift on the detector for one tilt.

    R = Rz(phi) Ry(theta) Rx(psi); a feature at sample position r is seen in the laboratory at R^T r, plus ``shift``.
    """

    theta_rad: float
    phi_rad: float = 0.0
    psi_rad: float = 0.0
    shift_angstrom_xy: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        for item in fields(self)[:3]:
            angle = getattr(self, item.name)
            _require(
                math.isfinite(angle) and abs(angle) <= 2 * math.pi,
                f"pose.{item.name}",
                angle,
                "an angle within one turn",
            )
        _require(
            all(math.isfinite(s) for s in self.shift_angstrom_xy),
            "pose.shift_angstrom_xy",
            self.shift_angstrom_xy,
            "finite Å",
        )

    @property
    def rotation(self) -> np.ndarray:
        """Matrix R (3, 3), float64."""
        return (
            rotation_about("z", self.phi_rad) @ rotation_about("y", self.theta_rad) @ rotation_about("x", self.psi_rad)
        )

    @property
    def mirrored(self) -> Pose:
        """The other hand: theta and psi negated, so that a volume mirrored in z has the same projections."""
        return replace(self, theta_rad=-self.theta_rad, psi_rad=-self.psi_rad)

    def to_laboratory(self, positions: np.ndarray) -> np.ndarray:
        """Return sample ``positions`` (n, 3) in Å as seen in the laboratory: R^T r, shifted in x and y."""
        return positions @ self.rotation + np.array([*self.shift_angstrom_xy, 0.0])

    def to_attrs(self) -> dict[str, Any]:
        """Return JSON attributes with units in the names."""
        return {
            "phi_deg": math.degrees(self.phi_rad),
            "theta_deg": math.degrees(self.theta_rad),
            "psi_deg": math.degrees(self.psi_rad),
            "shift_angstrom_xy": list(self.shift_angstrom_xy),
            "convention": "R = Rz(phi) Ry(theta) Rx(psi), active; seen at R^T r; the sign of theta mirrors the volume",
        }

    @classmethod
    def from_attrs(cls, attrs: Mapping[str, Any]) -> Pose:
        """Rebuild from :meth:`to_attrs`."""
        return cls(
            theta_rad=math.radians(attrs["theta_deg"]),
            phi_rad=math.radians(attrs["phi_deg"]),
            psi_rad=math.radians(attrs["psi_deg"]),
            shift_angstrom_xy=(float(attrs["shift_angstrom_xy"][0]), float(attrs["shift_angstrom_xy"][1])),
        )


@dataclass(frozen=True)
class TiltSeries:
    """The poses of a tilt series, in the order of acquisition.

    Raises
    ------
    ConfigurationError
        For no pose at all, or two tilts at the same orientation.
    """

    poses: tuple[Pose, ...]

    def __post_init__(self) -> None:
        _require(len(self.poses) > 0, "tilts", 0, "at least one tilt")
        seen: dict[tuple[float, float, float], int] = {}
        for index, pose in enumerate(self.poses):
            key = (round(pose.phi_rad, 9), round(pose.theta_rad, 9), round(pose.psi_rad, 9))
            if key in seen:
                angle = math.degrees(pose.theta_rad)
                raise ConfigurationError(
                    f"tilts {seen[key]} and {index} have the same angles (theta = {angle:g} deg); "
                    "every tilt needs its own orientation: correct the angle list or drop one of the two"
                )
            seen[key] = index

    @classmethod
    def from_degrees(
        cls, theta_deg: Sequence[float], phi_deg: Sequence[float] | None = None, psi_deg: Sequence[float] | None = None
    ) -> TiltSeries:
        """Build from angle lists in degrees; missing ``phi`` and ``psi`` are zero (single axis, about y)."""
        theta = np.asarray(theta_deg, dtype=float)
        phi = np.zeros_like(theta) if phi_deg is None else np.asarray(phi_deg, dtype=float)
        psi = np.zeros_like(theta) if psi_deg is None else np.asarray(psi_deg, dtype=float)
        if not (theta.shape == phi.shape == psi.shape) or theta.ndim != 1:
            raise ConfigurationError(
                f"tilt angle lists must be of one length: {theta.shape} theta, {phi.shape} phi, {psi.shape} psi given"
            )
        radians = np.radians(np.stack([theta, phi, psi], axis=-1))
        return cls(tuple(Pose(theta_rad=float(t), phi_rad=float(f), psi_rad=float(s)) for t, f, s in radians))

    @property
    def single_axis(self) -> bool:
        """Whether all tilts turn about y alone."""
        return all(pose.phi_rad == 0 and pose.psi_rad == 0 for pose in self.poses)

    @property
    def rotations(self) -> np.ndarray:
        """Matrices R of all tilts, (tilt, 3, 3)."""
        return np.stack([pose.rotation for pose in self.poses])

    def __len__(self) -> int:
        return len(self.poses)

    def __iter__(self) -> Iterator[Pose]:
        return iter(self.poses)

    def __getitem__(self, index: int) -> Pose:
        return self.poses[index]
