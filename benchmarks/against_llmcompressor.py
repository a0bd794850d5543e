"""CPU seconds and peak memory of `fewbit quantize` against llm-compressor's GPTQ, paired: A B A B ...

    python benchmarks/against_llmcompressor.py --peer PYTHON [--pairs 2] [--threads 1]

PYTHON is the interpreter of an environment with llm-compressor (pip install llmcompressor==0.14.0.1). Both
quantize SmolLM2 to W4A16 group 64 symmetric from the same 32 x 512 tokens of WikiText-2 validation; whole
processes are measured (user + system CPU seconds, peak resident set), imports, loading and saving included.
Both results are then evaluated as saved. Writes benchmarks/results/against_llmcompressor.md.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from measure import FEWBIT, measured

import fewbit
from fewbit.evaluate import Protocol, windows
from fewbit.io.source import open_source
from fewbit.io.text import read_text
from fewbit.stream.data import Calibration, sample_tokens

ROOT = Path(__file__).parent


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", required=True)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=ROOT.parent.parent / "shared" / "data")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    text = args.data / "wikitext2_raw_valid.txt"
    source = open_source("smollm2")
    tokens = sample_tokens(Calibration(source=str(text), samples=32, seqlen=512, seed=0), source.tokenizer())
    (folder / "tokens.json").write_text(json.dumps(tokens.tolist()))
    original = fewbit.load("smollm2")
    original.save_pretrained(folder / "model")
    source.tokenizer().save_pretrained(folder / "model")

    rows = {"fewbit": [], "llm-compressor": []}
    for i in range(args.pairs):
        ours = f"{FEWBIT} quantize smollm2 -r gptq --group-size 64 --samples 32 --seqlen 512".split()
        ours += ["--calibration", str(text), "-o", str(folder / f"ours{i}")]
        theirs = [args.peer, str(ROOT / "peers" / "llmcompressor_gptq.py"), str(folder / "model")]
        theirs += [str(folder / "tokens.json"), str(folder / f"theirs{i}"), str(args.threads)]
        for name, command in (("fewbit", ours), ("llm-compressor", theirs)):
            rows[name].append(measured(command, args.threads))
            print(name, rows[name][-1], flush=True)
    protocol = Protocol()
    test = windows(source.tokenizer(), read_text(args.data / "wikitext2_raw_test.txt"), protocol)
    lines = [
        f"Printed by `python benchmarks/against_llmcompressor.py --peer PYTHON --pairs {args.pairs} "
        f"--threads {args.threads}`; torch {torch.__version__}, medians of the alternating pairs.",
        "",
        "| tool | CPU s | wall s | peak resident MB | KL | top-1 % | perplexity |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, folder_name in (("fewbit", "ours0"), ("llm-compressor", "theirs0")):
        cpu, wall, peak = (statistics.median(column) for column in zip(*rows[name], strict=True))
        got = fewbit.evaluate(fewbit.load(folder / folder_name), test, protocol, against=original)
        lines.append(
            f"| {name} | {cpu:.0f} | {wall:.0f} | {peak:.0f} | {got.kl:.4f} | {100 * got.top1:.1f} | "
            f"{got.perplexity:.2f} |"
        )
    ratios = [a[0] / b[0] for a, b in zip(rows["fewbit"], rows["llm-compressor"], strict=True)]
    pairs = ", ".join(f"{r:.2f}" for r in ratios)
    lines += ["", f"CPU seconds, fewbit over llm-compressor, pair by pair: {pairs}", ""]
    (ROOT / "results").mkdir(exist_ok=True)
    (ROOT / "results" / "against_llmcompressor.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
