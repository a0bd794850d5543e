"""QuantizedCache: the transformers cache that holds keys and values in few bits.

    model.generate(..., past_key_values=QuantizedCache(model.config, kv_format("kivi4")))

A call attends to the keys and values that it brings as they are, and to earlier ones as they are stored; so
prefill in one call loses nothing, and every later token sees the quantized prefix. transformers decides what
kind of layer each is; only layers of full attention become quantized ones, the others (sliding windows, which
are short anyway; linear attention) stay transformers' own and are listed in `QuantizedCache.left_float`.

Without an attention kernel that reads codes, every call decodes the whole prefix: this saves memory between
calls and no time. This module imports transformers; `import fewbit` does not load it.

Road not taken: a subclass of transformers' ``QuantizedLayer``, which quantizes the prompt without any float
tokens and everything again whenever its residual is full (kvcache.py).

Shapes: b sequences, h key-value heads, l new tokens, t all tokens, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from fewbit.errors import InputError
from fewbit.nn.kvcache import KVFormat
from fewbit.nn.kvstore import empty


@dataclass(frozen=True, eq=False, kw_only=True)
class Steps:
    """Fixed steps of the keys and of the values, one entry a layer; None for a layer left in float."""

    key: tuple[Tensor | None, ...]
    value: tuple[Tensor | None, ...]


class QuantizedLayer(CacheLayerMixin):
    """One layer of the cache: two stores."""

    is_sliding = False

    def __init__(self, kv: KVFormat, key_steps: Tensor | None = None, value_steps: Tensor | None = None):
        super().__init__()
        self.kv, self.fixed, self.stores = kv, (key_steps, value_steps), ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Empty stores that suit states of this shape, dtype and device."""
        states = (key_states, key_states if value_states is None else value_states)
        triples = zip(self.kv.parts(), states, self.fixed, strict=True)
        self.stores = tuple(empty(part, x, steps) for part, x, steps in triples)
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        """New states [b, h, l, d] in; out what attention reads, [b, h, t, d]: stored ones, then the new."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        states = (key_states, value_states)
        seen = [torch.cat([s.read(), x], -2) for s, x in zip(self.stores, states, strict=True)]
        self.stores = tuple(s.append(x) for s, x in zip(self.stores, states, strict=True))
        return seen[0], seen[1]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(store.nbytes for store in self.stores)

    def get_seq_length(self) -> int:
        return self.stores[0].tokens if self.stores else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1  # no limit

    def reset(self) -> None:
        self.stores, self.is_initialized = (), False

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens: ``-n`` of them, as transformers counts.

        Raises ``InputError`` for tokens that are coded already.
        """
        if tokens_to_remove > 0:
            raise InputError(f"crop({tokens_to_remove}) is not supported; give -n to remove n tokens")
        self.stores = tuple(store.crop(-tokens_to_remove) for store in self.stores)

    def offload(self) -> None:
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map(lambda t: t.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequences in another order, for beam search: codes move as they are."""
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t[indices])

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.stores = tuple(store.map(change) for store in self.stores)


class QuantizedCache(Cache):
    """A cache for a model of ``config`` in ``kv``; ``steps`` from `fewbit.nn.kvsteps` where it needs them.

    ``left_float`` lists the layers that are not quantized, with the reason. Raises ``InputError`` when none
    is, when a layer to skip is not there, and when steps are missing.
    """

    def __init__(self, config: Any, kv: KVFormat, steps: Steps | None = None):
        if kv.static and steps is None:
            raise InputError("this KV format has fixed steps; find them with kvsteps.calibrate")
        layers, left = _layers(config), {}
        for index, layer in enumerate(layers):
            if index in kv.skip:
                left[index] = "skipped"
            elif type(layer) is not DynamicLayer:
                sliding = getattr(layer, "is_sliding", False)
                left[index] = "sliding window" if sliding else type(layer).__name__
            else:
                fixed = (None, None) if steps is None else (steps.key[index], steps.value[index])
                layers[index] = QuantizedLayer(kv, *fixed)
        beyond = [index for index in kv.skip if index >= len(layers)]
        if beyond:
            raise InputError(f"layer {beyond[0]} to skip is not among the {len(layers)} layers, 0 to n - 1")
        if len(left) == len(layers):
            reasons = ", ".join(sorted(set(left.values())))
            raise InputError(
                f"no layer of {type(config).__name__} has a cache to quantize ({reasons}); use the model's "
                "own cache"
            )
        super().__init__(layers=layers)
        self.left_float: dict[int, str] = left

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored; of layers that are left alone, their float tensors."""
        own = (getattr(layer, "nbytes", None) for layer in self.layers)
        return sum(n if n is not None else _float_bytes(x) for n, x in zip(own, self.layers, strict=True))


def _layers(config: Any) -> list[Any]:
    """The layers that transformers itself would make."""
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{type(config).__name__} is an encoder-decoder, whose cache is not quantized")
    return list(DynamicCache(config=config).layers)


def _float_bytes(layer: Any) -> int:
    tensors = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return sum(t.nbytes for t in tensors if t is not None)


def cache_bytes(cache: Any) -> int:
    """Bytes held by a transformers cache, quantized or not."""
    return cache.nbytes if isinstance(cache, QuantizedCache) else sum(map(_float_bytes, cache.layers))
