"""The sections of the report on the specimen: the volume, the atoms and their score."""

from __future__ import annotations

import numpy as np
import xarray as xr

from stemtomo.reporting import figures, markup
from stemtomo.reporting.atoms3d import BALL_ANGSTROM, Kind, canvas
from stemtomo.reporting.figures import COLOURS, Picture
from stemtomo.reporting.results import Results, thumbnail

MIRROR = (
    "The sign of the tilt angles cannot be seen in the images: (theta, z) and (-theta, -z) give the same projections, "
    "and very nearly the same diffraction patterns. If the microscope counts its tilt the other way round, this volume "
    "and these atoms are mirrored in z; check the sign once with a specimen of known handedness."
)
_SLICE = 700


def volume(results: Results) -> str:
    """Return the section on the volume: three orthogonal slices, three sums, the loss."""
    data = results.read("volume")
    if data is None:
        return ""
    slices, sums, described = volume_pictures(data)
    loss = np.asarray(data["loss"], dtype=float)
    line = [("", list(range(1, loss.size + 1)), loss.tolist())]
    return markup.section(
        "volume",
        "Volume",
        markup.paragraph(described),
        markup.note(MIRROR),
        markup.figure(figures.row(slices), "Electrostatic potential in three slices through the rotation centre."),
        markup.figure(figures.row(sums), "Potential summed along each axis."),
        markup.figure(figures.curves(line, "iteration", "loss", logarithmic=True), "Loss of the tomography.", width=620)
        if loss.size
        else "",
    )


def volume_pictures(data: xr.Dataset) -> tuple[list[Picture], list[Picture], str]:
    """Return three slices of the potential in ``data``, its sums along the axes, and a sentence on its voxels."""
    potential = data["potential"]
    voxel = np.broadcast_to(np.asarray(data.attrs["voxel_angstrom"], dtype=float), 3)
    size = {"z": 0, "y": 1, "x": 2}
    slices, sums = [], []
    for across, axes in (("z", ("y", "x")), ("y", ("z", "x")), ("x", ("z", "y"))):
        pixel = voxel[[size[axes[0]], size[axes[1]]]]
        middle = potential.sizes[across] // 2
        values, stride = thumbnail(potential.isel({across: middle}).transpose(*axes), _SLICE)
        scaled = (float(pixel[0]) * stride, float(pixel[1]) * stride)
        slices.append(Picture(values, f"slice {across} = 0", "V", scaled, axes=axes, cmap="inferno"))
        values, stride = thumbnail((potential.sum(across) * float(voxel[size[across]])).transpose(*axes), _SLICE)
        sums.append(Picture(values, f"sum along {across}", "V Å", scaled, axes=axes, cmap="inferno"))
    extent = " × ".join(f"{n * v:.1f}" for n, v in zip(potential.shape, voxel, strict=True))
    described = (
        f"{' × '.join(map(str, potential.shape))} voxels of {voxel[0]:.4g} Å (z × y × x), {extent} Å. "
        "The rotation centre is the voxel n\u00a0//\u00a02; the beam of the untilted specimen runs along +z."
    )
    return slices, sums, described


def atoms(results: Results) -> str:
    """Return the section on the atoms: the canvas that can be turned, the count and the intensities by species."""
    data = results.read("atoms")
    if data is None:
        return ""
    if data.sizes["atom"] == 0:
        return markup.section("atoms", "Atoms", markup.paragraph("No atom was found.", "missing"))
    species = np.array([str(name) for name in data["species"].values])
    intensity = np.asarray(data["intensity"], dtype=float)
    names = sorted(set(species), key=lambda name: float(np.median(intensity[species == name])))
    rows = []
    for name in names:
        chosen = species == name
        width = np.asarray(data["width_angstrom"], dtype=float)[chosen]
        rows.append(
            (
                _label(name),
                markup.number(int(chosen.sum())),
                f"{np.median(intensity[chosen]):.4g}",
                f"{intensity[chosen].std():.3g}",
                f"{np.median(width):.3f}",
            )
        )
    head = ("species", "atoms", "median intensity (V Å³)", "spread (V Å³)", "median width (Å)")
    groups = [(_label(name), intensity[species == name]) for name in names]
    histogram = figures.histogram(groups, "integrated potential (V Å³)")
    return markup.section(
        "atoms",
        "Atoms",
        _canvas(data, species, names),
        markup.table(rows, head, numeric=(1, 2, 3, 4)),
        markup.figure(histogram, "Intensities of the atoms, by species.", width=620),
    )


def score(results: Results) -> str:
    """Return the section that compares the atoms with known ones."""
    data = results.read("score")
    if data is None:
        return ""
    attrs = data.attrs
    rows: list[tuple[str, str, str]] = []
    for key, label, meaning in (
        ("recall", "recall", "part of the known atoms that were found"),
        ("precision", "precision", "part of the found atoms that are known"),
        ("rmsd_pm", "RMSD", "pm, over matched atoms, after one rigid shift of the whole model"),
        ("species_accuracy", "species accuracy", "part of the matched atoms with the right species"),
    ):
        if attrs.get(key) is not None:
            value = f"{attrs[key]:.2f}" if key == "rmsd_pm" else f"{attrs[key]:.4f}"
            rows.append((label, value, meaning))
    known = {"recall", "precision", "rmsd_pm", "species_accuracy"}
    rest = {
        key: value for key, value in attrs.items() if key not in known and isinstance(value, (int, float, str, list))
    }
    extra = markup.details("All numbers", markup.table(list(rest.items()))) if rest else ""
    return markup.section("score", "Comparison with known atoms", markup.table(rows, numeric=(1,)), extra)


def _canvas(data: xr.Dataset, species: np.ndarray, names: list[str]) -> str:
    positions = np.stack([np.asarray(data[axis], dtype=float) for axis in "xyz"], axis=-1)
    kinds = [
        Kind(_label(name), COLOURS[index % len(COLOURS)], BALL_ANGSTROM * (1 + 0.15 * min(index, 6)))
        for index, name in enumerate(names)
    ]
    numbers = {name: index for index, name in enumerate(names)}
    return canvas("atoms", positions, np.array([numbers[name] for name in species]), kinds)


def _label(name: str) -> str:
    return f"class {name}" if name.isdigit() else name
