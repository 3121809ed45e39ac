"""The sections of the report on order, lattice, strain and states followed in time."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import xarray as xr

from stemtomo.reporting import figures, markup
from stemtomo.reporting.atoms3d import Kind, canvas
from stemtomo.reporting.figures import COLOURS, Picture
from stemtomo.reporting.results import Results

_SCALE = ("#313695", "#4575b4", "#74add1", "#abd9e9", "#fdae61", "#f46d43", "#d73027", "#a50026")
_FAINT = "#8a929b"
_SMALL = 0.35
_MOST_ROWS = 12
_COMPONENTS = ("xx", "yy", "zz", "xy", "xz", "yz")


def order(results: Results) -> str:
    """Return the section on bond order, pair distribution, chemical order and grains."""
    data = results.read("order")
    if data is None:
        return ""
    attrs, positions = data.attrs, _positions(data)
    value = np.asarray(data["order"])
    lines = [("all", data["r_angstrom"].values.tolist(), data["g"].values.tolist())]
    lines += [(str(n)[2:].replace("_", "-"), lines[0][1], data[n].values.tolist()) for n in data if str(n)[:2] == "g_"]
    coordination = attrs["coordination"]
    rows = [
        ("cutoff of neighbours", f"{attrs['cutoff_angstrom']:.3f} Å"),
        ("coordination", f"{coordination['mean']:.2f} ({_number(coordination['mean_inside'])} inside)"),
        (f"atoms of order at least {attrs['threshold']:g}", _share(attrs["crystalline"], attrs["atoms"])),
    ]
    return markup.section(
        "order",
        "Order",
        _scaled("order", positions, value, 0.0, 1.0, "order"),
        markup.table(rows),
        markup.figure(figures.histogram([("", value)], "bond-orientational order"), "Order of the atoms.", 620),
        markup.figure(figures.curves(lines, "distance (Å)", "g(r)"), "Pair distribution.", width=620),
        _chemical(data, positions) if "chemical" in attrs else "",
    )


def _chemical(data: xr.Dataset, positions: np.ndarray) -> str:
    found = data.attrs["chemical"]
    rows = [
        (row["number"], row["phase"], row["atoms"], f"{row['mean_order']:.3f}", row["antisites"])
        for row in found["grains"][:_MOST_ROWS]
    ]
    return (
        markup.paragraph(
            f"Chemical order of {found['species_a']} (A) and {found['species_b']} (B): mean {found['mean_order']:.3f}; "
            f"{len(found['grains'])} grains of order at least {found['threshold']:g}."
        )
        + _labelled("grains", positions, np.asarray(data["grain"]), "grain")
        + markup.table(rows, ("grain", "phase", "atoms", "mean order", "antisites"), numeric=(0, 2, 3, 4))
    )


def lattice(results: Results) -> str:
    """Return the section on the registered crystal: missing sites and displacements."""
    data = results.read("lattice")
    if data is None:
        return ""
    attrs, occupied = data.attrs, np.asarray(data["occupied"])
    moved = attrs["displacement"]
    wedge = moved["missing_wedge_axis"]
    rows = [
        ("crystal", attrs["crystal"]),
        ("rotation vector", ", ".join(f"{v:.3f}" for v in attrs["rotation_deg"]) + " deg"),
        ("strain of the cell (xx, yy, zz)", ", ".join(f"{100 * attrs['strain'][i][i]:.3f} %" for i in range(3))),
        ("occupied sites", _share(attrs["occupied"], attrs["sites"])),
        ("missing", markup.number(attrs["missing"])),
        (f"mean displacement along the missing wedge ({wedge})", f"{moved['mean_along_wedge_angstrom']:.3f} Å"),
        ("mean displacement across it, per axis", f"{moved['mean_across_wedge_angstrom']:.3f} Å"),
        ("mean distance from the site", f"{moved['mean_distance_angstrom']:.3f} Å"),
    ]
    kinds = [Kind("missing", "#d73027", 1.1), Kind("occupied", _FAINT, _SMALL)]
    return markup.section(
        "lattice",
        "Lattice",
        canvas("lattice", _positions(data), occupied.astype(int), kinds),
        markup.table(rows),
    )


def strain(results: Results) -> str:
    """Return the section on strain: dilatation in three dimensions, all components in a slab through the middle."""
    data = results.read("strain")
    if data is None:
        return ""
    attrs, positions, known = data.attrs, _positions(data), np.asarray(data["known"])
    values = {name: np.asarray(data[f"strain_{name}"]) for name in _COMPONENTS}
    dilatation = 100 * (values["xx"] + values["yy"] + values["zz"])
    reach = max(float(np.percentile(np.abs(dilatation[known]), 98)), 1e-3) if known.any() else 1.0
    middle = float(np.median(positions[:, 2]))
    slab = known & (np.abs(positions[:, 2] - middle) < attrs["smoothing_angstrom"])
    pictures = [_map(positions[slab], 100 * values[n][slab], n, attrs["smoothing_angstrom"] / 2) for n in _COMPONENTS]
    rows = [
        (name, f"{100 * attrs['mean_strain'][name]:.4f}", f"{100 * attrs['std_strain'][name]:.4f}")
        for name in _COMPONENTS
    ]
    error = attrs["error"]
    text = (
        f"Against the {attrs['reference']} cell of {attrs['crystal']}. Resolution {attrs['resolution_angstrom']:.1f} Å "
        f"(full width of the Gaussian that is fitted over); median standard error of a component "
        f"{'–' if error is None else f'{100 * error:.3f} %'}. {attrs['unassigned']} atoms are on no site."
    )
    return markup.section(
        "strain",
        "Strain",
        markup.paragraph(text),
        _scaled("strain", positions[known], dilatation[known], -reach, reach, "dilatation, %") if known.any() else "",
        markup.table(rows, ("component", "mean (%)", "spread (%)"), numeric=(1, 2)),
        *(_maps(pictures, middle) if slab.any() else ()),
    )


def _maps(pictures: list[Picture], middle: float) -> tuple[str, str]:
    said = f"Strain in a slab about z = {middle:.1f} Å, mean over its depth."
    return (
        markup.figure(figures.row(pictures[:3]), said),
        markup.figure(figures.row(pictures[3:]), "Shear in the same slab."),
    )


def tracking(results: Results) -> str:
    """Return the section on states: registration, events, sizes of the nuclei."""
    data = results.read("tracking")
    if data is None:
        return ""
    attrs = data.attrs
    states = [
        (i, s["atoms"], s["nuclei"], _number(s["core_atoms"]), _number(s["core_rmsd_angstrom"]), _number(s["matched"]))
        for i, s in enumerate(attrs["states"])
    ]
    events = [
        (f"{e['step']} to {e['step'] + 1}", e["kind"], e["atoms_before"], e["atoms_after"], e["shared"])
        for e in attrs["events"]
    ]
    lines = [(f"track {t['number']}", [n[0] for n in t["nuclei"]], t["atoms"]) for t in attrs["tracks"]]
    last = np.asarray(data["atom_state"]) == len(states) - 1
    positions = np.stack([np.asarray(data[f"atom_{axis}"]) for axis in "xyz"], axis=-1)[last]
    return markup.section(
        "tracking",
        "States in time",
        _labelled("tracking", positions, np.asarray(data["atom_track"])[last], "track"),
        markup.table(
            states, ("state", "atoms", "nuclei", "core atoms", "core RMSD (Å)", "matched"), numeric=tuple(range(6))
        ),
        markup.table(events, ("states", "event", "atoms before", "after", "shared"), numeric=(2, 3, 4)),
        markup.figure(
            figures.curves(lines, "state", "atoms", points=True), "Atoms of every nucleus, followed.", width=620
        )
        if lines
        else "",
    )


def _positions(data: xr.Dataset) -> np.ndarray:
    return np.stack([np.asarray(data[axis], dtype=float) for axis in "xyz"], axis=-1)


def _scaled(anchor: str, positions: np.ndarray, values: np.ndarray, low: float, high: float, name: str) -> str:
    """Return a canvas of atoms coloured by ``values`` in eight steps from ``low`` to ``high``."""
    edges = np.linspace(low, high, len(_SCALE) + 1)
    kind = np.clip(np.searchsorted(edges, values) - 1, 0, len(_SCALE) - 1)
    names = [f"{a:.2g} to {b:.2g}" for a, b in itertools.pairwise(edges)]
    names[0] = f"{name} {names[0]}"
    kinds = [Kind(text, colour) for text, colour in zip(names, _SCALE, strict=True)]
    return canvas(anchor, positions, kind, kinds)


def _labelled(anchor: str, positions: np.ndarray, label: np.ndarray, name: str) -> str:
    """Return a canvas of atoms coloured by their ``label``, those without one small and grey."""
    present = np.unique(label[label >= 0])[:_MOST_ROWS]
    kinds = [Kind(f"{name} {number}", COLOURS[i % len(COLOURS)]) for i, number in enumerate(present)]
    kinds.append(Kind("others", _FAINT, _SMALL))
    kind = np.full(len(label), len(present))
    for i, number in enumerate(present):
        kind[label == number] = i
    return canvas(anchor, positions, kind, kinds)


def _map(positions: np.ndarray, values: np.ndarray, name: str, pixel: float) -> Picture:
    """Return the mean of ``values`` (atom,) on a grid of ``pixel`` Å in x and y."""
    low = positions[:, :2].min(axis=0) if len(positions) else np.zeros(2)
    x, y = ((positions[:, :2] - low) / pixel).astype(int).T if len(positions) else np.zeros((2, 0), int)
    shape = (int(y.max(initial=0)) + 1, int(x.max(initial=0)) + 1)
    count, total = np.zeros(shape), np.zeros(shape)
    np.add.at(count, (y, x), 1)
    np.add.at(total, (y, x), values)
    mean = np.divide(total, count, out=np.zeros(shape), where=count > 0)
    return Picture(mean, f"strain {name}", "%", (pixel, pixel), cmap="RdBu_r", diverging=True, valid=count > 0)


def _share(part: int, whole: int) -> str:
    return f"{markup.number(part)} of {markup.number(whole)} ({100 * part / max(whole, 1):.2f} %)"


def _number(value: Any) -> str:
    return "–" if value is None else markup.number(value, 4)
