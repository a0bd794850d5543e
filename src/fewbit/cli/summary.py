"""What a person reads before a run, the plan, and after it, the summary."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from pathlib import Path
from typing import IO

from fewbit.cli.show import duration, facts, percent, size, some, table
from fewbit.cli.size import parameters, size_bytes
from fewbit.stream.coverage import coverage
from fewbit.stream.planned import Plan
from fewbit.stream.quantize import Result

WORST = 5  # layers that the summary names
HELD_BY = {
    "compressed-tensors": "compressed-tensors: transformers and vLLM load it without fewbit",
    "native": "fewbit's own: fewbit loads it, and transformers after `import fewbit`",
}


def show_plan(plan: Plan, stream: IO[str]) -> None:
    """The plan in a dozen lines."""
    kinds = Counter((f"{layer.format}{layer.basis_text}", solver(layer)) for layer in plan.layers)
    rows = [("model", plan.source.name), ("recipe", plan.recipe.name)]
    rows += [("layers", f"{n} to {name} by {how}") for (name, how), n in kinds.most_common()]
    rows += [("activations", text) for text in _sites(plan)]
    rows += [
        ("bits", f"{plan.bits_per_weight:.2f} per quantized weight, scales and zeros counted"),
        ("size", f"{_before(plan)} -> about {size(plan.size_bytes)}"),
        ("calibration", _calibration(plan)),
        (
            "runs on",
            f"{plan.device}, in about {size(plan.peak_bytes)} of memory and {duration(plan.seconds)}",
        ),
        ("written as", HELD_BY[plan.checkpoint]),
    ]
    if plan.checkpoint_reason:
        rows.append(("", f"(not compressed-tensors: {plan.checkpoint_reason})"))
    rows += [("mind", caveat) for caveat in plan.caveats]
    if plan.left:
        rows.append(("stays", f"{some(plan.left)}: not quantized"))
    if plan.unused:
        rows.append(("not used", f"{some(plan.unused)}: in the file, but in no layer of the model; left out"))
    facts(rows, stream)


def _sites(plan: Plan) -> list[str]:
    """Formats of tensors that no linear reads, the fewest first, with their roles."""
    roles: dict[str, list[str]] = {}
    for site in plan.sites:
        roles.setdefault(site.text, []).append(site.place.role)
    out = []
    for text, found in sorted(roles.items(), key=lambda pair: len(pair[1])):
        which = "" if out or len(roles) == 1 else f" ({', '.join(dict.fromkeys(found))})"
        out.append(f"{len(found)} tensors{which} to {text}")
    return out


def show_layers(plan: Plan, stream: IO[str]) -> None:
    """Which layers get which format, one line per name with its block numbers left out."""
    kinds: dict[tuple[str, ...], int] = Counter()
    for layer in plan.layers:
        name = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", layer.name)
        shape = f"[{layer.shape[0]}, {layer.shape[1]}]"
        kinds[
            name, shape, f"{layer.format}{layer.basis_text}", solver(layer), f"{layer.bits_per_weight:.2f}"
        ] += 1
    columns = ("layer", ">times", "shape", "format", "solver", ">bits")
    table(columns, ((key[0], str(n), *key[1:]) for key, n in kinds.items()), stream)


def solver(layer) -> str:
    """A solver's name."""
    return type(layer.rule.solver).__name__.lower()


def _before(plan: Plan) -> str:
    """Size of the original's files; a GGUF file is quantized itself: what it stands for is said first."""
    stored = size(size_bytes(plan.source))
    if not hasattr(plan.source, "container"):
        return stored
    plain = parameters(plan.source) * plan.source.dtype.itemsize
    name = str(plan.source.dtype).removeprefix("torch.")
    return f"{size(plain)} in {name} (as quantized GGUF {stored})"


def _calibration(plan: Plan) -> str:
    if plan.calibration is None:
        return "none needed"
    c = plan.calibration
    if plan.sites:
        return f"{c.samples} sentences of {c.source}, chosen by seed {c.seed}"
    return f"{c.samples} x {c.seqlen} tokens of {c.source or 'embedded'}, chosen by seed {c.seed}"


def show_result(result: Result, model: str, stream: IO[str]) -> None:
    """Where the checkpoint is, what it cost, which layers to look at, and what to type next."""
    plan, out = result.plan, str(result.output)
    done = f"{len(result.rows)} layers in {duration(result.seconds)}"
    if result.finished_before:
        done = "nothing to do: the same command had finished before"
    elif result.resumed_blocks:
        done += f"; {result.resumed_blocks} blocks were taken over from an interrupted run"
    experts = coverage(result.rows)
    written = sum(file.stat().st_size for file in Path(result.output).glob("*.safetensors"))
    facts(
        [
            ("checkpoint", out),
            ("written as", HELD_BY[plan.checkpoint]),
            ("bits", f"{plan.bits_per_weight:.2f} per quantized weight"),
            ("size", f"{_before(plan)} -> {size(written)}"),
            *([("experts", str(experts))] if experts else []),
            *(("mind", text) for text in plan.fallbacks),
            ("verified", _verified(result.difference)),
            ("done", done),
        ],
        stream,
    )
    worst = sorted(result.rows, key=lambda row: -row.error)[:WORST]
    what = "of the output" if any(row.tokens for row in worst) else "of the weight"
    stream.write(f"\nThe {len(worst)} layers with the largest squared error {what}:\n")
    table(
        ("layer", "format", ">error"), ((row.layer, row.format, percent(row.error)) for row in worst), stream
    )
    _show_notes(result, stream)
    stream.write("\nNext:\n")
    path = shlex.quote(out)
    if plan.recipe.of_encoder:
        stream.write(f"  fewbit eval {path} --pairs sts-dev.tsv --against {shlex.quote(model)}\n")
        stream.flush()
        return
    stream.write(f"  fewbit eval {path} --data embedded:eval --against {shlex.quote(model)}\n")
    stream.write(f'  fewbit generate {path} "The capital of France is"\n')
    stream.flush()


def _verified(difference: float | None) -> str:
    if difference is None:
        return "no: the checkpoint was not read back, as asked"
    if difference == 0:
        return "read back from disk: its answers equal those of the run"
    return f"read back from disk: its answers equal those of the run to {difference:.1g} of the largest"


def _show_notes(result: Result, stream: IO[str]) -> None:
    """What solvers could not do exactly, each once with the layers it happened in."""
    layers: dict[str, list[str]] = {}
    for row in result.rows:
        for said in row.notes:
            layers.setdefault(said, []).append(row.layer)
    if not layers:
        return
    stream.write("\nNotes of the solvers:\n")
    for said, names in list(layers.items())[:WORST]:
        stream.write(f"  {some(names, 2)}: {said}\n")
    if len(layers) > WORST:
        stream.write(f"  and {len(layers) - WORST} more, all in fewbit_manifest.json of the checkpoint\n")
