"""The layout of a store, schema version 1: its groups, their variables with dims and units, and how frames are cut.

``docs/store.md`` says the same in words. A change that an older reader cannot read raises ``SCHEMA_VERSION``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import xarray as xr

from stemtomo.errors import StoreError

SCHEMA_VERSION = 1
FRAME_DIMS = ("y", "x", "ky", "kx")
CHUNK_POSITIONS = 8
"""Edge of an inner chunk in scan positions: what one read decodes at least."""
SHARD_POSITIONS = 32
"""Edge of a shard in scan positions: one file, one write, one task."""

Kind = Literal["real", "complex", "boolean", "label"]
_KINDS = {"real": "fiu", "complex": "c", "boolean": "b", "label": "iuUOT"}


@dataclass(frozen=True)
class Variable:
    """An array of a group: its dims in order, the unit of its values and what kind of values they are."""

    dims: tuple[str, ...]
    units: str
    kind: Kind = "real"
    meaning: str = ""
    required: bool = True


@dataclass(frozen=True)
class GroupSchema:
    """A result: the stage that makes it, its variables, and the attributes that it must carry.

    ``revision`` counts changes of the stage's method: results of an older one are out of date.
    """

    stage: str
    variables: dict[str, Variable]
    attrs: tuple[str, ...] = ()
    per_tilt: bool = False
    revision: int = 1


def _optional(dims: tuple[str, ...], units: str, meaning: str) -> Variable:
    return Variable(dims, units, "real", meaning, required=False)


_IMAGE = ("y", "x")
_TILT = ("tilt",)
_ATOM = ("atom",)
_SUPERPIXEL = ("superpixel",)

GROUPS: dict[str, GroupSchema] = {
    "tilt": GroupSchema(
        stage="ingest",
        per_tilt=True,
        variables={"frames": Variable(FRAME_DIMS, "counts", "real", "diffraction patterns as the detector gave them")},
        attrs=("optics", "scan", "detector", "pose"),
    ),
    "quicklook": GroupSchema(
        stage="quicklook",
        per_tilt=True,
        variables={
            "mean_pattern": Variable(("ky", "kx"), "counts", "real", "mean over the scan"),
            "total_counts": Variable(_IMAGE, "counts", "real", "sum of each pattern"),
            "bright_field": Variable(_IMAGE, "counts", "real", "sum inside the bright-field disk"),
            "dark_field": Variable(_IMAGE, "counts", "real", "sum outside the bright-field disk"),
            "com_x": Variable(_IMAGE, "1/Å", "real", "centre of mass along kx"),
            "com_y": Variable(_IMAGE, "1/Å", "real", "centre of mass along ky"),
            "maximum_pattern": _optional(("ky", "kx"), "counts", "largest over the scan"),
            "bright_field_stack": _optional((*_IMAGE, *_SUPERPIXEL), "counts", "sum in each block of the disc"),
            "superpixel_kx": _optional(_SUPERPIXEL, "1/Å", "mean kx of the pixels of a superpixel"),
            "superpixel_ky": _optional(_SUPERPIXEL, "1/Å", "mean ky of the pixels of a superpixel"),
            "superpixel_pixels": _optional(_SUPERPIXEL, "1", "number of pixels of a superpixel"),
            "valid": Variable(_IMAGE, "1", "boolean", "where a frame was recorded", required=False),
            "done": Variable(_IMAGE, "1", "boolean", "where frames have come, while they come", required=False),
        },
    ),
    "calibration": GroupSchema(
        stage="calibrate",
        per_tilt=True,
        revision=3,
        variables={
            "parallax": _optional(_IMAGE, "1", "tilt-corrected bright field over its mean"),
            "icom_phase": _optional(_IMAGE, "rad", "phase integrated from the centre of mass"),
            "bad_pixels": Variable(("ky", "kx"), "1", "real", "0 good, 1 dead, 2 hot"),
        },
        attrs=("found", "metadata", "difference", "undetermined"),
    ),
    "ptychography": GroupSchema(
        stage="ptychography",
        per_tilt=True,
        revision=5,
        variables={
            "object": Variable(("slice", "y", "x"), "1", "complex", "transmission of every slice"),
            "phase_sum": Variable(_IMAGE, "rad", "real", "phase summed over the slices"),
            "illumination": Variable(_IMAGE, "1", "real", "how often a pixel was lit"),
            "probe": Variable(("probe_y", "probe_x"), "1", "complex", "real-space probe, centre at n // 2"),
            "loss": Variable(("epoch",), "1", "real", "misfit after every epoch"),
            "loss_map": _optional(
                ("scan_y", "scan_x"), "1", "loss of every position in the last epoch, zero without a frame"
            ),
            "position_x": _optional(("position",), "Å", "refined probe positions, of recorded patterns in scan order"),
            "position_y": _optional(("position",), "Å", "refined probe positions, of recorded patterns in scan order"),
            "mistilt_map_x_mrad": _optional(("position",), "mrad", "mistilt of recorded patterns in scan order"),
            "mistilt_map_y_mrad": _optional(("position",), "mrad", "mistilt of recorded patterns in scan order"),
            "held_out_loss": _optional(("epoch",), "1", "misfit of patterns held out, after every epoch"),
            "background": _optional(("ky", "kx"), "counts", "electrons counted beside the waves, per pattern"),
            "variation_modes": Variable(
                ("variation", "window_y", "window_x"), "1", "complex", "what the probe varies by", required=False
            ),
            "variation_weights": _optional(("position", "variation"), "1", "how much of it at each recorded position"),
            "mistilt_x_mrad": _optional(("geometry_iteration",), "mrad", "mistilt while it was looked for"),
            "mistilt_y_mrad": _optional(("geometry_iteration",), "mrad", "mistilt while it was looked for"),
            "thickness_angstrom": _optional(("geometry_iteration",), "Å", "thickness while it was looked for"),
        },
        attrs=("pixel_angstrom",),
    ),
    "half_scans": GroupSchema(
        stage="half_scans",
        per_tilt=True,
        variables={
            "first": Variable(_IMAGE, "rad", "real", "phase sum from one half of the scan positions"),
            "second": Variable(_IMAGE, "rad", "real", "phase sum from the other half"),
        },
        attrs=("pixel_angstrom",),
    ),
    "projections": GroupSchema(
        stage="projections",
        revision=2,
        variables={
            "phase": Variable(("tilt", "y", "x"), "rad", "real", "projected phase, filtered where that was asked for"),
            "phase_raw": _optional(("tilt", "y", "x"), "rad", "projected phase before the filters"),
            "depth_phase": _optional(("tilt", "slice"), "rad", "mean phase of the specimen in a slice, over vacuum"),
            "depth_contrast": _optional(("tilt", "slice"), "rad", "deviation of the phase of the specimen in a slice"),
            "valid": Variable(("tilt", "y", "x"), "1", "boolean", "where the phase was measured"),
            **{f"{angle}_deg": Variable(_TILT, "deg") for angle in ("theta", "phi", "psi")},
        },
        attrs=("pixel_angstrom",),
    ),
    "alignment": GroupSchema(
        stage="align",
        variables={
            "shift_x_angstrom": Variable(_TILT, "Å", "real", "shift of the projection in the detector frame"),
            "shift_y_angstrom": Variable(_TILT, "Å", "real", "shift of the projection in the detector frame"),
            "score": Variable(_TILT, "1", "real", "agreement with the other tilts"),
            "theta_deg": _optional(_TILT, "deg", "refined angle"),
            "phi_deg": _optional(_TILT, "deg", "refined angle"),
            "psi_deg": _optional(_TILT, "deg", "refined angle"),
            "magnification": _optional(_TILT, "1", "by which the projection is larger than the volume"),
            "gain": _optional(("tilt", "y"), "1", "factor that brings the projections to one scale"),
        },
        revision=2,
    ),
    "volume": GroupSchema(
        stage="tomography",
        variables={
            "potential": Variable(("z", "y", "x"), "V", "real", "electrostatic potential"),
            "loss": Variable(("iteration",), "1", "real", "misfit after every iteration"),
            "shift_x_angstrom": _optional(_TILT, "Å", "refined shift"),
            "shift_y_angstrom": _optional(_TILT, "Å", "refined shift"),
            "r1": _optional(_TILT, "1", "sum of the absolute misfit over that of the projection"),
            "r2": _optional(_TILT, "1", "norm of the misfit over that of the projection"),
        },
        attrs=("voxel_angstrom",),
        revision=3,
    ),
    "resolution": GroupSchema(stage="resolution", variables={}, attrs=("numbers",)),
    "joint": GroupSchema(
        stage="joint",
        variables={
            "potential": Variable(("z", "y", "x"), "V", "real", "electrostatic potential"),
            "loss": Variable(("epoch",), "1", "real", "misfit as met in every epoch"),
            "projection": Variable(("tilt", "y", "x"), "rad", "real", "phase of the volume projected at every tilt"),
            "probe": Variable(
                ("tilt", "mode", "probe_y", "probe_x"), "1", "complex", "probe in the plane of the rotation centre"
            ),
            "shift_x_angstrom": Variable(_TILT, "Å", "real", "shift of every tilt"),
            "shift_y_angstrom": Variable(_TILT, "Å", "real", "shift of every tilt"),
            "theta_deg": Variable(_TILT, "deg", "real", "angle of every tilt, refined where asked for"),
            "phi_deg": Variable(_TILT, "deg", "real", "angle of every tilt, refined where asked for"),
            "psi_deg": Variable(_TILT, "deg", "real", "angle of every tilt, refined where asked for"),
            "turn_deg": _optional(("tilt", "axis"), "deg", "turn about the laboratory's x, y and z that was found"),
            "focus_change_angstrom": _optional(_TILT, "Å", "what C1 of a tilt is larger by than said"),
            "vacuum_share": _optional(_TILT, "1", "share of the lit field that is vacuum whose phase was taken off"),
        },
        attrs=("voxel_angstrom", "sigma_rad_per_volt_angstrom"),
        revision=5,
    ),
    "focal_series": GroupSchema(
        stage="focal_series",
        variables={
            "images": Variable(("image", "y", "x"), "1", "real", "incoherent signal"),
            "section": Variable(("image",), "1", "label", "focal section"),
            **{f"{angle}_deg": Variable(("image",), "deg") for angle in ("theta", "phi", "psi")},
        },
        attrs=("pixel_angstrom", "energy_kev", "semiangle_mrad"),
    ),
    "local_orbital": GroupSchema(
        stage="local_orbital",
        variables={
            **{axis: Variable(_ATOM, "Å") for axis in "xyz"},
            "intensity": Variable(_ATOM, "1", "real", "integral over an image, in its unit times pixels"),
            "width_angstrom": Variable(_ATOM, "Å", "real", "standard deviation of the Gaussian"),
            "species": Variable(_ATOM, "1", "label", "number of the class"),
            **{f"sigma_{axis}": Variable(_ATOM, "Å", "real", "standard deviation") for axis in "xyz"},
            **{f"shift_{axis}_angstrom": Variable(("image",), "Å", "real", "shift of every image") for axis in "xy"},
            **{f"turn_{axis}_rad": Variable(("image",), "rad", "real", "rotation after the pose") for axis in "xyz"},
            "probe": Variable(
                ("focus", "slice", "probe_y", "probe_x"), "1", "real", "probe of every focal section over depth"
            ),
            "loss": Variable(("iteration",), "1", "real", "half the squared misfit per pixel"),
        },
        attrs=("pixel_angstrom", "slice_thickness_angstrom"),
        revision=5,
    ),
    "atoms": GroupSchema(
        stage="find_atoms",
        variables={
            **{axis: Variable(_ATOM, "Å") for axis in "xyz"},
            "species": Variable(_ATOM, "1", "label", "symbol, or number of the class"),
            "intensity": Variable(_ATOM, "V Å^3", "real", "potential integrated over the atom"),
            "width_angstrom": Variable(_ATOM, "Å", "real", "standard deviation of the fitted Gaussian"),
            "fit_residual": Variable(_ATOM, "1", "real", "relative residual of the fit"),
        },
        revision=10,
    ),
    "order": GroupSchema(
        stage="order",
        variables={
            "q4": Variable(_ATOM, "1"),
            "q6": Variable(_ATOM, "1"),
            "order": Variable(_ATOM, "1"),
            "neighbours": Variable(_ATOM, "1"),
            "g": Variable(("r",), "1"),
            "r_angstrom": Variable(("r",), "Å"),
        },
        attrs=("cutoff_angstrom", "crystalline"),
    ),
    "lattice": GroupSchema(
        stage="lattice",
        variables={
            **{name: Variable(("site",), "Å") for name in ("x", "y", "z")},
            "species": Variable(("site",), "1", "label"),
            "occupied": Variable(("site",), "1", "boolean"),
            **{f"displacement_{name}": Variable(("site",), "Å") for name in ("x", "y", "z")},
        },
        attrs=("crystal", "matrix", "rotation_deg", "strain"),
    ),
    "strain": GroupSchema(
        stage="strain",
        variables={
            **{f"displacement_{name}": Variable(_ATOM, "Å") for name in ("x", "y", "z")},
            **{f"strain_{name}": Variable(_ATOM, "1") for name in ("xx", "yy", "zz", "xy", "xz", "yz")},
        },
        attrs=("smoothing_angstrom", "resolution_angstrom"),
    ),
    "tracking": GroupSchema(
        stage="track",
        variables={
            "state": Variable(("nucleus",), "1"),
            "track": Variable(("nucleus",), "1"),
            "atoms": Variable(("nucleus",), "1"),
        },
        attrs=("states", "events"),
    ),
    "local_orbital_deviation": GroupSchema(
        stage="local_orbital",
        variables={
            "z_angstrom": Variable(("layer",), "Å", "real", "middle of each layer"),
            "atoms": Variable(("layer",), "1", "real", "atoms of known ones in it that were found"),
            "rmsd_pm": Variable(("layer",), "pm", "real", "root mean square deviation in 3D"),
            "stated_pm": Variable(("layer",), "pm", "real", "the same of the stated standard deviations"),
            **{
                f"{name}_pm": Variable(("layer",), "pm", "real", f"{meaning} of the deviations")
                for name, meaning in (("lower", "first quartile"), ("median", "median"), ("upper", "third quartile"))
            },
        },
        attrs=("recall", "precision", "rmsd_pm", "rmsd_over_stated"),
    ),
    "score": GroupSchema(stage="score", variables={}, attrs=("recall", "precision", "rmsd_pm", "species_accuracy")),
}


def tilt_name(index: int) -> str:
    """Name of the member of a per-tilt group: ``"007"``."""
    return f"{index:03d}"


def group_schema(group: str) -> GroupSchema:
    """Return the schema of ``group``: ``"volume"``, or ``"quicklook/007"`` for a group with one member per tilt.

    Raises
    ------
    StoreError
        For a name that schema version 1 does not have.
    """
    name, slash, member = group.partition("/")
    schema = GROUPS.get(name)
    if schema is None or (slash and not (schema.per_tilt and re.fullmatch(r"\d{3,}", member))):
        known = ", ".join(f"{key}/NNN" if value.per_tilt else key for key, value in GROUPS.items())
        raise StoreError(f"{group!r} is not a group of a store (schema {SCHEMA_VERSION}); the groups are {known}")
    return schema


def stage_revision(stage: str) -> int:
    """Revision of the method of ``stage``; 1 for a stage that makes no group of its own."""
    return max((schema.revision for schema in GROUPS.values() if schema.stage == stage), default=1)


def conform(group: str, dataset: xr.Dataset) -> xr.Dataset:
    """Return ``dataset`` as ``group`` stores it: checked against the schema, units on every variable.

    Variables beyond the schema are kept if they carry ``units`` themselves.

    Raises
    ------
    StoreError
        For a variable or attribute that is missing, or has the wrong dims, kind or units.
    """
    schema = group_schema(group)
    missing = [name for name, variable in schema.variables.items() if variable.required and name not in dataset]
    missing_attrs = [name for name in schema.attrs if name not in dataset.attrs]
    if missing or missing_attrs:
        raise StoreError(
            f"{group}: the {schema.stage} result lacks "
            + "; ".join(
                f"the {what} {', '.join(names)}"
                for what, names in (("variables", missing), ("attributes", missing_attrs))
                if names
            )
        )
    result = dataset.copy(deep=False)
    for name in dataset.variables:
        # A copy, because attributes are set below and the caller's dataset is not ours to change.
        result[name].attrs = dict(dataset[name].attrs)
        _check_variable(group, str(name), result[name], schema.variables.get(str(name)))
    return result


def _check_variable(group: str, name: str, array: xr.DataArray, variable: Variable | None) -> None:
    if variable is None:
        if "units" not in array.attrs:
            raise StoreError(f"{group}/{name} is not in the schema and has no attrs['units']; give it ('1' for none)")
        return
    if array.dims != variable.dims:
        raise StoreError(f"{group}/{name} has dims {array.dims}, expected {variable.dims}")
    if array.dtype.kind not in _KINDS[variable.kind]:
        raise StoreError(f"{group}/{name} has dtype {array.dtype}, expected {variable.kind} values")
    if array.attrs.setdefault("units", variable.units) != variable.units:
        raise StoreError(f"{group}/{name} is in {array.attrs['units']}, expected {variable.units}; convert it first")
    if variable.meaning:
        array.attrs.setdefault("long_name", variable.meaning)


def frame_units(dtype: np.dtype) -> str:
    """Unit of stored frames: whole numbers are counts, real numbers are on a scale of their own."""
    return "counts" if np.dtype(dtype).kind in "iu" else "arbitrary"


def frame_chunks(shape: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Inner chunk of frames of ``shape`` (y, x, ky, kx)."""
    return (min(CHUNK_POSITIONS, shape[0]), min(CHUNK_POSITIONS, shape[1]), shape[2], shape[3])


def frame_shards(shape: tuple[int, int, int, int], positions: int = SHARD_POSITIONS) -> tuple[int, int, int, int]:
    """Shard of frames of ``shape`` (y, x, ky, kx): ``positions`` along y and x, at most what covers the scan.

    A shard is a whole number of inner chunks, so it may reach past the end of the scan.
    """
    chunks = frame_chunks(shape)
    edges = [
        chunk * min(max(1, positions // chunk), math.ceil(count / chunk))
        for chunk, count in zip(chunks[:2], shape[:2], strict=True)
    ]
    return (edges[0], edges[1], shape[2], shape[3])


def shard_positions_for(detector_shape: tuple[int, int], dtype: np.dtype, limit_bytes: float) -> int:
    """Edge of the largest shard (32, 16 or 8 positions) that holds at most ``limit_bytes`` before compression."""
    pattern = math.prod(detector_shape) * np.dtype(dtype).itemsize
    edge = SHARD_POSITIONS
    while edge > CHUNK_POSITIONS and edge * edge * pattern > limit_bytes:
        edge //= 2
    return edge
