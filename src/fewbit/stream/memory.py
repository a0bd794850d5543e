"""Where freed memory goes: kept for the next block, or given back to the system.

A page that was given back costs a fault when it is needed again, and rounding in one pass spends much of its
work on faults if every temporary array is a fresh one. A heap with holes, on the other hand, does not shrink
by itself, and holes add up from block to block. So

- ``keep_freed_arrays`` tells glibc to serve arrays up to 8 MiB from its heap, where they leave pages that
  the next ones use, and not to hand the top of the heap back on its own (by default it does whenever more
  than 128 KiB of it are free);
- `Heap` gives back what is free once the process is ``KEEP`` larger than after its first block: rarely where
  blocks are small, since each fills the holes of those before, and at each block where they are large.

The peak that results is printed by benchmarks/peak_memory.py and benchmarks/memory_by_depth.py.
"""

from __future__ import annotations

import ctypes
import os
import sys

from fewbit.io.source import Source

KEEP = 64 << 20  # bytes
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MAPPED = 8 << 20  # larger ones are mappings of their own: holes of their size would add up


def keep_freed_arrays() -> None:
    """Fix malloc's thresholds for this process as above; does nothing without glibc."""
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _MAPPED)
    mallopt(_M_TRIM_THRESHOLD, 1 << 30)  # `Heap` gives back instead


class Heap:
    """Gives freed memory back after a block when the process is ``KEEP`` larger than after the first one."""

    def __init__(self) -> None:
        self._first: int | None = None

    def settle(self, source: Source) -> None:
        """A block is done with."""
        now = resident()
        if self._first is None:
            self._first = now
        elif now > self._first + KEEP:
            source.release()


def resident() -> int:
    """Resident bytes of this process; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
