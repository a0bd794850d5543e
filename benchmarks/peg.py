"""PEG on a decoder with planted outliers: what groups of like range give back.

    OMP_NUM_THREADS=1 python benchmarks/peg.py [--data FOLDER] [KEY=VALUE ...]

SmolLM2 with the outliers of `int8_ladder.plant`, 32 calibration windows of 512 tokens of WikiText-2
validation, seed 0; perplexity of the checkpoint on WikiText-2 raw test, solid join, 12 windows of 512. Prints
one line for the settings of the recipe `peg` that are named.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from int8_ladder import ROOT, plant

import fewbit
from fewbit.evaluate import Protocol, windows
from fewbit.io.source import open_source
from fewbit.io.text import read_text
from fewbit.recipe import named


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=ROOT.parent.parent / "shared" / "data")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = named("peg", dict(pair.split("=") for pair in args.settings))
    tokenizer = open_source("smollm2").tokenizer()
    tokens = windows(tokenizer, read_text(args.data / "wikitext2_raw_test.txt"), Protocol())
    text = fewbit.Calibration(
        source=str(args.data / "wikitext2_raw_valid.txt"), samples=32, seqlen=512, seed=0
    )
    with tempfile.TemporaryDirectory() as folder:
        model, out = Path(folder, "planted"), Path(folder, "out")
        original = fewbit.load("smollm2", dtype=torch.float32)
        plant(original)
        original.save_pretrained(model)
        tokenizer.save_pretrained(model)
        made = fewbit.quantize(model, recipe, output=out, calibration=text)
        got = fewbit.evaluate(fewbit.load(out, dtype=torch.float32), tokens, Protocol())
    bits = made.plan.bits_per_weight
    print(f"| {' '.join(args.settings)} | {bits:.3f} | {got.perplexity:.2f} |")


if __name__ == "__main__":
    main()
