"""``fewbit search``: which layer gets which format, under a budget of bits, of bytes or of harm."""

from __future__ import annotations

import math
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewbit.cli import options
from fewbit.cli.candidates import (
    Candidate,
    CandidateFiles,
    Candidates,
    For,
    Target,
    as_recipe,
    candidates,
    choices,
    defaults,
    swept,
)
from fewbit.cli.options import Device, Json, Model, Seed, Seqlen, Settings, Verbose
from fewbit.cli.scoring import (
    KL_TOKENS,
    KL_WINDOWS,
    SAMPLES,
    Data,
    KlTokens,
    KlWindows,
    Samples,
    ScoreName,
    Subject,
    open_subject,
)
from fewbit.errors import InputError

if TYPE_CHECKING:
    from fewbit.search import Found

CHOICES = "2,3,4"
NATS = (ScoreName.FISHER, ScoreName.NOISE, ScoreName.KL)  # whose sums are expected KL
UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def search(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The recipe file to write; new.")
    ],
    bits: Annotated[
        float | None,
        typer.Option("--bits", metavar="B", help="Stored bits per weight on average, scales counted."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Of the whole checkpoint on disk, embeddings and all: 400MB, 1.5GB, 90MiB."
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(metavar="KL", help="The smallest model whose expected KL, nats per token, is no more."),
    ] = None,
    words: Candidates = None,
    files: CandidateFiles = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", metavar="RECIPE", help="One recipe at several numbers of bits."),
    ] = None,
    bits_choices: Annotated[
        str | None,
        typer.Option(
            "--choices", metavar="B,B,..", help="What its setting bits may be.", show_default=CHOICES
        ),
    ] = None,
    settings: Settings = None,
    target: For = None,
    together: Annotated[
        bool,
        typer.Option("--together", help="Layers that read one tensor (q, k, v; gate, up) choose alike."),
    ] = False,
    score: Annotated[
        ScoreName,
        typer.Option(
            help="fisher: by squared gradients; noise: HIGGS's, by noise in each layer; kl: each layer alone "
            "under each format, measured; weight, output: relative errors, which know nothing of layers."
        ),
    ] = ScoreName.FISHER,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="FOLDER", help="Scores of fewbit sensitivity; those that are missing go there."
        ),
    ] = None,
    data: Data = options.EMBEDDED,
    samples: Samples = SAMPLES,
    seqlen: Seqlen = options.SEQLEN,
    kl_windows: KlWindows = KL_WINDOWS,
    kl_tokens: KlTokens = KL_TOKENS,
    seed: Seed = options.SEED,
    device: Device = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Choose the format of each layer of MODEL so that the whole loses least, and write a recipe file.

    What a layer may get is given with -c, with -r and --choices, or left to the default: HIGGS with feedback
    at 2 to 6 bits and int8. Solved exactly, by the linear model of HIGGS: the KL divergence is a sum over
    layers. The float model must fit in memory. Then: fewbit quantize MODEL --recipe-file FILE -o OUT
    """
    options.prepare(verbose)
    began = time.perf_counter()
    budget = _budget(bits, size, max_kl, score)
    if output.exists() or not output.absolute().parent.is_dir():
        reason = "is there already" if output.exists() else "has no folder to be written in"
        raise InputError(f"{output} {reason}; name a new recipe file with -o")
    given = _given(words, files, recipe, bits_choices, settings)
    if given and len(given) < 2:
        raise InputError(f"one candidate, {given[0].name!r}, leaves nothing to choose; give more with -c")
    subject = open_subject(model, data, samples, seqlen, kl_windows, kl_tokens, seed, device)
    given = given or defaults(target, [shape[1] for shape in subject.shapes.values()])
    found, total = _found(subject, given, target, together, score, cache, budget)
    made = as_recipe(found, given)
    if all(rule.weight is None for rule in made.rules):
        raise InputError("the budget lets every layer stay as it is, so there is nothing to write; lower it")
    output.write_text(made.to_yaml(), encoding="utf-8")
    report = _report(found, [one.name for one in given], score) | {
        "model": model, "output": str(output), "budget": budget, "size_bytes": total, "data": data,
        "score": score.value, "together": together or target is not None,
        "for": target and target.value, "seconds": time.perf_counter() - began,
    }  # fmt: skip
    if as_json:
        from fewbit.cli.show import print_json

        print_json(report)
    else:
        _show(report)


def _budget(bits: float | None, size: str | None, max_kl: float | None, score: ScoreName) -> dict[str, float]:
    """The one budget that was given: bits per weight, bytes, or nats per token."""
    given = {"bits": bits, "size": size, "max_kl": max_kl}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        got = "no budget is given" if not given else f"{len(given)} budgets are given"
        raise InputError(f"{got}; give one of --bits 3.25, --size 400MB and --max-kl 0.05")
    name, value = next(iter(given.items()))
    value = _bytes(value) if name == "size" else value
    option = f"--{name.replace('_', '-')}"
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"{option} {value:g} is not a positive number; give one such as 2.5")
    if name == "max_kl" and score not in NATS:
        raise InputError(f"--max-kl counts nats and --score {score.value} does not; use fisher, noise or kl")
    return {name: value}


def _bytes(text: str) -> float:
    """400MB as a number."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([kMG]i?)?B?\s*", text)
    try:
        return float(found[1]) * UNITS[found[2] or ""]
    except (TypeError, ValueError):
        raise InputError(f"--size {text!r} is not a size; give one such as 400MB, 1.5GB or 90MiB") from None


def _given(
    words: list[str] | None,
    files: list[Path] | None,
    recipe: str | None,
    bits_choices: str | None,
    settings: list[str] | None,
) -> list[Candidate]:
    """The candidates of the command line; none where it names none."""
    found = candidates(words or (), files or ())
    if recipe is not None:
        return [*found, *swept(recipe, CHOICES if bits_choices is None else bits_choices, settings or [])]
    if bits_choices is not None or settings:
        raise InputError("--choices and --set belong to a recipe; name it with -r, or write it out with -c")
    return found


def _found(
    subject: Subject,
    given: list[Candidate],
    target: Target | None,
    together: bool,
    score: ScoreName,
    cache: Path | None,
    budget: dict[str, float],
) -> tuple[Found, int]:
    """The choices, and bytes of the whole checkpoint."""
    from fewbit.search import Budget, Score, choose, siblings

    own = choices(given, subject.kinds, target)
    shapes, rest = subject.shapes, subject.rest_bytes()
    weights = sum(out * into for out, into in shapes.values())
    room = {
        "bits": lambda b: Budget(bits=b * weights),
        "size": lambda b: Budget(bits=max(8 * (b - rest), 1.0)),
        "max_kl": lambda b: Budget(kl=b),
    }
    name, value = next(iter(budget.items()))
    limit = room[name](value)
    kept = 8 * subject.source.dtype.itemsize
    least = sum(min(c.bits(shapes[n], kept) for c in cs) for n, cs in own.items())
    if name == "size" and least > limit.bits:
        raise InputError(
            f"{value:.0f} bytes are fewer than the {rest + least / 8:.0f} of the smallest choices, of which "
            f"embeddings, norms and head take {rest}; give more, or smaller candidates"
        )
    if name == "bits" and least > limit.bits * (1 + 1e-12):
        raise InputError(
            f"{value:g} bits per weight are fewer than the {least / weights:.4g} of the smallest choices, "
            f"scales counted; give {math.ceil(100 * least / weights) / 100:g} or more, or smaller candidates"
        )
    rows = subject.measure(own, {score}, cache)
    alike = together or target is Target.VLLM
    groups = siblings(subject.model, list(own), subject.tokens) if alike else ()
    found = choose(own, shapes, rows, limit, Score(score.value), together=groups, kept=kept)
    return found, rest + math.ceil(found.bits / 8)


def _report(found: Found, names: list[str], score: ScoreName) -> dict:
    """Plain data for --json."""
    return {
        "bits_per_weight": found.bits_per_weight,
        "expected_kl": found.expected_kl if score in NATS else None,
        "loss": found.expected_kl,
        "candidates": names,
        "layers": [
            {
                "layer": p.layer,
                "choice": names[p.choice],
                "bits_per_weight": p.bits / p.weights,
                "weights": p.weights,
                "error": p.row.weight,
                "output_error": p.row.output,
                "loss": p.loss,
            }
            for p in found.layers
        ],
    }


def _show(report: dict) -> None:
    from fewbit.cli.show import duration, facts, number, size, table
    from fewbit.search import RANGE

    layers, total = report["layers"], sum(r["weights"] for r in report["layers"])
    name, value = next(iter(report["budget"].items()))
    rows = [
        ("model", report["model"]),
        ("bits", f"{report['bits_per_weight']:.4f} per weight; scales and zeros counted, embeddings not"),
        ("size", f"{size(report['size_bytes'])} on disk, everything counted"),
        ("budget", {"bits": f"{value:g} bits", "size": size(value), "max_kl": f"a KL of {value:g}"}[name]),
        ("time", duration(report["seconds"])),
        (
            "written",
            f"{report['output']}; fewbit quantize {report['model']} --recipe-file {report['output']} -o OUT",
        ),
    ]
    if report["expected_kl"] is None:
        rows.insert(3, ("error", f"{number(report['loss'])}, relative squared, added over layers: no KL"))
    else:
        rows.insert(3, ("KL", f"{number(report['expected_kl'])} nats per token expected by the linear model"))
        if report["expected_kl"] > RANGE:
            text = f"above about {RANGE} errors add up to more than their sum: expect a larger KL"
            rows.insert(4, ("mind", text))
    facts(rows, sys.stdout)
    print()
    own = {name: [r for r in layers if r["choice"] == name] for name in report["candidates"]}
    cells = (
        (
            name,
            str(len(rs)),
            f"{100 * sum(r['weights'] for r in rs) / total:.1f}",
            number(sum(r["loss"] for r in rs)),
        )
        for name, rs in own.items()
    )
    last = ">error" if report["expected_kl"] is None else ">expected KL"
    table(("candidate", ">layers", ">% of weights", last), cells, sys.stdout)
