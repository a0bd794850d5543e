"""Rows at work: a process each, whose messages become calls, and which all end together.

The road not taken is a pool of processes: one that the system kills for its memory takes the pool with it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Lock
from typing import Any


class Processes:
    """Processes of `fewbit.compare.worker`, ``workers`` at a time at most, called from as many threads.

    Each gets its share of the processors, unless OMP_NUM_THREADS has settled that.
    """

    def __init__(self, workers: int):
        share = {} if workers == 1 else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
        self._environment = share | os.environ
        self._running: set[subprocess.Popen] = set()
        self._lock, self._ended = Lock(), Event()

    def run(self, job: dict[str, Any], step: Callable[[str, int, int], None]) -> tuple[str, Any]:
        """Do a job in a process of its own: ("row", figures) or ("failed", sentence)."""
        words = [sys.executable, "-P", "-W", "ignore", "-m", "fewbit.compare.worker"]
        with self._lock:
            if self._ended.is_set():
                return "failed", "the comparison has ended"
            process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environment
            )
            self._running.add(process)
        try:
            with suppress(BrokenPipeError):  # one that has died already: its end says why
                process.stdin.write(json.dumps(job))
                process.stdin.close()
            for line in process.stdout:
                kind, *said = json.loads(line)
                if kind == "step":
                    step(*said)
                else:
                    return kind, said[0]
            code = process.wait()
        finally:
            process.kill()  # no harm to one that has ended
            process.wait()
            with self._lock:
                self._running.discard(process)
        if code < 0:
            name = signal.Signals(-code).name
            memory = ", as happens when memory runs out" if name == "SIGKILL" else ""
            return "failed", f"the process of this row was ended by {name}{memory}"
        return "failed", f"the process of this row left with code {code} and no result"

    def end(self) -> None:
        """Kill what runs, and let nothing begin any more."""
        with self._lock:
            self._ended.set()
            for process in self._running:
                process.kill()

    @property
    def ended(self) -> bool:
        """Whether `end` was called."""
        return self._ended.is_set()
