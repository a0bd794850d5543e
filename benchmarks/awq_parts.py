"""What each part of the awq recipe brings beside rounding and GPTQ on one grid; SmoothQuant's levels.

    python benchmarks/awq_parts.py [--data FOLDER] [--only SUBSTRING] [--model MODEL] [--device cpu]

Quantizes SmolLM2, saved in float32 (32 x 512 calibration tokens of WikiText-2 validation, seed 0), with each
row's settings and evaluates each checkpoint as it was saved: WikiText-2 raw test, solid join, 12 windows of
512, against the float model. Rows "planted" start from the same model with three channels of every norm 40 to
80 times as large and the columns of their readers as much smaller: in floating point it computes the same.
Writes benchmarks/results/awq_parts.md, row by row; finished rows are kept, so an interrupted run goes on.
"""

import argparse
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

import fewbit
from fewbit.evaluate import Protocol, windows
from fewbit.io.source import open_source
from fewbit.io.text import read_text

ROOT = Path(__file__).parent
KEPT = ROOT / "results" / "awq_parts.json"
PLANTED = {10: 60.0, 200: 40.0, 400: 80.0}
WEIGHTS = {  # settings beyond group_size=64, symmetric=false
    "rtn, min-max": ("rtn", {}),
    "rtn, weighted MSE range": ("rtn", {"range": "mse"}),
    "rtn, clip search": ("rtn", {"range": "output"}),
    "awq, scale search alone": ("awq", {"range": "minmax"}),
    "awq, scale search and weighted MSE range": ("awq", {"range": "mse"}),
    "awq, scale search and clip search (default)": ("awq", {}),
    "awq, with duo scaling": ("awq", {"duo": "true"}),
    "awq, 10 points": ("awq", {"points": "10"}),
    "gptq": ("gptq", {}),
}


def rows():
    """(name, recipe, planted)."""
    for name, (recipe, settings) in WEIGHTS.items():
        settings = {"group_size": "64", "symmetric": "false", **settings}
        yield f"4 bit g64: {name}", fewbit.recipes.named(recipe, settings), False
        if name in (
            "rtn, min-max",
            "rtn, clip search",
            "awq, scale search and clip search (default)",
            "gptq",
        ):
            yield f"3 bit g64: {name}", fewbit.recipes.named(recipe, {**settings, "bits": "3"}), False
    for planted in (False, True):
        for level in ("O1", "O2", "O3"):
            smooth = fewbit.recipes.smoothquant(level=level)
            kind = f"W8A8 {level}{', planted' if planted else ''}"
            yield f"{kind}: none", replace(smooth, transforms=()), planted
            yield f"{kind}: alpha 0.5", smooth, planted
            yield f"{kind}: alpha 0.8", fewbit.recipes.smoothquant(level=level, alpha=0.8), planted
            yield (
                f"{kind}: alpha 0.5, linears too",
                fewbit.recipes.smoothquant(level=level, linear=True),
                planted,
            )


@torch.no_grad()
def copied(model: str, folder: Path, factors: dict[int, float]) -> str:
    """``model`` with outlier channels behind every norm, saved with its tokenizer in float32.

    On a GPU blocks run in the dtype of the source; in bfloat16 no fold leaves their output as it was.
    """
    original = fewbit.load(model, dtype=torch.float32)
    for block in original.model.layers:
        attention, mlp = block.self_attn, block.mlp
        readers = ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj))
        for norm, linears in zip(
            (block.input_layernorm, block.post_attention_layernorm), readers, strict=True
        ):
            for channel, factor in factors.items():
                norm.weight[channel] *= factor
                for linear in linears:
                    linear.weight[:, channel] /= factor
    original.save_pretrained(folder)
    open_source(model).tokenizer().save_pretrained(folder)
    return str(folder)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=ROOT.parent.parent / "shared" / "data")
    parser.add_argument("--only", default="")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    protocol = Protocol()
    text = read_text(args.data / "wikitext2_raw_test.txt")
    tokens = windows(open_source(args.model).tokenizer(), text, protocol).to(args.device)
    original = fewbit.load(args.model, device=args.device, dtype=torch.float32)
    calibration = fewbit.Calibration(
        source=str(args.data / "wikitext2_raw_valid.txt"), samples=32, seqlen=512, seed=0
    )
    folder = Path(tempfile.mkdtemp())
    plain, planted = (copied(args.model, folder / str(bool(f)), f) for f in ({}, PLANTED))
    for name, recipe, with_outliers in rows():
        if args.only not in name or name in kept():
            continue
        result = fewbit.quantize(
            planted if with_outliers else plain, recipe,
            output=folder / "out", calibration=calibration, device=args.device,
        )  # fmt: skip
        model = fewbit.load(folder / "out", device=args.device, dtype=torch.float32)
        got = fewbit.evaluate(model, tokens, protocol, against=original)
        shutil.rmtree(folder / "out")
        row = {
            "bits": result.plan.bits_per_weight, "kl": got.kl, "kl_error": got.kl_error, "top1": got.top1,
            "perplexity": got.perplexity, "not folded": sum(bool(r.notes) for r in result.rows),
        }  # fmt: skip
        print(json.dumps({name: row}), flush=True)
        write(kept() | {name: row})  # another process may have added rows
    shutil.rmtree(folder)


def kept() -> dict:
    """Rows of earlier runs."""
    return json.loads(KEPT.read_text()) if KEPT.exists() else {}


def write(done: dict):
    """The table as Markdown, in the order of ``rows``."""
    lines = ["Printed by `python benchmarks/awq_parts.py` (see its first lines for the protocol).", ""]
    lines += ["| row | bits / weight | KL | ± | top-1 % | perplexity |", "|---|--:|--:|--:|--:|--:|"]
    for name in (n for n, _, _ in rows() if n in done):
        r = done[name]
        lines.append(
            f"| {name} | {r['bits']:.3f} | {r['kl']:.4f} | {r['kl_error']:.4f} | {100 * r['top1']:.1f} | "
            f"{r['perplexity']:.2f} |"
        )
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text(json.dumps(done, indent=1))
    KEPT.with_suffix(".md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
