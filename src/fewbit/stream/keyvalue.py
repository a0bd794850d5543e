"""Fixed steps of keys and values, found while the calibration batches pass the quantized layers.

Each flow carries a cache that stores nothing and remembers the steps that its last call of each layer would
suit (``fewbit.nn.kvsteps.Watch``); blocks may be run several times, and what comes last has gone through the
quantized k and v.

Road not taken: a forward of its own after the run. It costs as much as the calibration itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from fewbit.io import kv as file
from fewbit.io.compressed_kv import refusal
from fewbit.io.kept import stored_name
from fewbit.nn.kvcache import KVFormat
from fewbit.stream.suspend import Flow, wait


class KeyValues:
    """Steps of the keys and values of ``model``, or nothing at all where ``kv`` is None."""

    def __init__(self, model: nn.Module, kv: KVFormat | None):
        self.model, self.kv, self.watches = model, kv, []

    def watch(self) -> dict:
        """Arguments of a forward whose keys and values are watched."""
        if self.kv is None:
            return {"use_cache": False}
        from fewbit.nn.kvsteps import Watch

        self.watches.append(Watch(self.model.config, self.kv))
        return {"use_cache": True, "past_key_values": self.watches[-1]}

    def finish(self, flows: Sequence[Flow], block: nn.Module) -> None:
        """Let flows that wait in the last block run to its end, which solving does not ask of them."""
        if self.kv is None:
            return
        handle = block.register_forward_hook(lambda module, args, out: wait(module, args, {}))
        for flow in flows:
            flow.resume()
        handle.remove()

    def tensors(self, mapping: Mapping[str, str]) -> dict[str, torch.Tensor]:
        """What a file holds of them. mapping: parameters of the model to stored tensors."""
        if self.kv is None:
            return {}
        from fewbit.nn.kvsteps import as_stored, attentions, largest

        steps, at = largest(self.watches), attentions(self.model, self.kv)
        return file.to_dict(
            {stored_name(name, mapping): as_stored(self.kv, steps, i) for i, name in at.items()}
        )


def kv_refusal(kv: KVFormat | None, model: nn.Module) -> str:
    """Why compressed-tensors does not hold these steps of this model; "" when it does, and without any.

    Raises ``InputError`` for a model whose attentions cannot be told.
    """
    if kv is None:
        return ""
    from fewbit.nn.kvsteps import attentions, cached_layers

    found = attentions(model, kv)
    left = cached_layers(model.config) - len(found)
    if left:
        return (
            refusal(kv) or f"keys and values of {left} layers (sliding windows) stay float, and none do there"
        )
    return refusal(kv) or next((why for n in found.values() if (why := _unknown(model, n))), "")


def _unknown(model: nn.Module, name: str) -> str:
    """Engines know an attention that caches keys and values by the projections that make them."""
    own = {child for child, _ in model.get_submodule(name).named_children()}
    known = {"k_proj", "v_proj"} <= own or "qkv_proj" in own
    return "" if known else f"{name} is no attention with k_proj and v_proj, by which engines know one"
