"""``fewbit export``: a quantized checkpoint in the layout that another engine reads."""

from __future__ import annotations

import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewbit.cli import options
from fewbit.cli.options import Json, Verbose
from fewbit.errors import InputError

if TYPE_CHECKING:
    from fewbit.stream.export import Exported

SHARD_SIZE = "5GB"
WORST = 5


class Target(StrEnum):
    """Layouts that are written."""

    COMPRESSED = "compressed-tensors"
    GPTQ = "gptq"
    GPTQ_V2 = "gptq_v2"
    AWQ = "awq"
    BITSANDBYTES = "bitsandbytes"
    FP8 = "fp8"
    GGUF = "gguf"
    NATIVE = "native"


def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="IN", help="A quantized checkpoint: one of fewbit's, or of any layout that it reads."
        ),
    ],
    to: Annotated[
        Target,
        typer.Option("--to", metavar="LAYOUT", help=f"One of {', '.join(Target)}.", show_choices=False),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="OUT", help="Folder of the result, new or empty; of gguf a file."
        ),
    ],
    requantize: Annotated[
        bool,
        typer.Option("--requantize", help="Round what the layout cannot hold to its nearest format."),
    ] = False,
    shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest file; memory holds one of them.")
    ] = SHARD_SIZE,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify",
            help="Read the result back, compare every weight by value, and have transformers load it in a "
            "process of its own.",
        ),
    ] = True,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write a quantized checkpoint in another layout, code for code.

    Nothing is rounded again unless --requantize is given: what the layout cannot hold is refused, with the
    layer and the reason. Everything else of IN is in OUT, too, or is listed.
    """
    options.prepare(verbose)
    from fewbit.cli.show import print_json
    from fewbit.stream.export import export as run
    from fewbit.stream.shards import size_of

    began, limit = time.perf_counter(), size_of(shard_size)
    if to is Target.GGUF:
        _gguf(checkpoint, output, requantize, as_json)
        return
    done = run(
        checkpoint, to.value, output, requantize=requantize, shard_bytes=limit, verify=verify,
        progress=_Tensors(),
    )  # fmt: skip
    if as_json:
        print_json(done.as_dict() | {"model": checkpoint, "seconds": time.perf_counter() - began})
    else:
        _show(done, checkpoint, time.perf_counter() - began)


class _Tensors:
    """A line for each tenth of the tensors; the clock starts with the first of them."""

    def __call__(self, done: int, total: int) -> None:
        from fewbit.cli.progress import Windows

        if not done:
            self._bar = Windows("tensor")
        else:
            self._bar(done, total)


def _gguf(checkpoint: str, output: Path, requantize: bool, as_json: bool) -> None:
    """One file for llama.cpp."""
    from fewbit.cli.show import facts, print_json, size
    from fewbit.io.gguf_write import write
    from fewbit.io.source import open_source

    if output.suffix != ".gguf" or output.exists():
        raise InputError(
            f"{output} must be the name of a new file that ends in .gguf; choose another with -o"
        )
    if requantize:
        raise InputError(
            "--requantize does not go with gguf; quantize in a format that ggml has, such as -r rtn --set "
            "format=q4_0, or leave it out"
        )
    done = write(open_source(checkpoint), output)
    if as_json:
        found = {"model": checkpoint, "output": str(output), "to": "gguf", "size_bytes": done.nbytes}
        found |= {"kinds": done.kinds, "rounded": list(done.rounded), "unused": list(done.left_out)}
        print_json(found | {"caveats": list(done.caveats)})
        return
    rows = [("file", str(output)), ("written as", f"GGUF: {done}"), ("size", size(done.nbytes))]
    rows += [("left out", ", ".join(done.left_out))] if done.left_out else []
    rows += [("mind", text) for text in done.caveats]
    facts(rows, sys.stdout)


def _show(done: Exported, checkpoint: str, seconds: float) -> None:
    """What went over as it was, what did not, who has read it."""
    from collections import Counter

    from fewbit.cli.show import duration, facts, number, percent, size, some, table

    again = done.requantized
    kinds = Counter(str(layer.to.format) for layer in done.layers)
    same = len(done.layers) - len(again)
    change = max((layer.change for layer in done.layers), default=0.0)
    steps = f"; the dtype of their steps changes weights by {number(change)}" if change else ""
    rows = [
        ("checkpoint", str(done.output)),
        (
            "written as",
            f"{done.target}: {', '.join(f'{n} layers {kind}' for kind, n in kinds.most_common())}",
        ),
        ("lossless", f"{same} of {len(done.layers)} layers code for code{steps}"),
    ]
    if again:
        rows.append(("rounded", f"{len(again)} layers again: {again[0].why}"))
    rows += [
        ("as it was", f"{len(done.copied)} tensors that are not quantized: {some(done.copied, 3)}"),
        ("size", f"{size(done.nbytes)} in {done.shards} file" + "s" * (done.shards > 1)),
        ("verified", _verified(done)),
    ]
    if done.rounded_floats:
        rows.append(("rounded", f"{some(done.rounded_floats, 3)}: to the dtype of the model"))
    rows += [("tied", f"{name}: is {held}, stored once") for name, held in done.tied.items()]
    if done.unused:
        rows.append(("not used", f"{some(done.unused, 3)}: in no layer of the model; copied all the same"))
    rows += [("mind", text) for text in done.caveats]
    rows.append(("time", duration(seconds)))
    facts(rows, sys.stdout)
    if again:
        print(f"\nThe {min(WORST, len(again))} layers that this changes most (relative squared error):")
        cells = ((x.name, str(x.entry.format), str(x.to.format), percent(x.error)) for x in again[:WORST])
        table(("layer", "from", "to", ">error"), cells, sys.stdout)
        print(f"\nNext, what that costs:\n  fewbit eval {done.output} --against {checkpoint}")


def _verified(done: Exported) -> str:
    """In words what was compared with what."""
    if done.seen is None:
        return "no, as asked"
    read = "read back from disk, every weight equal by value; "
    if done.seen.difference is None:
        return f"{read}transformers cannot load it here ({done.seen.why})"
    near = "equal to ours" if done.seen.difference == 0 else f"within {done.seen.difference:.1g} of ours"
    return f"{read}transformers loads it in a process of its own, its logits {near}"
