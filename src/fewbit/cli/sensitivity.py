"""``fewbit sensitivity``: what each format costs each layer by several scores, and which are right."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewbit.cli import options
from fewbit.cli.candidates import CandidateFiles, Candidates, candidates, choices, defaults
from fewbit.cli.options import Device, Json, Model, Seed, Seqlen, Verbose
from fewbit.cli.scoring import (
    KL_TOKENS,
    KL_WINDOWS,
    SAMPLES,
    Data,
    KlTokens,
    KlWindows,
    Samples,
    ScoreName,
    open_subject,
)
from fewbit.errors import InputError

if TYPE_CHECKING:
    from fewbit.search import Row

SCORES = "output,fisher,kl"
RESULT = "sensitivity.json"


def sensitivity(
    model: Model,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FOLDER", help="Where scores are kept as they come, and found again."
        ),
    ],
    words: Candidates = None,
    files: CandidateFiles = None,
    scores: Annotated[
        str,
        typer.Option(
            metavar="S,S,..",
            help="weight, output: relative squared errors; fisher, noise: KL as squared gradients and "
            "HIGGS's coefficients expect it; kl: measured, each layer alone.",
        ),
    ] = SCORES,
    worst: Annotated[int, typer.Option(metavar="N", help="Rows of the table of the worst layers.")] = 10,
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
    """Say which layers of MODEL each format hurts, by errors, by expected and by measured KL.

    Scores are kept layer by layer: the same command goes on after an interruption, and measures only what is
    missing when formats are added. fewbit search --from FOLDER chooses by them. The float model must fit in
    memory.
    """
    options.prepare(verbose)
    began = time.perf_counter()
    asked = _scores(scores)
    given = candidates(words or (), files or ())
    if worst < 1:
        raise InputError(f"--worst {worst} leaves no rows to show; give 1 or more")
    subject = open_subject(model, data, samples, seqlen, kl_windows, kl_tokens, seed, device)
    given = given or defaults(None, ())
    rows = subject.measure(choices(given, subject.kinds, None), asked, output)
    report = _report(rows, asked) | {
        "model": model, "data": data, "samples": samples, "seqlen": seqlen,
        "kl_tokens": list(subject.kl_tokens.shape), "seed": seed, "folder": str(output),
        "seconds": time.perf_counter() - began,
    }  # fmt: skip
    import json

    (output / RESULT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if as_json:
        from fewbit.cli.show import print_json

        print_json(report)
    else:
        _show(report, worst)


def _scores(text: str) -> list[ScoreName]:
    known = {s.value: s for s in ScoreName}
    names = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [n for n in names if n not in known]
    if wrong or not names:
        raise InputError(f"--scores {text!r} names {wrong or 'nothing'}; give some of {', '.join(known)}")
    return [known[n] for n in dict.fromkeys(names)]


def _report(rows: dict[str, Sequence[Row]], scores: Sequence[ScoreName]) -> dict:
    """Plain data for --json."""
    from dataclasses import asdict

    from fewbit.search import Score, rank_correlations

    flat = [row for own in rows.values() for row in own]
    names = list(dict.fromkeys(row.choice for row in flat))
    asked = [Score(s.value) for s in scores]
    truth = rank_correlations(rows, [s for s in asked if s is not Score.KL]) if Score.KL in asked else {}
    sums = {
        name: {s.value: sum(r.value(s) or 0.0 for r in flat if r.choice == name) for s in asked}
        for name in names
    }
    return {
        "scores": [s.value for s in scores],
        "candidates": names,
        "rank_correlation_with_kl": truth,
        "sums": sums,
        "layers": [asdict(row) for row in flat],
    }


def _show(report: dict, worst: int) -> None:
    from fewbit.cli.show import duration, facts, number, table

    names = report["scores"]
    by = next((n for n in ("kl", "fisher", "noise", "output", "weight") if n in names), "weight")
    ranked = sorted(report["layers"], key=lambda r: -(r[by] or 0.0))[:worst]
    print(f"worst layers, by {by}")
    cells = ((r["layer"], r["choice"], *(number(r[n]) for n in names)) for r in ranked)
    table(("layer", "candidate", *(f">{n}" for n in names)), cells, sys.stdout)
    print("\nsums over layers")
    cells = ((c, *(number(s[n]) for n in names)) for c, s in report["sums"].items())
    table(("candidate", *(f">{n}" for n in names)), cells, sys.stdout)
    truth = report["rank_correlation_with_kl"]
    if truth:
        others = [n for n in names if n != "kl"]
        print("\nrank correlation of each score with the measured KL, over layers")
        cells = ((c, *("-" if t[n] is None else f"{t[n]:.3f}" for n in others)) for c, t in truth.items())
        table(("candidate", *(f">{n}" for n in others)), cells, sys.stdout)
    print()
    tokens = report["kl_tokens"]
    rows = [
        ("model", report["model"]),
        (
            "text",
            f"{report['samples']} x {report['seqlen']} tokens of {report['data']}, seed {report['seed']}",
        ),
        ("time", duration(report["seconds"])),
        ("kept", f"{report['folder']}; fewbit search {report['model']} --from {report['folder']} ..."),
    ]
    if {"kl", "noise"} & set(names):
        rows.insert(2, ("KL", f"nats per token over {tokens[0]} x {tokens[1]} tokens, one layer at a time"))
    facts(rows, sys.stdout)
