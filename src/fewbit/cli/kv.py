"""``--kv``: a quantized cache of keys and values by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from fewbit.cli import options

CHUNK = 64  # tokens of a call in eval
WINDOWS, WINDOW = 4, 512  # calibration of fixed steps

KV = Annotated[
    str | None,
    typer.Option(
        "--kv",
        metavar="FORMAT",
        help="Keep keys and values in few bits: kivi4, kivi2, int8-token, int4-token, fp8, fp8-head, ...; "
        "-g64, -r32, -s4 after the name set group, newest and first tokens in float.",
    ),
]


def cache_of(name: str, model: Any, tokenizer: Any) -> Callable[[], Any]:
    """A function that makes empty caches for ``model``; fixed steps come from the embedded text.

    Raises ``InputError`` for an unknown name and a model that has no cache to quantize.
    """
    from fewbit.nn.kvcache import kv_format
    from fewbit.nn.kvlayer import QuantizedCache, calibrate

    kv, steps = kv_format(name), None
    if kv.static:
        steps = calibrate(model, _tokens(model, tokenizer), kv)
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
