"""Fixed steps of keys and values: watched as they pass, and kept by a model beside its weights.

    Watch       a cache that stores nothing and remembers what steps would suit the states of the last call
    keep, kept  attention.k_scale, attention.v_scale [1] or [heads, 1, 1] float32: buffers of attentions

The names and shapes of the buffers are those of compressed-tensors and vLLM, so that a model's state is what
its file holds. This module imports transformers; `import fewbit` does not load it.

Road not taken: steps in the configuration of the model. They are numbers that belong to its weights.

Shapes: b sequences, h key-value heads, l tokens, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from fewbit.errors import InputError
from fewbit.format.block import PerTensor
from fewbit.nn.kvcache import KVFormat
from fewbit.nn.kvlayer import Steps
from fewbit.nn.kvstore import fixed_steps

NAMES = ("k_scale", "v_scale")  # of keys, of values
LEAST = 2.0**-126  # a step, where keys or values are all 0


class Watch(DynamicCache):
    """Passes keys and values through and stores none. ``seen``: (layer, side) -> steps of the last call."""

    def __init__(self, config: Any, kv: KVFormat):
        super().__init__(config=config)
        self.kv = kv
        self.seen: dict[tuple[int, int], Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        """States [b, h, l, d] in and out, as they are."""
        if is_covered(self, self.kv, layer_idx):
            for side, part in enumerate(self.kv.parts()):
                steps = fixed_steps(part, (key_states, value_states)[side].detach())
                if steps is not None:
                    self.seen[layer_idx, side] = steps
        return key_states, value_states


def is_covered(cache: DynamicCache, kv: KVFormat, index: int) -> bool:
    """Whether layer ``index`` is one that ``kv`` quantizes: of full attention, and not skipped."""
    return type(cache.layers[index]) is DynamicLayer and index not in kv.skip


def largest(watches: Iterable[Watch]) -> Steps:
    """The largest steps that any of the watches has seen."""
    watches = list(watches)
    found: dict[tuple[int, int], Tensor] = {}
    for watch in watches:
        for at, steps in watch.seen.items():
            found[at] = torch.maximum(found.get(at, steps), steps)
    sides = (tuple(found.get((i, side)) for i in range(len(watches[0].layers))) for side in (0, 1))
    return Steps(key=next(sides), value=next(sides))


def calibrate(model: nn.Module, tokens: Tensor, kv: KVFormat) -> Steps:
    """Fixed steps of ``kv`` from the keys and values of ``tokens`` [w, l]: the largest of any window.

    Raises ``InputError`` for a format whose steps are not fixed.
    """
    if not kv.static:
        raise InputError("this KV format finds its steps token by token; leave calibration out")
    device, watches = next(model.parameters()).device, []
    for ids in tokens:
        watches.append(Watch(model.config, kv))
        with torch.no_grad():
            model(input_ids=ids[None].to(device), past_key_values=watches[-1], use_cache=True)
    return largest(watches)


def cached_layers(config: Any) -> int:
    """How many layers keep keys and values, or a state."""
    return len(DynamicCache(config=config).layers)


def attentions(model: nn.Module, kv: KVFormat) -> dict[int, str]:
    """Layer -> name of its attention module, of all layers that ``kv`` covers.

    Raises ``InputError`` where there is none to quantize, or no module can be told.
    """
    layers = DynamicCache(config=model.config)
    wanted = [i for i in range(len(layers.layers)) if is_covered(layers, kv, i)]
    root = model.get_decoder() if hasattr(model, "get_decoder") else model
    outer = next((f"{n}." for n, m in model.named_modules() if m is root and n), "")
    found: dict[int, str] = {}
    for name, module in root.named_modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and "attention" in type(module).__name__.lower():
            found.setdefault(index, outer + name)
    lost = [i for i in wanted if i not in found]
    if lost or not wanted:
        what = f"layer {lost[0]} has none" if lost else "no layer has a cache of full attention"
        raise InputError(
            f"fixed steps of keys and values belong to attention modules, and of {type(model).__name__} "
            f"{what}; leave --kv out"
        )
    return {i: found[i] for i in wanted}


def as_stored(kv: KVFormat, steps: Steps, index: int) -> tuple[Tensor, Tensor]:
    """The steps of a layer as buffers and files hold them."""
    pair = (steps.key[index], steps.value[index])
    shapes = ((1,) if part.format.block == PerTensor() else (-1, 1, 1) for part in kv.parts())
    return tuple(s.float().clamp(min=LEAST).reshape(n) for n, s in zip(shapes, pair, strict=True))


def keep(model: nn.Module, kv: KVFormat, scales: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Give attention modules, by name, their steps; ``model.kv_format`` says what they are of."""
    for name, pair in scales.items():
        for buffer, scale in zip(NAMES, pair, strict=True):
            model.get_submodule(name).register_buffer(buffer, scale)
    model.kv_format = kv


def kept(model: nn.Module) -> tuple[KVFormat, Steps] | None:
    """The steps that a model keeps, as a cache takes them; None without any."""
    kv = getattr(model, "kv_format", None)
    if kv is None:
        return None
    at, count = attentions(model, kv), cached_layers(model.config)
    sides = ([None] * count, [None] * count)
    for index, name in at.items():
        for side, (buffer, part) in enumerate(zip(NAMES, kv.parts(), strict=True)):
            scale = model.get_submodule(name).get_buffer(buffer).float()
            sides[side][index] = scale.reshape(() if part.format.block == PerTensor() else (-1, 1))
    return kv, Steps(key=tuple(sides[0]), value=tuple(sides[1]))
