"""Adapters on a quantized model (QLoRA): the codes stay, small wide matrices beside them learn.

    y = x W_q^T + b + (alpha / r) x A^T B^T      W_q codes, A [r, in], B [out, r]; dx passes W_q decoded anew

QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, eq. 5; LoRA, Hu et al. 2021,
https://arxiv.org/abs/2106.09685. The adapters are those of the peft library: its configurations, files and
everything it does with them; here stands only how they sit on a `QLinear`. Kept apart, they are saved by
peft beside the quantized checkpoint. Merged, the layer is wide again, and what rounding it anew costs is to
be measured: W_q + B A lies on another grid than W_q.

Road not taken: peft's own merging, which would add B A to decoded values and lose it with them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.nn import QLinear


def add_adapters(model: nn.Module, config: Any) -> nn.Module:
    """A ``peft`` model: adapters on the layers of ``model`` that ``config`` (``peft.LoraConfig``) names.

    `QLinear` layers keep their codes; everything but the adapters is frozen. Adapters are float32 unless
    ``config`` says otherwise. Raises ``InputError`` where peft is not installed.
    """
    try:
        from peft import get_peft_model
    except ImportError:
        raise InputError("adapters are those of the peft library: pip install peft") from None
    config._register_custom_module({QLinear: _adapted()})
    return get_peft_model(model, config)


@torch.no_grad()
def merge_adapters(model: nn.Module) -> nn.Module:
    """The model below ``model`` (of `add_adapters`) with its active adapters in wide weights, W_q + B A.

    Adapted layers become ``torch.nn.Linear`` in the dtype of the model's embedding; the others stay as they
    are. In place. Raises ``InputError`` where nothing is adapted, and for layers whose codes live in another
    basis or whose inputs are quantized.
    """
    adapted = _adapted()
    base = model.get_base_model()
    layers = {n: m for n, m in base.named_modules() if isinstance(m, adapted)}
    if not layers:
        raise InputError(
            f"{type(base).__name__} has no adapters on quantized layers; call add_adapters first"
        )
    dtype = base.get_input_embeddings().weight.dtype
    made = {name: _wide(name, layer, dtype) for name, layer in layers.items()}
    for name, layer in made.items():
        base.set_submodule(name, layer)
    return base


def _wide(name: str, layer: Any, dtype: torch.dtype) -> nn.Linear:
    own: QLinear = layer.get_base_layer()
    if any(part is not None for part in (own.online, own.output, own.apart, own.activation)):
        raise InputError(
            f"{name} has quantized inputs, columns apart or a basis of its own, and cannot become one wide "
            "weight; keep its adapters"
        )
    weight = own.qweight.dequantize()
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            weight += layer.get_delta_weight(adapter).float()
    out = nn.Linear(own.in_features, own.out_features, bias=False, device="meta")
    out.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    out.bias = own.bias
    return out


@cache
def _adapted() -> type:
    """peft's adapter layer, on a base whose weight is codes."""
    from peft.tuners.lora import Linear

    class AdaptedLinear(Linear):
        """Adapters beside a `QLinear`."""

        def _get_base_layer_device_and_dtype(self, base: QLinear) -> tuple[torch.device, torch.dtype]:
            return base.codes.device, torch.float32

        def get_delta_weight(self, adapter: str) -> Tensor:
            """(alpha / r) B A, [out, in]."""
            product = self.lora_B[adapter].weight @ self.lora_A[adapter].weight
            return product * self.scaling[adapter]

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            raise InputError(
                "adapters cannot be added to codes in place; fewbit.train.merge_adapters makes a wide model"
            )

    return AdaptedLinear
