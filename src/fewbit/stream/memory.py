"""Give freed memory back to the system at once.

glibc serves large arrays from its heap after the first of them has been freed (its threshold for ``mmap``
adapts upward), and a heap with holes does not shrink: the loop's peak was 1.2 GB where 0.75 GB were alive
(SmolLM2, 16,384 calibration tokens, benchmarks/results/memory.md). Fixing the threshold at 1 MiB makes every
large array its own mapping, which disappears when it is freed; the price is fresh pages for each, a few per
cent of a run.
"""

from __future__ import annotations

import ctypes
import sys

_M_MMAP_THRESHOLD = -3  # malloc.h


def return_freed_arrays() -> None:
    """Fix malloc's mmap threshold at 1 MiB for this process; does nothing without glibc."""
    if not sys.platform.startswith("linux"):
        return
    try:
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    except (OSError, AttributeError):
        return
