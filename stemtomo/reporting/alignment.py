"""The section of the report on alignment: what is wrong, sinograms before and after, angles, misfit of every tilt."""

from __future__ import annotations

import numpy as np
import scipy.ndimage
import xarray as xr

from stemtomo.reporting import figures, markup
from stemtomo.reporting.figures import Picture
from stemtomo.reporting.results import Results

_ROWS = 5
"""Rows along the tilt axis that a sinogram is the mean of."""
_TURNED_DEG = 1e-3


def alignment(results: Results) -> str:
    """Return the section, empty without an alignment."""
    data, projections = results.read("alignment"), results.read("projections")
    if data is None or projections is None:
        return ""
    content = [markup.note(f"{each['text'].capitalize()}.") for each in data.attrs.get("diagnoses", [])]
    content.append(markup.paragraph(_lead(data, results.read("volume"))))
    volume = results.read("volume")
    source = volume if volume is not None and "shift_x_angstrom" in volume else data
    content.append(_sinograms(projections, source))
    content += _angles(projections, data)
    content += _misfits(projections, volume)
    return markup.section("alignment", "Alignment", *content)


def _lead(data: xr.Dataset, volume: xr.Dataset | None) -> str:
    text = f"Method: {data.attrs.get('method', 'unknown')}."
    if (angle := data.attrs.get("angle_change_rms_deg")) is not None:
        text += f" Angles changed by {angle:.2f}° (rms)."
    if volume is not None and "r1" in volume:
        text += f" R1 of the volume: {float(volume['r1'].mean()):.4f}"
        free = volume.attrs.get("r_free")
        text += "." if free is None else f", R-free of what was held out: {float(free):.4f}."
    return text


def _sinograms(projections: xr.Dataset, shifts: xr.Dataset) -> str:
    """Draw the mean of some rows over tilt, as recorded and moved by the shifts found."""
    theta, pixel = np.asarray(projections["theta_deg"]), float(projections.attrs["pixel_angstrom"])
    order = np.argsort(theta)
    moves = np.stack([np.asarray(shifts[f"shift_{axis}_angstrom"]) / pixel for axis in "yx"], axis=-1)
    middle = projections.sizes["y"] // 2
    before: list[np.ndarray] = []
    after: list[np.ndarray] = []
    for tilt in order:
        image = np.asarray(projections["phase"][int(tilt)], dtype=float)
        rows = slice(max(0, middle - _ROWS // 2), middle + _ROWS // 2 + 1)
        before.append(image[rows].mean(axis=0))
        after.append(scipy.ndimage.shift(image, -moves[tilt], order=1)[rows].mean(axis=0))
    pictures = [
        Picture(np.array(stack), title, "rad", axes=("tilt", "x"), cmap="inferno")
        for stack, title in ((before, "as recorded"), (after, "aligned"))
    ]
    caption = "Sinogram: rows through the rotation centre, one line per tilt in the order of theta."
    return markup.figure(figures.row(pictures), caption)


def _angles(projections: xr.Dataset, data: xr.Dataset) -> list[str]:
    """Draw by how much the angles of every tilt were changed."""
    if "theta_deg" not in data:
        return []
    theta = np.asarray(projections["theta_deg"])
    order = np.argsort(theta)
    changes = {name: np.asarray(data[f"{name}_deg"]) - projections[f"{name}_deg"] for name in ("theta", "phi", "psi")}
    lines = [
        (name, theta[order].tolist(), np.asarray(change)[order].tolist())
        for name, change in changes.items()
        if np.abs(change).max() > _TURNED_DEG
    ]
    if not lines:
        return []
    picture = figures.curves(lines, "tilt angle theta (deg)", "change (deg)", points=True)
    return [markup.figure(picture, "Angles refined, less those given.", width=620)]


def _misfits(projections: xr.Dataset, volume: xr.Dataset | None) -> list[str]:
    """Draw the R factors of every projection."""
    if volume is None or "r1" not in volume:
        return []
    theta = np.asarray(projections["theta_deg"])
    order = np.argsort(theta)
    lines = [(name.upper(), theta[order].tolist(), np.asarray(volume[name])[order].tolist()) for name in ("r1", "r2")]
    picture = figures.curves(lines, "tilt angle theta (deg)", "misfit", points=True)
    return [markup.figure(picture, "Misfit of the volume's projections at every tilt.", width=620)]
