"""Which score orders layers as the KL of each layer alone does?

    python benchmarks/sensitivity.py [--data FOLDER] [--every N] [--windows W] [--device cpu] [--results FILE]

SmolLM2-135M, every N-th of the 210 layers of its blocks: rounding at 2, 3 and 4 bits (asymmetric, groups of
64), MXFP4, GPTQ at 3 bits and HIGGS with feedback at 3 bits. Scores are those of `fewbit sensitivity` on W
windows of 512 tokens of WikiText-2 validation, of which three quarters are what solvers see and the last
quarter judges; KL is measured on 4 windows of 256 of that quarter. Beside them, what a score would be without
each of its parts:

    fisher, seen text     errors judged on the text that solvers saw
    fisher, a t_eff^2     one coefficient a layer and the plain Gram matrix, no weights of rows and tokens
    fisher, a t^2         the error of the weight alone

Spearman's rank correlation with KL over layers; log sd: standard deviation of log(score / KL), what is left
of the differences between layers; sum: of scores over that of KL.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

import fewbit
from fewbit.io.source import open_source
from fewbit.nn.blocks import weight_of
from fewbit.recipe.entry import from_words
from fewbit.search import (
    Choice,
    Judge,
    Score,
    Texts,
    block_linears,
    cost,
    error,
    fisher_inputs,
    fisher_rows,
    gram_matrices,
)
from fewbit.search.judge import replaced
from fewbit.search.linearity import response
from fewbit.search.measure import NOISE_LEVELS
from fewbit.solve import Stats
from fewbit.stream.data import Calibration, sample_tokens

ROOT = Path(__file__).parent
CANDIDATES = (
    *(f"rtn:bits={b},group_size=64,symmetric=false" for b in (2, 3, 4)), "rtn:format=mxfp4",
    "gptq:bits=3,group_size=64,symmetric=false", "higgs:bits=3,solver=gptq",
)  # fmt: skip
SCORES = ("output", "noise", "fisher", "fisher, seen text", "fisher, a t_eff^2", "fisher, a t^2")


def choice(words: str) -> Choice:
    """What a recipe of words does with every layer."""
    rule = from_words(words).recipe.rules[0]
    return Choice(format=rule.weight, solver=rule.solver, basis=rule.basis, name=words)


@torch.no_grad()
def rows(model: torch.nn.Module, names: list[str], texts: Texts):
    """One row of all scores for each layer and candidate."""
    modules, choices = block_linears(model), [choice(words) for words in CANDIDATES]
    r = fisher_rows(model, texts.solve)
    seen, held = (gram_matrices(model, names, t) for t in (texts.solve, texts.judge))
    near = fisher_inputs(model, names, texts.judge)
    own = fisher_inputs(model, names, texts.solve)
    with Judge(model, texts.kl) as judge:
        for name in names:
            judge.start_at(name)
            module = modules[name]
            w = weight_of(module).detach().float()
            a = float(r[name].mean() * w.square().sum())
            noise = response(judge, name, module.weight, NOISE_LEVELS).coefficient
            for one in choices:
                value = one.solve(w, Stats(gram=seen[name]))
                found = error(w, value, held[name])
                with replaced(module.weight, value):
                    kl = judge.kl()
                yield {
                    "layer": name, "candidate": one.name, "kl": kl, Score.OUTPUT: found.output,
                    Score.NOISE: noise * found.effective, Score.FISHER: cost(w - value, r[name], near[name]),
                    "fisher, seen text": cost(w - value, r[name], own[name]),
                    "fisher, a t_eff^2": a * found.effective, "fisher, a t^2": a * found.weight,
                }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent.parent / "shared" / "data")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "sensitivity.json")
    args = parser.parse_args()
    text = args.data / "wikitext2_raw_valid.txt"
    tokens = sample_tokens(
        Calibration(source=text, samples=args.windows, seqlen=512), open_source("smollm2").tokenizer()
    )
    judging = tokens[-max(1, args.windows // 4) :]
    model = fewbit.load("smollm2", args.device, torch.float32)
    names, found = list(block_linears(model))[:: args.every], []
    for row in rows(model, names, Texts.split(tokens, judging[:4, :256])):
        found.append(row)
        args.results.write_text(json.dumps({"windows": args.windows, "rows": found}) + "\n")
        print(row["layer"], row["candidate"], f"{row['kl']:.5f} {row['fisher']:.5f}", flush=True)
    args.results.with_suffix(".md").write_text(markdown(args, found))


def markdown(args: argparse.Namespace, found: list[dict]) -> str:
    """A table for each candidate, and for all together."""
    layers = len({row["layer"] for row in found})
    lines = [
        "# Scores of single layers beside their KL", "",
        f"Printed by `python benchmarks/sensitivity.py --every {args.every} --windows {args.windows}` on "
        f"{args.device} (its first lines say",
        f"what is measured): {layers} layers.", "",
    ]  # fmt: skip
    for name in (*CANDIDATES, "all together"):
        own = [row for row in found if name in (row["candidate"], "all together")]
        kl = np.array([row["kl"] for row in own])
        lines += [f"## {name}", "", f"Sum of KL {kl.sum():.4f}", ""]
        lines += ["| score | rank correlation | log sd | sum |", "|---|--:|--:|--:|"]
        for score in SCORES:
            value = np.array([row[score] for row in own])
            spread = np.log(value / kl).std()
            share = value.sum() / kl.sum() if score != "output" else math.nan
            rho = spearmanr(value, kl).statistic
            shown = "" if math.isnan(share) else f"{share:.2f}"
            lines.append(f"| {score} | {rho:.3f} | {spread:.2f} | {shown} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
