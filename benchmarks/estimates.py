"""How close the predicted time of a run comes: three blocks of SmolLM2, recipe by recipe.

    OMP_NUM_THREADS=1 python benchmarks/estimates.py [--data FOLDER] [--samples N] [--only TEXT ...]
                                                     [--predict]

The model is the packaged one cut to its first blocks; calibration: windows of 512 tokens of WikiText-2
validation. A row is a process of its own with one thread: `make_plan` predicts, then `quantize` runs.
Measured are the CPU seconds of `quantize`, which other programs do not lengthen much, less those of its own
plan; imports are done before. Rows go to benchmarks/results/estimates.json as they come and are not run
again; with --predict they are predicted again beside what was measured. The table is
benchmarks/results/estimates.md.
"""

import argparse
import json
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

import fewbit
from fewbit.io.source import open_source
from fewbit.recipe import named
from fewbit.stream.data import Calibration
from fewbit.stream.plan import make_plan
from fewbit.stream.quantize import quantize

ROOT = Path(__file__).parent
BLOCKS, WITHIN = 3, 1.5
G64 = {"group_size": "64"}
ROWS = {
    "RTN": ("rtn", G64),
    "GPTQ": ("gptq", G64),
    "AWQ": ("awq", G64),
    "HQQ": ("hqq", {}),
    "QuIP#": ("quip-sharp", {}),
    "QuIP#, tuned by 20 steps": ("quip-sharp", {"tune": "20"}),
    "QTIP, L = 10": ("qtip", {"state_bits": "10"}),
    "QTIP, L = 12": ("qtip", {"state_bits": "12"}),
    "QTIP, L = 14": ("qtip", {"state_bits": "14"}),
    "k-means": ("kmeans", {}),
    "GPTVQ": ("gptvq", {}),
    "AQLM": ("aqlm", {}),
    "OmniQuant": ("omniquant", G64),
    "AutoRound": ("autoround", G64),
}


def cut(folder: Path) -> None:
    """The packaged model with its first blocks alone, in bfloat16."""
    model = fewbit.load("smollm2", dtype=torch.bfloat16)
    model.model.layers = model.model.layers[:BLOCKS]
    model.config.num_hidden_layers = BLOCKS
    model.save_pretrained(folder)
    open_source("smollm2").tokenizer().save_pretrained(folder)


def one(folder: Path, name: str, settings: dict, calibration: Calibration, before: dict | None) -> dict:
    """Seconds of one row, predicted, measured and of predicting; ``before``: what was measured already."""
    import transformers.models.llama.modeling_llama  # noqa: F401  imports are nobody's prediction

    torch.set_num_threads(1)
    recipe, clock = named(name, settings), time.process_time
    start = clock()
    plan = make_plan(open_source(folder), recipe, calibration)[0]
    planning, start = clock() - start, clock()
    if before:
        return before | {"predicted": plan.seconds, "planning": planning}
    make_plan(open_source(folder), recipe, calibration)
    again, start = clock() - start, clock()
    with tempfile.TemporaryDirectory() as out:
        quantize(folder, recipe, output=f"{out}/out", calibration=calibration)
    return {"predicted": plan.seconds, "measured": clock() - start - again, "planning": planning}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent.parent / "shared" / "data")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--predict", action="store_true", help="predict rows again that were measured")
    parser.add_argument("--only", nargs="*", default=[""], help="rows whose names hold one of these")
    args = parser.parse_args()
    calibration = Calibration(source=args.data / "wikitext2_raw_valid.txt", samples=args.samples)
    file = ROOT / "results" / "estimates.json"
    done = json.loads(file.read_text()) if file.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        cut(Path(folder))
        for row, (name, settings) in ROWS.items():
            if (row in done) != args.predict or not any(text in row for text in args.only):
                continue
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                done[row] = pool.submit(
                    one, Path(folder), name, settings, calibration, done.get(row)
                ).result()
            print(row, done[row], flush=True)
            file.write_text(json.dumps(done, indent=1) + "\n")
    write(done, args.samples)


def write(done: dict, samples: int) -> None:
    """The table."""
    lines = [
        "Printed by `OMP_NUM_THREADS=1 python benchmarks/estimates.py`, which says what is measured.",
        "",
        f"{BLOCKS} blocks of SmolLM2-135M, {samples} x 512 tokens, one thread of a CPU, in CPU seconds.",
        "",
        "| recipe | predicted | measured | predicted / measured | predicting takes |",
        "|---|--:|--:|--:|--:|",
    ]
    off = []
    for row in (row for row in ROWS if row in done):
        predicted, measured, planning = (done[row][k] for k in ("predicted", "measured", "planning"))
        ratio = predicted / measured
        lines.append(f"| {row} | {predicted:.1f} | {measured:.1f} | {ratio:.2f} | {planning:.1f} |")
        off += [] if 1 / WITHIN < ratio < WITHIN else [row]
    lines += ["", f"Off by more than a factor of {WITHIN}: {', '.join(off) or 'none'}.", ""]
    (ROOT / "results" / "estimates.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
