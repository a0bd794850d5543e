"""Give freed memory back to the system, where that is cheap.

glibc serves large arrays from its heap after the first of them has been freed (its threshold for ``mmap``
adapts upward), and a heap with holes does not shrink. With the threshold fixed, every array above it is a
mapping of its own that disappears when it is freed; but each such array costs fresh pages.
A threshold of 1 MiB gives the lowest peak and spends much of a run on fresh pages; 8 MiB is the compromise.
The peak that results is printed by benchmarks/peak_memory.py.
"""

from __future__ import annotations

import ctypes
import sys

_M_MMAP_THRESHOLD = -3  # malloc.h


def return_freed_arrays() -> None:
    """Fix malloc's mmap threshold at 8 MiB for this process; does nothing without glibc."""
    if not sys.platform.startswith("linux"):
        return
    try:
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 8 << 20)
    except (OSError, AttributeError):
        return
