"""The verb ``calibrate``: what the quicklook tells of the microscope, beside what the metadata say."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from stemtomo.algorithms.imaging import calibration, parallax, scan_gaps
from stemtomo.distributed import Executor
from stemtomo.distributed import executor as default_executor
from stemtomo.errors import CalibrationError
from stemtomo.geometry import Detector, Optics, Scan
from stemtomo.io.provenance import Provenance
from stemtomo.io.schema import tilt_name
from stemtomo.io.store import Store
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.pipeline.compare import COMPARED, series_trends
from stemtomo.pipeline.config import CalibrationSettings
from stemtomo.pipeline.focus_refinement import refine_tilt
from stemtomo.pipeline.progress import Progress, Silent

GROUP = "calibration"


def calibrate(
    store: Store | str | Path,
    settings: CalibrationSettings | None = None,
    *,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Find disc, descan, scan rotation, C1, astigmatism and bad pixels of every tilt from its quicklook alone.

    Nothing of the metadata is changed; what was found goes to ``calibration/NNN``, beside what the metadata say.

    Parameters
    ----------
    store
        Store with complete quicklooks, opened with mode ``"r+"``.
    settings
        Known signs, and what has to be found; see :class:`~stemtomo.pipeline.config.CalibrationSettings`.

    Returns
    -------
    dict
        ``tilts``: per tilt ``found``, ``metadata``, ``difference`` and ``undetermined`` (name: reason); ``series``: per
        number its smooth trend over the tilts and the outliers; ``computed``: number of tilts not there already.
        The rotation and the sign of C1 hang together: (rotation, C1) and (rotation + 180 deg, -C1) fit alike. Unless
        the settings say which, ``found`` has ``candidates`` with both and ``undetermined`` the key ``sign``.

    Raises
    ------
    StoreError
        If a quicklook is missing.
    CalibrationError
        If ``settings.require`` names what the data of a tilt do not determine.
    """
    store = Store.of(store)
    settings = settings or CalibrationSettings()
    executor = executor or default_executor()
    progress = progress or Silent()
    groups = [f"{GROUP}/{tilt_name(index)}" for index in range(store.tilt_count)]
    provenances = [_provenance(store, index, settings) for index in range(store.tilt_count)]
    todo = [i for i, group in enumerate(groups) if not store.is_complete(group, provenances[i].fingerprint)]
    progress.start(GROUP, len(groups), "tilt")
    progress.advance(len(groups) - len(todo))
    handles = [executor.submit(calibrate_tilt, store.path, index, settings) for index in todo]
    for i, dataset in executor.as_completed(handles):
        store.write(groups[todo[i]], dataset, provenances[todo[i]])
        progress.advance()
    progress.finish(GROUP)
    records = [calibration_record(store, index) for index in range(store.tilt_count)]
    _require(store, records, settings)
    return {"tilts": records, "series": series_trends(records), "computed": len(todo)}


def calibrate_tilt(path: Path, index: int, settings: CalibrationSettings) -> xr.Dataset:
    """Calibrate one tilt of the store at ``path``; return the dataset of its group ``calibration``."""
    store = Store(path)
    look = store.read(f"quicklook/{tilt_name(index)}").load()
    optics, scan, detector = store.optics(index), store.scan(index), store.detector(index)
    recorded, valid = store.valid(index), store.valid(index)
    if not recorded.all():
        look, valid = _without_gaps(look, recorded)
        scan = replace(scan, shape_yx=valid.shape, periodic=False)
    wavelength = wavelength_angstrom(optics.energy_ev)
    undetermined: dict[str, str] = {}
    found: dict[str, Any] = {}
    semiangle, offset = _disc(look, optics, detector, found, undetermined)
    com = np.asarray(look["com_y"], dtype=float), np.asarray(look["com_x"], dtype=float)
    descan = calibration.fit_descan(*com)
    found["descan_inv_angstrom_per_position"] = {"ky_yx": descan.slope_ky_yx, "kx_yx": descan.slope_kx_yx}
    com = calibration.without_descan(*com, descan)
    field = calibration.field_rotation(*com, scan.step_angstrom_yx, 2 * semiangle / wavelength)
    found["com_rotation_deg"] = math.degrees(field.rotation_rad) if field.determined else None
    found["com_residual"], found["com_transposed"] = field.residual, field.transposed if field.determined else None
    if not field.determined:
        undetermined["com_rotation_deg"] = (
            f"no rotation makes the centre of mass free of curl (residual {field.residual:.2f}, mirrored or not "
            f"{field.other_residual:.2f})"
        )
    fit = _parallax(look, semiangle, wavelength, offset, scan, settings, found, undetermined)
    _rotation_and_sign(fit, field, settings, found, undetermined)
    bad = calibration.bad_pixels(np.asarray(look["mean_pattern"]), _maximum(look), int(recorded.sum()))
    found["dead_pixels"], found["hot_pixels"] = int((bad == 1).sum()), int((bad == 2).sum())
    if settings.refine:
        refine_tilt(store, index, bad, settings, found, undetermined)
    variables: dict[str, Any] = {"bad_pixels": (("ky", "kx"), bad)}
    if fit is not None and not fit.reason:
        variables["parallax"] = (("y", "x"), fit.image.astype(np.float32))
    turn = found["rotation_deg"]
    rotation = scan.rotation_rad if turn is None else math.radians(turn)
    phase = calibration.integrated_phase(*com, scan.step_angstrom_yx, rotation, bool(found["transposed"]))
    variables["icom_phase"] = (("y", "x"), phase.astype(np.float32))
    if not recorded.all():
        variables = _in_place(variables, recorded)
    metadata = _metadata(optics, scan, detector)
    attrs = {
        "found": found,
        "metadata": metadata,
        "difference": _difference(found, metadata),
        "undetermined": undetermined,
        "icom_rotation_from": "metadata" if turn is None else "calibration",
    }
    return xr.Dataset(variables, attrs=attrs)


def _without_gaps(look: xr.Dataset, recorded: np.ndarray) -> tuple[xr.Dataset, np.ndarray]:
    """Return the part of the scan that is whole, gaps in it filled from beside them, and the mask (y, x) of that part.

    Zeros at positions without a frame would be details that all images share, and hold them in place.
    """
    part = scan_gaps.whole_part(recorded)
    look, valid = look.isel(y=part[0], x=part[1]), recorded[part]
    filled = {
        name: (image.dims, scan_gaps.fill_gaps(image.values, valid), image.attrs)
        for name, image in look.data_vars.items()
        if image.dims[:2] == ("y", "x") and image.dtype.kind == "f"
    }
    return look.assign(filled), valid


def _in_place(variables: dict[str, Any], recorded: np.ndarray) -> dict[str, Any]:
    """Put images of the part that is whole into the scan, 0 outside, and the mask (y, x) of frames beside them."""
    part = scan_gaps.whole_part(recorded)
    for name, (dims, values) in variables.items():
        if dims == ("y", "x"):
            whole = np.zeros(recorded.shape, values.dtype)
            whole[part] = values
            variables[name] = (dims, whole)
    return {**variables, "valid": (("y", "x"), recorded, {"units": "1"})}


def _provenance(store: Store, index: int, settings: CalibrationSettings) -> Provenance:
    inputs = {
        group: store.fingerprint(group) for group in (f"tilt/{tilt_name(index)}", f"quicklook/{tilt_name(index)}")
    }
    # What has to be found does not change what is.
    return Provenance.start("calibrate", settings.model_dump(mode="json", exclude={"require"}), inputs)


def calibration_record(store: Store, index: int) -> dict[str, Any]:
    """Return what was found of tilt ``index``, beside its metadata."""
    attrs = store.read(f"{GROUP}/{tilt_name(index)}").attrs
    theta = store.pose(index).theta_rad
    kept = {key: attrs[key] for key in ("found", "metadata", "difference", "undetermined")}
    return {"tilt": index, "theta_rad": theta, "theta_deg": math.degrees(theta), **kept}


def _require(store: Store, records: list[dict[str, Any]], settings: CalibrationSettings) -> None:
    names = {"disc": "semiangle_mrad", "rotation": "rotation_mod_180_deg", "c1": "c1_magnitude_angstrom"}
    for wanted in settings.require:
        for record in records:
            if record["found"][names[wanted]] is None:
                why = "; ".join(f"{name}: {reason}" for name, reason in record["undetermined"].items())
                raise CalibrationError(
                    f"{store.path}: the data of tilt {record['tilt']} do not determine the {wanted} ({why}); "
                    "what was found is kept in the store"
                )


def _maximum(look: xr.Dataset) -> np.ndarray | None:
    return np.asarray(look["maximum_pattern"]) if "maximum_pattern" in look else None


def _disc(
    look: xr.Dataset, optics: Optics, detector: Detector, found: dict[str, Any], undetermined: dict[str, str]
) -> tuple[float, np.ndarray]:
    """Measure the disc; return the semiangle in rad to go on with and the centre (x, y) off the metadata's in 1/Å."""
    wavelength = wavelength_angstrom(optics.energy_ev)
    names = ("semiangle_mrad", "beam_centre_ky_px", "beam_centre_kx_px", "disc_radius_px", "pixel_inv_angstrom_if")
    found.update(dict.fromkeys(names))
    try:
        disc = calibration.fit_disc(np.asarray(look["mean_pattern"]))
    except CalibrationError as error:
        undetermined["semiangle_mrad"] = str(error)
        return optics.semiangle_rad, np.zeros(2)
    semiangle = disc.radius_px * detector.pixel_inv_angstrom * wavelength
    found.update(
        semiangle_mrad=semiangle * 1e3,
        beam_centre_ky_px=disc.centre_px_yx[0],
        beam_centre_kx_px=disc.centre_px_yx[1],
        disc_radius_px=disc.radius_px,
        # One number gives the other: the pixel, if the semiangle of the metadata is right.
        pixel_inv_angstrom_if=optics.semiangle_rad / wavelength / disc.radius_px,
    )
    off = np.array(disc.centre_px_yx[::-1]) - np.array(detector.centre_yx[::-1])
    return semiangle, off * detector.pixel_inv_angstrom


def _parallax(
    look: xr.Dataset,
    semiangle: float,
    wavelength: float,
    offset: np.ndarray,
    scan: Scan,
    settings: CalibrationSettings,
    found: dict[str, Any],
    undetermined: dict[str, str],
) -> parallax.ParallaxFit | None:
    if "bright_field_stack" not in look:
        undetermined["c1_angstrom"] = "the quicklook has no bright-field stack; run it with superpixels = 150"
        return None
    k = np.stack([np.asarray(look["superpixel_kx"]), np.asarray(look["superpixel_ky"])], axis=-1) - offset
    fit = parallax.fit_parallax(
        np.asarray(look["bright_field_stack"]),
        k * wavelength,
        semiangle,
        wavelength,
        scan.step_angstrom_yx,
        largest_shift_fraction=settings.largest_shift_fraction,
        periodic=scan.periodic,
    )
    found["parallax_significance"] = fit.significance
    if fit.reason:
        undetermined["c1_angstrom"] = fit.reason
    return fit


def _rotation_and_sign(
    fit: parallax.ParallaxFit | None,
    field: calibration.FieldRotation,
    settings: CalibrationSettings,
    found: dict[str, Any],
    undetermined: dict[str, str],
) -> None:
    """Write rotation, C1 and astigmatism; both candidates, and one of them only if a sign is known."""
    lens = fit.lens if fit is not None and not fit.reason else None
    names = ("rotation_deg", "c1_angstrom", "c12_angstrom", "phi12_deg", "rotation_mod_180_deg")
    found.update(dict.fromkeys((*names, "c1_magnitude_angstrom", "transposed")), candidates=[])
    found.update(dict.fromkeys(("rotation_sigma_deg", "c1_sigma_angstrom", "c12_sigma_angstrom")))
    known = [lens.rotation_rad] if lens else [field.rotation_rad] if field.determined else []
    if not known:
        undetermined["rotation_deg"] = "neither the centre of mass nor the parallax tells it"
        return
    turn = found["rotation_mod_180_deg"] = math.degrees(known[0])
    found["transposed"] = lens.transposed if lens else field.transposed
    turns = [turn, math.degrees(math.remainder(known[0] + math.pi, 2 * math.pi))]
    if lens is not None and fit is not None:
        found["candidates"] = [
            {"rotation_deg": turns[0], "c1_angstrom": lens.c1_angstrom},
            {"rotation_deg": turns[1], "c1_angstrom": -lens.c1_angstrom},
        ]
        found["c1_magnitude_angstrom"], found["c12_angstrom"] = abs(lens.c1_angstrom), lens.c12_angstrom
        found["c1_sigma_angstrom"], found["c12_sigma_angstrom"] = fit.c1_sigma_angstrom, fit.c12_sigma_angstrom
        found["rotation_sigma_deg"] = math.degrees(fit.rotation_sigma_rad)
    chosen = None
    if settings.rotation_near_deg is not None:
        near = settings.rotation_near_deg
        chosen = min((0, 1), key=lambda i: abs(math.remainder(turns[i] - near, 360)))
    elif settings.c1_sign is not None and lens is not None:
        chosen = int((lens.c1_angstrom > 0) != (settings.c1_sign == "positive"))
    if chosen is None:
        undetermined["sign"] = (
            "(rotation, C1) and (rotation + 180 deg, -C1) fit alike; give the sign of C1 or the rotation within 90 deg"
        )
        return
    found["rotation_deg"] = turns[chosen]
    if lens is not None:
        found["c1_angstrom"] = found["candidates"][chosen]["c1_angstrom"]
        found["phi12_deg"] = math.degrees(lens.phi12_rad) + 90 * chosen


def _metadata(optics: Optics, scan: Scan, detector: Detector) -> dict[str, Any]:
    centre = detector.centre_yx
    return {
        "semiangle_mrad": optics.semiangle_rad * 1e3,
        "beam_centre_ky_px": centre[0],
        "beam_centre_kx_px": centre[1],
        "rotation_deg": math.degrees(scan.rotation_rad),
        # Parallax sees C1 at a plane within the specimen, a refinement in its middle: the metadata's at the rotation
        # centre, which lies in the middle of the specimen.
        "c1_angstrom": optics.c1_angstrom - optics.defocus_plane_z_angstrom,
        "c12_angstrom": optics.aberrations.get("C12", 0.0),
    }


def _difference(found: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """Return found less metadata; with an open sign, of the candidate nearer to the metadata's rotation."""
    shown = dict(found)
    if found["rotation_deg"] is None and found["rotation_mod_180_deg"] is not None:
        turn = metadata["rotation_deg"]
        shown["rotation_deg"] = turn + math.remainder(found["rotation_mod_180_deg"] - turn, 180)
        if found["candidates"]:
            near = min(found["candidates"], key=lambda c: abs(math.remainder(c["rotation_deg"] - turn, 360)))
            shown["c1_angstrom"] = near["c1_angstrom"]
    result = {name: None if shown.get(name) is None else shown[name] - metadata[name] for name in COMPARED}
    if result["rotation_deg"] is not None:
        result["rotation_deg"] = math.remainder(result["rotation_deg"], 360)
    if shown.get("refined_c1_angstrom") is not None:
        result["refined_c1_angstrom"] = shown["refined_c1_angstrom"] - metadata["c1_angstrom"]
    return result
