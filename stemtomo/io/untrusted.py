"""Files from elsewhere: whatever their parsing comes upon is one named error, and no header asks for any memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from stemtomo.errors import FormatError, StemtomoError

FRAME_LIMIT_BYTES = 1 << 30
"""Largest frame, five times that of a camera of 11,520 x 8,184 pixels at 2 bytes: who says more is damaged."""

DAMAGED = "it was damaged outside stemtomo: remove the folder of this tilt and run ingest again"


@contextmanager
def reading(
    where: str | Path,
    kind: str,
    advice: str = "it is damaged; copy the file again",
    passing: tuple[type[Exception], ...] = (),
    error: type[StemtomoError] = FormatError,
) -> Iterator[None]:
    """Give every error of parsing and decoding within the block one name.

    Parameters
    ----------
    where
        The file (and array), the beginning of the message.
    kind
        What it is read as.
    passing
        Errors that are somebody else's to name, beside those that have a name of their own.
    error
        The name.

    Raises
    ------
    StemtomoError
        ``error``, with what was met. Errors with a name of their own pass.
    """
    try:
        yield
    except StemtomoError:
        raise
    except passing:
        raise
    except MemoryError as met:
        raise error(f"{where}: as {kind} it asks for more memory than there is ({met}); {advice}") from met
    except Exception as met:  # parsers and codecs raise whatever damaged bytes lead them to
        said = str(met) or type(met).__name__
        raise error(f"{where}: cannot be read as {kind} ({said}); {advice}") from met


def check_frame(where: str | Path, shape: Sequence[int], dtype: np.dtype, limit_bytes: int = FRAME_LIMIT_BYTES) -> None:
    """Check that a frame (or another piece that is held at once) of ``shape`` is of a size that there is.

    Raises
    ------
    FormatError
        If it is empty or larger than ``limit_bytes``.
    """
    asked = math.prod(int(length) for length in shape) * dtype.itemsize
    if any(length < 1 for length in shape):
        raise FormatError(
            f"{where}: has frames of {list(shape)} pixels; the header is damaged, or nothing was recorded"
        )
    if asked > limit_bytes:
        raise FormatError(
            f"{where}: says frames of {list(shape)} {dtype}, {asked:.3g} bytes each; at most {limit_bytes:.3g} are "
            "read, so the header is damaged or its axes are called otherwise than they are"
        )
