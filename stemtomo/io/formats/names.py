"""Files of a tilt series whose names carry the angle: ``tilt_{theta}.mib``."""

from __future__ import annotations

import re
from pathlib import Path

from stemtomo.errors import AcquisitionError, FormatError

ANGLE = "{theta}"
_NUMBER = r"(?P<theta>[+-]?\d+(?:\.\d+)?)"


def files_by_angle(pattern: Path) -> tuple[tuple[Path, ...], tuple[float, ...]]:
    """Return the files that fit ``pattern`` and their angles in degrees, by ascending angle.

    ``{theta}`` stands once, in the name of the file or of a folder; the other characters are as they are.

    Raises
    ------
    FormatError
        If the pattern has not one ``{theta}``, or no file fits it.
    AcquisitionError
        If two files have the same angle, or a file fits but for an angle that is no number; naming them.
    """
    level = [index for index, part in enumerate(pattern.parts) if ANGLE in part]
    if len(level) != 1 or pattern.parts[level[0]].count(ANGLE) != 1:
        raise FormatError(f"{pattern}: {ANGLE} must stand once, where the angle is in the names of the files")
    folder, rest = Path(*pattern.parts[: level[0]]), pattern.parts[level[0] + 1 :]
    before, _, after = pattern.parts[level[0]].partition(ANGLE)
    wanted = re.compile(re.escape(before) + _NUMBER + re.escape(after))
    found: dict[float, Path] = {}
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    for name in names:
        fits = len(name) > len(before + after) and name.startswith(before) and name.endswith(after)
        file = folder.joinpath(name, *rest)
        if not fits or not file.exists():
            continue
        match = wanted.fullmatch(name)
        if match is None:
            raise AcquisitionError(
                f"{file}: fits {pattern.name} but {name[len(before) : len(name) - len(after)]!r} is no angle; "
                "rename the file, or list the files of the series in input.path"
            )
        angle = float(match["theta"])
        if angle in found:
            raise AcquisitionError(f"{file} and {found[angle]} both have the angle {angle:g} degrees; keep one of them")
        found[angle] = file
    if not found:
        raise FormatError(f"{pattern}: no file fits this name; check input.path")
    angles = tuple(sorted(found))
    return tuple(found[angle] for angle in angles), angles
