"""What a short training with the rounding in the loop wins back, on the packaged SmolLM2.

    OMP_NUM_THREADS=1 python benchmarks/qat.py --data FOLDER [--steps 40] [--bits 3]

Asymmetric integers in groups of 64, all linears of the blocks. The rounded model, and the same after as many
updates of AdamW as ``steps`` says (weights 5e-5, steps and zeros 1e-4 of `LearnedRange`, cosine, gradients
clipped to 1) on different windows of 128 tokens of WikiText-2 raw validation. Perplexity of the converted
models on WikiText-2 raw test, first 4 windows of 512.

Writes benchmarks/results/qat.md.
"""

import argparse
import math
import time
from pathlib import Path

import torch

import fewbit
from fewbit.evaluate import Protocol, windows
from fewbit.io.source import open_source
from fewbit.io.text import read_text
from fewbit.train import LearnedRange, convert, prepare

RESULT = Path(__file__).parent / "results" / "qat.md"
EVALUATED = Protocol(window=512, windows=4)


def train(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    """One update of the model for each window of ``tokens`` [w, l]."""
    ranges = [p for n, p in model.named_parameters() if n.endswith(("weight_step", "weight_zero"))]
    known = {id(p) for p in ranges}
    rest = [p for p in model.parameters() if id(p) not in known]
    groups = [{"params": rest, "lr": 5e-5}, {"params": ranges, "lr": 1e-4}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    down = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: 0.5 + 0.5 * math.cos(math.pi * i / len(tokens))
    )
    model.train()
    for i, window in enumerate(tokens):
        loss = model(input_ids=window[None], labels=window[None]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        down.step()
        print(f"step {i + 1}/{len(tokens)} loss {loss.item():.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--bits", type=int, default=3)
    args = parser.parse_args()
    tokenizer = open_source("smollm2").tokenizer()
    text = lambda part: read_text(args.data / f"wikitext2_raw_{part}.txt")  # noqa: E731
    test = windows(tokenizer, text("test"), EVALUATED)
    learned = windows(tokenizer, text("valid"), Protocol(window=128, windows=args.steps))
    score = lambda model: fewbit.evaluate(model.eval(), test, EVALUATED).perplexity  # noqa: E731
    recipe = fewbit.recipes.rtn(bits=args.bits, group_size=64, symmetric=False)
    model = fewbit.load("smollm2")
    rows = [("float", score(model))]
    print(rows, flush=True)
    rows.append(("rounded", score(convert(prepare(model, recipe)))))
    print(rows, flush=True)
    model = prepare(fewbit.load("smollm2"), recipe, weight=LearnedRange())
    began = time.perf_counter()
    train(model, learned)
    minutes = (time.perf_counter() - began) / 60
    rows.append((f"trained, {args.steps} updates of 128 tokens", score(convert(model))))
    lines = [f"| {name} | {value:.2f} |" for name, value in rows]
    command = f"OMP_NUM_THREADS=1 python benchmarks/qat.py --steps {args.steps} --bits {args.bits}"
    RESULT.write_text(
        f"Printed by `{command} --data FOLDER`; {minutes:.0f} minutes of training on one core that others "
        f"shared.\n\nSmolLM2, int{args.bits} asymmetric in groups of 64, WikiText-2 raw test, 4 windows of "
        "512.\n\n| | perplexity |\n|---|--:|\n" + "\n".join(lines) + "\n"
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
