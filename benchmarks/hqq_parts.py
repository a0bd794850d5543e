"""What each part of the hqq recipe brings, and why a float zero alone loses to plain rounding at 3 bits.

    python benchmarks/hqq_parts.py [--data FOLDER] [--only SUBSTRING] [--threads N]

The packaged SmolLM2, each linear layer replaced in memory by what its codes mean; WikiText-2 raw test, solid
join, 12 windows of 512, against the float model. Nothing is calibrated. Rows "... kept" put back the float
weights of the 8 input columns (of 576) whose inputs are largest, in the layers named: 8 x 512 tokens of
WikiText-2 validation say which. Beside KL: squared error of the weights over their squares, and the same with
errors and weights multiplied by the mean squared input of their column, in v_proj and in all other layers,
means over layers; and the share of a group's squared error that is its mean (1 / 64 when errors are
independent). Seconds are those of all 210 layers.

Writes benchmarks/results/hqq_parts.md row by row; finished rows are kept, so an interrupted run goes on.
"""

import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace

import torch

import fewbit
from fewbit.evaluate import Protocol, evaluate, windows
from fewbit.io.source import open_source
from fewbit.io.text import read_text
from fewbit.recipe import hqq, rtn
from fewbit.solve import Stats

ROOT = Path(__file__).parent
INTEGER = {"symmetric": False, "scale": "fp16"}
FLOAT = {**INTEGER, "zero": "float"}
PUBLISHED = {"stretch": False, "columns": 0.0}  # the published code rounds the first zero at 4 bits alone
ROWS = {  # recipe, settings beyond bits and group_size, projections whose 8 largest inputs keep float weights
    "rtn, integer zero": (rtn, INTEGER, ""),
    "rtn, float zero": (rtn, FLOAT, ""),
    "hqq as published, first zero not rounded": (hqq, {**PUBLISHED, "round_zero": False}, ""),
    "hqq as published, first zero rounded": (hqq, PUBLISHED, ""),
    "first zero rounded, stretched": (hqq, {"columns": 0.0}, ""),
    "first zero rounded, stretched, p = 0.7 in steps": (hqq, {"columns": 0.0, "norm": 0.7}, ""),
    "stretched, columns weighted": (hqq, {"round_zero": False}, ""),
    "first zero rounded, stretched, columns weighted (default)": (hqq, {}, ""),
    "default with an integer zero": (hqq, {"zero": "integer"}, ""),
    "rtn, integer zero, 8 columns of v kept": (rtn, INTEGER, "v"),
    "rtn, float zero, 8 columns of v kept": (rtn, FLOAT, "v"),
}


def energies(model, layers, tokens) -> dict[str, torch.Tensor]:
    """Mean squared input of each column, by layer."""
    total = {}

    def add(name):
        def hook(module, inputs):
            total[name] = total.get(name, 0) + inputs[0][0].square().sum(0)

        return hook

    handles = [module.register_forward_pre_hook(add(name)) for name, module in layers.items()]
    with torch.no_grad():
        for ids in tokens:
            model(input_ids=ids[None])
    for handle in handles:
        handle.remove()
    return {name: h / h.mean() for name, h in total.items()}


def quantized(w, rule):
    """What the codes of ``w`` mean, and their bits per weight."""
    q = rule.solver(w, Stats(), rule.weight)
    return q.dequantize(), q.bits_per_weight


def weights_row(made, kept: str, layers, original, h) -> dict:
    """Replace every layer's weights; errors by layer, averaged."""
    rule, rows, spent, bits = made.rules[0], [], 0.0, 0.0
    for name, module in layers.items():
        w, projection = original[name], name.rpartition(".")[2]
        start = time.process_time()
        got, bits = quantized(w, rule)
        spent += time.process_time() - start
        if projection in {f"{letter}_proj" for letter in kept}:
            top = h[name].topk(8).indices
            got[:, top] = w[:, top]
        module.weight.data.copy_(got)
        e = got - w
        groups = e.unflatten(-1, (-1, 64))
        seen = [float((t.square().mean(0) * h[name]).sum()) for t in (e, w)]
        rows.append((projection == "v_proj", float(e.square().sum() / w.square().sum()), seen[0] / seen[1],
                     float(groups.mean(-1).square().sum() * 64 / e.square().sum())))  # fmt: skip
    v, error, felt, mean = torch.tensor(rows, dtype=torch.float64).unbind(1)
    return {
        "bits": bits, "error": error.mean().item(), "felt_v": felt[v == 1].mean().item(),
        "felt": felt[v == 0].mean().item(), "mean": mean.mean().item(), "seconds": spent,
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=ROOT.parent.parent / "shared" / "data")
    parser.add_argument("--only", default="")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    protocol = Protocol()
    tokenizer = open_source("smollm2").tokenizer()
    tokens = windows(tokenizer, read_text(args.data / "wikitext2_raw_test.txt"), protocol)
    seen = windows(tokenizer, read_text(args.data / "wikitext2_raw_valid.txt"), Protocol(windows=8))
    model = fewbit.load("smollm2")
    layers = {n: m for n, m in model.model.layers.named_modules() if isinstance(m, torch.nn.Linear)}
    original = {name: module.weight.data.clone() for name, module in layers.items()}
    h = energies(model, layers, seen)
    with torch.no_grad():
        logits = {tuple(ids.tolist()): model(input_ids=ids[None]).logits for ids in tokens}
    against = lambda input_ids, **_: SimpleNamespace(logits=logits[tuple(input_ids[0].tolist())])  # noqa: E731
    kept = ROOT / "results" / "hqq_parts.json"
    done = json.loads(kept.read_text()) if kept.exists() else {}
    for bits in (3, 4):
        for name, (recipe, settings, columns) in ROWS.items():
            key = f"{bits} bit: {name}"
            if key in done or args.only not in key or (columns and bits == 4):
                continue
            made = recipe(bits=bits, group_size=64, **settings)
            done[key] = weights_row(made, columns, layers, original, h)
            got = evaluate(model, tokens, protocol, against=against)
            done[key] |= {
                "kl": got.kl, "kl_error": got.kl_error, "top1": got.top1, "perplexity": got.perplexity,
            }  # fmt: skip
            print(key, done[key], flush=True)
            kept.write_text(json.dumps(done, indent=1))
            write(done)


def write(done: dict):
    """The table as Markdown."""
    lines = [
        "Printed by `python benchmarks/hqq_parts.py` (see its first lines for protocol and columns).",
        "",
        "| SmolLM2, group 64, fp16 scales | bits / weight | KL | ± | top-1 % | perplexity | error | "
        "times inputs: v | others | mean's share | CPU s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for key in sorted(done, key=lambda k: (k[0], list(ROWS).index(k.split(": ", 1)[1]))):
        r = done[key]
        lines.append(
            f"| {key} | {r['bits']:.3f} | {r['kl']:.4f} | {r['kl_error']:.4f} | {100 * r['top1']:.1f} | "
            f"{r['perplexity']:.2f} | {r['error']:.4f} | {r['felt_v']:.4f} | {r['felt']:.4f} | "
            f"{r['mean']:.3f} | {r['seconds']:.1f} |"
        )
    (ROOT / "results" / "hqq_parts.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
