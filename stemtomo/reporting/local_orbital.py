"""The section of the report on local orbitals: the atoms' numbers, what each search did, the probe over depth."""

from __future__ import annotations

import numpy as np
import xarray as xr

from stemtomo.reporting import figures, markup
from stemtomo.reporting.results import Results


def local_orbital(results: Results) -> str:
    """Return the section, empty without a result."""
    data = results.read("local_orbital")
    if data is None:
        return ""
    data = data.compute()
    sigma = np.sqrt(sum(data[f"sigma_{axis}"].values ** 2 for axis in "xyz"))
    foci = ", ".join(markup.number(depth, 3) for depth in data.attrs["focus_angstrom"])
    held_out = data.attrs["held_out_loss"]
    rows: list[tuple[str, str]] = [
        ("atoms", str(data.sizes["atom"])),
        ("images", str(data.sizes["image"])),
        ("width of an atom", f"{data.attrs['width_angstrom']:.3f} Å"),
        ("standard deviation of a position, median", f"{100 * float(np.median(sigma)):.2f} pm"),
        ("depth of sharpest probe, per section", f"{foci} Å"),
        ("misfit per pixel", f"{float(data['loss'][-1]):.3g}"),
    ]
    if held_out is not None:
        rows.append(("misfit per pixel of images held out", f"{held_out:.3g}"))
    searches = [(s["stage"], s["iterations"], s["added"], s["dropped"]) for s in data.attrs["searches"]]
    content = [
        markup.table(rows, ("", "")),
        markup.table(searches, ("search", "iterations", "atoms added", "atoms dropped"), numeric=(1, 2, 3)),
        markup.figure(_probes(data), "The probe of every focal section over depth (down), through its centre."),
        _losses(data),
        _deviation(results),
    ]
    return markup.section("local_orbital", "Local orbitals", *content)


def _probes(data: xr.Dataset) -> bytes:
    probe = data["probe"].values
    middle = probe.shape[2] // 2
    pixel = (float(data.attrs["slice_thickness_angstrom"]), float(data.attrs["pixel_angstrom"]))
    shown = [
        figures.Picture(probe[section, :, middle], f"section {section}", pixel=pixel, axes=("z", "x"))
        for section in range(len(probe))
    ]
    return figures.row(shown)


def _losses(data: xr.Dataset) -> str:
    loss = data["loss"].values
    picture = figures.curves(
        [("", list(range(1, len(loss) + 1)), loss.tolist())], "iteration", "misfit per pixel", logarithmic=True
    )
    return markup.figure(picture, "Half the squared misfit per pixel over all searches.", width=620)


def _deviation(results: Results) -> str:
    """Return the deviation from known atoms over depth, empty where none are known."""
    data = results.read("local_orbital_deviation")
    if data is None:
        return ""
    data, attrs = data.compute(), data.attrs
    depth = data["z_angstrom"].values.tolist()
    names = {"rmsd": "RMSD", "upper": "third quartile", "median": "median", "lower": "first quartile"}
    lines = [(label, depth, data[f"{name}_pm"].values.tolist()) for name, label in names.items()]
    lines.append(("stated", depth, data["stated_pm"].values.tolist()))
    picture = figures.curves(lines, "depth z (Å)", "deviation (pm)", whole_numbers=False)
    caption = (
        f"Deviation from the known atoms over depth: RMSD {markup.number(attrs['rmsd_pm'], 3)} pm, "
        f"{markup.number(attrs['rmsd_over_stated'], 3)} times what is stated; recall {attrs['recall']:.4f}, "
        f"precision {attrs['precision']:.4f}."
    )
    return markup.figure(picture, caption, width=620)
