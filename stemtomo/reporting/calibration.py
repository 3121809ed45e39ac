"""The section of the report on what the calibration found, beside the metadata."""

from __future__ import annotations

from stemtomo.io.schema import tilt_name
from stemtomo.pipeline.calibrate import calibration_record
from stemtomo.pipeline.compare import HEAD, comparison_rows, outlier_notes, refined_notes, series_trends
from stemtomo.reporting import figures, markup
from stemtomo.reporting.figures import Picture
from stemtomo.reporting.results import Results, thumbnail

_IMAGE = 512


def calibration(results: Results) -> str:
    """Return the section: a row per tilt, outliers, and parallax and iCOM images of the tilt nearest to zero."""
    tilts = results.tilts_with("calibration")
    if not tilts:
        return ""
    records = [calibration_record(results.store, index) for index in tilts]
    index = min(tilts, key=lambda i: abs(results.store.pose(i).theta_rad))
    data = results.store.read(f"calibration/{tilt_name(index)}")
    step = results.store.scan(index).step_angstrom_yx
    pictures = []
    for name, title, unit in (
        ("parallax", "parallax", "of the mean"),
        ("icom_phase", "integrated centre of mass", "rad"),
    ):
        if name in data:
            values, stride = thumbnail(data[name], _IMAGE)
            pictures.append(Picture(values, title, unit, (step[0] * stride, step[1] * stride)))
    notes = [*refined_notes(records), *outlier_notes(series_trends(records))]
    if any("sign" in record["undetermined"] for record in records):
        notes.append(
            "the sign is undetermined: (rotation, C1) and (rotation + 180 deg, -C1) fit alike, and the integrated "
            "centre of mass may be inverted"
        )
    return markup.section(
        "calibration",
        "Calibration",
        markup.paragraph("Found from the first look alone; in brackets what the metadata say, which stay as they are."),
        markup.table(comparison_rows(records), HEAD, numeric=tuple(range(1, len(HEAD)))),
        *(markup.paragraph(note[0].upper() + note[1:] + ".", "soft") for note in notes),
        markup.figure(figures.row(pictures), f"By-products of the calibration of tilt {index}."),
    )
