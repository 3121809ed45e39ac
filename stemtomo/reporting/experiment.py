"""The sections of the report on what was measured: the experiment, the first look, ptychography and projections."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import scipy.ndimage
import xarray as xr

from stemtomo.geometry import TiltSeries
from stemtomo.io.durable import human_bytes
from stemtomo.io.schema import tilt_name
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.reporting import figures, filters, markup
from stemtomo.reporting.figures import Picture
from stemtomo.reporting.results import Results, thumbnail

_THUMBNAIL = 160
_IMAGE = 512
_LARGEST_MONTAGE = 48
_VIRTUAL = (
    ("bright_field", "bright field"),
    ("annular_bright_field", "annular bright field"),
    ("dark_field", "dark field"),
)


def experiment(results: Results) -> str:
    """Return the section on optics, scan, detector and poses."""
    store = results.store
    if not results.begun:
        return ""
    first = results.begun[0]
    optics, scan, detector = store.optics(first), store.scan(first), store.detector(first)
    frames, series = store.frames(first, require_complete=False), TiltSeries(tuple(map(store.pose, results.begun)))
    to_come = f", {results.tilt_count - len(series)} to come" if len(series) < results.tilt_count else ""
    aberrations = {name: value for name, value in optics.aberrations.items() if name != "C10" and value}
    rows: list[tuple[str, str]] = [
        (
            "beam energy",
            f"{optics.energy_ev / 1e3:g} keV, wavelength {wavelength_angstrom(optics.energy_ev) * 100:.3f} pm",
        ),
        ("convergence semiangle", f"{optics.semiangle_rad * 1e3:g} mrad"),
        (
            "defocus C1",
            f"{optics.c1_angstrom:g} Å at z = {optics.defocus_plane_z_angstrom:g} Å (positive is overfocus)",
        ),
        ("further aberrations", ", ".join(f"{k} = {v:g}" for k, v in aberrations.items()) or "none given"),
        ("scan", f"{scan.shape_yx[0]} × {scan.shape_yx[1]} positions (y × x), step {_pair(scan.step_angstrom_yx)} Å"),
        (
            "scan rotation",
            f"{math.degrees(scan.rotation_rad):g} deg" + (", periodic specimen" if scan.periodic else ""),
        ),
        (
            "detector",
            f"{detector.shape_yx[0]} × {detector.shape_yx[1]} (ky × kx), pixel {detector.pixel_inv_angstrom:.5g} Å⁻¹",
        ),
        (
            "frames",
            f"{markup.number(results.tilt_count * scan.count)} of {frames.dtype}, "
            f"{human_bytes(results.tilt_count * frames.nbytes)} before compression",
        ),
        ("tilts", f"{len(series)}, {'single axis (about y)' if series.single_axis else 'general poses'}{to_come}"),
    ]
    theta = [math.degrees(pose.theta_rad) for pose in series]
    angles = ", ".join(f"{value:g}" for value in theta)
    return markup.section(
        "experiment",
        "Experiment",
        markup.table(rows),
        markup.paragraph(f"Tilt angles theta in degrees: {angles}.", "soft"),
    )


def quicklook(results: Results) -> str:
    """Return the section on the mean pattern and the virtual images of the tilt nearest to zero."""
    tilts = results.tilts_with("quicklook")
    if not tilts:
        return ""
    index = _nearest_zero(results, tilts)
    data = results.store.read(f"quicklook/{tilt_name(index)}")
    optics, scan, detector = (getattr(results.store, what)(index) for what in ("optics", "scan", "detector"))
    disc = optics.semiangle_rad / wavelength_angstrom(optics.energy_ev) / detector.pixel_inv_angstrom
    pattern = np.asarray(data["mean_pattern"])
    dk = (detector.pixel_inv_angstrom,) * 2
    unit = data["mean_pattern"].attrs.get("units", "counts")
    axes = ("ky", "kx")
    shown = [
        Picture(
            pattern, "mean pattern", f"{unit} per pixel", dk, "Å⁻¹", axes, "magma", circle=(*detector.centre_yx, disc)
        ),
        Picture(
            pattern,
            "logarithm",
            f"log10 {unit}",
            dk,
            "Å⁻¹",
            axes,
            "magma",
            logarithmic=True,
            circle=(*detector.centre_yx, disc),
        ),
    ]
    virtual = []
    for name, title in _VIRTUAL:
        if name in data:
            values, stride = thumbnail(data[name], _IMAGE)
            virtual.append(Picture(values, title, unit, _scaled(scan.step_angstrom_yx, stride)))
    centres = []
    for name, title in (("com_x", "centre of mass, x"), ("com_y", "centre of mass, y")):
        values, stride = thumbnail(data[name], _IMAGE)
        pixel = _scaled(scan.step_angstrom_yx, stride)
        centres.append(Picture(values, title, "Å⁻¹", pixel, cmap="RdBu_r", diverging=True))
    where = _tilt_label(results, index)
    return markup.section(
        "quicklook",
        "First look",
        markup.figure(figures.row(shown), f"Mean diffraction pattern at {where}; the circle is the convergence disc."),
        markup.figure(figures.row(virtual), f"Virtual images at {where}."),
        markup.figure(figures.row(centres), f"Centre of mass of each pattern at {where}, from the undiffracted beam."),
        _every_tilt(
            results, tilts, _Kind("quicklook", "dark_field", unit), scan.step_angstrom_yx, "Dark field of every tilt."
        ),
    )


def ptychography(results: Results) -> str:
    """Return the section on the phase of every tilt, the loss curves and the probe."""
    tilts = results.tilts_with("ptychography")
    if not tilts:
        return ""
    index = _nearest_zero(results, tilts)
    data = results.store.read(f"ptychography/{tilt_name(index)}")
    pixel = _pixel(data.attrs["pixel_angstrom"])
    values, stride = thumbnail(data["phase_sum"], _IMAGE)
    values, lit = _within_light(data, values, stride)
    probe = np.asarray(data["probe"])
    bright = np.abs(probe) > 0.03 * np.abs(probe).max()
    fine, phase = _scaled(pixel, 1), np.angle(probe)
    pictures = [
        Picture(values, "phase, summed over slices", "rad", _scaled(pixel, stride), cmap="inferno", valid=lit),
        Picture(np.abs(probe), "probe, modulus", "√electrons", fine, cmap="magma"),
        Picture(phase, "probe, phase", "rad", fine, cmap="twilight", valid=bright),
    ]
    seen = f"Reconstruction at {_tilt_label(results, index)}, {_slices(data)}; "
    kind = _Kind("ptychography", "phase_sum", "rad", "inferno")
    return markup.section(
        "ptychography",
        "Ptychography",
        markup.figure(figures.row(pictures), seen + "pixels that the beam hardly reached are empty."),
        _losses(results, tilts),
        _every_tilt(results, tilts, kind, pixel, "Phase of every tilt, as reconstructed."),
    )


def _slices(data: xr.Dataset) -> str:
    """Return how many slices there are, and how thick."""
    count, thickness = data.sizes["slice"], data.attrs.get("slice_thicknesses_angstrom", [])
    if count == 1 or not thickness:
        return f"{count} slice{'s' if count > 1 else ''}"
    each = f"{min(thickness):.3g}" + (f" to {max(thickness):.3g}" if max(thickness) > 1.001 * min(thickness) else "")
    return f"{count} slices of {each} Å"


def _losses(results: Results, tilts: list[int]) -> str:
    lines, floors, unit = [], [], ""
    for tilt in tilts:
        data = results.store.read(f"ptychography/{tilt_name(tilt)}")
        loss = np.asarray(data["loss"], dtype=float)
        lines.append((_tilt_label(results, tilt), list(range(1, loss.size + 1)), loss.tolist()))
        unit = str(data.attrs.get("loss_unit", unit))
        floors.append(data.attrs.get("noise_floor"))
    known = [float(floor) for floor in floors if floor is not None]
    caption = "Loss of every tilt after each epoch" + (f", {unit}" if unit else "")
    if known and results.store.frames(tilts[0], require_complete=False).dtype.kind in "iu":
        caption += f"; counting noise alone would leave {min(known):.4g} to {max(known):.4g}"
    return markup.figure(figures.curves(lines, "epoch", "loss", logarithmic=True), f"{caption}.", width=620)


def _within_light(data: xr.Dataset, values: np.ndarray, stride: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Cut every ``stride``-th pixel to what saw a fifth of the typical illumination or more; return the mask too."""
    if "illumination" not in data:
        return values, None
    light = np.asarray(data["illumination"][::stride, ::stride], dtype=float)
    lit = light >= 0.2 * np.percentile(light, 80)
    rows, columns = (np.flatnonzero(lit.any(axis=axis)) for axis in (1, 0))
    if not rows.size:
        return values, None
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return values[window], lit[window]


def projections(results: Results) -> str:
    """Return the section on the projections, moved by the shifts that were found."""
    data = results.read("projections")
    if data is None:
        return ""
    pixel = _pixel(data.attrs["pixel_angstrom"])
    volume, alignment = results.read("volume"), results.read("alignment")
    shifts = next((d for d in (volume, alignment) if d is not None and "shift_x_angstrom" in d), None)
    moves = np.zeros((data.sizes["tilt"], 2))
    if shifts is not None:
        moves = np.stack([np.asarray(shifts["shift_y_angstrom"]), np.asarray(shifts["shift_x_angstrom"])], axis=-1)
    theta = np.asarray(data["theta_deg"])
    pictures = []
    for index in _spread(range(data.sizes["tilt"])):
        image = _moved(np.asarray(data["phase"][index]), -moves[index] / pixel)
        valid = _moved(np.asarray(data["valid"][index], dtype=float), -moves[index] / pixel) > 0.5
        image, stride = thumbnail(image, _THUMBNAIL)
        pictures.append(
            Picture(
                image,
                f"{theta[index]:g}°",
                "rad",
                _scaled(pixel, stride),
                cmap="inferno",
                valid=valid[::stride, ::stride],
            )
        )
    moved = " after alignment" if moves.any() else ", not shifted"
    content = [
        markup.figure(
            figures.montage(pictures), f"Projected phase of every tilt{moved}; pixels without data are empty."
        )
    ]
    content += filters.beside(data, pixel) + filters.depth(data)
    if moves.any():
        order = np.argsort(theta)
        lines = [(name, theta[order].tolist(), moves[order, axis].tolist()) for name, axis in (("x", 1), ("y", 0))]
        source = "refined with the volume" if shifts is volume else "from the alignment"
        picture = figures.curves(lines, "tilt angle theta (deg)", "shift (Å)", points=True)
        content.append(markup.figure(picture, f"Shift of each projection on the detector, {source}.", width=620))
    return markup.section("projections", "Projections", *content)


class _Kind(NamedTuple):
    """One variable of a result per tilt, and how it is drawn."""

    group: str
    name: str
    unit: str
    cmap: str = "gray"


def _every_tilt(
    results: Results, tilts: list[int], kind: _Kind, pixel: tuple[float, float] | np.ndarray, caption: str
) -> str:
    if len(tilts) < 2:
        return ""
    pictures = []
    chosen = _spread(tilts)
    for tilt in chosen:
        data = results.store.read(f"{kind.group}/{tilt_name(tilt)}")
        values, stride = thumbnail(data[kind.name], _THUMBNAIL)
        values, valid = _within_light(data, values, stride)
        label = _tilt_label(results, tilt, short=True)
        pictures.append(Picture(values, label, kind.unit, _scaled(pixel, stride), cmap=kind.cmap, valid=valid))
    some = f" {len(chosen)} of {len(tilts)} are shown." if len(chosen) < len(tilts) else ""
    return markup.figure(figures.montage(pictures), caption + some)


def _spread(tilts: range | list[int]) -> list[int]:
    """Return all tilts, or as many as a page holds, evenly spread."""
    if len(tilts) <= _LARGEST_MONTAGE:
        return list(tilts)
    return [tilts[i] for i in np.linspace(0, len(tilts) - 1, _LARGEST_MONTAGE).round().astype(int)]


def _moved(image: np.ndarray, shift_px: np.ndarray) -> np.ndarray:
    return scipy.ndimage.shift(image, shift_px, order=1, mode="constant", cval=0.0)


def _nearest_zero(results: Results, tilts: list[int]) -> int:
    return min(tilts, key=lambda index: abs(results.store.pose(index).theta_rad))


def _tilt_label(results: Results, index: int, short: bool = False) -> str:
    degrees = f"{math.degrees(results.store.pose(index).theta_rad):.4g}°"
    return degrees if short else f"tilt {index} ({degrees})"


def _pixel(value: float | list[float]) -> np.ndarray:
    return np.broadcast_to(np.asarray(value, dtype=float), 2)


def _scaled(pixel: tuple[float, float] | np.ndarray, stride: int) -> tuple[float, float]:
    return (float(pixel[0]) * stride, float(pixel[1]) * stride)


def _pair(values: tuple[float, float]) -> str:
    return f"{values[0]:g}" if values[0] == values[1] else f"{values[0]:g} × {values[1]:g}"
