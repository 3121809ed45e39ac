"""The section of the report on resolution: spectra along the axes, correlations of half sets, the missing wedge."""

from __future__ import annotations

import numpy as np
import xarray as xr

from stemtomo.pipeline.resolution import HEAD, table_rows, wedge_text
from stemtomo.reporting import figures, markup
from stemtomo.reporting.results import Results

_LINES = (
    ("fsc_corrected", "half volumes"),
    ("fsc_randomised", "random phases (mask alone)"),
    ("fsc_z", "cone along z"),
    ("fsc_y", "cone along y"),
    ("fsc_x", "cone along x"),
    ("fsc_half_bit", "half bit"),
    ("fsc_one_bit", "one bit"),
)


def resolution(results: Results) -> str:
    """Return the section, empty without a result."""
    data = results.read("resolution")
    if data is None:
        return ""
    numbers = data.attrs["numbers"]
    content = [markup.table(table_rows(numbers), HEAD, numeric=(1, 2, 3, 4))]
    if "wedge" in numbers:
        content.append(markup.paragraph(wedge_text(numbers)))
    if "amplitude_z" in data:
        content.append(_spectra(data))
    if "fsc" in data:
        frequency = np.asarray(data["fsc_frequency"])
        lines = [(label, frequency, np.asarray(data[name])) for name, label in _LINES]
        caption = (
            f"Correlation of two volumes from half the {numbers['halves']} each, and curves of constant information;"
            " a curve ends where it first falls below a threshold."
        )
        content.append(_curve(lines, "correlation", caption))
    if "frc" in data:
        frequency = np.asarray(data["frc_frequency"])
        tilts = [int(tilt) for tilt in data["frc_tilt"].values]
        lines = [(f"tilt {tilt}", frequency, np.asarray(data["frc"][i])) for i, tilt in enumerate(tilts)]
        if len(lines) <= 6:
            lines += [(name, frequency, np.asarray(data[f"frc_{key}"])) for key, name in _LINES_OF_RINGS]
        caption = "Correlation of the phases from two halves of the scan positions: the information limit of each tilt."
        content.append(_curve(lines, "correlation", caption))
    return markup.section("resolution", "Resolution", *content)


_LINES_OF_RINGS = (("half_bit", "half bit"), ("one_bit", "one bit"))


def _spectra(data: xr.Dataset) -> str:
    lines = []
    for axis in "zyx":
        ratio = np.asarray(data[f"amplitude_{axis}"]) / np.asarray(data[f"background_{axis}"])
        lines.append((f"along {axis}", np.asarray(data[f"frequency_{axis}"])[1:], ratio[1:]))
    caption = (
        "Spectral amplitude along each axis, summed over the other two, over its background; the resolution is one over"
        " the frequency of the last significant peak."
    )
    return _curve(lines, "amplitude over background", caption, logarithmic=True)


def _curve(lines: list[tuple[str, np.ndarray, np.ndarray]], label: str, caption: str, logarithmic: bool = False) -> str:
    shown = [(name, x.tolist(), y.tolist()) for name, x, y in lines]
    picture = figures.curves(shown, "spatial frequency (1/Å)", label, logarithmic=logarithmic, whole_numbers=False)
    return markup.figure(picture, caption, width=620)
