"""``train``: a model and a text in, a trained checkpoint out, with what it became beside what it was.

Everything that can be refused is refused before the first tensor: names, settings, folders, the text, the run
to stand beside. Then the loop runs with a checkpoint every so many updates; the finished model is written,
read back from disk, scored on the held-out windows, and only then appears under its name.

A model is `fewbit.trainer.small.NAME` (made anew and trained from nothing) or whatever ``fewbit.load`` takes;
a GGUF file is trained from its decoded weights.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbit.errors import InputError
from fewbit.io.attached import make_saveable
from fewbit.io.load import load
from fewbit.io.source import Source, open_source
from fewbit.report.page import write
from fewbit.stream.estimate import check_disk
from fewbit.stream.job import write_text
from fewbit.trainer import curve
from fewbit.trainer.data import Corpus, read_corpus
from fewbit.trainer.folder import CURVE, REPORT, ROWS, Folder
from fewbit.trainer.loop import Loop
from fewbit.trainer.settings import Settings
from fewbit.trainer.small import NAME, byte_tokenizer, small_llama
from fewbit.trainer.way import Way

STATE = 12  # bytes of a parameter in a checkpoint of the run: itself and two moments, in float32


class Watch:
    """Who watches a run; this one does not look."""

    def start(self, done: int, total: int) -> None:
        """Updates begin, ``done`` of them taken over from an interrupted run."""

    def row(self, row: dict[str, Any], total: int) -> None:
        """One more update."""

    def note(self, text: str) -> None:
        """Something worth a line."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What came out: the folder, its ``training.json``, a row for each update; whether an equal run had
    finished before, so that there was nothing to do; the other run, where one was named.
    """

    output: Path
    report: dict[str, Any]
    rows: list[dict[str, Any]]
    finished_before: bool = False
    beside: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return self.report | {
            "output": str(self.output),
            "finished_before": self.finished_before,
            "losses": [row["loss"] for row in self.rows],
            "beside": self.beside and {k: self.beside[k] for k in ("name", "held", "steps")},
        }


def train(
    model: str,
    *,
    data: str | Path | None,
    output: Path,
    way: Way | None = None,
    settings: Settings | None = None,
    held_out: str | Path | None = None,
    device: str = "cpu",
    resume: bool = False,
    beside: Path | None = None,
    watch: Watch | None = None,
    tamper: Callable[[Loop], None] | None = None,
) -> Trained:
    """Train ``model`` on the text ``data`` into the folder ``output``.

    held_out: a text of its own for the held-out windows; None: the last twentieth of ``data``. beside: the
    folder of a finished run whose curve is drawn along. tamper: called before each update, for tests. Raises
    ``InputError`` for whatever cannot be worked with, before anything is written.
    """
    way, settings, watch = way or Way(), settings or Settings(), watch or Watch()
    other = None if beside is None else curve.read_run(Path(beside))
    source = None if model == NAME else _trainable(open_source(model))
    tokenizer = byte_tokenizer() if source is None else source.tokenizer()
    corpus = read_corpus(tokenizer, data, settings, held_out)
    if other is not None and other[0]["job"]["text"] != corpus.digest:
        raise InputError(
            f"{beside} was trained and scored on other tokens ({other[0]['data']}), so its losses cannot "
            "stand beside these; give a run on the same text with the same --length"
        )
    kind = torch.device(device).type
    key = {"model": model, "text": corpus.digest, "way": way.as_dict(), "device": kind} | settings.as_dict()
    folder = Folder(Path(output), key)
    if folder.check(resume):
        report, rows = curve.read_run(folder.output)
        before = None if other is None else other[0]
        return Trained(output=folder.output, report=report, rows=rows, finished_before=True, beside=before)
    made = _model(source, settings, device)
    _check_length(made, settings)
    check_disk(folder.output, STATE * sum(p.numel() for p in made.parameters()))
    loop, first = _prepared(made, way, corpus, settings, device)
    state = folder.open()
    if state is not None:
        loop.load(state)
        first = state["first"]
        watch.note(f"going on after update {loop.done} of {settings.steps}")
    watch.start(loop.done, settings.steps)
    while loop.done < settings.steps:
        if tamper is not None:
            tamper(loop)
        watch.row(loop.update(), settings.steps)
        if loop.done % settings.save_every == 0 or loop.done == settings.steps:
            folder.save(loop.state() | {"first": first})
    watch.note("writing the model and reading it back")
    report = _written(loop, folder, source, tokenizer, model, first, key)
    page = curve.draw(report, loop.rows, other)
    write(folder.ready / CURVE, page)
    folder.commit()
    return Trained(
        output=folder.output, report=report, rows=loop.rows, beside=None if other is None else other[0]
    )


def _trainable(source: Source) -> Source:
    from fewbit.io.checkpoint import Checkpoint

    if isinstance(source, Checkpoint):
        raise InputError(
            f"{source.name} is quantized already, and codes are not trained; give the model that it was made "
            "from"
        )
    return source


def _model(source: Source | None, settings: Settings, device: str) -> nn.Module:
    """The float32 model on the device."""
    if source is None:
        return small_llama(settings.seed).to(device)
    model = load(source.name, device, torch.float32, dequantize=True)  # of a GGUF, its codes
    if not hasattr(model.config, "vocab_size") or model.get_output_embeddings() is None:
        raise InputError(f"{source.name} predicts no next token; fewbit train takes causal language models")
    return model


def _check_length(model: nn.Module, settings: Settings) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and settings.length > positions:
        raise InputError(f"--length {settings.length} is more than the {positions} positions of the model")


def _prepared(
    model: nn.Module, way: Way, corpus: Corpus, settings: Settings, device: str
) -> tuple[Loop, dict[str, float]]:
    """The loop, and held-out losses before its first update: of the model as it came, and as it computes."""
    torch.manual_seed(settings.seed)
    calibration = corpus.ids[: settings.batch * settings.length].view(-1, settings.length).to(device)
    plain = Loop(model, Way(), corpus, settings, device).held_out()
    way.apply(model, calibration)
    loop = Loop(model, way, corpus, settings, device)
    return loop, {"plain": plain, "start": plain if way == Way() else loop.held_out()}


def _written(
    loop: Loop,
    folder: Folder,
    source: Source | None,
    tokenizer: Any,
    model: str,
    first: dict[str, float],
    key: dict[str, Any],
) -> dict[str, Any]:
    """Write the model, read it back, and say what became of it."""
    bytes_kept, peak = _kept(loop.optimizer), _peak(loop.device)
    parameters = sum(p.numel() for p in loop.model.parameters())
    done = loop.way.finish(loop.model, loop.optimizer)
    done = make_saveable(done) if loop.way.quant is not None else done
    done.to("cpu", torch.float32 if source is None else source.dtype)
    ready = folder.fresh()
    done.save_pretrained(ready)
    tokenizer.save_pretrained(ready)
    if loop.way.recipe is not None:
        write_text(ready / "fewbit_recipe.yaml", loop.way.recipe.to_yaml())
    score = loop.held_out(load(ready, loop.device, torch.float32))
    updates, settings = loop.rows, loop.settings
    report = {
        "name": f"{model}, {loop.way.name(settings.precision)}",
        "model": model,
        "data": loop.corpus.name,
        "held": updates[-1]["held"],
        "read_back": score,
        "before": first["plain"],
        "start": first["start"],
        "steps": len(updates),
        "skipped": sum(row["skipped"] for row in updates),
        "tokens_per_second": settings.tokens * len(updates) / loop.seconds,
        "seconds": loop.seconds,
        "parameters": parameters,
        "optimizer_bytes": bytes_kept,
        "peak_bytes": peak,
        "device": loop.device.type,
        "quantized": loop.way.quant is not None,
        "job": key,
    }
    write_text(ready / ROWS, "".join(json.dumps(row) + "\n" for row in updates))
    write_text(ready / REPORT, json.dumps(report, indent=1))
    return report


def _kept(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the states of an optimizer."""

    def count(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.untyped_storage().nbytes()
        return sum(count(v) for v in value.values()) if isinstance(value, dict) else 0

    return sum(count(state) for state in optimizer.state_dict()["state"].values())


def _peak(device: torch.device) -> int:
    """Most bytes that were held at once: on the GPU, or by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
