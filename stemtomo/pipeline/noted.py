"""What ingest notes of the frames of a tilt on their way: saturated and dead pixels, empty frames, values left out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from stemtomo.errors import FormatError
from stemtomo.io.layout import check_values
from stemtomo.io.prepared import replace_pixels
from stemtomo.kernels.masks import FrameSums
from stemtomo.kernels.survey import survey
from stemtomo.pipeline.config import IngestSettings

_LIT_NEIGHBOUR = 2
"""Largest value above which a neighbour of a pixel that never counted is not dark by chance."""


class Limits(NamedTuple):
    """From which count on a pixel is saturated, above which it is suspicious, and what share need not be finite."""

    saturation: float | None
    half: float | None
    nonfinite_fraction: float

    @classmethod
    def of(cls, dtype: np.dtype, settings: IngestSettings) -> Limits:
        """Return the limits for frames that the detector gives as ``dtype``; sums of pixels have none of their own."""
        largest = int(np.iinfo(dtype).max) if dtype.kind in "iu" and settings.bin == 1 else None
        saturation = settings.saturation_counts if settings.saturation_counts is not None else largest
        return cls(saturation, None if largest is None else largest // 2, settings.nonfinite_fraction)


@dataclass
class Noted:
    """Counts over the frames of a shard, or of all shards of a tilt together.

    ``maximum`` is the largest value of every pixel (ky, kx).
    """

    maximum: np.ndarray
    values: int = 0
    empty_frames: int = 0
    saturated_values: int = 0
    upper_half_values: int = 0
    nonfinite_values: int = 0

    @classmethod
    def nothing(cls, shape: tuple[int, int], dtype: np.dtype) -> Noted:
        """Return the counts of no frames."""
        return cls(np.full(shape, _lowest(dtype), dtype))

    def look(self, block: np.ndarray, limits: Limits, sums: FrameSums | None = None) -> None:
        """Count the frames of ``block`` (y, x, ky, kx), counts of electrons or real numbers.

        ``sums`` is what a look at the block has found, its first weight 1 everywhere; it spares a pass over counts.
        """
        self.values += block.size
        if sums is not None and block.dtype.kind in "iu":
            largest = sums.pattern_maximum
            self.empty_frames += int(np.count_nonzero(sums.weighted[..., 0] == 0))
        else:
            largest = np.full_like(self.maximum, _lowest(self.maximum.dtype))
            self.empty_frames += survey(block, largest)
        np.maximum(self.maximum, largest, out=self.maximum)
        peak = largest.max()
        if limits.saturation is not None and peak >= limits.saturation:
            self.saturated_values += int(np.count_nonzero(block >= limits.saturation))
        if limits.half is not None and peak > limits.half:
            self.upper_half_values += int(np.count_nonzero(block > limits.half))

    def checked(self, block: np.ndarray, where: str, tilt: int, corner: tuple[int, int], limits: Limits) -> np.ndarray:
        """Return ``block`` (y, x, ky, kx), at the scan position ``corner``, checked, repaired if allowed, and counted.

        Raises
        ------
        FormatError
            For values that no detector gives.
        """
        block = self.valid(block, where, tilt, corner, limits)
        self.look(block, limits)
        return block

    def valid(self, block: np.ndarray, where: str, tilt: int, corner: tuple[int, int], limits: Limits) -> np.ndarray:
        """Do what :meth:`checked` does, but for the counting of what a detector may give."""
        if limits.nonfinite_fraction > 0:
            block = self.repair(block, where)
        check_values(block, where, tilt, *corner)
        return block

    def repair(self, block: np.ndarray, where: str) -> np.ndarray:
        """Return ``block`` with values that are not finite replaced by those of their neighbours, and count them."""
        if block.dtype.kind != "f":
            return block
        with np.errstate(over="ignore", invalid="ignore"):
            if math.isfinite(float(block.sum(dtype=np.float64))):
                return block
        bad = ~np.isfinite(block)
        self.nonfinite_values += int(bad.sum())
        block = block if block.flags.writeable else block.copy()
        replace_pixels(block, bad, where)
        return block

    def add(self, other: Noted) -> None:
        """Add what was counted in another shard."""
        np.maximum(self.maximum, other.maximum, out=self.maximum)
        for name in ("values", "empty_frames", "saturated_values", "upper_half_values", "nonfinite_values"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def check(self, where: str, tilt: int, total: int, limits: Limits) -> None:
        """Check that not more values of a tilt of ``total`` are not finite than is allowed.

        Raises
        ------
        FormatError
            With their number.
        """
        allowed = limits.nonfinite_fraction * total
        if self.nonfinite_values > allowed:
            raise FormatError(
                f"{where}: {self.nonfinite_values} values of tilt {tilt} are not finite so far, "
                f"{int(allowed)} of {total} are allowed (ingest.nonfinite_fraction = {limits.nonfinite_fraction:g}); "
                "repair the detector data, or allow more"
            )

    def to_attrs(self, limits: Limits, missing_frames: int = 0) -> dict[str, Any]:
        """Return the counts as attributes of the tilt; frames that never came are not counted as empty."""
        limit = limits.saturation
        never = self.maximum <= 0
        lit = np.pad(self.maximum > _LIT_NEIGHBOUR - 1, 1, constant_values=True)
        surrounded = lit[:-2, 1:-1] & lit[2:, 1:-1] & lit[1:-1, :-2] & lit[1:-1, 2:]
        return {
            "largest_value": float(self.maximum.max()) if self.maximum.dtype.kind == "f" else int(self.maximum.max()),
            "empty_frames": self.empty_frames - missing_frames,
            "dead_pixels": int(np.count_nonzero(never & surrounded)),
            "zero_pixels": int(np.count_nonzero(never)),
            "saturated_pixels": 0 if limit is None else int(np.count_nonzero(self.maximum >= limit)),
            "saturated_values": self.saturated_values,
            "upper_half_values": self.upper_half_values,
            "nonfinite_values": self.nonfinite_values,
            "missing_frames": missing_frames,
        }


def _lowest(dtype: np.dtype) -> float:
    return int(np.iinfo(dtype).min) if dtype.kind in "iu" else -np.inf


def warning_text(where: str, tilt: int, noted: dict[str, Any]) -> str | None:
    """Return what looks wrong in a tilt, ``None`` if nothing does."""
    words = {
        "missing_frames": "{} frames are missing, their positions are masked",
        "empty_frames": "{} frames are empty (no count in any pixel)",
        "saturated_values": "{} values in {saturated_pixels} pixels are saturated",
        "upper_half_values": "{} values lie in the upper half of what the type holds (is it signed?)",
        "dead_pixels": "{} pixels never counted although their neighbours did (give ingest.dead_pixels)",
        "nonfinite_values": "{} values were not finite and took those of their neighbours",
    }
    told = [text.format(noted[key], **noted) for key, text in words.items() if noted[key]]
    return f"{where}, tilt {tilt}: {'; '.join(told)}" if told else None
