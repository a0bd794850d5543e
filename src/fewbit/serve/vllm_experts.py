"""Experts of a native checkpoint in vLLM: what its layer of routed experts asks of a quantization.

vLLM routes (softmax, groups, corrections: its own code) and runs shared experts, which are ordinary linear
layers; here is what becomes of the tokens once their experts are known. Its loader tells an expert's three
matrices as "w1" (gate), "w3" (up) and "w2" (down) and looks for parameters "w13_NAME" and "w2_NAME".

vLLM's kernels for fused experts take one format for all of a layer. Here each matrix is a layer of its own
(``fewbit.serve.experts``), so formats, bases and kept floats may differ from expert to expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase

from fewbit.errors import InputError
from fewbit.io.native import Entry
from fewbit.serve.experts import PackedExpert, PackedExperts
from fewbit.serve.packed import expect, layer_of, stored_layout
from fewbit.serve.vllm_names import find, remember

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
_PARTS = {"w1": 0, "w3": 1, "w2": 2}


@torch.library.custom_op("fewbit::packed_experts", mutates_args=())
def packed_experts(x: Tensor, ids: Tensor, weights: Tensor, name: str) -> Tensor:
    """x [T, h] through the experts of that name, by ids and weights [T, k] -> [T, h]."""
    return find(name).fewbit(x, ids, weights)


@packed_experts.register_fake
def _(x: Tensor, ids: Tensor, weights: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


class FewbitExperts(FusedMoEMethodBase):
    """The experts of a layer; ``entries``: of every quantized matrix below ``prefix`` by its full name."""

    def __init__(self, layer: nn.Module, prefix: str, entries: Mapping[str, Entry]):
        super().__init__(layer.moe_config)
        names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
        count = layer.moe_config.num_logical_experts
        self.names = [[f"{prefix}.{e}.{name}" for name in names] for e in range(count)]
        self.prefix, self.entries = prefix, entries
        known = {name for expert in self.names for name in expert}
        _check(layer, prefix, [name for name in entries if name not in known])

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """An empty parameter for every name; its loader keeps each expert's tensors for later."""
        shapes = [(intermediate_size_per_partition, hidden_size)] * 2
        shapes.append((hidden_size, intermediate_size_per_partition))
        split = any(
            (entry := self.entries.get(name)) is not None and tuple(entry.shape) != shape
            for expert in self.names
            for name, shape in zip(expert, shapes, strict=True)
        )
        if split or num_experts != len(self.names):
            raise InputError(
                f"{self.prefix} would be split over processes, padded, or its experts repeated, which native "
                "checkpoints do not allow; serve with --tensor-parallel-size 1 and without expert "
                "parallelism, or quantize into a format of compressed-tensors"
            )
        self.layouts = [
            [stored_layout(self.entries.get(n), s, params_dtype) for n, s in zip(expert, shapes, strict=True)]
            for expert in self.names
        ]
        layer.fewbit_name = remember(self.prefix, layer)
        layer.fewbit_arrived = [[{}, {}, {}] for _ in self.names]
        for expert in self.layouts:
            for layout, part in zip(expert, ("w13", "w13", "w2"), strict=True):
                for name, (_, dtype) in layout.items():
                    expect(layer, f"{part}_{name}", dtype, partial(_keep, layer.fewbit_arrived, name))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """The experts that run, where the parameters were."""
        device, act = next(p.device for p in layer.parameters()), ACTIVATIONS[layer.activation.value]
        experts = []
        for names, layouts, arrived in zip(self.names, self.layouts, layer.fewbit_arrived, strict=True):
            parts = zip(names, (self.entries.get(n) for n in names), layouts, arrived, strict=True)
            experts.append(PackedExpert(*(layer_of(*part, device) for part in parts), act))
        for name in {n for n, _ in layer.named_parameters(recurse=False) if n.startswith(("w13_", "w2_"))}:
            delattr(layer, name)
        del layer.fewbit_arrived
        layer.fewbit = PackedExperts(experts)

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        """Nothing that vLLM's kernels would need."""

    def maybe_make_prepare_finalize(self, *args: Any, **kwargs: Any) -> None:
        """Tokens stay where they are: one process holds all experts."""

    def apply(
        self,
        layer: nn.Module,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *shared: Any,
        **more_shared: Any,
    ) -> Tensor:
        """x [T, h], weights and ids [T, k] -> [T, h]; shared experts are vLLM's own affair."""
        if torch.compiler.is_compiling():
            return packed_experts(x, topk_ids, topk_weights, layer.fewbit_name)
        return layer.fewbit(x, topk_ids, topk_weights)


def _check(layer: nn.Module, prefix: str, beyond: Sequence[str]) -> None:
    """Refuse what computes otherwise than the formula of ``fewbit.serve.experts``."""
    if beyond:
        raise InputError(
            f"{beyond[0]} is quantized, and vLLM knows no such matrix of the experts {prefix}; this "
            "architecture is not served from native checkpoints"
        )
    activation = layer.activation.value
    limited = any(
        getattr(layer, n, None) is not None for n in ("swiglu_limit", "swiglu_alpha", "swiglu_beta")
    )
    if activation not in ACTIVATIONS or limited or layer.moe_config.has_bias:
        raise InputError(
            f"the experts {prefix} have biases, limits or the activation {activation}, and fewbit's plugin "
            f"runs plain gated experts with {', '.join(ACTIVATIONS)}; quantize them into a format of "
            "compressed-tensors"
        )
    if layer.apply_router_weight_on_input:
        raise InputError(
            f"the experts {prefix} multiply their inputs by the router's weights, which fewbit's plugin does "
            "not; quantize them into a format of compressed-tensors"
        )


def _keep(
    arrived: list[list[dict]],
    name: str,
    param: nn.Parameter,
    loaded_weight: Tensor,
    weight_name: str,
    shard_id: str,
    expert_id: int,
    return_success: bool = False,
) -> bool | None:
    """A weight loader: the tensor of one matrix of one expert. vLLM calls it by these names."""
    arrived[expert_id][_PARTS[shard_id]][name] = loaded_weight.detach().clone()
    return True if return_success else None
