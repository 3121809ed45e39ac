"""The section of the report on joint tomography: its volume, the loss by kind of epoch, and the hand."""

from __future__ import annotations

import numpy as np
import xarray as xr

from stemtomo.reporting import figures, markup
from stemtomo.reporting.results import Results
from stemtomo.reporting.specimen import MIRROR, volume_pictures

#: Kinds of epochs as the result records them, and what a reader calls them.
_KINDS = {"single": "sweeps, one slice", "sweep": "sweeps, sliced", "accelerated": "accelerated, all tilts"}


def joint(results: Results) -> str:
    """Return the section on the volume that was solved from all patterns: slices, sums, loss, what was refined."""
    data = results.read("joint")
    if data is None:
        return ""
    slices, sums, described = volume_pictures(data)
    hand = data.attrs.get("tilt_sign")
    refined = _refined(data)
    told = markup.paragraph(f"Checked: {hand['sentence']}.") if hand else markup.note(MIRROR)
    return markup.section(
        "joint",
        "Joint multislice tomography",
        markup.paragraph(described),
        markup.paragraph(
            f"{data.attrs['slices']} slice(s) of {data.attrs['slice_thickness_angstrom']:.3g} Å at every tilt; "
            f"loss of the result {data.attrs['final_loss']:.5g} per detector pixel. {_vacuum(data)}"
        ),
        told,
        markup.figure(figures.row(slices), "Electrostatic potential in three slices through the rotation centre."),
        markup.figure(figures.row(sums), "Potential summed along each axis."),
        markup.figure(_loss(data["loss"].values, list(data.attrs["epochs"])), "Loss as met in every epoch.", width=620),
        markup.table(refined, ("refined per tilt", "rms change", "largest"), numeric=(1, 2)) if refined else "",
    )


def _vacuum(data: xr.Dataset) -> str:
    if "vacuum_share" not in data:
        return ""
    share = data["vacuum_share"].values
    if not share.any():
        return "No tilt shows enough vacuum to take its phase off."
    seen = share[share > 0]
    return (
        f"The phase of vacuum was taken off {len(seen)} of {len(share)} tilts, where it is {seen.min():.0%} to "
        f"{seen.max():.0%} of the field."
    )


def _loss(loss: np.ndarray, kinds: list[str]) -> bytes:
    lines = []
    for kind, label in _KINDS.items():
        epochs = [number + 1 for number, name in enumerate(kinds) if name == kind]
        if epochs:
            lines.append((label, epochs, [float(loss[epoch - 1]) for epoch in epochs]))
    return figures.curves(lines, "epoch", "loss", logarithmic=True)


def _refined(data: xr.Dataset) -> list[tuple[str, str, str]]:
    """Return a row for everything that was refined about the tilts."""
    shifts = np.hypot(data["shift_x_angstrom"].values, data["shift_y_angstrom"].values)
    found = {"shift (Å)": shifts}
    if "turn_deg" in data:
        found["turn (deg)"] = np.linalg.norm(data["turn_deg"].values, axis=1)
    if "focus_change_angstrom" in data:
        found["C1 (Å)"] = np.abs(data["focus_change_angstrom"].values)
    return [(name, f"{np.sqrt(np.mean(v**2)):.3g}", f"{v.max():.3g}") for name, v in found.items() if v.any()]
