"""CPU seconds, peak memory and quality of `fewbit quantize` against the library that ships each method.

    python benchmarks/against_peers.py --peer PYTHON [--peer PYTHON] [--pairs 2] [--only TEXT] [--skip TEXT]

Each PYTHON is the interpreter of an environment with some of the peers; a row runs where its package is:
    pip install torch==2.13.0 transformers==5.23.0 accelerate
    pip install hqq==0.2.8.post1 bitsandbytes==0.50.2 optimum-quanto==0.2.7
and apart from these, as it wants an older transformers,
    pip install torch==2.13.0 llmcompressor==0.14.0.1

Both sides quantize the same float32 folder of SmolLM2 to the same setting and save it, A B A B, in whole
processes of one thread: user + system CPU seconds and peak resident set as the operating system counts them.
fewbit's modules are compiled to bytecode before, as an installer does with those of the peers.
"Without imports" takes off what a process costs that imports the modules a run had loaded by its end, and
does nothing else. fewbit's side contains reading the checkpoint back and comparing its logits with those of
the run, which no peer does; rows "not read back" leave it out (`--part time`).

LLM.int8() is measured without calibration, which bitsandbytes does not have.

Quality is of both results under one evaluation: WikiText-2 raw test, solid join, 12 windows of 512, KL
against the float model. A peer's own forward computes its logits, as some quantize inputs too. AWQ: 8 x 512
tokens of WikiText-2 validation, the same for both, and one pair (`--pairs` is for the others).

Finished parts of a row are kept in benchmarks/results/against_peers.json, and `--work FOLDER` keeps the model
and the results: an interrupted run goes on.
"""

import argparse
import compileall
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from measure import FEWBIT, measured

import fewbit
from fewbit.evaluate import Protocol, windows
from fewbit.format import FORMATS, Group
from fewbit.format.activation import Activation
from fewbit.io.source import open_source
from fewbit.io.text import read_text
from fewbit.recipe import Recipe, Rule, named
from fewbit.stream.data import Calibration, sample_tokens

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "against_peers.json"
MODULES = str(ROOT / "peers" / "modules.py")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method: the peer's package, script and last argument; fewbit's recipe; bits of either."""

    name: str
    package: str
    script: str
    scheme: str = ""
    recipe: Recipe
    bits: str
    calibrated: bool = False
    once: bool = False
    more: tuple[str, ...] = ()  # options of `fewbit quantize`


def quanto_groups() -> Recipe:
    """qint4 with the groups that quanto chooses: 96 for 576 columns, 128 for the 1536 of down_proj."""
    base = named("quanto", {"weights": "qint4", "group_size": "96"})
    narrow = base.rules[0]
    wide = replace(narrow, match="*.down_proj", weight=replace(narrow.weight, block=Group(128)))
    return replace(base, rules=(wide, narrow))


def mxfp4() -> Recipe:
    """MXFP4 weights and inputs, the exponent rule that does not clip what rounds to the largest point."""
    mx = FORMATS["mxfp4-even"]
    return Recipe(name="mxfp4-w4a4", rules=(Rule(weight=mx, input=Activation(format=mx)),))


ROWS = (
    Row(name="HQQ, 4 bit g64", package="hqq", script="hqq_g64.py", bits="4.50",
        recipe=named("hqq", {"bits": "4", "group_size": "64"})),
    Row(name="NF4 g64, double quantization", package="bitsandbytes", script="bitsandbytes_nf4.py",
        bits="4.13", recipe=named("nf4", {})),
    Row(name="LLM.int8()", package="bitsandbytes", script="bitsandbytes_int8.py", bits="8.05",
        recipe=named("llm-int8", {"calibrate": "false"})),
    Row(name="Quanto qint4, g96 and g128", package="optimum.quanto", script="quanto.py", bits="4.63",
        recipe=quanto_groups()),
    Row(name="FP8 dynamic", package="llmcompressor", script="llmcompressor_preset.py", scheme="FP8_DYNAMIC",
        bits="8.05, 8.02", recipe=named("fp8-dynamic", {})),
    Row(name="NVFP4A16", package="llmcompressor", script="llmcompressor_preset.py", scheme="NVFP4A16",
        bits="4.50", recipe=named("rtn", {"format": "nvfp4"})),
    Row(name="MXFP4 W4A4", package="llmcompressor", script="llmcompressor_preset.py", scheme="MXFP4",
        bits="4.25", recipe=mxfp4()),
    Row(name="AWQ, 4 bit g64 asymmetric", package="llmcompressor", script="llmcompressor_awq.py",
        bits="4.31", recipe=named("awq", {"group_size": "64"}), calibrated=True, once=True),
)  # fmt: skip
# The same work on both sides: no peer reads its file back.
ROWS += tuple(
    replace(row, name=f"{row.name}, not read back", more=("--no-read-back",))
    for row in ROWS
    if row.name in ("NF4 g64, double quantization", "LLM.int8()", "Quanto qint4, g96 and g128", "FP8 dynamic")
)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", action="append", required=True)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--only", default="")
    parser.add_argument("--skip", default="\0")
    parser.add_argument("--part", choices=("time", "quality", "all"), default="all")
    parser.add_argument("--data", type=Path, default=ROOT.parent.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, help="keeps the model and the results")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp())
    prepare(work, args.data)
    wanted = [row for row in ROWS if args.only in row.name and args.skip not in row.name]
    peers = {row.package: interpreter(args.peer, row.package) for row in wanted}
    if args.part != "quality":
        for row in wanted:
            times(row, peers[row.package], work, args)
    if args.part != "time":
        for row in wanted:
            quality(row, peers[row.package], work)
    (ROOT / "results" / "against_peers.md").write_text(markdown())
    if args.work is None:
        shutil.rmtree(work)


def prepare(work: Path, data: Path) -> None:
    """fewbit's bytecode, the model, calibration and test windows, and the float model's logits."""
    compileall.compile_dir(Path(fewbit.__file__).parent, quiet=1)
    if (work / "float.npy").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    source = open_source("smollm2")
    original, tokenizer = fewbit.load("smollm2"), source.tokenizer()
    original.save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    text = str(data / "wikitext2_raw_valid.txt")
    tokens = sample_tokens(Calibration(source=text, samples=8, seqlen=512, seed=0), tokenizer)
    (work / "tokens.json").write_text(json.dumps(tokens.tolist()))
    test = windows(tokenizer, read_text(data / "wikitext2_raw_test.txt"), Protocol())
    (work / "test.json").write_text(json.dumps(test.tolist()))
    with torch.no_grad():
        rows = [original(input_ids=ids[None]).logits[0].numpy() for ids in test]
    np.save(work / "float.npy", np.stack(rows))


def interpreter(peers: list[str], package: str) -> str:
    """The first of ``peers`` that can import ``package``."""
    ask = f"import importlib.util as u, sys; sys.exit(u.find_spec({package.split('.')[0]!r}) is None)"
    found = [p for p in peers if subprocess.run([p, "-c", ask]).returncode == 0]
    if not found:
        raise SystemExit(
            f"none of {', '.join(peers)} has {package}: install it there, or leave its rows out (--skip)"
        )
    return found[0]


def times(row: Row, peer: str, work: Path, args: argparse.Namespace) -> None:
    """Pairs of whole processes, and what their imports cost."""
    recipe = work / f"{slug(row)}.yaml"
    recipe.write_text(row.recipe.to_yaml())
    lists = {name: str(work / f"{slug(row)}-{name}.json") for name in ("ours", "theirs")}
    ours = [
        FEWBIT,
        "quantize",
        str(work / "model"),
        "--recipe-file",
        str(recipe),
        "-o",
        folder(work, row, "ours"),
    ]
    if row.calibrated:
        text = str(args.data / "wikitext2_raw_valid.txt")
        ours += f"--calibration {text} --samples 8 --seqlen 512".split()
    ours += row.more
    theirs = [str(ROOT / "peers" / row.script), *job(work, row), *([row.scheme] if row.scheme else [])]
    commands = {"ours": [sys.executable, MODULES, "run", lists["ours"], *ours]}
    commands["theirs"] = [peer, MODULES, "run", lists["theirs"], *theirs]
    for pair in range(1 if row.once else args.pairs):
        for name, command in commands.items():
            if len(kept(row).get(name, [])) > pair:
                continue
            shutil.rmtree(folder(work, row, name), ignore_errors=True)
            got = measured(command, 1)
            keep(row, **{name: [*kept(row).get(name, []), got]})
            print(row.name, name, *(f"{v:.1f}" for v in got), flush=True)
    for name, python in (("ours", sys.executable), ("theirs", peer)):
        if f"{name} imports" not in kept(row):
            seconds = [measured([python, MODULES, "load", lists[name]], 1)[0] for _ in range(2)]
            keep(row, **{f"{name} imports": statistics.median(seconds)})


def quality(row: Row, peer: str, work: Path) -> None:
    """KL, top-1 agreement and perplexity of both results."""
    protocol = Protocol()
    test = torch.tensor(json.loads((work / "test.json").read_text()))
    if "ours kl" not in kept(row):
        model = fewbit.load(folder(work, row, "ours"), dtype=torch.float32)
        score(row, "ours", model, test, protocol, work)
    if "theirs kl" not in kept(row):
        logits, script = work / f"{slug(row)}.npy", "saved.py" if row.once else row.script
        command = [peer, str(ROOT / "peers" / script), *job(work, row), str(work / "test.json"), str(logits)]
        measured([*command, *([row.scheme] if row.scheme and not row.once else [])], 1)
        score(row, "theirs", replay(logits), test, protocol, work)
        logits.unlink()


def score(row: Row, name: str, model, test, protocol: Protocol, work: Path) -> None:
    """Evaluate one result against the float model."""
    got = fewbit.evaluate(model, test, protocol, against=replay(work / "float.npy"))
    keep(row, **{f"{name} kl": got.kl, f"{name} top1": got.top1, f"{name} perplexity": got.perplexity})
    print(row.name, name, f"KL {got.kl:.4f}", flush=True)


def replay(path: Path):
    """A model that answers window after window with stored logits [windows, tokens, vocabulary]."""
    rows = iter(np.load(path, mmap_mode="r"))
    return lambda input_ids, **_: SimpleNamespace(logits=torch.from_numpy(next(rows).copy())[None])


def job(work: Path, row: Row) -> list[str]:
    """What peers/job.py takes."""
    return [str(work / "model"), str(work / "tokens.json"), folder(work, row, "theirs"), "1"]


def slug(row: Row) -> str:
    """The row's name for files."""
    return "".join(c if c.isalnum() else "-" for c in row.name.lower())


def folder(work: Path, row: Row, name: str) -> str:
    """Where a side saves its result."""
    return str(work / f"{slug(row)}-{name}")


def kept(row: Row) -> dict:
    """What is known of a row."""
    return json.loads(RESULTS.read_text()).get(row.name, {}) if RESULTS.exists() else {}


def keep(row: Row, **parts) -> None:
    """Add to what is known of a row."""
    done = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    done.setdefault(row.name, {}).update(parts)
    RESULTS.write_text(json.dumps(done, indent=1))


def markdown() -> str:
    """The tables."""
    lines = [
        "Printed by `python benchmarks/against_peers.py --peer PYTHON` (its first lines say what",
        f"is measured); torch {torch.__version__}, one thread, medians, a shared machine.",
        "fewbit is left of each slash.",
        "",
        "| method | bits | CPU s | CPU s without imports | ratios, pair by pair | peak resident MB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    measured_rows = [(row, kept(row)) for row in ROWS if "theirs imports" in kept(row)]
    for row, r in measured_rows:
        cpu, peak = ([statistics.median(run[i] for run in r[s]) for s in ("ours", "theirs")] for i in (0, 2))
        bare = [total - r[f"{s} imports"] for total, s in zip(cpu, ("ours", "theirs"), strict=True)]
        ratios = ", ".join(f"{a[0] / b[0]:.2f}" for a, b in zip(r["ours"], r["theirs"], strict=True))
        lines.append(
            f"| {row.name} | {row.bits} | {cpu[0]:.1f} / {cpu[1]:.1f} | {bare[0]:.1f} / {bare[1]:.1f} | "
            f"{ratios} | {peak[0]:.0f} / {peak[1]:.0f} |"
        )
    for row, r in ((row, kept(row)) for row in ROWS):
        if "ours" in r and "theirs" not in r:
            cpu, _, peak = r["ours"][0]
            lines += [
                "",
                f"{row.name}: fewbit {cpu:.1f} CPU s, {peak:.0f} MB; the peer's run is missing here.",
            ]
    lines += ["", "| method | peer | KL | top-1 % | perplexity |", "|---|---|--:|--:|--:|"]
    for row, r in ((row, kept(row)) for row in ROWS if "theirs kl" in kept(row)):
        (kl, top1, ppl) = (
            [r[f"{s} {key}"] for s in ("ours", "theirs")] for key in ("kl", "top1", "perplexity")
        )
        lines.append(
            f"| {row.name} | {row.package} | {kl[0]:.4f} / {kl[1]:.4f} | "
            f"{100 * top1[0]:.1f} / {100 * top1[1]:.1f} | {ppl[0]:.2f} / {ppl[1]:.2f} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
