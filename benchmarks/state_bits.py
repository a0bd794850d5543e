"""Why 65,536 states are no better than 4,096 at 2 bits: QTIP at L = 12 and 16, over bases, steps and text.

    python benchmarks/state_bits.py [--data FOLDER] [--device cuda] [--model FOLDER_OR_GGUF] [--workers N]

On N(0, 1) the larger trellis errs 7 % less at 2 bits, 9 % at 3 and 11 % at 4 (results/trellis.md). Here on
SmolLM2-135M: KL on 12 windows of 512 tokens of WikiText-2 raw test against the float model, and e, the mean
over layers of tr(E H E^T) / tr(W H W^T) on the calibration text (windows of 512 of WikiText-2 validation).
Each row over several seeds of the basis, whose spread is what chance does. A row is a process.

Rows are written to benchmarks/results/state_bits.json as they come, and are not run again.
"""

import argparse
import json
import math
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch

import fewbit
from fewbit.evaluate import Protocol, windows
from fewbit.io.source import open_source
from fewbit.io.text import read_text
from fewbit.recipe import named

ROOT = Path(__file__).parent
LINES = [(2, 0.95, 32), (2, 0.9, 32), (2, 0.85, 32), (2, 0.95, 128), (3, 0.95, 32)]  # bits, rho, windows
SEEDS = {(2, 0.95, 32): 4}


def rows():
    """(bits, rho, windows, state bits, seed)."""
    for line in LINES:
        for state_bits in (12, 16):
            for seed in range(SEEDS.get(line, 2)):
                yield *line, state_bits, seed


def one(folder, row, device, data, tokens, stop: float) -> dict | None:
    """Quantize and evaluate; None after ``stop``."""
    if time.time() > stop:
        return None
    bits, rho, samples, state_bits, seed = row
    settings = {"bits": bits, "rho": rho, "state_bits": state_bits, "seed": seed}
    recipe = named("qtip", {k: str(v) for k, v in settings.items()})
    text = fewbit.Calibration(
        source=str(data / "wikitext2_raw_valid.txt"), samples=samples, seqlen=512, seed=0
    )
    out, plain = folder / "-".join(map(str, row)), folder / "plain"
    fewbit.quantize(plain, recipe, output=out, calibration=text, device=device)
    layers = json.loads((out / "fewbit_manifest.json").read_text())["layers"]
    reference = fewbit.load(plain, device=device, dtype=torch.float32)
    loaded = fewbit.load(out, device=device, dtype=torch.float32)
    got = fewbit.evaluate(loaded, tokens, Protocol(), against=reference)
    shutil.rmtree(out)
    error = statistics.fmean(layer["error"] for layer in layers)
    return {"row": row, "error": error, "kl": got.kl, "kl_error": got.kl_error, "perplexity": got.perplexity}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent.parent / "shared" / "data")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="smollm2", help="a folder or file of it")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further row after this time")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "state_bits.json")
    args = parser.parse_args()
    stop = time.time() + 60 * args.minutes
    folder = Path(tempfile.mkdtemp())
    source = open_source(args.model)
    tokens = windows(source.tokenizer(), read_text(args.data / "wikitext2_raw_test.txt"), Protocol())
    fewbit.load(args.model, dtype=torch.float32).save_pretrained(folder / "plain")
    source.tokenizer().save_pretrained(folder / "plain")
    done = json.loads(args.results.read_text()) if args.results.exists() else []
    known = {tuple(r["row"]) for r in done}
    with ProcessPoolExecutor(args.workers, get_context("spawn"), max_tasks_per_child=1) as pool:
        jobs = [
            pool.submit(one, folder, row, args.device, args.data, tokens, stop)
            for row in rows()
            if row not in known
        ]
        for job in as_completed(jobs):
            if job.exception() is not None or job.result() is None:
                print(job.exception() or "no time", flush=True)
                continue
            done.append(job.result())
            print(json.dumps(done[-1]), flush=True)
            args.results.write_text(json.dumps(done, indent=1))
    shutil.rmtree(folder)
    args.results.with_suffix(".md").write_text(markdown(done), encoding="utf-8")


def markdown(done: list[dict]) -> str:
    """The table: a line for bits, rho and windows, both state sizes beside each other."""
    lines = ["Printed by `python benchmarks/state_bits.py` (its first lines say what is measured).", ""]
    lines += [
        "| bits | rho | windows | seeds | e, L = 12 | e, L = 16 | ratio | KL, L = 12 | KL, L = 16 | ratio |"
    ]
    lines += ["|--:|--:|--:|--:|--:|--:|--:|---|---|--:|"]
    for line in LINES:
        at = {
            n: sorted((r for r in done if tuple(r["row"][:4]) == (*line, n)), key=lambda r: r["row"][4])
            for n in (12, 16)
        }
        e = {n: statistics.fmean([r["error"] for r in found] or [math.nan]) for n, found in at.items()}
        kl = {n: statistics.fmean([r["kl"] for r in found] or [math.nan]) for n, found in at.items()}
        each = {n: ", ".join(f"{r['kl']:.3f}" for r in found) for n, found in at.items()}
        cells = [*line, f"{e[12]:.4f}", f"{e[16]:.4f}", f"{e[16] / e[12]:.3f}"]
        cells += [f"{kl[n]:.3f} ({each[n]})" for n in (12, 16)] + [f"{kl[16] / kl[12]:.3f}"]
        lines.append("| " + " | ".join("-" if "nan" in str(c) else str(c) for c in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
