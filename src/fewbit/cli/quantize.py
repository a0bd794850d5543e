"""``fewbit plan`` and ``fewbit quantize``: what will be done, and doing it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fewbit.cli import options
from fewbit.cli.kv import STORED_KV, with_kv
from fewbit.cli.options import (
    Bits,
    CalibrationText,
    DepthOption,
    Device,
    GroupSize,
    Json,
    Model,
    ReadBack,
    RecipeFile,
    RecipeName,
    Samples,
    Seed,
    Seqlen,
    Settings,
    Verbose,
)


def quantize(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="Folder of the checkpoint; new, or empty.")
    ],
    recipe: RecipeName = None,
    recipe_file: RecipeFile = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    settings: Settings = None,
    kv: STORED_KV = None,
    calibration: CalibrationText = options.EMBEDDED,
    samples: Samples = options.SAMPLES,
    seqlen: Seqlen = options.SEQLEN,
    seed: Seed = options.SEED,
    device: Device = None,
    depth: DepthOption = options.Depth.AUTO,
    read_back: ReadBack = True,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Quantize MODEL by a recipe into the folder OUT.

    Prints the plan, then works block by block; the result is read back from disk and compared before it
    appears under its name. A run that was interrupted goes on when the same command is given again.
    """
    options.prepare(verbose)
    chosen = with_kv(options.make_recipe(recipe, recipe_file, bits, group_size, settings), kv)
    from fewbit.cli.progress import watch_run
    from fewbit.cli.show import print_json
    from fewbit.cli.summary import show_result
    from fewbit.stream.data import Calibration
    from fewbit.stream.quantize import quantize as run

    text = Calibration(source=calibration, samples=samples, seqlen=seqlen, seed=seed)
    where = options.device_name(device)
    with watch_run() as progress:
        result = run(
            model, chosen, output=output, calibration=text, device=where, depth=depth.value,
            read_back=read_back, progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(result.as_dict())
    else:
        show_result(result, model, sys.stdout)


def plan(
    model: Model,
    recipe: RecipeName = None,
    recipe_file: RecipeFile = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    settings: Settings = None,
    kv: STORED_KV = None,
    calibration: CalibrationText = options.EMBEDDED,
    samples: Samples = options.SAMPLES,
    seqlen: Seqlen = options.SEQLEN,
    seed: Seed = options.SEED,
    device: Device = None,
    depth: DepthOption = options.Depth.AUTO,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="Check that the disk has room for it there."),
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say what quantize would do, with the same options, and do nothing.

    Which layer gets which format, bits per weight, size, memory and time; whatever cannot work is refused
    here as it would be there.
    """
    options.prepare(verbose)
    chosen = with_kv(options.make_recipe(recipe, recipe_file, bits, group_size, settings), kv)
    from fewbit.cli.show import print_json
    from fewbit.cli.summary import show_layers, show_plan
    from fewbit.io.source import open_source
    from fewbit.stream.data import Calibration
    from fewbit.stream.plan import make_plan
    from fewbit.stream.quantize import read_calibration

    text = Calibration(source=calibration, samples=samples, seqlen=seqlen, seed=seed)
    where = options.device_name(device)
    source = open_source(model)
    made = make_plan(source, chosen, text, output=output, device=where, depth=depth.value)[0]
    read_calibration(made)  # a text too short is refused now
    if as_json:
        print_json(made.as_dict())
        return
    show_plan(made, sys.stdout)
    print()
    show_layers(made, sys.stdout)
