"""Few electrons per pixel as short lists: events by the gaps between them, or four small counts in a byte.

On the host only: this is how frames lie on the disk. Counts are flat arrays of unsigned whole numbers.
"""

from __future__ import annotations

import numba
import numpy as np

GAP = 255
"""Symbol of an event list for 255 pixels without an event at their end."""
RARE = 3
"""Two-bit code of a count that does not fit two bits."""
PER_BYTE = 4

_BLOCK = 1024
"""Words of eight bytes that are looked at together."""

_jit = numba.njit(nogil=True, cache=True)


@_jit
def total(counts: np.ndarray) -> int:
    """Return the sum of ``counts``."""
    found = np.uint64(0)
    for index in range(counts.size):
        found += np.uint64(counts[index])
    return int(found)


def gap_list(counts: np.ndarray, electrons: int) -> np.ndarray:
    """Return the events of ``counts``, whose sum is ``electrons``, as gaps, uint8.

    A symbol below 255 goes on by as many pixels and counts one electron there; 255 goes on by 255 and counts none. So
    the second electron of a pixel is a 0.
    """
    symbols = np.empty(electrons + counts.size // GAP + 1, np.uint8)
    per_word = 8 // counts.itemsize
    words = counts[: counts.size // per_word * per_word].view(np.uint64)
    return symbols[: _write_gaps(counts, words, per_word, symbols)]


def add_events(symbols: np.ndarray, counts: np.ndarray) -> int:
    """Count the events of :func:`gap_list` into ``counts``, which is zero; return the pixel of the last symbol.

    Symbols that lead beyond the end of ``counts`` return its size: they are damaged.
    """
    return int(_read_gaps(symbols, counts))


def pack(counts: np.ndarray, most_rare: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Return ``counts`` (a multiple of 4) as four codes of two bits in a byte, and the counts above 2 in order.

    ``None`` if there are more than ``most_rare`` of them.
    """
    packed = np.empty(counts.size // PER_BYTE, np.uint8)
    rare = np.empty(most_rare, counts.dtype)
    found = _pack(counts, packed, rare)
    return None if found < 0 else (packed, rare[:found])


def unpack(packed: np.ndarray, rare: np.ndarray, counts: np.ndarray) -> int:
    """Write what :func:`pack` made into ``counts``; return how many counts above 2 there were.

    More than ``rare`` holds returns -1: the data are damaged.
    """
    return int(_unpack(packed, rare, _CODES.astype(counts.dtype), _HAS_RARE, counts))


@_jit
def _write_gaps(counts: np.ndarray, words: np.ndarray, per_word: int, symbols: np.ndarray) -> int:
    """Write the list of ``counts``, whose beginning is also ``words`` of eight bytes; return its length.

    Where events are is not to be foretold, so branches on single pixels cost more than the pixels: words that hold any
    are listed first, then their pixels, both without a branch.
    """
    lit = np.empty(_BLOCK, np.int64)
    events = np.empty(_BLOCK * per_word, np.int64)
    last = 0
    written = 0
    for first in range(0, words.size, _BLOCK):
        found = 0
        for word in range(first, min(first + _BLOCK, words.size)):
            lit[found] = word
            found += words[word] != 0
        held = 0
        for number in range(found):
            start = lit[number] * per_word
            for pixel in range(start, start + per_word):
                events[held] = pixel
                held += counts[pixel] != 0
        for number in range(held):
            written = _write_event(counts, events[number], last, symbols, written)
            last = events[number]
    for pixel in range(words.size * per_word, counts.size):
        if counts[pixel]:
            written = _write_event(counts, pixel, last, symbols, written)
            last = pixel
    return written


@numba.njit(nogil=True, inline="always")
def _write_event(counts: np.ndarray, pixel: int, last: int, symbols: np.ndarray, written: int) -> int:
    gap = pixel - last
    while gap >= GAP:
        symbols[written] = GAP
        written += 1
        gap -= GAP
    symbols[written] = gap
    written += 1
    for _ in range(counts[pixel] - 1):
        symbols[written] = 0
        written += 1
    return written


@_jit
def _read_gaps(symbols: np.ndarray, counts: np.ndarray) -> int:
    pixel = 0
    for index in range(symbols.size):
        gap = symbols[index]
        pixel += gap
        if pixel >= counts.size:
            return counts.size
        if gap != GAP:
            counts[pixel] += 1
    return pixel


@_jit
def _pack(counts: np.ndarray, packed: np.ndarray, rare: np.ndarray) -> int:
    found = 0
    for byte in range(packed.size):
        code = 0
        for place in range(PER_BYTE):
            count = counts[PER_BYTE * byte + place]
            if count >= RARE:
                if found == rare.size:
                    return -1
                rare[found] = count
                found += 1
                count = RARE
            code |= count << (2 * place)
        packed[byte] = code
    return found


@_jit
def _unpack(packed: np.ndarray, rare: np.ndarray, codes: np.ndarray, has_rare: np.ndarray, counts: np.ndarray) -> int:
    found = 0
    for byte in range(packed.size):
        code = packed[byte]
        start = PER_BYTE * byte
        for place in range(PER_BYTE):
            counts[start + place] = codes[code, place]
        if has_rare[code]:
            for place in range(PER_BYTE):
                if (code >> (2 * place)) & 3 == RARE:
                    if found == rare.size:
                        return -1
                    counts[start + place] = rare[found]
                    found += 1
    return found


_CODES = (np.arange(256)[:, None] >> (2 * np.arange(PER_BYTE))) & 3
_HAS_RARE = (_CODES == RARE).any(axis=1)
