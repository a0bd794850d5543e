"""``fewbit inspect``: what makes a model hard to quantize, and what helps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewbit.cli import options
from fewbit.cli.options import Device, Json, Model, Seed, Verbose

if TYPE_CHECKING:
    from fewbit.inspect import Inspection

SAMPLES, SEQLEN, WORST = 8, 512, 8


def inspect(
    model: Model,
    data: Annotated[
        str, typer.Option("--data", metavar="FILE|NAME", help="Text to look at it over: as of quantize.")
    ] = options.EMBEDDED,
    samples: Annotated[int, typer.Option(metavar="N", help="Windows of it.")] = SAMPLES,
    seqlen: Annotated[int, typer.Option(metavar="L", help="Tokens in each of them.")] = SEQLEN,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "--report", "-o", metavar="FILE", help="Write a report with pictures: one HTML file."
        ),
    ] = None,
    seed: Seed = options.SEED,
    device: Device = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Look at MODEL over a text: which channels and tokens stand out, what they cost, and which recipe helps.

    The model streams by once, block by block; memory is one block. Rounding to 8 and to 4 bits is tried on
    each layer under each remedy (steps per channel, groups, smoothing, rotation, columns kept in float).
    """
    options.prepare(verbose)
    from fewbit.report.page import check_path, write

    if output is not None:
        check_path(output)
    from fewbit.cli.progress import Windows
    from fewbit.cli.show import print_json
    from fewbit.inspect.look import look
    from fewbit.inspect.plain import as_dict
    from fewbit.stream.data import Calibration

    text = Calibration(source=data, samples=samples, seqlen=seqlen, seed=seed)
    where = options.device_name(device)
    options.imported()
    seen = look(model, text, device=where, progress=Windows("block"))
    if output is not None:
        from fewbit.inspect.report import report

        write(output, report(seen))
        options.note(f"wrote {output}")
    if as_json:
        print_json(as_dict(seen))
    else:
        _show(seen)


def _show(seen: Inspection) -> None:
    from fewbit.cli.show import facts, number, percent, some, table
    from fewbit.inspect.advice import advise, mean_error
    from fewbit.inspect.remedies import Remedy
    from fewbit.inspect.report import headlines

    rows = [("model", seen.model)]
    tokens = seen.windows * seen.seqlen
    rows.append(("text", f"{seen.text}, {seen.windows} windows of {seen.seqlen} tokens, {tokens} in all"))
    for bits in (8, 4):
        advice = advise(seen, bits)
        said = f"none fits: {seen.rotation}" if advice is None else advice.command(seen.model)
        rows.append((f"for W{bits}A{bits}", said))
    facts(rows, sys.stdout)
    print()
    for sentence in headlines(seen):
        print(sentence)
    print()
    cells = (
        (
            str(r),
            *(percent(mean_error(seen, r, b)) for b in (8, 4)),
            percent(max(layer.errors[8][r] for layer in seen.layers)),
        )
        for r in Remedy
    )
    table(("remedy", ">error W8A8", ">W4A4", ">worst layer W8A8"), cells, sys.stdout)
    print()
    worst = sorted(seen.groups, key=lambda g: -g.input.bits_lost_token)[:WORST]
    cells = (
        (
            g.name,
            number(g.input.largest),
            number(g.input.kurtosis),
            f"{g.input.bits_lost:.1f}",
            f"{g.input.bits_lost_token:.1f}",
            str(len(g.input.channels)),
            some([str(c.index) for c in g.input.channels], 6),
        )
        for g in worst
    )
    names = ("input of", ">largest", ">kurtosis", ">bits lost", ">per token", ">channels out", "which")
    table(names, cells, sys.stdout)
