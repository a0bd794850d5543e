"""Does LDLQ lower the output error of plain rounding on every layer of a model, with any grid?

    python benchmarks/ldlq_every_layer.py [--data FOLDER] [--device cuda] [--only TEXT ...] [--blocks N]
                                          [--minutes M] [--results FILE]

For every linear layer in the blocks of SmolLM2, W [out, in] with the Gram matrix H of its inputs in the float
model over 32 windows of 512 tokens of WikiText-2 validation:

    ratio = tr( E H E^T ) of LDLQ / tr( E H E^T ) of rounding to nearest,      E = W - Q

Both use one format with the same steps (fitted once, from W and H), and one basis; only the codes differ.
`unseen` is the same ratio under the H of 16 windows of the test text, which nothing was fitted to.

The errors of every layer are written to benchmarks/results/ldlq_every_layer.json grid by grid, and grids that
are there are not run again; the table beside it is printed from them. --blocks: so many blocks only, spread
over the model, for a trial.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

import fewbit
from fewbit.io.source import open_source
from fewbit.kernel.gram import add_gram, full
from fewbit.recipe import Recipe, named
from fewbit.solve import Ldlq, Rtn, Stats
from fewbit.stream.blocks import find_blocks, linears, watch
from fewbit.stream.data import Calibration, sample_tokens

ROOT = Path(__file__).parent
G64 = {"group_size": "64", "symmetric": "false"}


def rows() -> dict[str, Recipe]:
    """Recipes whose solver is LDLQ; the plain one is the same with Rtn."""
    ints = {f"int{b}, groups of 64": named("gptq", {"bits": str(b), **G64}) for b in (2, 3, 4)}
    return ints | {
        "NF4, groups of 64": named("gptq", {"grid": "nf4", "group_size": "64"}),
        "k-means of rows, 2 bit": named("kmeans", {"bits": "2", "solver": "gptq"}),
        "k-means of rows, 4 bit": named("kmeans", {"bits": "4", "solver": "gptq"}),
        "HIGGS p = 2, 2 bit": named("higgs", {"bits": "2", "solver": "gptq"}),
        "E8P, 2 bit": named("quip-sharp", {"passes": "0"}),
        "trellis, mad, L = 10, 2 bit": named("qtip", {"state_bits": "10"}),
    }


def grams(model: torch.nn.Module, groups: list[list[str]], ids: Tensor) -> dict[str, Tensor]:
    """X^T X / tokens of the input of every layer, by its name; layers with one input share it."""
    sums: dict[str, Tensor] = {}

    def add(name: str):
        def hook(_, args):
            x = args[0].flatten(0, -2)
            if name not in sums:
                sums[name] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
            add_gram(sums[name], x)

        return hook

    handles = [model.get_submodule(g[0]).register_forward_pre_hook(add(g[0])) for g in groups]
    for window in ids:
        model(input_ids=window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: full(sums[group[0]]) / ids.numel() for group in groups for name in group}


def solve(recipe: Recipe, w: Tensor, stats: Stats) -> dict[str, Tensor]:
    """W - Q of both solvers, in the basis of ``w``."""
    rule, part, own = recipe.rules[0], w, stats
    assert isinstance(rule.solver, Ldlq)
    if rule.basis is not None:
        part, own = rule.basis.enter(w), stats.mapped(rule.basis.input_map(w.shape[1]).apply)
    found = {}
    for name, solver in (("plain", Rtn()), ("ldlq", rule.solver)):
        value = solver(part, own, rule.weight).dequantize()
        found[name] = w - (value if rule.basis is None else rule.basis.leave(value))
    return found


def cost(e: Tensor, h: Tensor) -> float:
    """tr(E H E^T)."""
    return float(((e @ h) * e).sum(dtype=torch.float64))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent.parent / "shared" / "data")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="*", default=[""], help="grids whose names hold one of these")
    parser.add_argument("--blocks", type=int, help="so many blocks of the model only")
    parser.add_argument("--windows", type=int, default=32, help="of calibration")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further grid after this time")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "ldlq_every_layer.json")
    args = parser.parse_args()
    stop = time.time() + 60 * args.minutes
    tokenizer = open_source("smollm2").tokenizer()
    model = fewbit.load("smollm2", device=args.device, dtype=torch.float32)

    def windows(name: str, count: int) -> Tensor:
        text = Calibration(source=args.data / f"wikitext2_raw_{name}.txt", samples=count, seqlen=512)
        return sample_tokens(text, tokenizer).to(args.device)

    names = find_blocks(model).names
    if args.blocks is not None:
        names = [names[i * len(names) // args.blocks] for i in range(args.blocks)]
    layers = [f"{b}.{n}" for b in names for n in linears(model.get_submodule(b))]
    ids = windows("valid", args.windows)
    groups = watch(model, lambda: model(input_ids=ids[:1, :8], use_cache=False))
    groups = [kept for g in groups if (kept := [n for n in g if n in layers])]
    seen, unseen = grams(model, groups, ids), grams(model, groups, windows("test", 16))
    done = json.loads(args.results.read_text()) if args.results.exists() else {}
    for title, recipe in rows().items():
        if title in done or not any(o in title for o in args.only):
            continue
        if time.time() > stop:
            print("no time for", title, flush=True)
            continue
        start, found = time.perf_counter(), {}
        for name in layers:
            w = model.get_submodule(name).weight.detach().float()
            errors = solve(recipe, w, Stats(gram=seen[name]))
            found[name] = {k: [cost(e, seen[name]), cost(e, unseen[name])] for k, e in errors.items()}
        done[title] = {"layers": found, "seconds": time.perf_counter() - start, "device": args.device}
        args.results.write_text(json.dumps(done))
        print(table({title: done[title]}).splitlines()[-1], flush=True)
    args.results.with_suffix(".md").write_text(markdown(done))


def table(done: dict) -> str:
    """The ratios of each grid over the layers."""
    columns = "grid | layers | least | median | largest | worse | largest in"
    lines = [f"| {columns} | unseen: median | largest | worse | s |"]
    lines += ["|---|--:|--:|--:|--:|--:|---|--:|--:|--:|--:|"]
    for title in (t for t in rows() if t in done):
        found = done[title]["layers"]
        seen, unseen = ({n: r["ldlq"][i] / r["plain"][i] for n, r in found.items()} for i in range(2))
        most = max(seen, key=seen.get)
        lines.append(
            f"| {title} | {len(found)} | {min(seen.values()):.3f} | {spread(seen)} | "
            f"{most.removeprefix('model.layers.')} | {spread(unseen)} | {done[title]['seconds']:.0f} |"
        )
    return "\n".join(lines)


def spread(ratios: dict[str, float]) -> str:
    """Median, largest, and how many are no less than 1."""
    values = list(ratios.values())
    return f"{statistics.median(values):.3f} | {max(values):.3f} | {sum(r >= 1 for r in values)}"


def markdown(done: dict) -> str:
    """The page."""
    devices = ", ".join(sorted({r["device"] for r in done.values()}))
    return f"""# LDLQ against plain rounding, layer by layer

Printed by `python benchmarks/ldlq_every_layer.py` on {devices} (its first lines say what is
measured). Ratio of output errors, LDLQ over rounding to nearest with the same grid and steps, over the
linear layers of SmolLM2; `worse`: layers with a ratio of 1 or more; `unseen`: under the inputs of another
text.

{table(done)}
"""


if __name__ == "__main__":
    main()
