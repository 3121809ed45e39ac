"""What is noted of frames while they are copied: the largest value of every pixel, and frames without any count."""

from __future__ import annotations

import numba
import numpy as np


def survey(frames: np.ndarray, maximum: np.ndarray) -> int:
    """Raise ``maximum`` (ky, kx) to the largest value of each pixel in ``frames``; return how many of them are zero.

    Parameters
    ----------
    frames
        (y, x, ky, kx), real numbers on the host.
    maximum
        Same type as the frames; NaN in ``frames`` is passed over.
    """
    rows = np.ascontiguousarray(frames).reshape(-1, maximum.size)
    return int(_survey(rows, maximum.reshape(-1)))


@numba.njit(nogil=True, cache=True)
def _survey(rows: np.ndarray, maximum: np.ndarray) -> int:
    empty = 0
    for row in range(rows.shape[0]):
        lit = 0
        for pixel in range(rows.shape[1]):
            value = rows[row, pixel]
            maximum[pixel] = max(maximum[pixel], value)
            lit |= value != 0
        if lit == 0:
            empty += 1
    return empty
