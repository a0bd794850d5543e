"""Whole processes, measured by the operating system."""

import json
import os
import subprocess
import sys
from pathlib import Path

FEWBIT = str(Path(sys.executable).with_name("fewbit"))
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


# A child's peak starts at what its parent held when it forked, so a small process stands in between.
LAUNCH = """
import json, os, subprocess, sys, time
start = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
error = child.stderr.read().decode(errors="replace")
_, status, usage = os.wait4(child.pid, 0)
seconds = time.perf_counter() - start
print(json.dumps([status, error[-3000:], usage.ru_utime + usage.ru_stime, seconds, usage.ru_maxrss / 1024]))
"""


def measured(command: list[str], threads: int | None = None) -> tuple[float, float, float]:
    """CPU seconds, wall seconds and peak resident MB of a process that must succeed."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if threads is not None:
        env |= dict.fromkeys(THREADS, str(threads))
    launcher = [sys.executable, "-S", "-c", LAUNCH, *command]
    said = subprocess.run(launcher, env=env, capture_output=True, text=True, check=True).stdout
    status, error, cpu, wall, peak = json.loads(said)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{error}")
    return cpu, wall, peak
