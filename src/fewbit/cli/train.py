"""``fewbit train``: pretrain the small Llama, finetune a model, or train it with the rounding in the loop.

A run is watched on standard error: one line that is overwritten on a terminal, about twenty lines in a pipe,
with the time left, which is that of the updates of this sitting times the updates to go.
"""

from __future__ import annotations

import shlex
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbit.cli import options
from fewbit.cli.options import Bits, Device, GroupSize, Json, RecipeFile, RecipeName, Settings, Verbose

if TYPE_CHECKING:
    from fewbit.trainer.run import Trained
    from fewbit.trainer.way import Way

EPILOG = """Examples:

- `fewbit train tiny-llama --data shakespeare.txt -o out/bf16`

- `fewbit train tiny-llama --data shakespeare.txt -o out/fp8 --products rowwise --level O3 --beside out/bf16`

- `fewbit train smollm2 --data mine.txt -o out/tuned`

- `fewbit train smollm2 --data mine.txt -o out/w4 -r rtn --bits 4 --group-size 64 --quant lsq`
"""
FRESH = {"steps": 400, "batch": 16, "lr": 2e-3, "save_every": 50}
TUNED = {"steps": 60, "batch": 4, "lr": 5e-5, "save_every": 20, "held": 16, "looks": 4, "weight_decay": 0.0}


class Precision(StrEnum):
    """What products that are not in few bits are computed in."""

    BF16 = "bf16"
    FLOAT32 = "float32"


def train(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="tiny-llama (1.8 million parameters, bytes, from nothing), or a model that quantize takes, "
            "such as smollm2.",
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE|NAME",
            help="The text: a file, JSON lines, or a hub data set as name:config:split.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "--out", "-o", metavar="OUT", help="Folder of the result; new, or empty."),
    ],
    held_out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|NAME", help="A text that is only scored.", show_default="the last 5 % of --data"
        ),
    ] = None,
    products: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The products of linear layers in few bits: tensorwise, rowwise, delayed, blockwise, mxfp8, "
            "mxfp4, nvfp4, switchback, ...",
            show_default="--precision",
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What AdamW keeps: fp8-lm, adamw-fp8, adamw-8bit, adamw-4bit; or stable-adamw.",
            show_default="AdamW in float32",
        ),
    ] = None,
    level: Annotated[
        str | None,
        typer.Option(metavar="L", help="FP8-LM: O1 gradients in FP8, O2 moments too, O3 weights too."),
    ] = None,
    recipe: RecipeName = None,
    recipe_file: RecipeFile = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    settings: Settings = None,
    quant: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Train with the recipe's rounding in the forward: lsq (trained steps), learned (steps and "
            "zeros), ste (steps fitted), or quest (with --bits alone: QuEST's own grid, weights and inputs).",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Updates.", show_default="400; 60 for a trained model")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(metavar="B", help="Windows of one update.", show_default="16; 4 for a trained model"),
    ] = None,
    micro: Annotated[
        int | None, typer.Option(metavar="M", help="Windows of one forward.", show_default="all")
    ] = None,
    length: Annotated[int, typer.Option(metavar="L", help="Tokens of a window.")] = 128,
    lr: Annotated[
        float | None,
        typer.Option(metavar="R", help="Peak learning rate.", show_default="2e-3; 5e-5 for a trained model"),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="S", help="First weights and order of the windows.")] = 0,
    precision: Annotated[
        Precision, typer.Option(help="Of products that stay wide; weights are float32.")
    ] = Precision.BF16,
    save_every: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Updates between checkpoints.", show_default="50; 20 for a trained model"
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of the same command.")
    ] = False,
    beside: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A finished run whose curve is drawn along, such as BF16's."),
    ] = None,
    device: Device = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train MODEL on a text, in BF16 or in few bits, into the folder OUT.

    Pretrains tiny-llama, finetunes any other model, or trains it with a recipe's rounding in the loop
    (--quant), which gives a quantized checkpoint. A run that was interrupted goes on with --resume, to the
    same bits. OUT holds the model, losses.jsonl, training.json and curve.html.
    """
    options.prepare(verbose)
    from fewbit.cli.show import print_json
    from fewbit.trainer.run import train as run
    from fewbit.trainer.settings import Settings as Plan
    from fewbit.trainer.small import NAME
    from fewbit.trainer.way import Way

    way = Way(
        products=products,
        optimizer=optimizer,
        level=level,
        quant=quant,
        recipe=_recipe(recipe, recipe_file, bits, group_size, settings, quant),
    )
    given = {"steps": steps, "batch": batch, "micro": micro, "lr": lr, "save_every": save_every}
    chosen = (FRESH if model == NAME else TUNED) | {k: v for k, v in given.items() if v is not None}
    plan = Plan(**chosen, length=length, seed=seed, precision=precision.value)
    where = options.device_name(device)
    options.imported()
    result = run(
        model, data=data, output=output, way=way, settings=plan, held_out=held_out, device=where,
        resume=resume, beside=beside, watch=Lines(),
    )  # fmt: skip
    if as_json:
        print_json(result.as_dict())
    else:
        _show(result, way)


def _recipe(name, file, bits, group_size, settings, quant):
    """The recipe that the options describe, QuEST's own, or None where they describe none."""
    if name is None and file is None and quant == "quest" and group_size is None and not settings:
        from fewbit.trainer.way import quest

        return quest(4 if bits is None else bits)
    if name is None and file is None and bits is None and group_size is None and not settings:
        return None
    return options.make_recipe(name, file, bits, group_size, settings)


class Lines:
    """Progress of a run on standard error."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._began, self._first = 0.0, 0

    def start(self, done: int, total: int) -> None:
        """The clock runs."""
        self._began, self._first = time.perf_counter(), done

    def row(self, row: dict[str, Any], total: int) -> None:
        """A line, where one is due; always where an update was left out."""
        from fewbit.cli.show import duration

        done = row["step"]
        if row["skipped"]:
            self._line(
                f"update {done} left out: its gradient holds Inf or NaN; the weights stay as they were"
            )
        held = f", held-out loss {row['held']:.4f}" if "held" in row else ""
        left = (time.perf_counter() - self._began) / (done - self._first) * (total - done)
        ahead = f", about {duration(left)} left" if done < total else ""
        text = f"update {done}/{total}  loss {row['loss']:.4f}{held}{ahead}"
        if self._live and not held:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        elif held or done % max(1, total // 20) == 0 or done == self._first + 1:
            self._line(text)

    def note(self, text: str) -> None:
        """A line."""
        self._line(text)

    def _line(self, text: str) -> None:
        print(("\r\033[K" if self._live else "") + text, file=sys.stderr, flush=True)


def _show(result: Trained, way: Way) -> None:
    """What came out, against what, where it is, and what to type next."""
    from fewbit.cli.show import duration, facts, size

    r, job = result.report, result.report["job"]
    done = f"{r['steps']} updates of {job['batch']} x {job['length']} tokens in {duration(r['seconds'])}"
    if result.finished_before:
        done = "nothing to do: the same command had finished before"
    each = r["optimizer_bytes"] / r["parameters"]
    kept = f"{size(r['optimizer_bytes'])} of it the optimizer's: {each:.1f} bytes a parameter"
    rows = [
        ("trained", r["name"]),
        ("result", str(result.output)),
        ("loss", f"{r['held']:.4f} nats per token held out; {_before(r)}"),
        *_beside(result),
        ("read back", f"{r['read_back']:.4f} from the files, in their dtype, without low products"),
        ("left out", f"{r['skipped']} updates, whose gradients were not finite") if r["skipped"] else None,
        ("speed", f"{r['tokens_per_second']:,.0f} tokens/s on {r['device']}"),
        ("memory", f"{size(r['peak_bytes'])} at most, {kept}"),
        ("done", done),
        ("curve", str(result.output / "curve.html")),
    ]  # fmt: skip
    facts([row for row in rows if row is not None], sys.stdout)
    path, model = shlex.quote(str(result.output)), r["model"]
    print("\nNext:")
    if r["quantized"]:
        print(f"  fewbit eval {path} --data embedded:eval --against {shlex.quote(model)}")
        print(f"  fewbit export {path} --to compressed-tensors -o {path}-vllm")
    elif way.name("") == "" and result.beside is None:
        print("  the same command with --products rowwise, another -o and --beside", path)
    print(f'  fewbit generate {path} "The king"')


def _before(r: dict[str, Any]) -> str:
    """What the loss was before."""
    if r["quantized"]:
        return f"rounded before training {r['start']:.4f}, the float model {r['before']:.4f}"
    return f"before training {r['before']:.4f}"


def _beside(result: Trained) -> list[tuple[str, str]]:
    if result.beside is None:
        return []
    apart = 100 * (result.report["held"] / result.beside["held"] - 1)
    other = result.beside
    updates = "" if other["steps"] == result.report["steps"] else f" after {other['steps']} updates"
    return [("beside", f"{apart:+.2f} % from {other['held']:.4f} of {other['name']}{updates}")]
