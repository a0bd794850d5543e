"""One window through a model: in one call, or in chunks that read a cache of keys and values.

Shapes: l tokens of a window, v vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import InputError


def predict(
    model: Callable[..., Any], ids: Tensor, chunk: int | None, cache: Callable[[], Any] | None, where: str
) -> tuple[Tensor, int | None]:
    """Logits [l, v] of one window, and the bytes of the cache at its end (None without one)."""
    if chunk is None:
        return _logits(model, ids, where), None
    from fewbit.nn.kvlayer import cache_bytes  # imports transformers

    state, parts = None if cache is None else cache(), []
    for part in ids.split(chunk):
        out = model(input_ids=part[None].to(_device(model)), past_key_values=state, use_cache=True)
        parts.append(_checked(model, out, part, where))
        state = getattr(out, "past_key_values", None)
        if getattr(state, "layers", None) is None:
            raise InputError(f"{type(model).__name__} keeps no cache: leave the chunk out")
    return torch.cat(parts), cache_bytes(state)


def _logits(model: Callable[..., Any], ids: Tensor, where: str) -> Tensor:
    """Logits [l, v] of one window."""
    config = getattr(model, "config", None)
    keywords = {"use_cache": False} if getattr(config, "use_cache", False) and not masked(model) else {}
    return _checked(model, model(input_ids=ids[None].to(_device(model)), **keywords), ids, where)


def _checked(model: Callable[..., Any], out: Any, ids: Tensor, where: str) -> Tensor:
    """The logits [l, v] in a model's answer for ``ids`` [l]."""
    logits = getattr(out, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != (1, len(ids)):
        got = "nothing" if logits is None else f"the shape {list(getattr(logits, 'shape', ()))}"
        raise InputError(
            f"{where}: {type(model).__name__} gives {got} for logits, expected [1, {len(ids)}, vocabulary]: "
            "only a language model with its head can be evaluated"
        )
    return logits[0]


def masked(model: Callable[..., Any]) -> bool:
    """Does the model fill in masked words, seeing both sides? The class name alone tells."""
    return type(model).__name__.endswith("ForMaskedLM")


def _device(model: Callable[..., Any]) -> torch.device:
    tensors = model.parameters() if isinstance(model, torch.nn.Module) else ()
    return next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))
