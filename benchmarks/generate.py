"""Tokens a second of `fewbit generate` from checkpoints of many kinds on one core.

    python benchmarks/generate.py [--label after] [--only TEXT ...] [--data FOLDER] [--tokens 32]

SmolLM2-135M. Checkpoints are made cheaply, for how good they are does not change how fast they are, and stay
in ``runs/generate`` for the next time. A row is a process of its own with one thread: it loads the
checkpoint, writes two tokens to warm up and then ``--tokens`` tokens greedily after a prompt, three times, as
`fewbit generate` does. Tokens per second of processor time, the best of three, since other programs may use
the core too; the prompt's forward is counted. `agree`: new tokens that are those of label "before", from the
first on.

Rows go to results/generate.json under ``--label`` as they come; the table shows every label. "before" was
printed at the commit that it names.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from measure import FEWBIT, THREADS

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "generate.json"
PROMPT = "The history of the city begins with a small harbour on the river, where"
WANTED = ("before", "after")  # labels, in the order of the columns
DTYPES = ("float32", "bfloat16")
RECIPES = {
    "QTIP mad, 2 bit, L = 10": ("qtip", "--bits", "2", "--set", "state_bits=10"),
    "QTIP mad, 3 bit, L = 10": ("qtip", "--bits", "3", "--set", "state_bits=10"),
    "QTIP hyb, 2 bit, L = 10": ("qtip", "--bits", "2", "--set", "state_bits=10", "--set", "code=hyb"),
    "QuIP# (E8P), 2 bit": ("quip-sharp", "--bits", "2"),
    "QuIP# (E8P + E8P), 4 bit": ("quip-sharp", "--bits", "4"),
    "HIGGS, p = 2, 4 bit": ("higgs", "--bits", "4"),
    "GPTVQ, d = 2, 2 bit": ("gptvq", "--set", "iterations=3", "--set", "updates=0"),
    "AQLM 2x8, 2 bit": ("aqlm", "--set", "iterations=2", "--set", "epochs=0", "--set", "updates=0"),
    "GPTQ int4, groups of 64": ("gptq", "--bits", "4", "--group-size", "64"),
    "NF4": ("nf4",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent.parent / "shared" / "data")
    parser.add_argument("--label", default="after")
    parser.add_argument("--only", nargs="*", default=[""], help="rows whose names hold one of these")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--worker", nargs=2, metavar=("CHECKPOINT", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(speak(*args.worker, args.tokens)))
        return
    commit = said("git", "rev-parse", "--short", "HEAD").strip()
    for name in ("original", *RECIPES):
        if not any(text in name for text in args.only):
            continue
        path = "smollm2" if name == "original" else str(made(name, args.data))
        for dtype in DTYPES:
            worker = (sys.executable, __file__, "--worker", path, dtype, "--tokens", str(args.tokens))
            row = json.loads(said(*worker).splitlines()[-1])
            print(args.label, name, dtype, f"{row['per_cpu_second']:.2f} {row['per_second']:.2f}", flush=True)
            done = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}  # another label may run beside
            mine = done.setdefault(args.label, {"commit": commit, "rows": {}})
            mine["rows"][f"{name}/{dtype}"] = row
            RESULTS.write_text(json.dumps(done, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(markdown(json.loads(RESULTS.read_text())))


def made(name: str, data: Path) -> Path:
    """The checkpoint of a row: kept, or made now from 4 windows."""
    path = ROOT.parent / "runs" / "generate" / "".join(c if c.isalnum() else "-" for c in name)
    if not path.exists():
        recipe, *settings = RECIPES[name]
        text = ("--calibration", str(data / "wikitext2_raw_valid.txt"), "--samples", "4")
        said(
            FEWBIT, "quantize", "smollm2", "-r", recipe, *settings, *text, "--device", "cpu", "-o", str(path)
        )
    return path


def said(*command: str | Path) -> str:
    """Standard output of a process with one thread that must succeed."""
    env = {**os.environ, **dict.fromkeys(THREADS, "1")}
    return subprocess.run(
        list(map(str, command)), env=env, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def speak(checkpoint: str, dtype: str, tokens: int) -> dict:
    """Load, warm up and write; in a process that does nothing else."""
    import torch

    import fewbit
    from fewbit.io.source import open_source

    torch.set_num_threads(1)
    tokenizer = open_source("smollm2").tokenizer()
    model = fewbit.load(checkpoint, device="cpu", dtype=getattr(torch, dtype))
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    best = {"per_cpu_second": 0.0, "per_second": 0.0}
    for run in range(4):
        new = tokens if run else 2
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
                min_new_tokens=new, pad_token_id=0,
            )  # fmt: skip
        if run:
            wall, cpu = new / (time.perf_counter() - wall), new / (time.process_time() - cpu)
            best = {
                "per_cpu_second": max(best["per_cpu_second"], cpu),
                "per_second": max(best["per_second"], wall),
            }
    return best | {"ids": out[0, ids.shape[1] :].tolist()}


def markdown(done: dict) -> str:
    """The table: one line a recipe, both dtypes, every label."""
    labels = [label for label in WANTED if label in done]
    labels += [label for label in done if label not in labels]
    columns = [(dtype, label) for dtype in DTYPES for label in labels]
    lines = [
        "Tokens per second of processor time on one core, SmolLM2: `python benchmarks/generate.py`",
        "(see its first lines), 8 to 32 new tokens. Other programs kept both cores busy meanwhile, in some",
        "rows more than in others, so small differences mean nothing.",
        "Commits: " + ", ".join(f"{label} {done[label]['commit']}" for label in labels) + ".",
        "",
        "| checkpoint | " + " | ".join(f"{dtype}, {label}" for dtype, label in columns) + " | agree |",
        "|---|" + "--:|" * (len(columns) + 1),
    ]
    for name in ("original", *RECIPES):
        rows = {c: done[c[1]]["rows"].get(f"{name}/{c[0]}") for c in columns}
        both = [done[label]["rows"].get(f"{name}/float32") if label in done else None for label in WANTED]
        agree = [agreement(*both)]
        cells = [f"{row['per_cpu_second']:.1f}" if row else "-" for row in rows.values()]
        lines.append(f"| {name} | " + " | ".join(cells + agree) + " |")
    return "\n".join(lines) + "\n"


def agreement(before: dict | None, after: dict | None) -> str:
    """How many of the new tokens are the same, from the first on."""
    if not before or not after:
        return "-"
    pairs = list(zip(before["ids"], after["ids"], strict=False))
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return f"{same} of {len(pairs)}"


if __name__ == "__main__":
    main()
