"""The command itself: help at once with an example, no word of other libraries, the library's defaults."""

import subprocess
import sys

import pytest

from fewbit.cli import options
from fewbit.evaluate import Protocol
from fewbit.io.text import EMBEDDED, HELD_OUT, Join
from fewbit.stream.data import Calibration

COMMANDS = (
    *("quantize", "plan", "eval", "generate", "recipes"),
    *("formats", "explain", "memory", "plot points", "plot error"),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_an_example_of_the_command(fewbit, command):
    ran = fewbit(*command.split(), "--help")
    assert ran.code == 0
    assert ran.out.strip().splitlines()[-1].strip().startswith(f"Example:  fewbit {command} ")


def test_help_and_version_import_nothing_heavy():
    script = (
        "import sys; from fewbit.cli import main; sys.argv = ['fewbit', '--help']\n"
        "try: main.app()\n"
        "except SystemExit: print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"
    assert all(f" {command.split()[0]} " in ran.stdout for command in COMMANDS)


def test_leaving_at_once_loses_nothing():
    """Output in a pipe, exit functions and codes are those of a program that leaves in Python's own way."""
    script = (
        "import atexit, sys; from fewbit.cli.main import run; atexit.register(print, 'left', flush=True); "
        "sys.argv[1:] = sys.argv[1].split(); run()"
    )
    for words, code, end in (("--version", 0, "left\n"), ("quantize nothing -r nothing -o out", 2, "left\n")):
        ran = subprocess.run([sys.executable, "-c", script, words], capture_output=True, text=True)
        assert (ran.returncode, ran.stdout[-5:]) == (code, end)
        assert ("fewbit 0" in ran.stdout) == (code == 0)
        assert bool(ran.stderr) == (code == 2)


def test_version(fewbit):
    import fewbit as package

    assert fewbit("--version").out == f"fewbit {package.__version__}\n"


def test_no_word_of_other_libraries_reaches_the_streams(checkpoint):
    command = [
        sys.executable,
        "-m",
        "fewbit.cli.main",
        "generate",
        str(checkpoint),
        "It",
        "--max-new-tokens",
        "2",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stderr.count("\n") == 1
    assert "tokens/s" in ran.stderr


def test_defaults_are_those_of_the_library():
    default = Calibration()
    assert (default.samples, default.seqlen, default.seed) == (options.SAMPLES, options.SEQLEN, options.SEED)
    assert (Protocol().window, Protocol().windows) == (options.WINDOW, options.WINDOWS)
    assert (options.EMBEDDED, options.HELD_OUT) == (EMBEDDED, HELD_OUT)
    assert [j.value for j in options.JoinName] == [j.value for j in Join]
