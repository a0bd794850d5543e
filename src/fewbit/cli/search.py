"""``fewbit search``: which layer gets how many bits, under a budget."""

from __future__ import annotations

import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbit.cli import options
from fewbit.cli.options import Device, Json, Model, RecipeName, Seed, Seqlen, Settings, Verbose
from fewbit.errors import InputError

if TYPE_CHECKING:
    from fewbit.recipe import Recipe
    from fewbit.search import Found

CHOICES, SAMPLES = "2,3,4", 16
RANDOM = "random"


class EstimateName(StrEnum):
    """How the coefficients of the layers are found."""

    FISHER = "fisher"
    NOISE = "noise"


def search(
    model: Model,
    bits: Annotated[
        float, typer.Option("--bits", metavar="B", help="Stored bits per weight on average, scales counted.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The recipe file to write; new.")
    ],
    recipe: RecipeName = "higgs",
    choices: Annotated[
        str,
        typer.Option(metavar="B,B,..", help="What the recipe's setting bits may be for a layer."),
    ] = CHOICES,
    settings: Settings = None,
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE|NAME",
            help="Text that says what matters: as --calibration of quantize, or random (random tokens: no "
            "data at all).",
        ),
    ] = options.EMBEDDED,
    samples: Annotated[int, typer.Option(metavar="N", help="Windows of it.")] = SAMPLES,
    seqlen: Seqlen = options.SEQLEN,
    coefficients: Annotated[
        EstimateName,
        typer.Option(help="fisher: by gradients, a backward a window; noise: in one layer after another."),
    ] = EstimateName.FISHER,
    together: Annotated[
        bool,
        typer.Option("--together", help="Layers that read one tensor (q, k, v; gate, up) choose alike."),
    ] = False,
    seed: Seed = options.SEED,
    device: Device = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Choose the bits of each layer of MODEL so that the whole loses least, and write a recipe file.

    By the linear model of HIGGS, solved exactly: the KL divergence is the sum over layers of a coefficient
    times a squared relative error. The float model must fit in memory. Then:
    fewbit quantize MODEL --recipe-file FILE -o OUT
    """
    options.prepare(verbose)
    began = time.perf_counter()
    if not bits > 0:
        raise InputError(f"--bits {bits:g} is not a positive number; give an average such as 2.5")
    if output.exists() or not output.absolute().parent.is_dir():
        reason = "is there already" if output.exists() else "has no folder to be written in"
        raise InputError(f"{output} {reason}; name a new recipe file with -o")
    recipes = _recipes(recipe, choices, settings)
    where = options.device_name(device)

    import torch

    from fewbit.cli.progress import Windows
    from fewbit.cli.show import print_json
    from fewbit.io.load import load
    from fewbit.io.source import open_source
    from fewbit.search import Estimate, choose
    from fewbit.search.linearity import block_linears

    source = open_source(model)
    tokens = _tokens(source, data, samples, seqlen, seed)
    options.note(f"loading {model}")
    subject = load(model, where, torch.float32)
    own = {name: [_choice(r, name) for r in recipes.values()] for name in block_linears(subject)}

    def phase(text: str, counted: str) -> Windows:
        options.note(text)
        return Windows(counted)

    found = choose(
        subject, own, tokens, bits, estimate=Estimate(coefficients.value), together=together,
        kept=8 * source.dtype.itemsize, seed=seed, phase=phase,
    )  # fmt: skip
    names = [f"{recipe} bits={b}" for b in recipes]
    output.write_text(_write(recipes, found).to_yaml(), encoding="utf-8")
    report = _report(found, names) | {
        "model": model, "output": str(output), "budget": bits, "data": data,
        "coefficients": coefficients.value, "together": together, "seconds": time.perf_counter() - began,
    }  # fmt: skip
    if as_json:
        print_json(report)
    else:
        _show(report, names)


def _recipes(name: str, choices: str, settings: list[str] | None) -> dict[str, Recipe]:
    """The recipe at every number of bits."""
    given = [part.strip() for part in choices.split(",") if part.strip()]
    if len(given) < 2 or len(set(given)) < len(given):
        raise InputError(f"--choices {choices!r} leaves nothing to choose; give numbers such as {CHOICES}")
    found = {}
    for bits in given:
        made = options.make_recipe(name, None, None, None, [*(settings or []), f"bits={bits}"])
        if made.transforms or made.rotation is not None or made.tuning is not None:
            raise InputError(
                f"recipe {name!r} changes more than single layers and cannot be tried on each alone; choose "
                "another with -r, such as higgs, gptq or qtip"
            )
        if any(r.input is not None or r.alternatives or r.split is not None for r in made.rules):
            raise InputError(
                f"recipe {name!r} quantizes inputs, splits columns or chooses formats itself, which the "
                "search does not weigh; choose one of weights alone with -r, such as higgs, gptq or qtip"
            )
        found[bits] = made
    return found


def _tokens(source: Any, data: str, samples: int, seqlen: int, seed: int):
    """Token windows [samples, seqlen]."""
    from fewbit.stream.data import Calibration, sample_tokens

    if data != RANDOM:
        text = Calibration(source=data, samples=samples, seqlen=seqlen, seed=seed)
        return sample_tokens(text, source.tokenizer())
    from fewbit.search import random_tokens

    Calibration(samples=samples, seqlen=seqlen, seed=seed)  # refuses what is impossible
    return random_tokens(source.config().get_text_config().vocab_size, samples, seqlen, seed)


def _choice(recipe: Recipe, layer: str):
    """What the recipe does with a layer."""
    from fewbit.search import Choice

    rule = recipe.rule_for(layer)
    if rule is None or rule.weight is None:
        return Choice(format=None)
    return Choice(format=rule.weight, solver=rule.solver, basis=rule.basis)


def _write(recipes: dict[str, Recipe], found: Found) -> Recipe:
    """A rule per layer."""
    from dataclasses import replace

    from fewbit.recipe import Recipe, Rule

    made, rules = list(recipes.values()), []
    for p in found.layers:
        rule = made[p.choice].rule_for(p.layer)
        rules.append(Rule(match=p.layer) if rule is None else replace(rule, match=p.layer))
    return Recipe(name=f"search-{made[0].name}", rules=tuple(rules))


def _report(found: Found, names: list[str]) -> dict:
    """Plain data for --json."""
    return {
        "bits_per_weight": found.bits_per_weight,
        "expected_kl": found.expected_kl,
        "layers": [
            {
                "layer": p.layer,
                "choice": names[p.choice],
                "bits_per_weight": p.bits / p.weights,
                "weights": p.weights,
                "coefficient": p.coefficient,
                "error": p.error.best,
                "expected_kl": p.loss,
            }
            for p in found.layers
        ],
    }


def _show(report: dict, names: list[str]) -> None:
    from fewbit.cli.show import duration, facts, number, table

    layers, total = report["layers"], sum(r["weights"] for r in report["layers"])
    budget = f"{report['bits_per_weight']:.4f} per weight, of a budget of {report['budget']:g}"
    rows = [
        ("model", report["model"]),
        ("bits", budget + "; scales and zeros counted, embeddings not"),
        ("KL", f"{number(report['expected_kl'])} nats per token expected by the linear model"),
        ("time", duration(report["seconds"])),
        (
            "written",
            f"{report['output']}; fewbit quantize {report['model']} --recipe-file {report['output']}",
        ),
    ]
    if report["expected_kl"] > 0.3:
        rows.insert(3, ("mind", "above about 0.3 errors add up to more than their sum: expect a larger KL"))
    facts(rows, sys.stdout)
    print()
    own = {name: [r for r in layers if r["choice"] == name] for name in names}
    cells = (
        (
            name,
            str(len(rs)),
            f"{100 * sum(r['weights'] for r in rs) / total:.1f}",
            number(sum(r["expected_kl"] for r in rs)),
        )
        for name, rs in own.items()
    )
    table(("choice", ">layers", ">% of weights", ">expected KL"), cells, sys.stdout)
