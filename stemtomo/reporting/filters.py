"""Pictures of what the filters of the projections did, raw and filtered side by side, and of the phase by slice."""

from __future__ import annotations

import numpy as np
import xarray as xr

from stemtomo.reporting import figures, markup
from stemtomo.reporting.figures import Picture
from stemtomo.reporting.results import thumbnail

_IMAGE = 420


def beside(data: xr.Dataset, pixel: np.ndarray) -> list[str]:
    """Return the phase of the tilt nearest zero before and after the filters, what they took, and what to know."""
    if "phase_raw" not in data:
        return []
    tilt = int(np.argmin(np.abs(np.asarray(data["theta_deg"]))))
    raw, stride = thumbnail(np.asarray(data["phase_raw"][tilt]), _IMAGE)
    filtered, _ = thumbnail(np.asarray(data["phase"][tilt]), _IMAGE)
    valid = np.asarray(data["valid"][tilt])[::stride, ::stride]
    scale = (float(pixel[0]) * stride, float(pixel[1]) * stride)
    pictures = [
        Picture(raw, "raw", "rad", scale, cmap="inferno", valid=valid),
        Picture(filtered, "filtered", "rad", scale, cmap="inferno", valid=valid),
        Picture(raw - filtered, "taken off", "rad", scale, cmap="RdBu_r", diverging=True, valid=valid),
    ]
    said = data.attrs.get("filters", {})
    theta = float(data["theta_deg"][tilt])
    caption = f"Phase at {theta:g}° before and after the filters, and what they took off."
    rows = [
        (
            f"{float(angle):g}°",
            f"{said['noise_rad'][index]:.3g}",
            said["noise_source"][index],
            f"{said['removed_rad'][index]:.3g}",
            f"{said['kept_fraction'][index]:.1%}",
            f"{said['protected_fraction'][index]:.1%}",
        )
        for index, angle in enumerate(np.asarray(data["theta_deg"]))
        if said
    ]
    head = ("tilt", "noise (rad)", "learnt from", "taken off (rad)", "frequencies kept", "pixels protected")
    return [
        *(markup.note(note) for note in said.get("notes", [])),
        markup.figure(figures.row(pictures), caption),
        markup.details("Filters of every tilt", markup.table(rows, head, numeric=(1, 3, 4, 5))) if rows else "",
    ]


def depth(data: xr.Dataset) -> list[str]:
    """Return how the phase of the specimen is spread over the slices."""
    if "depth_phase" not in data or data.sizes["slice"] < 2:
        return []
    theta = np.asarray(data["theta_deg"])
    slices = list(range(1, data.sizes["slice"] + 1))
    lines = [(f"{theta[i]:g}°", slices, np.asarray(data["depth_phase"][i]).tolist()) for i in np.argsort(theta)]
    picture = figures.curves(lines, "slice along the beam", "phase over vacuum (rad)", points=True)
    return [markup.figure(picture, "Mean phase of the specimen in every slice, over vacuum.", width=620)]
