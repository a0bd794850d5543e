"""What tuning between groups brings at 2, 3 and 4 bits: steps, rates, amount of text.

    python benchmarks/block_tuning.py [--data FOLDER] [--device cuda] [--model FOLDER_OR_GGUF]
                                      [--workers N] [--only TEXT ...]

SmolLM2-135M as in methods.py: KL and perplexity on 12 windows of 512 tokens of WikiText-2 raw test against
the float model, calibration of WikiText-2 validation in windows of 512, seed 0. A row is a process.
Seconds are by the clock of quantizing, with ``--workers`` rows at a time on one GPU.

Rows are written to benchmarks/results/block_tuning.json as they come, and are not run again.
"""

import argparse
import json
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from urllib.parse import quote

import torch

import fewbit
from fewbit.compare.worker import cpu_seconds, device_name, peak_bytes
from fewbit.evaluate import Protocol, windows
from fewbit.io.source import open_source
from fewbit.io.text import read_text
from fewbit.recipe import named
from fewbit.solve.blocktune import BlockTuning

ROOT = Path(__file__).parent


def rows():
    """(name, recipe, calibration windows)."""
    qtip, sharp = named("qtip", {"bits": "2"}), named("quip-sharp", {"bits": "2"})
    at = lambda base, **settings: replace(base, tuning=BlockTuning(**settings))  # noqa: E731
    for windows_of_text in (32, 256):
        yield "QTIP, L = 12, no tuning", qtip, windows_of_text
        yield "QTIP, L = 12, 150 steps", at(qtip, steps=150), windows_of_text
    for lr in (0.003, 0.03):
        yield f"QTIP, L = 12, 150 steps at {lr}", at(qtip, steps=150, lr=lr), 256
    yield "QTIP, L = 12, 150 steps, norms at 0.003", at(qtip, steps=150, lr_rest=3e-3), 256
    yield "QTIP, L = 12, 400 steps", at(qtip, steps=400), 256
    yield "QTIP, L = 16, 150 steps", at(named("qtip", {"bits": "2", "state_bits": "16"}), steps=150), 256
    yield "QuIP#, no tuning", sharp, 256
    yield "QuIP#, 150 steps", at(sharp, steps=150), 256
    g64 = {"group_size": "64", "symmetric": "false"}
    others = {
        "GPTQ, groups of 64": named("gptq", {"bits": "2", **g64}),
        "GPTVQ, d = 2": named("gptvq", {}),
        "GPTVQ, d = 2, spread": named("gptvq", {"basis": "hadamard"}),
        "AQLM 2x8": named("aqlm", {}),
        "AQLM 2x8, spread": named("aqlm", {"basis": "hadamard"}),
        "3 bits, QTIP, L = 12": named("qtip", {"bits": "3"}),
        "3 bits, GPTQ, groups of 64": named("gptq", {"bits": "3", **g64}),
        "4 bits, QTIP, L = 12": named("qtip", {"bits": "4"}),
        "4 bits, GPTQ, groups of 64": named("gptq", g64),
    }
    for name, recipe in others.items():
        yield f"{name}, no tuning", recipe, 256
        yield f"{name}, 150 steps", at(recipe, steps=150), 256


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent.parent / "shared" / "data")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="smollm2", help="a folder or file of it")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[""], help="rows whose names hold one of these")
    parser.add_argument("--windows", type=int, help="rows of so many calibration windows only")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further row after this time")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "block_tuning.json")
    args = parser.parse_args()
    protocol, stop = Protocol(), time.time() + 60 * args.minutes
    folder = Path(tempfile.mkdtemp())
    source = open_source(args.model)
    tokens = windows(source.tokenizer(), read_text(args.data / "wikitext2_raw_test.txt"), protocol)
    fewbit.load(args.model, dtype=torch.float32).save_pretrained(folder / "plain")
    source.tokenizer().save_pretrained(folder / "plain")
    done = json.loads(args.results.read_text()) if args.results.exists() else {}
    with ProcessPoolExecutor(args.workers, get_context("spawn"), max_tasks_per_child=1) as pool:
        jobs = {}
        for name, recipe, samples in rows():
            key = f"{name}, {samples} windows"
            chosen = any(o in key for o in args.only) and args.windows in (None, samples)
            if key in done or not chosen:
                continue
            text = fewbit.Calibration(
                source=str(args.data / "wikitext2_raw_valid.txt"), samples=samples, seqlen=512, seed=0
            )
            job = pool.submit(one, folder, key, recipe, args.device, text, tokens, protocol, stop)
            jobs[job] = (key, name, samples)
        for job in as_completed(jobs):
            key, name, samples = jobs[job]
            if job.exception() is not None or job.result() is None:
                print(key, job.exception() or "no time", flush=True)
                continue
            done[key] = job.result() | {"name": name, "windows": samples}
            print(key, json.dumps(done[key]), flush=True)
            args.results.write_text(json.dumps(done, indent=1))
    shutil.rmtree(folder)
    args.results.with_suffix(".md").write_text(markdown(done), encoding="utf-8")


def one(folder, key, recipe, device, calibration, tokens, protocol, stop: float) -> dict | None:
    """Quantize, in a process that did nothing before, and evaluate what was saved; None after ``stop``."""
    if time.time() > stop:
        return None
    plain, out = folder / "plain", folder / quote(key, "")
    start = time.perf_counter()
    result = fewbit.quantize(plain, recipe, output=out, calibration=calibration, device=device)
    row = {
        "bits": result.plan.bits_per_weight, "wall_seconds": time.perf_counter() - start,
        "cpu_seconds": cpu_seconds(), "device": device_name(device), "peak_bytes": peak_bytes(device),
    }  # fmt: skip
    loaded, original = (fewbit.load(path, device=device, dtype=torch.float32) for path in (out, plain))
    got = fewbit.evaluate(loaded, tokens, protocol, against=original)
    shutil.rmtree(out)
    return row | {"kl": got.kl, "kl_error": got.kl_error, "top1": got.top1, "perplexity": got.perplexity}


def markdown(done: dict) -> str:
    """The table."""
    lines = ["Printed by `python benchmarks/block_tuning.py` (its first lines say what is measured).", ""]
    lines += ["| method | windows | bits / weight | KL | ± | top-1 % | perplexity | s | on |"]
    lines += ["|---|--:|--:|--:|--:|--:|--:|--:|---|"]
    order = [f"{name}, {samples} windows" for name, _, samples in rows()]
    for r in (done[key] for key in order if key in done):
        lines.append(
            f"| {r['name']} | {r['windows']} | {r['bits']:.3f} | {r['kl']:.3f} | {r['kl_error']:.3f} | "
            f"{100 * r['top1']:.1f} | {r['perplexity']:.2f} | {r['wall_seconds']:.0f} | {r['device']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
