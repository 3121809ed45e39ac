"""What the calibration of the tilts says together: trends, outliers, and rows beside the metadata."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from stemtomo.algorithms.imaging import trends

#: Numbers of a tilt that are compared with the metadata, with their units.
COMPARED = {
    "semiangle_mrad": "mrad",
    "beam_centre_ky_px": "px",
    "beam_centre_kx_px": "px",
    "rotation_deg": "deg",
    "c1_angstrom": "Å",
    "c12_angstrom": "Å",
}


#: Columns of :func:`comparison_rows`.
HEAD = (
    "tilt",
    "semiangle (mrad)",
    "centre ky, kx (px)",
    "scan rotation (deg)",
    "C1 at the specimen (Å)",
    "C12 (Å)",
    "bad px",
)


def series_trends(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the smooth trend over the tilts of every number, and which tilts lie off it.

    C1 follows the height of the specimen: a + b sin(theta) + c cos(theta); the others should not change.
    """
    theta = np.array([record["theta_rad"] for record in records])
    result: dict[str, Any] = {}
    for name, smooth in (("semiangle_mrad", False), ("com_rotation_deg", False), ("rotation_deg", False)):
        result[name] = _trend(theta, [record["found"][name] for record in records], smooth)
    branch = _one_branch(records)
    result["parallax_rotation_deg"] = _trend(theta, [pair and pair[0] for pair in branch], False)
    result["c1_angstrom"] = _trend(theta, [pair and pair[1] for pair in branch], True)
    result["refined_c1_angstrom"] = _trend(
        theta, [record["found"].get("refined_c1_angstrom") for record in records], True
    )
    if any(record["undetermined"].get("sign") for record in records):
        result["c1_angstrom"]["sign"] = "undetermined: all tilts on one branch, the other has the opposite sign"
    return {name: trend for name, trend in result.items() if trend["values"] != [None] * len(records)}


def _trend(theta: np.ndarray, values: list[float | None], smooth: bool) -> dict[str, Any]:
    known = np.array([value is not None for value in values])
    numbers = np.array([np.nan if value is None else value for value in values], dtype=float)
    fitted, outliers = trends.robust_trend(theta, numbers, known, smooth)
    return {
        "values": values,
        "trend": None if fitted is None else [float(v) for v in fitted],
        "outliers": [int(i) for i in np.flatnonzero(outliers)],
    }


def _one_branch(records: list[dict[str, Any]]) -> list[tuple[float, float] | None]:
    """Return (rotation, C1) of every tilt, of the two that fit the one nearest to the first tilt's rotation."""
    pairs: list[tuple[float, float] | None] = []
    first: float | None = None
    for record in records:
        candidates = record["found"]["candidates"]
        if not candidates:
            pairs.append(None)
            continue
        signed = record["found"]["c1_angstrom"]
        if first is None:
            chosen = next((c for c in candidates if signed is not None and c["c1_angstrom"] == signed), candidates[0])
            first = chosen["rotation_deg"]
        near = min(candidates, key=lambda c: abs(math.remainder(c["rotation_deg"] - first, 360)))
        pairs.append((first + math.remainder(near["rotation_deg"] - first, 360), near["c1_angstrom"]))
    return pairs


def comparison_rows(records: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return a row of text per tilt: each number found and, in brackets, the metadata's; a dash for undetermined.

    With an open sign the rotation is modulo 180 and C1 has either sign.
    """
    rows: list[tuple[str, ...]] = []
    for record in records:
        found, told = record["found"], record["metadata"]
        signed = found["rotation_deg"] is not None
        c1 = _text(found["c1_angstrom" if signed else "c1_magnitude_angstrom"], ".1f", "" if signed else "±")
        sigma = "" if found["c1_sigma_angstrom"] is None else f" (σ {found['c1_sigma_angstrom']:.1f})"
        if found.get("refined_c1_angstrom") is not None:
            sigma += f"; refined {found['refined_c1_angstrom']:.1f} (σ {found['refined_c1_sigma_angstrom']:.1f})"
        turn = _text(found["rotation_deg" if signed else "rotation_mod_180_deg"], ".2f")
        centre = ", ".join(_text(found[f"beam_centre_{axis}_px"], ".2f") for axis in ("ky", "kx"))
        said = ", ".join(f"{told[f'beam_centre_{axis}_px']:.2f}" for axis in ("ky", "kx"))
        rows.append(
            (
                f"{record['tilt']} ({record['theta_deg']:.4g}°)",
                f"{_text(found['semiangle_mrad'], '.2f')} [{told['semiangle_mrad']:.2f}]",
                f"{centre} [{said}]",
                f"{turn}{'' if signed or turn == '–' else ' mod 180'} [{told['rotation_deg']:.2f}]",
                f"{c1}{sigma} [{told['c1_angstrom']:.1f}]",
                f"{_text(found['c12_angstrom'], '.1f')} [{told['c12_angstrom']:.1f}]",
                f"{found['dead_pixels'] + found['hot_pixels']}",
            )
        )
    return rows


def refined_notes(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return a sentence for every tilt whose C1 was refined, with the planes that the numbers belong to."""
    notes = []
    for record in records:
        found = record["found"]
        if found.get("refined_c1_angstrom") is None:
            continue
        text = f"Tilt {record['tilt']}: C1 {found['refined_c1_angstrom']:.1f} Å in the middle of the specimen"
        text += f" (σ {found['refined_c1_sigma_angstrom']:.1f})"
        if found["refined_thickness_angstrom"] is not None:
            x, y = found["refined_mistilt_mrad"]
            text += (
                f", {found['refined_c1_entrance_angstrom']:.1f} Å on its entrance surface; thickness"
                f" {found['refined_thickness_angstrom']:.0f} Å (σ {found['refined_thickness_sigma_angstrom']:.0f}),"
                f" mistilt {x:.1f}, {y:.1f} mrad (σ {found['refined_mistilt_sigma_mrad']:.1f}); for ptychography"
                f" {_stack(record)}"
            )
        notes.append(text)
    return notes


def _stack(record: dict[str, Any]) -> str:
    """Return settings of a stack whose slices are half a depth of focus thick at most."""
    found = record["found"]
    thickness = found["refined_thickness_angstrom"]
    slices = max(1, math.ceil(thickness / (found["depth_of_focus_angstrom"] / 2)))
    return f"slices = {slices}, slice_thickness_angstrom = {thickness / slices:.1f}"


def outlier_notes(series: dict[str, Any]) -> list[str]:
    """Return a sentence for every number that some tilts do not share with the series."""
    return [
        f"Outlier: {name}: tilt {', '.join(map(str, trend['outliers']))} lies off the trend of the series"
        for name, trend in series.items()
        if trend["outliers"]
    ]


def _text(value: float | None, form: str, before: str = "") -> str:
    return "–" if value is None else f"{before}{value:{form}}"
