"""Every method on one model, one calibration and one evaluation: tables and picture of docs/results.md.

    python benchmarks/methods.py [--data FOLDER] [--device cuda] [--workers N] [--minutes M]
                                 [--only TEXT ...] [--skip TEXT ...] [--results FOLDER]

Two calls of ``fewbit compare``, of the rows in benchmarks/methods.yaml on SmolLM2-135M, written as float32
first so that every device computes in float32, and of those in benchmarks/planted.yaml on the same function
with outliers: in every norm of a block six channels get 20 to 100 times their gain, and the columns of the
linears that read them are divided by the same. Calibration: 32 windows of 512 tokens of WikiText-2
validation, seed 0. Evaluation: WikiText-2 raw test, solid join, 12 windows of 512, against the model of the
same call.

Rows are kept in FOLDER/methods and FOLDER/planted (benchmarks/results), and only those that are missing for
the device and the versions at hand are measured; --minutes 0 measures none and writes the page anew. The page
and the picture are written where FOLDER is the default.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from int8_ladder import plant

import fewbit
from fewbit.compare import Schedule, from_rows
from fewbit.errors import InputError
from fewbit.io.source import open_source

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
PAGE = ROOT.parent / "docs" / "results.md"
MODELS = {"methods": "smollm2-float32", "planted": "smollm2-planted"}  # file of rows, folder of the model
TEXTS = ("wikitext2_raw_valid.txt", "wikitext2_raw_test.txt")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=ROOT.parent.parent / "shared" / "data")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="*", default=[], help="rows whose heading/name holds one of these")
    parser.add_argument("--skip", nargs="*", default=[], help="rows that are left out")
    parser.add_argument("--minutes", type=float, help="begin no further row after this time")
    parser.add_argument("--workers", type=int, default=1, help="rows at a time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    start = time.monotonic()
    wanted = [name for name in MODELS if any_row(name, args)]
    if not wanted:
        parser.error("no row is left by --only and --skip")
    codes = []
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), args.data.resolve())
        for name in wanted:
            spent = (time.monotonic() - start) / 60
            codes.append(compare(name, Path(folder), args, spent))
    if args.results == RESULTS:
        draw()
    sys.exit(max(codes))


def any_row(name: str, args: argparse.Namespace) -> bool:
    """Whether the options leave any row of a file."""
    try:
        Schedule(only=tuple(args.only), skip=tuple(args.skip)).chosen(from_rows(ROOT / f"{name}.yaml"))
    except InputError:
        return False
    return True


def write_inputs(folder: Path, data: Path) -> None:
    """Both models and both texts in one folder, so that results name them without a path."""
    tokenizer = open_source("smollm2").tokenizer()
    model = fewbit.load("smollm2", dtype=torch.float32)
    for name, change in (("methods", lambda m: None), ("planted", plant)):
        change(model)
        model.save_pretrained(folder / MODELS[name])
        tokenizer.save_pretrained(folder / MODELS[name])
    for text in TEXTS:
        (folder / text).symlink_to(data / text)


def compare(name: str, folder: Path, args: argparse.Namespace, spent: float) -> int:
    """One call of ``fewbit compare`` in ``folder``, ``spent`` minutes after the start; its exit code."""
    valid, test = TEXTS
    words = [MODELS[name], "--rows", ROOT / f"{name}.yaml", "-o", args.results.resolve() / name]
    words += ["--data", valid, "--samples", 32, "--eval-data", test, "--dtype", "float32"]
    words += ["--device", args.device, "--workers", args.workers]
    if args.minutes is not None:
        words += ["--minutes", max(0.0, args.minutes - spent)]
    words += [f"--only={text}" for text in args.only] + [f"--skip={text}" for text in args.skip]
    if args.results == RESULTS:
        words += ["--markdown", PAGE]
    command = [sys.executable, "-m", "fewbit.cli.main", "compare", *map(str, words)]
    here = str(Path(fewbit.__file__).parent.parent)  # found from any folder, installed or not
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": path}).returncode


def draw() -> None:
    """The picture of the page."""
    if find_spec("matplotlib") is None:
        print("matplotlib is not installed: docs/pictures/pareto.svg stays as it is", file=sys.stderr)
        return
    import pareto

    pareto.main()


if __name__ == "__main__":
    main()
