"""Windows larger than the detector, so that what a thick specimen scatters beyond it does not fold back.

Behind a window of the detector's own pixels, a wave scattered past the detector's edge comes in again at the opposite
edge, where the model then finds electrons that the measurement does not hold. With a margin nothing is known about the
waves beyond the edge, and nothing is asked of them.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np

from stemtomo.algorithms.ptychography.windows import ObjectGrid

#: Largest share by which a window may grow beyond what was asked for, to put the scan on whole pixels.
_MOST = 0.34


def window_of(
    detector_yx: tuple[int, int],
    padding: float,
    period_angstrom_yx: tuple[float, float],
    step_angstrom_yx: tuple[float, float] | None = None,
) -> tuple[int, int]:
    """Return the pixels of a window that is larger than the detector by the share ``padding`` at least.

    Its edges are even products of 2, 3 and 5. Where the detector's own pixels put the scan on whole pixels, which
    spares two transforms per pattern, the window keeps it so if it finds an edge for it.

    Parameters
    ----------
    period_angstrom_yx
        Extent of a window, one over the detector's pixel.
    step_angstrom_yx
        Steps of a scan that is not rotated, ``None`` otherwise.
    """
    if padding <= 0:
        return detector_yx
    edges = []
    for axis, count in enumerate(detector_yx):
        least = int(np.ceil(count * (1 + padding)))
        fast = [edge for edge in range(least, 2 * least + 2) if edge % 2 == 0 and _is_smooth(edge)]
        chosen = fast[0]
        if step_angstrom_yx is not None:
            per_window = step_angstrom_yx[axis] / period_angstrom_yx[axis]
            if _is_whole(per_window * count):
                on_pixels = [e for e in fast if e <= count * (1 + max(padding, _MOST)) and _is_whole(per_window * e)]
                chosen = on_pixels[0] if on_pixels else chosen
        edges.append(chosen)
    return edges[0], edges[1]


def commensurate(grid: ObjectGrid, detector_yx: tuple[int, int]) -> ObjectGrid:
    """Return ``grid`` enlarged about its centre until it is a whole, even number of the detector's pixels too."""
    shape = []
    for size, window, count in zip(grid.shape_yx, grid.window_yx, detector_yx, strict=True):
        unit = 2 * Fraction(window, count).numerator
        shape.append(-(-size // unit) * unit)
    moved = np.array([new // 2 - old // 2 for new, old in zip(shape, grid.shape_yx, strict=True)])
    return replace(grid, shape_yx=(shape[0], shape[1]), corners=grid.corners + moved)


def to_detector_pixels(image: np.ndarray, window_yx: tuple[int, int], detector_yx: tuple[int, int]) -> np.ndarray:
    """Return ``image`` (..., y, x) on the coarser pixels of the detector, its frequencies beyond them cut off.

    Values at the pixels that both share, of which index n // 2 is one, are kept.
    """
    if window_yx == detector_yx:
        return image
    last = (-2, -1)
    # Phases about index n // 2: a detector of an odd number of pixels shares no corner with its window.
    spectrum = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(image, axes=last)), axes=last)
    for axis, (window, count) in zip(last, zip(window_yx, detector_yx, strict=True), strict=True):
        length = image.shape[axis]
        kept = length * count // window
        start = length // 2 - kept // 2
        spectrum = np.take(spectrum, np.arange(start, start + kept), axis=axis)
    found = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(spectrum, axes=last)), axes=last)
    found *= found.shape[-1] * found.shape[-2] / (image.shape[-1] * image.shape[-2])
    return np.ascontiguousarray(found if np.iscomplexobj(image) else found.real).astype(image.dtype)


def _is_smooth(number: int) -> bool:
    for factor in (2, 3, 5):
        while number % factor == 0:
            number //= factor
    return number == 1


def _is_whole(number: float) -> bool:
    return abs(number - round(number)) < 1e-6 and round(number) > 0
