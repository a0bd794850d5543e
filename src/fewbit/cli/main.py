"""``fewbit``: the entry point, and what becomes of errors.

0    done
1    a defect of fewbit: a traceback, please report it; or a recipe that failed in compare
2    input that cannot be worked with: one sentence "fewbit: ..." on standard error
130  interrupted
"""

from __future__ import annotations

import atexit
import errno
import os
import sys
import threading
from typing import Annotated

import typer
from typer.core import TyperGroup

from fewbit.cli import (
    compare,
    evaluate,
    explain,
    export,
    formats,
    generate,
    inspect,
    memory,
    plot,
    quantize,
    search,
    sensitivity,
    tables,
    train,
)  # fmt: skip
from fewbit.errors import InputError

UsageError = typer.BadParameter.__base__  # click's own, or that of the copy inside newer typers
FULL = (errno.ENOSPC, errno.EDQUOT)


class Commands(TyperGroup):
    """The group of all commands; turns errors that mean "your input" into one sentence and exit code 2."""

    def make_context(self, *args, **kwargs) -> typer.Context:
        """Read the words before the command."""
        try:
            return super().make_context(*args, **kwargs)
        except UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # no word at all: the help
                raise
            self._misused(error)

    def invoke(self, ctx: typer.Context) -> object:
        """Run one command."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except InputError as error:
            self._leave(2, str(error))
        except UsageError as error:
            self._misused(error)
        except BrokenPipeError:  # `fewbit formats | head`: nobody reads on, and that is no error
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except KeyboardInterrupt:
            last = {"quantize": "block", "compare": "row", "train": "checkpoint"}.get(
                ctx.invoked_subcommand or ""
            )
            again = f"; the same command goes on from the last finished {last}" if last else ""
            again += " when --resume is added" if last == "checkpoint" else ""
            self._leave(130, f"interrupted{again}")
        except OSError as error:
            if error.errno not in FULL:
                raise
            where = f" at {error.filename}" if error.filename else ""
            self._leave(2, f"the disk is full{where}; free some space and run the same command again")

    def _misused(self, error: UsageError) -> None:
        ctx = error.ctx
        at = ctx.command_path.removeprefix(ctx.find_root().command_path) if ctx else ""
        said = error.format_message().rstrip(".").replace(": Value error, ", ": ")  # typer's own word for it
        self._leave(2, f"{said}; `fewbit{at} --help` says what it takes")

    @staticmethod
    def _leave(code: int, sentence: str) -> None:
        print("fewbit:", " ".join(sentence.split()), file=sys.stderr)
        raise typer.Exit(code)


app = typer.Typer(
    name="fewbit",
    cls=Commands,
    help="Turn any Hugging Face language model into few bits, and prove what that cost.",
    epilog="Example:  fewbit quantize smollm2 -r gptq --group-size 64 -o out/smollm2-w4a16",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # joins the lines of a paragraph again
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print("fewbit", version("fewbit"))
        raise typer.Exit


@app.callback()
def _fewbit(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options that stand before the command."""


for _name, _command, _example in (
    ("quantize", quantize.quantize, "fewbit quantize smollm2 -r gptq --group-size 64 -o out/smollm2-w4a16"),
    ("plan", quantize.plan, "fewbit plan smollm2 -r gptq --bits 3 --group-size 64"),
    ("eval", evaluate.evaluate, "fewbit eval out/smollm2-w4a16 --data wiki.txt --against smollm2"),
    ("compare", compare.compare, "fewbit compare smollm2 -r nf4 -r gptq:group_size=64 -o compared"),
    ("export", export.export, "fewbit export out/smollm2-w4a16 --to gptq -o out/smollm2-gptq"),
    ("generate", generate.generate, 'fewbit generate out/smollm2-w4a16 "The capital of France is"'),
    ("memory", memory.memory, "fewbit memory smollm2 --context 8192 --batch 4"),
    ("search", search.search, "fewbit search smollm2 --bits 3.25 -o recipe.yaml"),
    (
        "sensitivity",
        sensitivity.sensitivity,
        "fewbit sensitivity smollm2 -c rtn:bits=3,group_size=64 -c nf4 -o scores",
    ),
    ("inspect", inspect.inspect, "fewbit inspect smollm2 -o report.html"),
    ("recipes", tables.recipes, "fewbit recipes gptq --set bits=3 > mine.yaml"),
    ("formats", formats.formats, "fewbit formats e4m3fn nf4 mxfp4"),
):
    app.command(_name, epilog=f"Example:  {_example}")(_command)
app.command("train", epilog=train.EPILOG)(train.train)
app.command("explain", epilog=explain.EPILOG, context_settings=explain.CONTEXT)(explain.explain)
app.add_typer(plot.app, name="plot")


def run() -> None:
    """What the ``fewbit`` command calls.

    It leaves as soon as all is written: Python would take down, object by object, the three thousand modules
    of torch and transformers. Exit functions run; where another thread still works, or on an error, Python
    leaves in its own way.
    """
    try:
        app()
    except SystemExit as leaving:
        others = [t for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]
        if others or not isinstance(leaving.code, int | None):
            raise
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(leaving.code or 0)


if __name__ == "__main__":
    run()
