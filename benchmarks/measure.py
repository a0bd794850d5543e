"""Whole processes, measured by the operating system."""

import os
import subprocess
import sys
import time
from pathlib import Path

FEWBIT = str(Path(sys.executable).with_name("fewbit"))
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def measured(command: list[str], threads: int | None = None) -> tuple[float, float, float]:
    """CPU seconds, wall seconds and peak resident MB of a process that must succeed."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if threads is not None:
        env |= dict.fromkeys(THREADS, str(threads))
    start = time.perf_counter()
    child = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    error = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{error.decode()[-3000:]}")
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - start, usage.ru_maxrss / 1024
