"""Native checkpoints in vLLM: ``vllm serve OUT``, where fewbit is installed beside it.

vLLM calls ``register`` at its start (entry point ``vllm.general_plugins``) and then knows what
``quant_method: fewbit`` of a config.json means. Every linear layer loads the tensors of the file as they are,
and computes by ``fewbit.serve.packed``: decode and multiply, whatever the format, with the kernels that
``fewbit.kernel`` picks. What one engine layer fuses comes in pieces, which its loader tells by their place
("q", "k", "v" or 0, 1).

Written against vLLM 0.26 and 0.32. One process holds whole layers: tensor parallelism is refused, since a
random basis or a trellis does not split along its sides. Experts: ``fewbit.serve.vllm_experts``. Fixed steps
of keys and values in E4M3, one a layer, are vLLM's own affair once it knows that they are there; other ones
it cannot use, which the log says.

Compiled, the product is one operator that torch.compile does not look into (``fewbit.serve.vllm_names``).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

from fewbit.errors import InputError
from fewbit.io import native
from fewbit.io.native import QUANT_METHOD, Entry
from fewbit.nn.kvcache import kv_format
from fewbit.serve.packed import Joined, expect, layer_of, stored_layout
from fewbit.serve.vllm_experts import FewbitExperts
from fewbit.serve.vllm_names import find, remember

LOG = logging.getLogger("fewbit.serve")
SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
_PLACES = {"q": 0, "k": 1, "v": 2, None: 0}


@torch.library.custom_op("fewbit::packed_linear", mutates_args=())
def packed_linear(x: Tensor, name: str, out_features: int) -> Tensor:
    """x [..., in] through the layer of that name -> [..., out_features]."""
    return find(name).fewbit(x)


@packed_linear.register_fake
def _(x: Tensor, name: str, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


class FewbitConfig(QuantizationConfig):
    """``quantization_config`` of a native checkpoint; ``entries``: of every quantized module by its name."""

    def __init__(self, plain: Mapping[str, Any]):
        super().__init__()
        self.entries = native.entries_from_config(plain)
        kv = native.kv_format(plain)
        self.kv_cache_scheme = SCHEME if kv == kv_format("fp8-tensor") else None  # what vLLM looks for
        if kv is not None and self.kv_cache_scheme is None:
            _say_once(
                "the fixed steps of keys and values in this native checkpoint are not used: vLLM knows those "
                "of --kv fp8-tensor alone, and caches the others as --kv-cache-dtype asks"
            )
        if native.sites_from_config(plain):
            raise InputError(
                "this checkpoint quantizes sums and outputs, as encoders do, which is not served; use "
                "fewbit.load"
            )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FewbitConfig:
        """From config.json."""
        return cls(config)

    def get_name(self) -> str:
        """The method's name."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Dtypes of activations."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of a GPU; only torch's own operators are needed."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Configuration files besides config.json."""
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Entries under the names that vLLM's model has."""
        self.entries = hf_to_vllm_mapper.apply_dict(self.entries)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a layer by its full name in vLLM's model; None: the layer's own."""
        below = [name for name in self.entries if name == prefix or name.startswith(f"{prefix}.")]
        if isinstance(layer, Attention) and self.kv_cache_scheme is not None:
            return BaseKVCacheMethod(self)
        if isinstance(layer, RoutedExperts) and below:
            return FewbitExperts(layer, prefix, {name: self.entries[name] for name in below})
        if not isinstance(layer, LinearBase):
            if below:
                raise InputError(
                    f"{prefix} is quantized, and fewbit's plugin serves linear layers and experts only; "
                    "dequantize it"
                )
            return None
        parent, _, last = prefix.rpartition(".")
        pieces = [f"{parent}.{piece}" for piece in self.packed_modules_mapping.get(last, [last])]
        entries = [self.entries.get(piece) for piece in pieces]
        return FewbitLinear(pieces, entries) if any(entries) else UnquantizedLinearMethod()


class FewbitLinear(LinearMethodBase):
    """The pieces of a linear layer, as the file names them; an entry is None where one is not quantized."""

    def __init__(self, pieces: list[str], entries: list[Entry | None]):
        self.pieces, self.entries = pieces, entries

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """An empty parameter for every name; its loader keeps each piece's tensor for later."""
        if input_size_per_partition != input_size or sum(output_partition_sizes) != output_size:
            raise InputError(
                f"{self.pieces[0]} would be split over processes, which native checkpoints do not allow; "
                "serve with --tensor-parallel-size 1, or quantize into a format of compressed-tensors"
            )
        if len(output_partition_sizes) != len(self.pieces):
            raise InputError(
                f"vLLM joins {len(output_partition_sizes)} layers where fewbit knows "
                f"{', '.join(self.pieces)}; this architecture is not served from native checkpoints"
            )
        layer.fewbit_name = remember(self.pieces[0], layer)
        layer.fewbit_arrived = [{} for _ in self.pieces]
        sizes = zip(self.entries, output_partition_sizes, strict=True)
        self.layouts = [stored_layout(entry, (rows, input_size), params_dtype) for entry, rows in sizes]
        for layout in self.layouts:
            for name, (_, dtype) in layout.items():
                expect(layer, name, dtype, partial(_keep, layer.fewbit_arrived, name))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """The layer that runs, where the parameters were."""
        device = next(p.device for p in layer.parameters())
        pieces = zip(self.pieces, self.entries, self.layouts, layer.fewbit_arrived, strict=True)
        made = [layer_of(*piece, device) for piece in pieces]
        for name in {name for layout in self.layouts for name in layout}:
            delattr(layer, name)
        del layer.fewbit_arrived
        if self.pieces[0].endswith(".kv_b_proj"):  # latent attention asks where its weight is, not for it
            layer.register_buffer("weight", torch.empty(0, device=device), persistent=False)
        layer.fewbit = Joined(made)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] -> [..., out] in x's dtype."""
        if torch.compiler.is_compiling():
            y = packed_linear(x, layer.fewbit_name, layer.fewbit.out_features)
        else:
            y = layer.fewbit(x)
        return y if bias is None else y + bias


@cache
def _say_once(text: str) -> None:
    """A warning, once in a process: vLLM reads a configuration several times."""
    LOG.warning(text)


def _keep(arrived: list[dict], name: str, parameter: nn.Parameter, loaded: Tensor, place: Any = None) -> None:
    """A weight loader: the tensor of a piece, which the engine names by its place or on the tensor."""
    place = getattr(loaded, "shard_id", None) if place is None else place
    arrived[_PLACES.get(place, place)][name] = loaded.detach().clone()


def register() -> None:
    """Tell vLLM of fewbit's checkpoints. Called by vLLM in each of its processes."""
    register_quantization_config(QUANT_METHOD)(FewbitConfig)
