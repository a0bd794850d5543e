"""Learned scales (LET) against learned clips alone and against SmoothQuant's closed form, inputs quantized.

    OMP_NUM_THREADS=1 python benchmarks/let.py [--data FOLDER] [--bits 6] [--blocks 2,8,15,21,27]
                                            [--only TEXT]

SmolLM2-135M with planted outliers, as in methods.py. Weights asymmetric in one step a row, inputs asymmetric
per token, both in ``--bits``, in the blocks of ``--blocks``; the others stay float, so that a CPU answers in
minutes. Calibration: ``--samples`` windows of 512 tokens of WikiText-2 validation; evaluation of the saved
checkpoint on ``--windows`` windows of 512 of its test text against the float model.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from int8_ladder import plant

import fewbit
from fewbit.evaluate import Protocol, windows
from fewbit.io.source import open_source
from fewbit.io.text import read_text
from fewbit.recipe import Recipe, Rule, omniquant

ROOT = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent.parent / "shared" / "data")
    parser.add_argument("--bits", type=int, default=6)
    parser.add_argument("--blocks", default="2,8,15,21,27")
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", default="", help="rows whose names hold this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    protocol = Protocol(windows=args.windows)
    source, folder = open_source("smollm2"), Path(tempfile.mkdtemp())
    tokens = windows(source.tokenizer(), read_text(args.data / "wikitext2_raw_test.txt"), protocol)
    reference = fewbit.load("smollm2", dtype=torch.float32)
    planted = fewbit.load("smollm2", dtype=torch.float32)
    plant(planted)
    planted.save_pretrained(folder / "planted")
    source.tokenizer().save_pretrained(folder / "planted")
    text = fewbit.Calibration(
        source=str(args.data / "wikitext2_raw_valid.txt"), samples=args.samples, seqlen=512, seed=0
    )
    print(f"Printed by `OMP_NUM_THREADS=1 python benchmarks/let.py --bits {args.bits}", end=" ")
    print(f"--blocks {args.blocks} --samples {args.samples} --windows {args.windows}", end=" ")
    print(f"--steps {args.steps}` (see its first lines).\n")
    print(f"| W{args.bits}A{args.bits} | KL | ± | perplexity | CPU s |\n|---|--:|--:|--:|--:|")
    for name, recipe in ((n, r) for n, r in rows(args.bits, args.steps) if args.only in n):
        parts = (replace(r, match=f"*layers.{i}.*") for r in recipe.rules for i in args.blocks.split(","))
        recipe = replace(recipe, rules=tuple(parts))
        start = time.process_time()
        fewbit.quantize(folder / "planted", recipe, output=folder / name, calibration=text)
        seconds = time.process_time() - start
        loaded = fewbit.load(folder / name, dtype=torch.float32)
        got = fewbit.evaluate(loaded, tokens, protocol, against=reference)
        print(
            f"| {name} | {got.kl:.4f} | {got.kl_error:.4f} | {got.perplexity:.2f} | {seconds:.0f} |",
            flush=True,
        )


def rows(bits: int, steps: int):
    """(name, recipe); all on the grids of the first."""
    own = {"bits": bits, "group_size": -1, "input_bits": bits, "steps": steps}
    both, clips = omniquant(**own, let=True), omniquant(**own)
    grids = (Rule(weight=clips.rules[0].weight, input=clips.rules[0].input),)
    yield "rounded to nearest", Recipe(name="rtn", rules=grids)
    yield "LWC", clips
    yield "SmoothQuant's scales", Recipe(name="smooth", rules=grids, transforms=both.transforms)
    yield "SmoothQuant's scales, LWC", Recipe(name="both", rules=clips.rules, transforms=both.transforms)
    yield "SmoothQuant's scales, LWC, LET", both


if __name__ == "__main__":
    main()
