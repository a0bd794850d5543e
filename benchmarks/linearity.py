"""HIGGS's linearity: does the sum of a_l t_l^2 over the layers foretell what few bits cost?

    python benchmarks/linearity.py [--data FOLDER] [--device cuda] [--layers N] [--windows W] [--seeds S]
                                   [--minutes M] [--results FILE] [--plot FILE]

SmolLM2-135M. Coefficients a_l: from Gaussian noise in one layer at a time (five relative norms, 4 windows of
512 tokens of WikiText-2 validation, and one norm on random tokens), and from squared gradients (16 windows).
Models: every linear layer of the blocks on HIGGS's points, all at one size or each layer at a size drawn at
random; rounded to nearest, and with feedback (`solver=gptq`, Gram matrices of the float model over 32
windows of validation). Measured: KL and perplexity against the float model on WikiText-2 raw test, 12 windows
of 512, solid join.

Results go to benchmarks/results/linearity.json as they come and are not measured again; the page beside it
and the plot are made from them. For a trial: --layers, so many of them, spread over the model, the rest
float; --windows, of every text; --seeds, of random mixes.
"""

import argparse
import json
import math
import random
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import fewbit
from fewbit.evaluate import Protocol, windows
from fewbit.io.source import open_source
from fewbit.io.text import read_text
from fewbit.recipe import named
from fewbit.search import (
    Choice,
    Error,
    Response,
    error,
    fisher,
    gram_matrices,
    noise_responses,
    predict,
    random_tokens,
)
from fewbit.search.linearity import block_linears
from fewbit.solve import Stats
from fewbit.stream.data import Calibration, sample_tokens

ROOT = Path(__file__).parent
LEVELS = (0.03, 0.05, 0.1, 0.2, 0.3)
UNIFORM = ("2", "2.5", "3", "3.5", "4", "5", "6", "8")
FEEDBACK = ("2", "2.5", "3", "3.5", "4")
MIXES = {"6 to 8": ("6", "8"), "4 to 6": ("4", "5", "6"), "3 to 5": ("3", "3.5", "4", "5"),
         "3 to 4": ("3", "3.5", "4"), "2 to 4": ("2", "2.5", "3", "3.5", "4")}  # fmt: skip
KINDS = {
    "weight": "t^2 of the weight",
    "effective": "t^2 effective",
    "output": "relative error of the output",
    "grid": "the grid's on N(0, 1)",
    "random": "t^2 effective, a on random tokens",
    "fisher": "t^2 effective, a of gradients",
}


def higgs(bits: str, **settings: str) -> Choice:
    """HIGGS at so many bits: p = 2 up to 4, scalars above."""
    rule = named("higgs", {"bits": bits, "p": "1" if float(bits) > 4 else "2", **settings}).rules[0]
    return Choice(format=rule.weight, solver=rule.solver, basis=rule.basis)


def grid_error(choice: Choice) -> float:
    """Mean squared error of the points on N(0, 1)."""
    grid = choice.format.grid
    x = torch.randn(2**18, generator=torch.Generator().manual_seed(0))
    x = x.view(-1, grid.width) if grid.width > 1 else x
    return float((grid.snap(x) - x).square().mean())


class Models:
    """SmolLM2 whose layers are exchanged for quantized ones, each solved once, from the float model."""

    def __init__(self, data: Path, device: str, layers: int | None = None, count: int | None = None):
        self.data, self.count = data, count
        self.source = open_source("smollm2")
        self.model, self.judge = (fewbit.load("smollm2", device, torch.float32) for _ in range(2))
        own = block_linears(self.model)
        names = list(own) if layers is None else [list(own)[i * len(own) // layers] for i in range(layers)]
        self.modules = {name: own[name] for name in names}
        self.clean = {name: self.judge.get_submodule(name).weight.detach() for name in names}
        self.protocol = Protocol(windows=count or 12)
        text = read_text(data / "wikitext2_raw_test.txt")
        self.test = windows(self.source.tokenizer(), text, self.protocol)
        self.values: dict[str, dict[str, Tensor]] = {}  # choice -> layer -> values
        self.errors: dict[str, dict[str, Error]] = {}
        self._grams: dict[str, Tensor] = {}

    def text(self, count: int) -> Tensor:
        """Windows of validation text, [count, 512]."""
        text = Calibration(
            source=self.data / "wikitext2_raw_valid.txt", samples=self.count or count, seqlen=512
        )
        return sample_tokens(text, self.source.tokenizer())

    @torch.no_grad()
    def solve(self, key: str, choice: Choice) -> None:
        """Find the values and errors of every layer under a choice, under inputs of 32 windows."""
        if key in self.values:
            return
        if not self._grams:
            self._grams = gram_matrices(self.judge, list(self.modules), self.text(32))
        self.values[key], self.errors[key] = {}, {}
        for name, w in self.clean.items():
            h = self._grams[name]
            self.values[key][name] = choice.solve(w, Stats(gram=h))
            self.errors[key][name] = error(w, self.values[key][name], h)

    @torch.no_grad()
    def measure(self, allocation: dict[str, str]) -> dict[str, float]:
        """KL, its standard error and perplexity on the test text, each layer at its choice."""
        for name, key in allocation.items():
            self.modules[name].weight.copy_(self.values[key][name])
        got = fewbit.evaluate(self.model, self.test, self.protocol, against=self.judge)
        return {"kl": got.kl, "kl_error": got.kl_error, "nll": got.nll}

    def float_nll(self) -> float:
        """Of the float model on the test text."""
        return fewbit.evaluate(self.judge, self.test, self.protocol).nll

    def bits(self, allocation: dict[str, str], choices: dict[str, Choice]) -> float:
        """Stored bits per weight, everything counted."""
        total = sum(w.numel() for w in self.clean.values())
        return sum(choices[k].bits(tuple(self.clean[n].shape)) for n, k in allocation.items()) / total


def allocations(names: list[str], sizes: tuple[str, ...], mixes: tuple[str, ...], tag: str, seeds: int):
    """(name, layer -> choice): all at one size, then random mixes; ``tag`` goes before the size."""
    for size in sizes:
        yield f"{tag}{size} bit", dict.fromkeys(names, tag + size)
    for mix in mixes:
        for seed in range(seeds):
            draw = random.Random(f"{mix} {seed}")
            yield f"{tag}{mix}, random {seed}", {n: tag + draw.choice(MIXES[mix]) for n in names}


def coefficients(models: Models) -> dict:
    """a_l by noise on text, by noise on random tokens, by squared gradients."""
    names, began = list(models.clean), time.perf_counter()
    seen = noise_responses(models.judge, models.text(4), layers=names, levels=LEVELS)
    vocabulary = models.judge.config.vocab_size
    took = [time.perf_counter() - began]
    blind = noise_responses(
        models.judge, random_tokens(vocabulary, models.count or 4, 512), layers=names, levels=(0.1,)
    )
    took.append(time.perf_counter() - began)
    own = fisher(models.judge, models.text(16))
    took.append(time.perf_counter() - began)
    return {
        "responses": [asdict(r) for r in seen],
        "random": {r.layer: r.coefficient for r in blind},
        "fisher": {name: own[name] for name in names},
        "seconds": [took[0], took[1] - took[0], took[2] - took[1]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent.parent / "shared" / "data")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, help="so many layers of the model only")
    parser.add_argument("--windows", type=int, help="of every text")
    parser.add_argument("--seeds", type=int, default=5, help="random mixes of each kind")
    parser.add_argument("--minutes", type=float, default=1e9, help="start nothing further after this time")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "linearity.json")
    parser.add_argument("--plot", type=Path, help="an SVG; needs matplotlib")
    args = parser.parse_args()
    stop = time.time() + 60 * args.minutes
    done = json.loads(args.results.read_text()) if args.results.exists() else {"models": {}}
    models = Models(args.data, args.device, args.layers, args.windows)

    def save() -> None:
        args.results.write_text(json.dumps(done))

    if "coefficients" not in done:
        done |= {"device": args.device, "nll": models.float_nll(), "coefficients": coefficients(models)}
        save()
    names = list(models.clean)
    for tag, settings, sizes, mixes in (
        ("", {}, UNIFORM, tuple(MIXES)),
        ("gptq ", {"solver": "gptq"}, FEEDBACK, ("3 to 4", "2 to 4")),
    ):
        for title, allocation in allocations(names, sizes, mixes, tag, args.seeds):
            if title in done["models"]:
                continue
            if time.time() > stop:
                print("no time for", title, flush=True)
                continue
            for key in dict.fromkeys(allocation.values()):
                models.solve(key, higgs(key.removeprefix(tag), **settings))
            errors = {n: models.errors[key][n] for n, key in allocation.items()}
            of = {k: grid_error(higgs(k.removeprefix(tag))) for k in dict.fromkeys(allocation.values())}
            grid = {n: of[key] for n, key in allocation.items()}
            done["models"][title] = models.measure(allocation) | {
                "feedback": bool(tag),
                "uniform": len(set(allocation.values())) == 1,
                "predicted": predictions(done["coefficients"], errors, grid),
            }
            save()
            print(title, json.dumps(done["models"][title]), flush=True)
        models.values.clear()
    args.results.with_suffix(".md").write_text(markdown(done))
    if args.plot is not None:
        plot(done, args.plot)


def predictions(found: dict, errors: dict[str, Error], grid: dict[str, float]) -> dict[str, float]:
    """sum a_l e_l by what e is, with a by noise; and by what a is, with the effective t^2."""
    noise = {r["layer"]: Response(**r).coefficient for r in found["responses"]}
    kinds = {k: {n: getattr(e, k) for n, e in errors.items()} for k in ("weight", "output", "effective")}
    by_error = {k: predict(noise, e) for k, e in (kinds | {"grid": grid}).items()}
    own = {k: predict(found[k], kinds["effective"]) for k in ("random", "fisher")}
    return by_error | own


def correlations(done: dict, kind: str, of: list[str], log: bool = True) -> tuple[float, float]:
    """Pearson (of logarithms) and Spearman of predicted and measured KL."""
    from scipy.stats import pearsonr, spearmanr

    x = [done["models"][t]["predicted"][kind] for t in of]
    y = [done["models"][t]["kl"] for t in of]
    line = pearsonr(np.log(x), np.log(y)) if log else pearsonr(x, y)
    return float(line.statistic), float(spearmanr(x, y).statistic)


def sets(done: dict) -> dict[str, list[str]]:
    """Models by what they show."""
    models = done["models"]
    plain = [t for t in models if not models[t]["feedback"]]
    fine = [t for t in plain if models[t]["predicted"]["weight"] < 0.5]
    return {
        "rounding, all": plain,
        "rounding, predicted below 0.5": fine,
        "feedback, all": [t for t in models if models[t]["feedback"]],
        "all": list(models),
    }


def markdown(done: dict) -> str:
    """The page."""
    found, models = done["coefficients"], done["models"]
    responses = [Response(**r) for r in found["responses"]]
    noise = {r.layer: r.coefficient for r in responses}
    lines = [
        "# HIGGS's linear model on SmolLM2", "",
        f"Printed by `python benchmarks/linearity.py` on {done['device']} (its first lines say what is",
        "measured). KL in nats per token.", "",
        "## Coefficients", "",
        "KL / t^2 of noise in one layer, by its relative norm t, over its value at the smallest t:", "",
        "| t | least | median | largest |", "|--:|--:|--:|--:|",
    ]  # fmt: skip
    for i, t in enumerate(LEVELS):
        ratios = sorted((r.kl[i] / t**2) / (r.kl[0] / LEVELS[0] ** 2) for r in responses)
        lines.append(f"| {t} | {ratios[0]:.2f} | {ratios[len(ratios) // 2]:.2f} | {ratios[-1]:.2f} |")
    lines += ["", "| by kind of layer | least a | median | largest |", "|---|--:|--:|--:|"]
    for kind in dict.fromkeys(n.rpartition(".")[2] for n in noise):
        own = sorted((a, n) for n, a in noise.items() if n.endswith(kind))
        ends = " | ".join(f"{a:.3f} ({n.split('.')[2]})" for a, n in (own[0], own[-1]))
        low, high = ends.split(" | ")
        lines.append(f"| {kind} (block) | {low} | {own[len(own) // 2][0]:.3f} | {high} |")
    lines += ["", f"The sum over {len(noise)} layers is {sum(noise.values()):.1f}.", ""]
    lines += ["| another estimate | log Pearson with noise on text | Spearman | s |", "|---|--:|--:|--:|"]
    for name, key, took in (
        ("noise on text, 5 norms", "", 0),
        ("noise on random tokens, 1 norm", "random", 1),
        ("squared gradients", "fisher", 2),
    ):
        other = found[key] if key else noise
        log, rank = agreement(noise, other)
        lines.append(f"| {name} | {log:.3f} | {rank:.3f} | {found['seconds'][took]:.0f} |")
    lines += [
        "",
        "## Whole models",
        "",
        "| | predicted KL | KL | ratio | perplexity |",
        "|---|--:|--:|--:|--:|",
    ]
    for t, r in models.items():
        if r["uniform"] and not r["feedback"]:
            p = r["predicted"]["weight"]
            lines.append(
                f"| {t} | {p:.4f} | {r['kl']:.4f} | {r['kl'] / p:.2f} | {math.exp(min(r['nll'], 20)):.2f} |"
            )
    lines += ["", "Rounding to nearest; float: perplexity " + f"{math.exp(done['nll']):.2f}.", ""]
    lines += ["| models | | error that enters | log Pearson | Spearman | KL / predicted, least to largest |"]
    lines += ["|---|--:|---|--:|--:|---|"]
    for name, titles in sets(done).items():
        for kind, said in KINDS.items():
            if len(titles) < 3:
                continue
            log, rank = correlations(done, kind, titles)
            ratios = [models[t]["kl"] / models[t]["predicted"][kind] for t in titles]
            lines.append(
                f"| {name} | {len(titles)} | {said} | {log:.4f} | {rank:.4f} | "
                f"{min(ratios):.2f} to {max(ratios):.2f} |"
            )
    lines += ["", "Perplexity: the increase of its logarithm against the KL of the same models,", ""]
    both = [(r["nll"] - done["nll"], r["kl"]) for r in models.values()]
    if len(both) > 2:
        from scipy.stats import pearsonr, spearmanr

        x, y = zip(*both, strict=True)
        lines += [f"Pearson {pearsonr(x, y).statistic:.4f}, Spearman {spearmanr(x, y).statistic:.4f}."]
    return "\n".join(lines) + "\n"


def agreement(a: dict[str, float], b: dict[str, float]) -> tuple[float, float]:
    """Pearson of logarithms and Spearman of two sets of coefficients."""
    from scipy.stats import pearsonr, spearmanr

    x, y = [a[n] for n in a], [b[n] for n in a]
    return float(pearsonr(np.log(x), np.log(y)).statistic), float(spearmanr(x, y).statistic)


def plot(done: dict, path: Path) -> None:
    """Measured against predicted: KL and the increase of log perplexity."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fewbit"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), constrained_layout=True)
    groups = (
        ("rounding, one size", lambda r: r["uniform"] and not r["feedback"], "weight", "o"),
        ("rounding, mixed", lambda r: not r["uniform"] and not r["feedback"], "weight", "x"),
        ("feedback, one size", lambda r: r["uniform"] and r["feedback"], "effective", "s"),
        ("feedback, mixed", lambda r: not r["uniform"] and r["feedback"], "effective", "+"),
    )
    for label, wanted, kind, marker in groups:
        rows = [r for r in done["models"].values() if wanted(r)]
        x = [r["predicted"][kind] for r in rows]
        axes[0].loglog(x, [r["kl"] for r in rows], marker, label=label)
        axes[1].loglog(x, [max(r["nll"] - done["nll"], 1e-4) for r in rows], marker, label=label)
    for axis, label in zip(axes, ("measured KL, nats per token", "increase of log perplexity"), strict=True):
        ends = [min(axis.get_xlim()[0], 1e-3), axis.get_xlim()[1]]
        axis.plot(ends, ends, color="grey", linewidth=0.8, label="equal")
        axis.set_xlabel("predicted: sum of a t² (feedback: of a t²_eff)")
        axis.set_ylabel(label)
        axis.legend()
    figure.suptitle("SmolLM2 on HIGGS points: the linear model against measurement, WikiText-2 test")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
