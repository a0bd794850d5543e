"""Training with keys and values as the cache will hold them.

    k^ = decode(encode(k)),  v^ = decode(encode(v))     after RoPE, per token or with fixed steps; dk = dk^

LLM-QAT, Liu et al. 2023, https://arxiv.org/abs/2305.17888, section 2.2: every token of a window is rounded as
it would be on its way into the cache, straight through; the ranges are those of the token, so nothing clips.
Formats are those of `fewbit.nn.kvcache`, the numbers those of its stores.

One thing differs from decoding: there a token reads its own key and value before they are stored. Here all
tokens of a window are computed at once, and read their own as stored, too.

Road not taken: hooks on the projections of keys. Keys are stored after RoPE, which follows them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.format import Params
from fewbit.nn.kvcache import KVFormat, Part
from fewbit.nn.kvlayer import QuantizedCache, QuantizedLayer, Steps
from fewbit.nn.kvstore import empty, unview, view
from fewbit.train.fake import Identity, fake


def fake_cache(model: nn.Module, kv: KVFormat, steps: Steps | None = None) -> Callable[[], None]:
    """From now on forwards of ``model`` (transformers) without a cache of their own round keys and values.

    steps: from ``fewbit.nn.kvsteps.calibrate``, where ``kv`` has fixed ones. Returns what undoes it. Raises
    ``InputError`` for formats that keep the newest tokens in float: every token of a window is newest once.
    """
    if kv.residual:
        raise InputError(
            f"a window is trained as a whole, so no {kv.residual} newest tokens can stay in float; use a "
            "format without a residual, such as int4-token or fp8"
        )
    FakeKVCache(model.config, kv, steps)  # its refusals come now

    def look(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if kwargs.get("past_key_values") is not None:
            return args, kwargs
        if module.training and getattr(module, "is_gradient_checkpointing", False):
            raise InputError(
                "gradient checkpointing leaves caches out, and with them the rounding of keys and values; "
                "turn it off"
            )
        return args, {**kwargs, "past_key_values": FakeKVCache(module.config, kv, steps), "use_cache": True}

    return model.register_forward_pre_hook(look, with_kwargs=True).remove


class FakeKVLayer(QuantizedLayer):
    """A layer of the cache that keeps nothing and gives back what it would."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        """[b, h, t, d] in, the same rounded out, with gradients."""
        key, value = self.kv.parts()
        return _fake(key_states, key, self.fixed[0]), _fake(value_states, value, self.fixed[1])


class FakeKVCache(QuantizedCache):
    """What forwards of training get as a cache; for one forward."""

    def __init__(self, config: Any, kv: KVFormat, steps: Steps | None = None):
        super().__init__(config, kv, steps)
        self.layers = [
            FakeKVLayer(own.kv, *own.fixed) if isinstance(own, QuantizedLayer) else own for own in self.layers
        ]


def _fake(x: Tensor, part: Part, steps: Tensor | None) -> Tensor:
    """Keys or values [b, h, t, d] as a store gives them back."""
    if part.format is None:
        return x
    steps = empty(part, x, steps).steps
    head, rest = x[..., : part.sink, :], x[..., part.sink :, :]
    if not rest.shape[-2]:
        return x
    params = None if steps is None else Params(scale=steps, zero=None)
    seen = fake(view(rest, part.along), part.format, params, Identity())
    return torch.cat([head, unview(seen, part.along, x.shape[0], x.shape[-1])], -2)
