"""``--kv``: a quantized cache of keys and values by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from fewbit.cli import options

CHUNK = 64  # tokens of a call in eval
WINDOWS, WINDOW = 4, 512  # calibration of fixed steps
FLOAT = "float"

KV = Annotated[
    str | None,
    typer.Option(
        "--kv",
        metavar="FORMAT",
        help="Keep keys and values in few bits: kivi4, kivi2, int8-token, int4-token, fp8, fp8-head, ...; "
        "-g64, -r32, -s4 after the name set group, newest and first tokens in float.",
        show_default="as the checkpoint says; float: not at all",
    ),
]


STORED_KV = Annotated[
    str | None,
    typer.Option(
        "--kv",
        metavar="FORMAT",
        help="Find fixed steps of keys and values on the calibration text, too, and store them: "
        "fp8-tensor or fp8-head (what vLLM reads), int8-tensor, int8-head.",
        show_default="no steps",
    ),
]


def with_kv(recipe: Any, name: str | None) -> Any:
    """The recipe with keys and values stored as named. Raises ``InputError`` for an unknown name."""
    from dataclasses import replace

    from fewbit.nn.kvcache import kv_format

    return recipe if name is None else replace(recipe, kv=kv_format(name))


def kv_of(name: str | None, source: Any) -> str | None:
    """What to call the KV format of a run: as asked, else that of the checkpoint; None for float.

    Raises ``InputError`` for an unknown name, before a model is loaded.
    """
    from fewbit.nn.kvcache import KV_FORMATS, kv_format

    if name is None and getattr(source, "kv", None) is not None:
        return next((n for n, kv in KV_FORMATS.items() if kv == source.kv), "the checkpoint's")
    if name is None or name.lower() == FLOAT:
        return None
    kv_format(name)
    return name


def cache_of(name: str, model: Any, tokenizer: Any) -> Callable[[], Any]:
    """A function that makes empty caches for ``model``; fixed steps are those that it keeps for this format,
    else they come from the embedded text.

    Raises ``InputError`` for an unknown name and a model that has no cache to quantize.
    """
    from fewbit.nn.kvcache import KV_FORMATS, kv_format
    from fewbit.nn.kvlayer import QuantizedCache
    from fewbit.nn.kvsteps import calibrate, kept

    own = kept(model)
    if own is not None and KV_FORMATS.get(name, own[0]) == own[0]:
        kv, steps = own
    else:
        kv, steps = kv_format(name), None
        steps = calibrate(model, _tokens(model, tokenizer), kv) if kv.static else None
    left = QuantizedCache(model.config, kv, steps).left_float
    if left:
        each = ", ".join(f"{index} ({why})" for index, why in left.items())
        options.note(f"the KV cache of these layers stays in float: {each}")
    return lambda: QuantizedCache(model.config, kv, steps)


def _tokens(model: Any, tokenizer: Any) -> Any:
    """Windows of the embedded text, no longer than the model's positions."""
    from fewbit.evaluate import Protocol, windows
    from fewbit.io.text import read_text

    positions = getattr(model.config, "max_position_embeddings", None) or WINDOW
    protocol = Protocol(window=min(WINDOW, positions), windows=WINDOWS)
    return windows(tokenizer, read_text(options.EMBEDDED), protocol)
