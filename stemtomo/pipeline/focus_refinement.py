"""``calibrate --refine``: C1, thickness and mistilt of a tilt from its patterns, for what is too thick for parallax."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from stemtomo import backend
from stemtomo.algorithms.ptychography import focus, mistilt
from stemtomo.algorithms.ptychography.adaptive import Geometry, Stack
from stemtomo.algorithms.ptychography.advice import probe_diameter_angstrom
from stemtomo.algorithms.ptychography.mistilt import Data, Free
from stemtomo.algorithms.ptychography.padding import commensurate, window_of
from stemtomo.algorithms.ptychography.windows import object_grid
from stemtomo.geometry import Optics, Scan
from stemtomo.io.store import Store
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.physics.probe import probe_wave
from stemtomo.pipeline.config import CalibrationSettings

#: Windows are larger than what is used of the detector by this share, so that what scatters beyond does not fold back.
_PADDING = 0.33
#: What is used of the detector, in semiangles: the disc and what is next to it.
_USED_SEMIANGLES = 2.0
#: Largest distance of the patterns that are used, in diameters of the probe.
_OVERLAP = 0.25
#: Iterations after which the two signs of C1 are compared.
_SIGN_ITERATIONS = 15

#: Numbers of a tilt that a refinement adds to what was found.
NAMES = (
    "refined_c1_angstrom",
    "refined_c1_sigma_angstrom",
    "refined_c1_entrance_angstrom",
    "refined_thickness_angstrom",
    "refined_thickness_sigma_angstrom",
    "refined_mistilt_mrad",
    "refined_mistilt_sigma_mrad",
    "depth_of_focus_angstrom",
    "refined_loss",
    "refined_noise_floor",
)


class Chosen(NamedTuple):
    """The patterns that a refinement looks at."""

    rows: np.ndarray
    columns: np.ndarray
    counts: np.ndarray
    """(position, qy, qx), zero frequency first, what is used of the detector."""
    electrons: float
    """Counted on the whole detector, mean."""
    mask: np.ndarray | None


def refine_tilt(
    store: Store,
    index: int,
    bad_pixels: np.ndarray,
    settings: CalibrationSettings,
    found: dict[str, Any],
    undetermined: dict[str, str],
) -> None:
    """Add to ``found`` what a multislice fit says of a tilt, or to ``undetermined`` why it says nothing.

    The fit begins at the C1 and the rotation found; with an open sign both are tried for some iterations, and the one
    that leaves less loss is taken, where that is clear. Where parallax found nothing it begins at the metadata's.
    """
    found.update(dict.fromkeys(NAMES))
    if found["transposed"]:
        undetermined["refined_c1_angstrom"] = "the scan is transposed: correct the metadata, ingest and calibrate again"
        return
    optics, scan = store.optics(index), store.scan(index)
    starts = _starts(optics, scan, found)
    chosen = _chosen(store, index, starts[0]["c1_angstrom"], bad_pixels, settings, found)
    if len(chosen.counts) < settings.refine_patterns // 4:
        undetermined["refined_c1_angstrom"] = f"only {len(chosen.counts)} patterns in the middle of the scan"
        return
    start = starts[0] if len(starts) == 1 else _signed(store, index, chosen, starts, settings, found, undetermined)
    if start is None:
        return
    stack, data = _prepared(store, index, chosen, start, settings, found)
    columns = chosen.columns if np.ptp(chosen.columns) >= np.ptp(chosen.rows) else chosen.rows
    left = columns < np.median(columns)
    halves = np.flatnonzero(left), np.flatnonzero(~left)
    semiangle = _semiangle(optics, found)
    found["depth_of_focus_angstrom"] = wavelength_angstrom(optics.energy_ev) / semiangle**2
    refined = focus.refine(
        _geometry(optics, semiangle, settings), stack, data, halves, semiangle, settings.refine_iterations
    )
    _write(refined, start["c1_angstrom"], found, undetermined)


def _starts(optics: Optics, scan: Scan, found: dict[str, Any]) -> list[dict[str, float]]:
    """Return the pairs of rotation and C1 to begin at: one, or two where the sign is open."""
    if found["candidates"] and found["c1_angstrom"] is None:
        return list(found["candidates"])
    c1, turn = found["c1_angstrom"], found["rotation_deg"]
    told = optics.c1_angstrom - optics.defocus_plane_z_angstrom
    told_turn = math.degrees(scan.rotation_rad)
    return [{"c1_angstrom": told if c1 is None else c1, "rotation_deg": told_turn if turn is None else turn}]


def _semiangle(optics: Optics, found: dict[str, Any]) -> float:
    """Return the semiangle in rad that was found, else that of the metadata."""
    return (found["semiangle_mrad"] or optics.semiangle_rad * 1e3) / 1e3


def _geometry(optics: Optics, semiangle: float, settings: CalibrationSettings) -> Geometry:
    depth = wavelength_angstrom(optics.energy_ev) / semiangle**2
    return Geometry(np.zeros(2), (settings.thickness_angstrom or depth) / settings.refine_slices)


def _signed(
    store: Store,
    index: int,
    chosen: Chosen,
    starts: list[dict[str, float]],
    settings: CalibrationSettings,
    found: dict[str, Any],
    undetermined: dict[str, str],
) -> dict[str, float] | None:
    """Return the start of which a short fit leaves less loss, and write the sign; ``None`` where that is not clear."""
    optics = store.optics(index)
    fits = []
    for start in starts:
        stack, data = _prepared(store, index, chosen, start, settings, found)
        begin = _geometry(optics, _semiangle(optics, found), settings)
        every = np.arange(len(chosen.counts))
        fit = mistilt.fit(begin, stack, data, every, _SIGN_ITERATIONS, free=Free(focus=True))
        fits.append(focus.Trial(fit.loss, focus.skewness(fit, stack, data, every)))
    best = focus.better_sign(fits[0], fits[1])
    if best is None:
        undetermined["refined_c1_angstrom"] = (
            "both signs of C1 fit alike, and atoms are not told from gaps; give --c1-sign or --rotation-near"
        )
        return None
    undetermined.pop("sign", None)
    found["rotation_deg"], found["c1_angstrom"] = starts[best]["rotation_deg"], starts[best]["c1_angstrom"]
    found["sign_from"] = (
        f"multislice: loss {100 * (1 - fits[best].loss / fits[1 - best].loss):.1f} % below that of the other sign,"
        f" skewness of the phase {fits[best].skewness:.1f} and not {fits[1 - best].skewness:.1f}"
    )
    return starts[best]


def _chosen(
    store: Store,
    index: int,
    c1_angstrom: float,
    bad_pixels: np.ndarray,
    settings: CalibrationSettings,
    found: dict[str, Any],
) -> Chosen:
    """Read a square in the middle of the scan, as wide as patterns that still overlap well make it."""
    optics, scan, detector = store.optics(index), store.scan(index), store.detector(index)
    wavelength = wavelength_angstrom(optics.energy_ev)
    semiangle = _semiangle(optics, found)
    probe = probe_diameter_angstrom(wavelength, semiangle, c1_angstrom, 0.0)
    edge = math.isqrt(settings.refine_patterns)
    lines = []
    for count, step in zip(scan.shape_yx, scan.step_angstrom_yx, strict=True):
        stride = max(1, min(int(_OVERLAP * probe / step), count // edge))
        number = min(edge, count)
        lines.append((count - (number - 1) * stride - 1) // 2 + stride * np.arange(number))
    rows, columns = (a.ravel() for a in np.meshgrid(*lines, indexing="ij"))
    kept = store.valid(index)[rows, columns]
    x0, x1, stride = int(lines[1][0]), int(lines[1][-1]) + 1, int(np.diff(lines[1]).max(initial=1))
    read = np.concatenate([store.read_frames(index, (int(y), slice(x0, x1)))[::stride] for y in lines[0]])[kept]
    known = found["beam_centre_ky_px"], found["beam_centre_kx_px"]
    centre = [round(told if c is None else c) for c, told in zip(known, detector.centre_yx, strict=True)]
    used = math.ceil(_USED_SEMIANGLES * semiangle / wavelength / detector.pixel_inv_angstrom)
    near = [_around(c, min(n, 2 * used), n) for c, n in zip(centre, detector.shape_yx, strict=True)]
    good = bad_pixels[np.ix_(*near)] == 0
    electrons = float(read.sum(axis=(1, 2), dtype=np.float64).mean())
    counts = np.ascontiguousarray(read[:, near[0]][:, :, near[1]])
    return Chosen(rows[kept], columns[kept], counts, electrons, None if good.all() else good)


def _around(centre: int, count: int, length: int) -> np.ndarray:
    """Return the ``count`` pixels of a line of ``length`` about ``centre``, that one first, as frequencies go."""
    return (centre + np.rint(np.fft.fftfreq(count, 1 / count)).astype(int)) % length


def _prepared(
    store: Store,
    index: int,
    chosen: Chosen,
    start: dict[str, float],
    settings: CalibrationSettings,
    found: dict[str, Any],
) -> tuple[Stack, Data]:
    """Return tied slices about the plane of the probe, and patterns and probe of ``start``."""
    optics, pixel = store.optics(index), store.detector(index).pixel_inv_angstrom
    scan = replace(store.scan(index), rotation_rad=math.radians(start["rotation_deg"]))
    shape = (chosen.counts.shape[1], chosen.counts.shape[2])
    extent = (1 / pixel, 1 / pixel)
    window = window_of(shape, _PADDING, extent)
    where = chosen.rows * scan.shape_yx[1] + chosen.columns
    grid = object_grid(scan.positions()[where], window, (extent[0] / window[0], extent[1] / window[1]))
    grid = commensurate(grid, shape)
    semiangle = _semiangle(optics, found)
    lens = replace(optics, semiangle_rad=semiangle, aberrations={**optics.aberrations, "C10": start["c1_angstrom"]})
    lens = replace(lens, defocus_plane_z_angstrom=0.0)
    slices = settings.refine_slices
    wavelength = wavelength_angstrom(optics.energy_ev)
    stack = Stack(grid, wavelength, slices, entry=-(slices - 1) / 2)
    probe = probe_wave(lens, window, grid.pixel_angstrom_yx, intensity=chosen.electrons)
    place = backend.to_device if backend.gpu_available() else np.asarray
    mask = None if chosen.mask is None else place(chosen.mask)
    return stack, Data(place(probe[None]), place(chosen.counts), mask)


def _write(refined: focus.Refined, c1_angstrom: float, found: dict[str, Any], undetermined: dict[str, str]) -> None:
    found["refined_loss"], found["refined_noise_floor"] = refined.loss, refined.noise_floor
    if refined.reason:
        undetermined["refined_c1_angstrom"] = refined.reason
        return
    c1 = c1_angstrom + refined.c1_angstrom
    found["refined_c1_angstrom"], found["refined_c1_sigma_angstrom"] = c1, refined.c1_sigma_angstrom
    if math.isinf(refined.thickness_sigma_angstrom):
        undetermined["refined_thickness_angstrom"] = (
            "halves of the field that began with other thicknesses did not come together; C1 does not hang on it"
        )
        return
    thickness = refined.thickness_angstrom
    found["refined_thickness_angstrom"] = thickness
    found["refined_thickness_sigma_angstrom"] = refined.thickness_sigma_angstrom
    # C1 > 0 is overfocus: on the entrance surface, half a thickness nearer to the source, it is less.
    found["refined_c1_entrance_angstrom"] = c1 - thickness / 2
    found["refined_mistilt_mrad"] = (refined.mistilt_rad_xy * 1e3).tolist()
    found["refined_mistilt_sigma_mrad"] = refined.mistilt_sigma_rad * 1e3
