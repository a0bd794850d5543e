"""``fewbit memory``: what a model needs to run and to be trained, and which GPUs hold it."""

from __future__ import annotations

import sys
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from fewbit.cli import options
from fewbit.cli.options import Json, Model

if TYPE_CHECKING:
    from fewbit.analyze.anatomy import Anatomy
    from fewbit.analyze.gpus import Gpu
    from fewbit.analyze.memory import Inference
    from fewbit.analyze.training import Training

CONTEXT = 4096


def memory(
    model: Model,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokens of context in each sequence.",
            show_default=f"{CONTEXT}, or what the model was made for",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(metavar="B", help="Sequences at a time.")] = 1,
    as_json: Json = False,
) -> None:
    """Estimate the memory MODEL needs in every scheme, to run it and to train it, and name GPUs that hold it.

    Needs the configuration alone: of a hub id only config.json is downloaded, and a folder with nothing but
    config.json will do. GB are 10^9 bytes.
    """
    options.prepare(False)
    from fewbit.analyze.anatomy import anatomy
    from fewbit.analyze.memory import check_load, inference
    from fewbit.analyze.training import training
    from fewbit.cli.show import print_json
    from fewbit.errors import InputError
    from fewbit.io.config import open_config

    for name, value in (("context", context), ("batch", batch)):
        if value is not None and value < 1:  # said before the model is looked for
            raise InputError(f"--{name} {value} is not a positive number; give 1 or more")
    found = anatomy(open_config(model))
    tokens = min(CONTEXT, found.longest or CONTEXT) if context is None else context
    caveat = check_load(found, tokens, batch)
    if as_json:
        print_json(_as_dict(found, tokens, batch, caveat))
        return
    _show_model(found, tokens, batch, caveat, sys.stdout)
    _show_inference(inference(found, tokens, batch), sys.stdout)
    if found.cache:
        _show_caches(found, tokens, batch, sys.stdout)
    _show_training(training(found, tokens, batch), sys.stdout)
    _show_gpus(sys.stdout)


def _show_model(model: Anatomy, context: int, batch: int, caveat: str, stream: IO[str]) -> None:
    from fewbit.cli.show import facts

    ends = "the head tied to them" if model.tied else "head"
    rows = [
        ("model", f"{model.name}: {model.kind}, {_count(model.parameters)} parameters"),
        ("", f"{_count(model.linear_parameters)} in linear layers of {model.blocks} blocks, to be quantized"),
        ("", f"{_count(model.rest)} elsewhere, {_count(model.embedding)} of them embeddings and {ends}"),
        ("load", f"{context:,} tokens of context x {batch:,}"),
        ("cache", _cache_fact(model)),
    ]
    if model.experts:
        said = f"{_count(model.experts)} parameters are fused experts, which no scheme here quantizes"
        rows.append(("mind", f"{said}: they count in 16 bits"))
    if model.widths is None:
        rows.append(("mind", f"{model.widths_reason}; the totals leave them out"))
    if caveat:
        rows.append(("mind", caveat))
    facts(rows, stream)


def _cache_fact(model: Anatomy) -> str:
    from fewbit.analyze.memory import CACHES, cache_per_token
    from fewbit.cli.show import size

    if not model.cache:
        return model.cache_reason or "none: it keeps no keys and values between tokens"
    growing, ever = cache_per_token(model, CACHES[0][1])
    windows = sorted({layer.window for layer in model.cache if layer.window is not None})
    text = f"{size(growing)} per token in bf16, in {len(model.cache)} layers"
    if windows:
        named = " and ".join(f"{window:,}" for window in windows)
        text += f"; {size(ever)} beyond the sliding window of {named} tokens"
    return text


def _show_inference(rows: tuple[Inference, ...], stream: IO[str]) -> None:
    from fewbit.cli.show import number, table

    stream.write("\nTo run it, keys and values in 16 bits:\n")
    columns = ("scheme", ">bits", ">weights", ">cache", ">activations", ">total", "smallest GPU")
    cells = []
    for row in rows:
        held = row.weights
        figures = (held.nbytes, row.cache, row.activations, row.total)
        cells.append((held.scheme, number(held.bits), *map(_size, figures), _smallest(row.gpus, row.total)))
    table(columns, cells, stream)
    notes: dict[str, list[str]] = {}
    for row in rows:
        notes.setdefault(row.weights.note, []).append(row.weights.scheme)
    for note in filter(None, notes):
        stream.write(f"{', '.join(notes[note])}: {note}.\n")


def _show_caches(model: Anatomy, context: int, batch: int, stream: IO[str]) -> None:
    from fewbit.analyze.memory import CACHES, cache_bytes, cache_per_token, inference
    from fewbit.cli.show import table

    stream.write("\nWith keys and values in fewer bits:\n")
    rows = []
    names = ("bf16", "W4A16 g{} symmetric")
    for name, format in CACHES:
        totals = inference(model, context, batch, format, _schemes(names))
        per_token = cache_per_token(model, format)[0]
        kept = cache_bytes(model, format, context, batch)
        rows.append((name, _size(per_token), _size(kept), *(_size(row.total) for row in totals)))
    shown = [row.weights.scheme for row in totals]
    table(("cache", ">per token", ">cache", *(f">total, {name}" for name in shown)), rows, stream)


def _schemes(names: tuple[str, ...]):
    from fewbit.analyze.memory import SCHEMES

    return [scheme for scheme in SCHEMES if scheme.name in names]


def _show_training(rows: tuple[Training, ...], stream: IO[str]) -> None:
    from fewbit.cli.show import table

    stream.write(
        "\nTo train it on sequences of that length (checkpointed: one block's activations at a time; the GPU "
        "is\nfor that):\n"
    )
    columns = (
        "method", ">bytes/param", ">states", ">weights", ">activations", ">total", ">checkpointed",
        "smallest GPU",
    )  # fmt: skip
    cells = (
        (
            row.method,
            str(row.per_parameter),
            _size(row.state + row.extra),
            _size(row.copy),
            _size(row.activations),
            _size(row.total),
            _size(row.total_checkpointed),
            _smallest(row.gpus, row.total_checkpointed),
        )
        for row in rows
    )
    table(columns, cells, stream)


def _show_gpus(stream: IO[str]) -> None:
    from fewbit.analyze.gpus import GPUS, RESERVE

    by_size: dict[int, list[str]] = {}
    for gpu in GPUS:
        by_size.setdefault(gpu.memory_gb, []).append(gpu.name)
    each = "; ".join(f"{gb} GB {', '.join(names)}" for gb, names in by_size.items())
    stream.write(
        f"\nGPUs: {each}.\n{RESERVE * 100:.0f} % of each stays free for the CUDA context, workspaces and "
        "fragmentation. What the smallest holds, all\nlarger ones hold; training asks for BF16 arithmetic "
        "(A100, RTX 4090 and later), FP8-LM for FP8 (RTX 4090, L40,\nH100 and later).\n"
    )


def _smallest(gpus: tuple[Gpu, ...], total: int | None) -> str:
    """The GPUs of the least memory that hold it, or how many of the largest do together."""
    from fewbit.analyze.gpus import GPUS, how_many

    if total is None:
        return "-"
    if not gpus:
        return f"none; {how_many(total, GPUS[-1])} x {GPUS[-1]}"
    least = [gpu for gpu in gpus if gpu.memory_gb == gpus[0].memory_gb]
    return f"{' or '.join(gpu.name for gpu in least)} {least[0].memory_gb} GB"


def _size(nbytes: float | None) -> str:
    from fewbit.cli.show import size

    return "-" if nbytes is None else size(nbytes)


def _count(n: int) -> str:
    """'8.03 billion', '135 million'."""
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if n >= 0.9995 * unit:
            return f"{n / unit:.3g} {name}"
    return f"{n:,}"


def _as_dict(model: Anatomy, context: int, batch: int, caveat: str) -> dict[str, Any]:
    from dataclasses import asdict

    from fewbit.analyze.gpus import GPUS, RESERVE
    from fewbit.analyze.memory import CACHES, cache_bytes, cache_per_token, inference
    from fewbit.analyze.training import training

    described = {k: v for k, v in asdict(model).items() if k not in ("linears", "cache")}
    described |= {"linear_parameters": model.linear_parameters, "rest": model.rest}
    described["cache_layers"] = None if model.cache is None else [asdict(layer) for layer in model.cache]
    caches = []
    for name, format in CACHES:
        growing, ever = cache_per_token(model, format) or (None, None)
        kept = cache_bytes(model, format, context, batch)
        caches.append(
            {
                "cache": name,
                "bytes_per_token": growing,
                "bytes_per_token_beyond_windows": ever,
                "size_bytes": kept,
            }
        )
    return {
        "model": described,
        "context": context,
        "batch": batch,
        "mind": caveat,
        "reserve": RESERVE,
        "gpus": [asdict(gpu) for gpu in GPUS],
        "caches": caches,
        "inference": [
            {
                "scheme": row.weights.scheme,
                "format": str(row.weights.format),
                "bits_per_weight": row.weights.bits,
                "note": row.weights.note,
                "cache": name,
                "weights_bytes": row.weights.nbytes,
                "cache_bytes": row.cache,
                "activations_bytes": row.activations,
                "total_bytes": row.total,
                "gpus": [str(gpu) for gpu in row.gpus],
            }
            for name, format in CACHES
            for row in inference(model, context, batch, format)
        ],
        "training": [
            {**asdict(row), "gpus": [str(gpu) for gpu in row.gpus]} for row in training(model, context, batch)
        ],
    }
