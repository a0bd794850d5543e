"""One row, in a process that does nothing else: ``python -m fewbit.compare.worker JOB``.

JOB is JSON on standard input. What happens is told on standard output, one JSON list a line: ["step", what,
done, total] while it works, then ["row", figures] or ["failed", sentence]. Time and memory are read when the
checkpoint is written and before anything is loaded to judge it.

The road not taken is a pool of processes: one that the system kills for its memory takes the pool with it.
"""

from __future__ import annotations

import gc
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from fewbit.compare.rows import CPU
from fewbit.errors import InputError
from fewbit.stream.progress import Progress


class _Told(Progress):
    """A run's blocks, as steps."""

    def __init__(self, tell: Any):
        self._tell = tell

    def block(self, done: int, total: int, resumed: bool) -> None:
        """A block is finished."""
        self._tell("step", "block", done, total)


def peak_bytes(device: str) -> int:
    """The largest resident size of this process, or what was allocated at most on its GPU."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # getrusage counts what the process was forked from
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(status["VmHWM"].split()[0])
    except (OSError, KeyError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def device_name(device: str) -> str:
    """CPU, or a GPU's name without its maker and memory: H100."""
    import torch

    if torch.device(device).type == "cpu":
        return CPU
    words = torch.cuda.get_device_name(device).split()
    return next((word for word in words if any(c.isdigit() for c in word)), words[-1])


def cpu_seconds() -> float:
    """Seconds of all processors that this process has used."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def quantized(job: dict[str, Any], out: Path, tell: Any) -> dict[str, Any]:
    """Quantize into ``out``; bits, bytes, time and memory."""
    from fewbit.evaluate import size_bytes
    from fewbit.recipe import from_yaml
    from fewbit.stream.data import Calibration
    from fewbit.stream.quantize import quantize

    start = time.perf_counter()
    result = quantize(
        job["model"],
        from_yaml(job["recipe"]),
        output=out,
        calibration=Calibration(**job["calibration"]),
        device=job["device"],
        progress=_Told(tell),
    )
    return {
        "wall_seconds": time.perf_counter() - start,
        "cpu_seconds": cpu_seconds(),
        "peak_bytes": peak_bytes(job["device"]),
        "bits": result.plan.bits_per_weight,
        "size_bytes": size_bytes(out),
        "checkpoint": result.plan.checkpoint,
    }


def judged(job: dict[str, Any], path: str | Path, against: str | None, tell: Any) -> dict[str, Any]:
    """Evaluate what lies at ``path`` by the job's windows and tasks."""
    import torch

    from fewbit.evaluate import Protocol, evaluate
    from fewbit.io.load import load
    from fewbit.io.source import open_source
    from fewbit.io.text import Join

    dtype = None if job["dtype"] is None else getattr(torch, job["dtype"])
    model = load(path, job["device"], dtype)
    original = None if against is None else load(against, job["device"], dtype)
    protocol = Protocol(**(job["protocol"] | {"join": Join(job["protocol"]["join"])}))
    tokens = torch.load(job["tokens"], weights_only=True)
    found = {}
    # A masked language model has nothing to tell of itself alone.
    if against is not None or not type(model).__name__.endswith("ForMaskedLM"):
        got = evaluate(
            model,
            tokens,
            protocol,
            against=original,
            progress=lambda done, total: tell("step", "window", done, total),
        )
        found = {k: getattr(got, k) for k in ("perplexity", "nll_error", "kl", "kl_error", "top1")}
    del original
    gc.collect()
    if job["tasks"]:
        from fewbit.evaluate.tasks import answer, open_tasks

        with open_tasks(job["tasks"], job["task_data"], job["limit"]) as tasks:
            asked = answer(
                model,
                open_source(job["model"]).tokenizer(),
                tasks,
                limit=job["limit"],
                batch=job["batch"],
                progress=lambda done, total: tell("step", "request", done, total),
            )
        found |= {"scores": [score.as_dict() for score in asked.scores], "cut": asked.cut}
    return found


def original_size(model: str) -> dict[str, Any]:
    """Bits and bytes of a plain checkpoint of the model in its own dtype."""
    from fewbit.io.source import open_source

    source = open_source(model)
    return {
        "bits": 8.0 * source.dtype.itemsize,
        "size_bytes": sum(math.prod(t.shape) for t in source.tensors().values()) * source.dtype.itemsize,
    }


def run(job: dict[str, Any], tell: Any) -> dict[str, Any]:
    """The figures of one row."""
    on = {"on": device_name(job["device"])}
    if job["recipe"] is None:
        return on | original_size(job["model"]) | judged(job, job["model"], None, tell)
    out = Path(job["folder"]) / "checkpoint"
    figures = on | quantized(job, out, tell)
    figures |= judged(job, out, job["model"], tell)
    shutil.rmtree(out)
    return figures


def main() -> None:
    """Read the job, do it, tell."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this one ends it
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no message

    def tell(*message: Any) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    job = json.loads(sys.stdin.read())
    try:
        tell("row", run(job, tell))
    except InputError as error:
        tell("failed", str(error))
    except Exception as error:
        traceback.print_exc()
        said = (str(error).splitlines() or [""])[0]
        tell("failed", f"a defect of fewbit: {type(error).__name__}: {said}"[:300])


if __name__ == "__main__":
    main()
