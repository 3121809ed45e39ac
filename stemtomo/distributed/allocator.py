"""How workers of a cluster ask the operating system for memory."""

from __future__ import annotations

import ctypes
import sys

from distributed import Worker, WorkerPlugin

#: Names of parameters in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


class KeepBuffers(WorkerPlugin):
    """Lets a worker keep some freed memory for its next buffers.

    Distributed starts workers so that the C library hands freed memory back at once. Every buffer of a numerical loop
    is then made of new pages, which the kernel clears: half as much again as the work of ptychography, measured. Arrays
    of more than 16 MiB, which a chunk of patterns seldom is, still go back when they are freed.
    """

    name = "stemtomo-keep-buffers"

    def setup(self, worker: Worker) -> None:
        """Set the thresholds of the process, where its C library has them."""
        if sys.platform != "linux":
            return
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)
        if set_option is not None:
            set_option(_MMAP_THRESHOLD, 16 << 20)
            set_option(_TRIM_THRESHOLD, 64 << 20)
