"""Options that several commands share, and what turns them into the library's objects.

Defaults are written here once more than in the library, so that ``--help`` can show them without importing
torch; a test holds the two equal.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewbit.errors import InputError

if TYPE_CHECKING:
    from fewbit.recipe import Recipe

SAMPLES, SEQLEN, SEED = 128, 512, 0
EMBEDDED, HELD_OUT = "embedded", "embedded:eval"
WINDOW, WINDOWS = 512, 12


class Depth(StrEnum):
    """Where forwards are suspended."""

    AUTO = "auto"
    LINEAR = "linear"
    BLOCK = "block"


class JoinName(StrEnum):
    """How the lines of a text become one text again."""

    ROWS = "rows"
    SOLID = "solid"


class DtypeName(StrEnum):
    """What a model is run in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A hub id, a folder of safetensors, a .gguf file, or smollm2 (the packaged model).",
    ),
]
Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT", help="A checkpoint that fewbit wrote, or any MODEL that quantize takes."
    ),
]
RecipeName = Annotated[
    str | None, typer.Option("--recipe", "-r", metavar="RECIPE", help="A recipe of `fewbit recipes`.")
]
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="A recipe as YAML instead of -r, such as the one saved beside a checkpoint."
    ),
]
Bits = Annotated[int | None, typer.Option(metavar="B", help="Short for --set bits=B.")]
GroupSize = Annotated[
    int | None,
    typer.Option(metavar="G", help="Short for --set group_size=G; -1: one scale per row, 0: per tensor."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting of the recipe; may be given many times."),
]
CalibrationText = Annotated[
    str,
    typer.Option(
        "--calibration",
        "--data",
        metavar="FILE|NAME",
        help="A text file, JSON lines, a hub data set as name:config:split, or embedded (English that ships "
        "with Python); for mixed-precision and peg-encoder one sentence on every line.",
    ),
]
Samples = Annotated[int, typer.Option(metavar="N", help="Windows of calibration text, or sentences.")]
Seqlen = Annotated[int, typer.Option(metavar="L", help="Tokens in each of them.")]
Seed = Annotated[
    int, typer.Option(metavar="S", help="Chooses them; the result depends on it and on no other seed.")
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="D", help="cpu, cuda or cuda:1; a GPU is taken when there is one.", show_default="auto"
    ),
]
DepthOption = Annotated[
    Depth,
    typer.Option(
        help="Wait for all calibration batches at each linear (one forward in all) or at each block (less "
        "memory, twice the time); auto asks how much memory there is."
    ),
]
ReadBack = Annotated[
    bool,
    typer.Option(
        "--read-back/--no-read-back",
        help="Read the checkpoint from disk and compare its logits with the run's; without, fast recipes "
        "take less time and prove nothing.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Show what transformers and the hub client have to say, too.")
]
Dtype = Annotated[
    DtypeName,
    typer.Option(help="What the model is run in; auto is float32 on a CPU and the checkpoint's on a GPU."),
]


def prepare(verbose: bool) -> None:
    """Set the process up for work; call it before torch and transformers are imported.

    Other libraries' warnings and bars stay off the streams, except the bar of a download where somebody can
    see it: minutes of silence would look like a hang.
    """
    # OpenMP threads spin while they wait for each other. Where cores are shared (a container, a busy machine)
    # the one they wait for is not running meanwhile: with 1000 turns instead of GNU's 300,000, 48 tokens took
    # 7 s and not 20 to 100 beside other busy processes on two cores.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Importing torch and transformers makes millions of objects and hardly any garbage, which the collector
    # looks for all the time. See ``imported``.
    gc.set_threshold(100_000, 50, 100)
    if verbose:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.simplefilter("ignore")


def imported() -> None:
    """What a command needs is imported: from now on collect garbage as usual, but not among that."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # extensions complain of what is left at the end
    gc.set_threshold(700, 10, 10)


def note(text: str) -> None:
    """One line for whoever watches."""
    print(text, file=sys.stderr, flush=True)


def device_name(wanted: str | None) -> str:
    """``wanted``, or "cuda" where there is one, or "cpu".

    Raises ``InputError`` for what torch cannot use here.
    """
    import torch

    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise InputError(f"device {wanted!r} is unknown; give cpu, cuda, or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {wanted!r} is not supported; give cpu, cuda, or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise InputError(f"device {wanted!r} is not there: torch sees {count} CUDA devices; try --device cpu")
    return wanted


def dtype_of(wanted: DtypeName):
    """The torch dtype, or None for auto."""
    import torch

    return None if wanted is DtypeName.AUTO else getattr(torch, wanted.value)


def make_recipe(
    name: str | None, file: Path | None, bits: int | None, group_size: int | None, settings: list[str] | None
) -> Recipe:
    """The recipe that the options describe. Raises ``InputError`` when they contradict each other."""
    from fewbit.recipe import named
    from fewbit.recipe.entry import from_file

    given = _settings(bits, group_size, settings or [])
    if (name is None) == (file is None):
        got = "no recipe is given" if name is None else f"both -r {name} and --recipe-file {file} are given"
        raise InputError(f"{got}; name one with -r (fewbit recipes lists them) or a file with --recipe-file")
    if name is not None:
        return named(name, given)
    if given:
        raise InputError(
            f"a recipe file is complete and takes no setting {next(iter(given))!r}; edit the file, or use -r "
            "with --set"
        )
    return from_file(file).recipe


def _settings(bits: int | None, group_size: int | None, pairs: list[str]) -> dict[str, str]:
    """Settings by name, each given once."""
    short = {"bits": bits, "group_size": group_size}
    given = {key: str(value) for key, value in short.items() if value is not None}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise InputError(f"--set {pair!r} is not key=value, such as --set bits=3")
        if key in given:
            raise InputError(f"setting {key!r} is given twice, as {given[key]!r} and {value!r}; give it once")
        given[key] = value.strip()
    return given
