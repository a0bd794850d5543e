"""What each part of the gptq recipe brings, and GPTQ against rounding on the same grid.

    python benchmarks/gptq_parts.py [--data FOLDER] [--only SUBSTRING]

Quantizes the packaged SmolLM2 (32 x 512 calibration tokens, seed 0) with each row's settings and evaluates
each checkpoint as it was saved: WikiText-2 raw test, solid join, 12 windows of 512, against the float model.
Table "parts" calibrates on WikiText-2 validation, as the peers' figures did; table "bits" on C4. Writes
benchmarks/results/gptq_parts.md, row by row; finished rows are kept, so an interrupted run goes on.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch

import fewbit
from fewbit.evaluate import Protocol, windows
from fewbit.io.source import open_source
from fewbit.io.text import read_text

ROOT = Path(__file__).parent
PARTS = {  # settings beyond bits=4, group_size=64
    "rtn, min-max": ("rtn", {"divisor": "full"}),
    "rtn, weighted MSE range": ("rtn", {"range": "mse", "divisor": "full"}),
    "gptq, min-max, natural order": ("gptq", {"range": "minmax", "act_order": "false"}),
    "gptq, min-max, act-order": ("gptq", {"range": "minmax"}),
    "gptq, MSE range, act-order": ("gptq", {"range": "mse-plain"}),
    "gptq, weighted MSE range, natural order": ("gptq", {"act_order": "false"}),
    "gptq, weighted MSE range, dynamic groups": ("gptq", {"act_order": "false", "static_groups": "false"}),
    "gptq, weighted MSE range, act-order (default)": ("gptq", {}),
}
ASYMMETRIC = (
    "rtn, min-max",
    "gptq, min-max, natural order",
    "gptq, weighted MSE range, act-order (default)",
)


def rows(data: Path):
    """(table, name, recipe, settings, calibration file)."""
    valid, c4 = data / "wikitext2_raw_valid.txt", data / "calib_c4_en_train_first1000.jsonl"
    for symmetric in ("true", "false"):
        kind = "symmetric" if symmetric == "true" else "asymmetric"
        for name, (recipe, settings) in PARTS.items():
            if symmetric == "false" and name not in ASYMMETRIC:
                continue
            yield "parts", f"4 bit g64 {kind}: {name}", recipe, {"symmetric": symmetric, **settings}, valid
    for bits in ("4", "3", "2"):
        for symmetric in ("true", "false"):
            kind = "symmetric" if symmetric == "true" else "asymmetric"
            for name in ("rtn, weighted MSE range", "gptq, weighted MSE range, act-order (default)"):
                recipe, settings = PARTS[name]
                settings = {"bits": bits, "symmetric": symmetric, **settings}
                yield "bits", f"{bits} bit g64 {kind}: {name}", recipe, settings, c4


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=ROOT.parent.parent / "shared" / "data")
    parser.add_argument("--only", default="")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    protocol = Protocol()
    source = open_source("smollm2")
    tokens = windows(source.tokenizer(), read_text(args.data / "wikitext2_raw_test.txt"), protocol)
    original = fewbit.load("smollm2")
    kept = ROOT / "results" / "gptq_parts.json"
    torch.set_num_threads(args.threads)
    done = json.loads(kept.read_text()) if kept.exists() else {}
    for table, name, recipe, settings, text in rows(args.data):
        if f"{table}/{name}" in done or args.only not in f"{table}/{name}":
            continue
        settings = {"group_size": "64", **settings}
        folder = Path(tempfile.mkdtemp())
        calibration = fewbit.Calibration(source=str(text), samples=32, seqlen=512, seed=0)
        made = fewbit.recipes.named(recipe, settings)
        result = fewbit.quantize("smollm2", made, output=folder / "out", calibration=calibration)
        got = fewbit.evaluate(fewbit.load(folder / "out"), tokens, protocol, against=original)
        shutil.rmtree(folder)
        done = json.loads(kept.read_text()) if kept.exists() else {}  # another process may have added rows
        done[f"{table}/{name}"] = {
            "bits": result.plan.bits_per_weight, "kl": got.kl, "kl_error": got.kl_error, "top1": got.top1,
            "perplexity": got.perplexity,
        }  # fmt: skip
        print(name, done[f"{table}/{name}"], flush=True)
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps(done, indent=1))
        write(done)


def write(done: dict):
    """The two tables as Markdown."""
    lines = ["Printed by `python benchmarks/gptq_parts.py` (see its first lines for the protocol).", ""]
    for table in ("parts", "bits"):
        lines += [f"## {table}", "", "| row | bits / weight | KL | ± | top-1 % | perplexity |"]
        lines += ["|---|--:|--:|--:|--:|--:|"]
        for key, r in done.items():
            if key.startswith(table + "/"):
                lines.append(
                    f"| {key.split('/', 1)[1]} | {r['bits']:.3f} | {r['kl']:.4f} | {r['kl_error']:.4f} | "
                    f"{100 * r['top1']:.1f} | {r['perplexity']:.2f} |"
                )
        lines.append("")
    (ROOT / "results" / "gptq_parts.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
