"""Run by test_saving_memory.py in a process of its own: bytes by which saving and exporting raise its peak.

python saving.py FOLDER LIMIT        FOLDER/model: a float model; prints JSON
"""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open

import fewbit
from fewbit.format import BF16, Format, Group
from fewbit.grid import Int
from fewbit.io.source import open_source
from fewbit.recipe import Recipe, Rule
from fewbit.stream import job
from fewbit.stream.export import export

RECIPE = Recipe(name="rtn", rules=(Rule(weight=Format(grid=Int(8), block=Group(128), scale=BF16)),))


def reset() -> int:
    """Start the peak again at what is resident now, in bytes. (``ru_maxrss`` would count the parent's.)"""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """The largest resident size since ``reset``, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Everything once on a small model, so that what is imported and kept for good does not count."""
    torch.set_num_threads(1)
    folder, limit = Path(sys.argv[1]), int(sys.argv[2])
    job.SHARD_BYTES = limit
    for name in ("small", "model"):
        out = folder / f"{name}-quantized"
        before = reset()
        fewbit.quantize(folder / name, RECIPE, output=out, read_back=False)
        save = peak() - before
        before = reset()
        export(out, "gptq", folder / f"{name}-gptq", shard_bytes=limit, verify=False)
        found = {"save": save, "export": peak() - before}
        weights = sum(i.nbytes // i.dtype.itemsize for i in open_source(folder / name).tensors().values())
        found["weights"] = weights
        for step, made in (("save", out), ("export", folder / f"{name}-gptq")):
            files = sorted(made.glob("*.safetensors"))
            found[f"{step} shards"] = [file.stat().st_size for file in files]
            largest = 0
            for file in files:
                with safe_open(file, "pt") as held:
                    largest = max(largest, *(held.get_tensor(n).nbytes for n in held.keys()))  # noqa: SIM118
            found[f"{step} largest"] = largest
    print(json.dumps(found))


main()
