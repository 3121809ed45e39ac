"""From a source into a shard: in pieces that stay near the processor, as far as the file can be read in pieces."""

from __future__ import annotations

import itertools
import math

from stemtomo.io.formats.datasets import DatasetRecords
from stemtomo.io.formats.records import ScannedFrames
from stemtomo.io.formats.tilts import StackedTilts
from stemtomo.io.gaps import MaskedFrames
from stemtomo.io.prepared import PreparedFrames
from stemtomo.io.raw import ArrayFile
from stemtomo.io.schema import CHUNK_POSITIONS
from stemtomo.io.series import SeriesOfFiles
from stemtomo.io.sources import FrameSource

Region = tuple[int, int, int, int]
"""First and last + 1 row and column (y0, y1, x0, x1) in positions of the scan."""

_PIECE_BYTES = 8 << 20
"""A piece is as many inner chunks as hold this much; larger ones leave the caches, and are made of new memory."""


def piece_regions(source: FrameSource, region: Region) -> list[Region]:
    """Cut ``region``, one shard, into what is best read from ``source`` at once: whole inner chunks.

    Frames that lie in a file one by one are read in pieces of some megabytes. Files with chunks of their own
    (HDF5, Zarr) would be expanded several times, and are read at once.
    """
    y0, y1, x0, x1 = region
    frame_bytes = math.prod(source.shape[3:]) * source.dtype.itemsize
    finest = _finest(source)
    if finest == "shard" or (y1 - y0) * (x1 - x0) * frame_bytes <= _PIECE_BYTES:
        return [region]
    chunks = max(1, _PIECE_BYTES // (CHUNK_POSITIONS**2 * frame_bytes))
    across = math.ceil((x1 - x0) / CHUNK_POSITIONS)
    wide = across if finest == "row" else min(across, chunks)
    step_y, step_x = max(1, chunks // wide) * CHUNK_POSITIONS, wide * CHUNK_POSITIONS
    return [
        (y, min(y + step_y, y1), x, min(x + step_x, x1))
        for y, x in itertools.product(range(y0, y1, step_y), range(x0, x1, step_x))
    ]


def _finest(source: FrameSource) -> str:
    """What can be read of ``source`` without reading more: a ``chunk``, a ``row`` of them, or a ``shard``."""
    if isinstance(source, SeriesOfFiles | StackedTilts):
        return _finest(source.sources[0])
    if isinstance(source, MaskedFrames | PreparedFrames):
        return _finest(source.source)
    if isinstance(source, ArrayFile):
        return "chunk" if set(source.layout.axes[-2:]) == {"ky", "kx"} else "shard"
    if isinstance(source, ScannedFrames) and not isinstance(source.records, DatasetRecords):
        return "row"  # opening the file takes its time
    return "shard"
