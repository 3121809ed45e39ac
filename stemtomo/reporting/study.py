"""The picture of a study: the error of the atoms over what was varied, a line for every way."""

from __future__ import annotations

from typing import Any

from stemtomo.pipeline.study import VARIED
from stemtomo.reporting import figures


def study_picture(rows: list[dict[str, Any]]) -> bytes | None:
    """Return a PNG of the RMSD in pm over the quantity with most values; ``None`` where nothing was varied or found."""
    varied = [name for name in VARIED if name in rows[0]]
    if not varied:
        return None
    across = max(varied, key=lambda name: len({row[name] for row in rows}))
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        others = ", ".join(f"{VARIED[name]} {row[name]:g}" for name in varied if name != across)
        if row["rmsd_pm"] is not None:
            label = f"{row['way'].replace('_', ' ')}{', ' if others else ''}{others}"
            lines.setdefault(label, []).append((row[across], row["rmsd_pm"]))
    drawn = [(label, *map(list, zip(*sorted(points), strict=True))) for label, points in lines.items()]
    if not drawn:
        return None
    return figures.curves(drawn, VARIED[across], "RMSD (pm)", logarithmic=True, points=True)  # type: ignore[arg-type]
