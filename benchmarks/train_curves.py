"""Loss curves of every low-precision way beside BF16's, on the small Llama, three seeds.

    python benchmarks/train_curves.py --data FILE --device cuda --workers 14     (a GPU, 16 CPU cores)
    python benchmarks/train_curves.py --data FILE --small                        (a smoke on a CPU, 6 minutes)
    python benchmarks/train_curves.py --draw                                     (picture and table again)

FILE is a text such as tiny Shakespeare; its last twentieth is held out. Each row (a way, a seed) trains the
same model from the same weights on the same batches: 2 blocks of width 256, bytes, AdamW with betas 0.9 and
0.95, peak rate 2e-3 after 10 % of the updates, cosine to a tenth, gradients clipped to 1, BF16 autocast with
float32 weights. ``--steps``, ``--batch`` and ``--blocks`` change its size, ``--only`` takes patterns of ways
("quest*"), ``--seeds`` how many. Rows run in ``--workers`` processes; one that is in the file already (same
settings) is not run again, so a command that was cut off goes on.

Goals: FP8 in each scaling, FP8-LM at O3, SwitchBack and MXFP8 end within 1 % of BF16's held-out loss in the
mean over seeds (a single seed moves by as much from rounding alone, the worst is printed beside it); QuEST
at 4, 2 and 1 bits in this order, each ahead of plain straight-through training at the same bits (the same
grid under its absmax, no Hadamard map, all gradients pass). "fitted" is that with QuEST's fit, "mapped" with
the fit and the Hadamard map: what is left to QuEST is its trust.

Writes benchmarks/results/train_curves.json, .md and, where matplotlib is installed, .svg (or under --out).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from fnmatch import fnmatchcase
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores

import torch

from fewbit.format import AbsMax
from fewbit.recipe import Recipe, Rule
from fewbit.train import PRODUCTS, Identity, Straight, quest_input, quest_weight
from fewbit.train.levels import LEVELS
from fewbit.trainer import way as ways
from fewbit.trainer.curve import smoothed
from fewbit.trainer.data import read_corpus
from fewbit.trainer.loop import Loop
from fewbit.trainer.settings import Settings
from fewbit.trainer.small import byte_tokenizer, small_llama
from fewbit.trainer.way import Way, quest
from fewbit.transform import Incoherence

RESULTS = Path(__file__).parent / "results"
STATES = ("fp8-lm", "adamw-fp8", "adamw-8bit", "adamw-4bit")
BITS = (4, 2, 1)
WITHIN = (
    "tensorwise",
    "rowwise*",
    "folded*",
    "delayed",
    "blockwise",
    "switchback*",
    "mxfp8",
    "fp8-lm O3",
)  # 1 % of BF16
ways.QUANTS = {**ways.QUANTS, "identity": lambda bits: Straight(surrogate=Identity())}


def straight(bits: int, fit: bool, mapped: bool = False) -> Way:
    """QuEST's grid without its trust; under its absmax or with QuEST's fit, behind its map or without."""
    weight, input = quest_weight(bits), quest_input(bits)
    if not fit:
        weight = replace(weight, range=AbsMax())
        input = replace(input, format=replace(input.format, range=AbsMax()))
    basis = Incoherence(output=False) if mapped else None
    recipe = Recipe(name="straight", rules=(Rule(weight=weight, input=input, basis=basis),))
    return Way(quant="identity", recipe=recipe)


def all_ways() -> dict[str, Way]:
    """Every way by name, BF16 first."""
    found = {"bf16": Way()} | {name: Way(products=name) for name in PRODUCTS if name != "wide"}
    found |= {f"fp8-lm {level}": Way(products="tensorwise", level=level) for level in LEVELS}
    found |= {f"states {name}": Way(optimizer=name) for name in STATES}
    found |= {f"quest {b}": Way(quant="quest", recipe=quest(b)) for b in BITS}
    found |= {f"ste {b}": straight(b, fit=False) for b in BITS}
    found |= {f"fitted {b}": straight(b, fit=True) for b in BITS}
    return found | {f"mapped {b}": straight(b, fit=True, mapped=True) for b in BITS}


def run(name: str, settings: Settings, blocks: int, data: str, device: str) -> dict:
    """One row."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    warnings.simplefilter("ignore")
    way, began = all_ways()[name], time.perf_counter()
    corpus = read_corpus(byte_tokenizer(), data, settings)
    model = small_llama(settings.seed, blocks).to(device)
    torch.manual_seed(settings.seed)
    loop = Loop(way.apply(model, corpus.held[:4].to(device)), way, corpus, settings, device)
    failed = None
    try:
        while loop.done < settings.steps:
            loop.update()
    except Exception as error:
        failed = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return {
        **key(name, settings, blocks, device),
        "held": loop.rows[-1].get("held") if loop.rows and failed is None else None,
        "curve": [[step, round(loss, 5)] for step, loss in smoothed(loop.rows)],
        "skipped": sum(row["skipped"] for row in loop.rows),
        "tokens_per_second": settings.tokens * loop.done / max(loop.seconds, 1e-9),
        "seconds": time.perf_counter() - began,
        "failed": failed,
    }


def key(name: str, settings: Settings, blocks: int, device: str) -> dict:
    """What a row depends on."""
    how = {k: getattr(settings, k) for k in ("steps", "batch", "length", "lr", "seed")}
    return {"way": name, **how, "blocks": blocks, "device": torch.device(device).type}


def apart(rows: list[dict]) -> dict[str, list[float]]:
    """Held-out loss of each way against BF16's of the same seed, in percent."""
    base = {r["seed"]: r["held"] for r in rows if r["way"] == "bf16"}
    out: dict[str, list[float]] = {}
    for r in rows:
        if r["held"] is not None and r["seed"] in base:
            out.setdefault(r["way"], []).append(100 * (r["held"] / base[r["seed"]] - 1))
    return out


def verdicts(rows: list[dict]) -> list[str]:
    """The goals, met or not."""
    far, lines = apart(rows), []
    mean = {
        w: statistics.mean(h)
        for w in {r["way"] for r in rows}
        if (h := [r["held"] for r in rows if r["way"] == w and r["held"] is not None])
    }
    for name in [w for w in far if any(fnmatchcase(w, p) for p in WITHIN)]:
        mean_of, worst = statistics.mean(far[name]), max(far[name], key=abs)
        met = "yes" if abs(mean_of) <= 1 else "NO"
        lines.append(f"{name} within 1 % of BF16: {met} ({mean_of:+.2f} %, the worst seed {worst:+.2f} %)")
    if all(f"quest {b}" in mean for b in BITS):
        ordered = mean["quest 4"] < mean["quest 2"] < mean["quest 1"]
        lines.append(f"QuEST at 4, 2, 1 bits ordered: {'yes' if ordered else 'NO'}")
    for b in BITS:
        for other in ("ste", "fitted", "mapped"):
            if {f"quest {b}", f"{other} {b}"} <= mean.keys():
                ahead = mean[f"quest {b}"] < mean[f"{other} {b}"]
                lines.append(f"QuEST ahead of {other} at {b} bits: {'yes' if ahead else 'NO'}")
    return lines


def table(rows: list[dict], command: str) -> str:
    """The page of results."""
    names, far = list(dict.fromkeys(r["way"] for r in rows)), apart(rows)
    one = rows[0]
    lines = [
        f"Printed by `{command}`.",
        "",
        f"Small Llama of {one['blocks']} blocks, {one['steps']} updates of {one['batch']} x {one['length']} "
        f"bytes, on {one['device']}; held-out loss in nats per byte, mean over seeds and range; apart: from "
        "BF16 of the same seed, mean and worst.",
        "",
        "| way | held-out loss | range | apart % | worst % | skipped | seeds |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name in names:
        own = [r for r in rows if r["way"] == name]
        held = [r["held"] for r in own if r["held"] is not None]
        if not held:
            lines.append(f"| {name} | failed: {own[0]['failed']} | | | | | |")
            continue
        d = far.get(name, [])
        away = (f"{statistics.mean(d):+.2f}", f"{max(d, key=abs):+.2f}") if d else ("", "")
        lines.append(
            f"| {name} | {statistics.mean(held):.4f} | {max(held) - min(held):.4f} | {away[0]} | {away[1]} "
            f"| {sum(r['skipped'] for r in own)} | {len(held)} |"
        )
    return "\n".join([*lines, "", *(f"- {line}" for line in verdicts(rows)), ""])


def draw(rows: list[dict], path: Path) -> None:
    """Three panels: products and optimizers as distance from BF16, few bits as losses; means over seeds."""
    from matplotlib.figure import Figure

    from fewbit.analyze.plots import save

    def curve(name: str) -> tuple[list[float], list[float]]:
        own = [r["curve"] for r in rows if r["way"] == name and r["held"] is not None]
        return [p[0] for p in own[0]], [
            statistics.mean(p[1] for p in points) for points in zip(*own, strict=True)
        ]

    names = [
        w for w in dict.fromkeys(r["way"] for r in rows) if any(r["held"] for r in rows if r["way"] == w)
    ]
    few = [n for n in names if n.split()[0] in ("quest", "ste", "fitted", "mapped")]
    kept = [n for n in names if n.split()[0] in ("states", "fp8-lm")]
    figure = Figure(figsize=(15, 5), layout="constrained")
    panels = figure.subplots(1, 3)
    steps, base = curve("bf16")
    first = len(steps) // 4  # the first quarter is steep: percent of it say nothing
    groups = (
        ("low-precision products", [n for n in names if n not in {*few, *kept, "bf16"}]),
        ("optimizer states and FP8-LM", kept),
    )
    for axes, (title, own) in zip(panels[:2], groups, strict=True):
        axes.axhspan(-1, 1, color="#e8f0e8", label="within 1 %")
        for i, name in enumerate(own):
            far = [100 * (a / b - 1) for a, b in zip(curve(name)[1], base, strict=True)]
            axes.plot(
                steps[first:], far[first:], label=name, linewidth=1.2, linestyle=("-", "--", ":")[i % 3]
            )
        axes.set(title=title, xlabel="updates", ylabel="training loss apart from BF16, %")
        axes.legend(fontsize=8, frameon=False)
    panels[2].plot(steps, base, color="black", label="bf16")
    style = {"quest": "-", "mapped": "-.", "fitted": "--", "ste": ":"}
    colour = {"4": "#0072b2", "2": "#009e73", "1": "#d55e00"}
    for name in few:
        kind, bits = name.split()
        panels[2].plot(*curve(name), label=name, linestyle=style[kind], color=colour[bits], linewidth=1.4)
    panels[2].set(
        title="weights and inputs in few bits", xlabel="updates", ylabel="training loss, nats per byte"
    )
    panels[2].legend(fontsize=8, frameon=False)
    save(figure, path)


def publish(rows: list[dict], out: Path, command: str) -> None:
    """Rows, table and picture under ``out``."""
    (out / "train_curves.json").write_text(json.dumps({"command": command, "rows": rows}) + "\n")
    if any(r["way"] == "bf16" and r["held"] for r in rows):
        text = table(rows, command)
        (out / "train_curves.md").write_text(text)
        print(text, flush=True)
        try:
            draw(rows, out / "train_curves.svg")
        except ImportError:
            print("no matplotlib: draw the picture elsewhere with --draw")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=["*"], metavar="PATTERN")
    parser.add_argument("--small", action="store_true", help="20 updates of 4 windows, one seed")
    parser.add_argument("--draw", action="store_true", help="run nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.small:
        args.steps, args.batch, args.seeds = 20, 4, 1
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "train_curves.json"
    if args.draw:
        kept = json.loads(file.read_text())
        publish(kept["rows"], args.out, kept["command"])
        return
    chosen = [w for w in all_ways() if w == "bf16" or any(fnmatchcase(w, p) for p in args.only)]
    size = f"--steps {args.steps} --batch {args.batch} --blocks {args.blocks} --seeds {args.seeds}"
    command = f"python benchmarks/train_curves.py --data {Path(args.data).name} --device {args.device} {size}"
    jobs = [
        (w, Settings(steps=args.steps, batch=args.batch, seed=s, held=256, looks=1))
        for s in range(args.seeds)
        for w in chosen
    ]
    keys = [key(w, s, args.blocks, args.device) for w, s in jobs]
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    rows = [r for r in rows if r["failed"] is None and {k: r[k] for k in keys[0]} in keys]
    there = [{k: r[k] for k in keys[0]} for r in rows]
    jobs = [j for j, k in zip(jobs, keys, strict=True) if k not in there]
    began = time.perf_counter()
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run, w, s, args.blocks, args.data, args.device) for w, s in jobs]
        for i, future in enumerate(as_completed(futures), start=1):
            row = future.result()
            rows.append(row)
            rows.sort(key=lambda r: (list(all_ways()).index(r["way"]), r["seed"]))
            file.write_text(json.dumps({"command": command, "rows": rows}) + "\n")
            held = "-" if row["held"] is None else f"{row['held']:.4f}"
            print(
                f"{i}/{len(jobs)} {time.perf_counter() - began:.0f} s {row['way']} seed {row['seed']}: {held}"
                f"  {row['tokens_per_second']:.0f} tokens/s  {row['failed'] or ''}",
                flush=True,
            )
    publish(rows, args.out, command)


if __name__ == "__main__":
    main()
