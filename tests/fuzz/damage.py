"""What happens to files: bytes change, ends go missing, pieces are repeated, and numbers become absurd."""

from __future__ import annotations

import struct
from typing import NamedTuple

from hypothesis import strategies as st

#: Whole numbers with which headers are tricked, little- and big-endian, of 1 to 8 bytes.
_ABSURD = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**40, 2**63 - 1, 2**64 - 1)
_TEXTS = (
    b"99999999999",
    b"-1",
    b"0",
    b"nan",
    b"inf",
    b"1e400",
    b"../../x",
    b"{}",
    b"[]",
    b"null",
    b'"',
    b"\n",
    b"\0",
    b"\xff\xfe",
)


class Damage(NamedTuple):
    """One change of the bytes of a file: ``where`` is a share of its length, or a byte of its first kilobyte."""

    kind: str
    where: float
    head: int
    value: bytes

    def __call__(self, data: bytes) -> bytes:
        """Return the damaged bytes."""
        at = self.head if self.head >= 0 else int(self.where * len(data))
        at = min(at, len(data))
        if self.kind == "cut":
            return data[:at]
        if self.kind == "insert":
            return data[:at] + self.value + data[at:]
        if self.kind == "remove":
            return data[:at] + data[at + len(self.value) :]
        if self.kind == "repeat":
            return data[:at] + data[max(0, at - 16 * len(self.value)) :]
        return data[:at] + self.value + data[at + len(self.value) :]


def _number(order: str, bytes_wide: int, value: int) -> bytes:
    code = {1: "B", 2: "H", 4: "I", 8: "Q"}[bytes_wide]
    return struct.pack(order + code, value % 2 ** (8 * bytes_wide))


_values = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from(_TEXTS),
    st.builds(_number, st.sampled_from("<>"), st.sampled_from((1, 2, 4, 8)), st.sampled_from(_ABSURD)),
)
_one = st.builds(
    Damage,
    st.sampled_from(("change", "change", "change", "change", "cut", "insert", "remove", "repeat")),
    st.floats(0, 1),
    st.one_of(st.just(-1), st.integers(0, 1023)),
    _values,
)
#: Up to four damages of one file, the file's number first.
DAMAGES = st.tuples(st.integers(0, 63), st.lists(_one, min_size=1, max_size=4))
