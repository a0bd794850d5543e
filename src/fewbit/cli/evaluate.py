"""``fewbit eval``: what the bits cost, beside the protocol without which a figure says nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbit.cli import options
from fewbit.cli.kv import CHUNK, KV
from fewbit.cli.options import Checkpoint, Device, Dtype, DtypeName, JoinName, Json, Verbose
from fewbit.cli.pairs import check_options, compare_pairs
from fewbit.cli.tasks import (
    BATCH,
    Batch,
    Limit,
    TaskData,
    Tasks,
    ask_tasks,
    check_task_options,
    split_names,
)
from fewbit.errors import InputError

if TYPE_CHECKING:
    from fewbit.evaluate import Evaluation

SAMPLE = "The quick brown fox, 1914: f(x) = x**2; naïve Straße, 東京."  # two tokenizers must agree on it


def evaluate(
    ctx: typer.Context,
    model: Checkpoint,
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE|NAME",
            help="A text file, JSON lines, a hub data set as name:config:split, or embedded:eval (the part "
            "of the embedded text that calibration does not see).",
        ),
    ] = options.HELD_OUT,
    join: Annotated[
        JoinName,
        typer.Option(
            help="rows: lines joined by blank lines, as in published WikiText figures; solid: without them."
        ),
    ] = JoinName.SOLID,
    window: Annotated[int, typer.Option(metavar="L", help="Tokens in a window.")] = options.WINDOW,
    windows: Annotated[
        int, typer.Option(metavar="N", help="Windows from the start of the text; 0: all.")
    ] = options.WINDOWS,
    stride: Annotated[
        int | None,
        typer.Option(
            metavar="S", help="Tokens between the starts of windows.", show_default="the window: no overlap"
        ),
    ] = None,
    kv: KV = None,
    chunk: Annotated[
        int | None,
        typer.Option(
            metavar="C",
            help="Tokens of one call, which reads the keys and values of earlier calls from the cache; 1: "
            "token by token.",
            show_default=f"the window; {CHUNK} with --kv",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The original; adds KL divergence and top-1 agreement, or the change of the embeddings.",
        ),
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="For encoders, instead of a text: sentence pairs with scores, tab-separated with columns "
            "sentence1, sentence2 and score (STS-B's dev.tsv of GLUE).",
        ),
    ] = None,
    tasks: Tasks = None,
    task_data: TaskData = None,
    limit: Limit = None,
    batch: Batch = BATCH,
    device: Device = None,
    dtype: Dtype = DtypeName.AUTO,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Perplexity of a MODEL or CHECKPOINT on a text, and its distance from the original.

    KL is the mean over tokens of KL(original || result) in nats; top-1 the share of tokens at which both
    hold the same one likeliest. With --tasks: the share of questions that it answers. With --pairs: the rank
    correlation of an encoder's cosines with people's scores.
    """
    options.prepare(verbose)
    from fewbit.cli.kv import cache_of, kv_of
    from fewbit.cli.progress import Windows
    from fewbit.cli.show import print_json
    from fewbit.cli.size import bits_per_weight, parameters, size_bytes
    from fewbit.evaluate import Protocol
    from fewbit.evaluate import evaluate as run
    from fewbit.evaluate import windows as cut
    from fewbit.io.load import load
    from fewbit.io.source import open_source
    from fewbit.io.text import Join, read_text

    check_task_options(ctx)
    if tasks is not None:
        asked = split_names(tasks)
        source, original = open_source(model), None if against is None else open_source(against)
        if original is not None:
            _same_tokenizer(source, original)
        where, kind = options.device_name(device), options.dtype_of(dtype)
        if getattr(source, "kv", None) is not None:
            options.note("questions are asked with keys and values in float, whatever the checkpoint says")
        ask_tasks(source, original, asked, task_data, limit, batch, where, kind, as_json)
        return
    if pairs is not None:
        check_options(ctx)
        source, original = open_source(model), None if against is None else open_source(against)
        if original is not None:
            _same_tokenizer(source, original)
        compare_pairs(source, pairs, original, options.device_name(device), options.dtype_of(dtype), as_json)
        return
    source = open_source(model)
    kv = kv_of(kv, source)
    if kv is not None:
        chunk = min(CHUNK, window) if chunk is None else chunk
    how = Join(join.value)
    protocol = Protocol(window=window, windows=windows or None, stride=stride, join=how, chunk=chunk)
    where, kind = options.device_name(device), options.dtype_of(dtype)
    text = read_text(data)
    original = None if against is None else open_source(against)
    if original is not None:
        _same_tokenizer(source, original)
    tokens = cut(source.tokenizer(), text, protocol)
    options.note(f"loading {model}" + (f" and {against}" if against else ""))
    subject = load(model, where, kind)
    judge = None if against is None else load(against, where, kind)
    options.imported()
    cache = None if kv is None else cache_of(kv, subject, source.tokenizer())
    found = run(subject, tokens, protocol, against=judge, progress=Windows(), data=text.name, cache=cache)
    report = found.as_dict() | {
        "model": model,
        "against": against,
        "kv": kv,
        "bits_per_weight": bits_per_weight(source),
        "size_bytes": size_bytes(source),
        "parameters": parameters(source),
        "device": where,
        "dtype": str(getattr(subject, "dtype", kind)).removeprefix("torch."),
    }
    if as_json:
        print_json(report)
    else:
        _show(found, report)


def _same_tokenizer(source: Any, original: Any) -> None:
    """Token ids must mean the same to both."""
    a, b = (s.tokenizer()(SAMPLE, add_special_tokens=False)["input_ids"] for s in (source, original))
    if a != b:
        raise InputError(
            f"{source.name} and {original.name} do not have the same tokenizer, so their predictions cannot "
            "be compared; give with --against the model that the checkpoint was made from"
        )


def _show(found: Evaluation, report: dict) -> None:
    """The figures with standard errors, then the protocol."""
    from fewbit.cli.show import duration, facts, number, size

    rows, join = [("model", report["model"])], found.join.value
    if found.perplexity is not None:
        error = None if found.nll_error is None else found.perplexity * found.nll_error
        rows.append(("perplexity", number(found.perplexity) + _plus_minus(error)))
    if found.kl is not None:
        rows.append(
            (
                "KL",
                f"{number(found.kl)}{_plus_minus(found.kl_error)} nats per token, from {report['against']}",
            )
        )
        rows.append(("top-1", f"{100 * found.top1:.1f} % of tokens agree"))
    rows += [
        ("bits", f"{report['bits_per_weight']:.2f} per weight"),
        ("size", size(report["size_bytes"])),
        *_cache_rows(found, report["kv"]),
        ("protocol", f"{found.windows} windows of {found.window} tokens, stride {found.stride}, join {join}"),
        ("", f"{found.tokens:,} tokens scored; +- is the standard error over windows"),
        ("text", found.data),
        ("run", f"{report['dtype']} on {report['device']}, {duration(found.seconds)}"),
    ]
    facts(rows, sys.stdout)


def _cache_rows(found: Evaluation, kv: str | None) -> list[tuple[str, str]]:
    """How the cache was used, and what it held."""
    if found.chunk is None:
        return []
    each = found.cache_bytes / found.window
    return [("KV cache", f"{kv or 'float'}, {each:,.0f} bytes per token, read every {found.chunk} tokens")]


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" +- {error:.2g}"
