"""Any formats under a budget of bits: QTIP, GPTQ onto NF4 and MXFP4, scalar codebooks, FP8 and int8, mixed.

    python benchmarks/search_mixed.py [--data FOLDER] [--scores FOLDER] [--device cpu] [--bits B ...]
                                      [--results FILE]

SmolLM2-135M at 3.25 and 4.25 stored bits per weight of the blocks' layers, scales and tables counted. It is
what users run: `fewbit search` on WikiText-2 validation (16 windows of 512; scores are kept in the folder of
--scores, so that both budgets share them), then `fewbit.quantize` of the recipe that it wrote, calibrated on
32 windows of 512 of the same text, seed 0. Measured as in benchmarks/methods.py: the checkpoint as it was
saved against the float model, WikiText-2 raw test, solid join, 12 windows of 512.

"uniform" rows are those of benchmarks/results/methods/results.json whose size is from the budget to 0.75 bits
above, the three of least KL, and QTIP at the whole number of bits below. Rows go to
benchmarks/results/search_mixed.json as they come and are not measured again.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

import fewbit
from fewbit.evaluate import Protocol, windows
from fewbit.io.source import open_source
from fewbit.io.text import read_text
from fewbit.recipe import from_yaml

ROOT = Path(__file__).parent
CANDIDATES = (
    "qtip:bits=2", "qtip:bits=3", "qtip:bits=4", "gptq:grid=nf4,group_size=64", "gptq:format=mxfp4-even",
    "higgs:bits=5,p=1,solver=gptq", "higgs:bits=6,p=1,solver=gptq", "fp8", "int8",
)  # fmt: skip
ABOVE = 0.75


def searched(bits: float, scores: Path, text: Path, file: Path, device: str) -> dict:
    """What `fewbit search` says, its recipe in ``file``."""
    words = [w for c in CANDIDATES for w in ("-c", c)]
    words += ["--bits", f"{bits}", "--samples", "16", "--data", str(text), "--from", str(scores)]
    call = [sys.executable, "-m", "fewbit.cli.main", "search", "smollm2", *words, "-o", str(file)]
    call += ["--device", device, "--json"]
    return json.loads(subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True).stdout)


def measured(file: Path, text: Path, data: Path, device: str) -> dict[str, float]:
    """The checkpoint of a recipe, as it was saved."""
    folder, protocol, source = Path(tempfile.mkdtemp()), Protocol(), open_source("smollm2")
    reference = fewbit.load("smollm2", device, torch.float32)
    reference.save_pretrained(folder / "plain")
    source.tokenizer().save_pretrained(folder / "plain")
    calibration = fewbit.Calibration(source=text, samples=32, seqlen=512, seed=0)
    recipe = from_yaml(file.read_text())
    out = folder / "out"
    result = fewbit.quantize(folder / "plain", recipe, output=out, calibration=calibration, device=device)
    tokens = windows(source.tokenizer(), read_text(data / "wikitext2_raw_test.txt"), protocol)
    got = fewbit.evaluate(fewbit.load(out, device, torch.float32), tokens, protocol, against=reference)
    shutil.rmtree(folder)
    return {
        "bits": result.plan.bits_per_weight, "kl": got.kl, "kl_error": got.kl_error, "top1": got.top1,
        "perplexity": got.perplexity,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent.parent / "shared" / "data")
    parser.add_argument("--scores", type=Path, default=ROOT.parent / "out" / "search_mixed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bits", type=float, nargs="*", default=[3.25, 4.25])
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "search_mixed.json")
    args = parser.parse_args()
    text = args.data / "wikitext2_raw_valid.txt"
    for bits in args.bits:
        done = _read(args.results)
        if str(bits) in done:
            continue
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "recipe.yaml"
            said = searched(bits, args.scores, text, file, args.device)
            row = {"expected": said["expected_kl"], "searched_bits": said["bits_per_weight"]}
            weights = {layer["layer"]: layer["weights"] for layer in said["layers"]}
            chosen = Counter()
            for layer in said["layers"]:
                chosen[layer["choice"]] += weights[layer["layer"]] / sum(weights.values())
            row |= {"chosen": dict(chosen)} | measured(file, text, args.data, args.device)
        done = _read(args.results)
        done[str(bits)] = row
        args.results.write_text(json.dumps(done, indent=1) + "\n")
        print(bits, json.dumps(row), flush=True)
    args.results.with_suffix(".md").write_text(markdown(_read(args.results)))


def _read(file: Path) -> dict:
    """Rows that are known."""
    return json.loads(file.read_text()) if file.exists() else {}


def markdown(done: dict) -> str:
    """A table for each budget."""
    file = ROOT / "results" / "methods" / "results.json"
    uniform = [row for row in json.loads(file.read_text())["rows"] if row["kl"] is not None]
    lines = ["# Any formats under a budget of bits", ""]
    lines += ["Printed by `python benchmarks/search_mixed.py` (its first lines say what is measured).", ""]
    for bits in sorted(float(b) for b in done):
        row = done[str(bits)]
        near = [r for r in uniform if bits <= r["bits"] <= bits + ABOVE]
        shown = sorted(near, key=lambda r: r["kl"])[:3]
        shown += [r for r in uniform if "QTIP, mad" in r["name"] and int(r["bits"]) == int(bits)]
        lines += [f"## {bits:g} bits", "", "| | bits | expected KL | KL | ± | top-1 % | perplexity |"]
        lines += ["|---|--:|--:|--:|--:|--:|--:|", _line("**search**", row, f"{row['expected']:.4f}")]
        lines += [_line(f"uniform: {r['name']}", r, "") for r in shown]
        parts = sorted(row["chosen"].items(), key=lambda pair: -pair[1])
        lines += ["", "Shares of the weights: " + ", ".join(f"`{c}` {100 * s:.1f} %" for c, s in parts), ""]
    return "\n".join(lines)


def _line(name: str, r: dict, expected: str) -> str:
    error = "" if r.get("kl_error") is None else f"{r['kl_error']:.4f}"
    return (
        f"| {name} | {r['bits']:.3f} | {expected} | {r['kl']:.4f} | {error} | {100 * r['top1']:.1f} | "
        f"{r['perplexity']:.2f} |"
    )


if __name__ == "__main__":
    main()
