"""transformers' side of a native checkpoint: its configuration class and its quantizer.

Loading goes through transformers' own loader: before it, every quantized module is replaced by a shell whose
buffers have the names, shapes and dtypes of the file (``native.layout``); after it, the shells become
``QLinear``. Saving goes the other way through ``get_state_dict_and_metadata``. Written against transformers
5.17 and 5.23.

This module imports transformers; ``fewbit.io.hf`` imports it when transformers is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fewbit.errors import InputError
from fewbit.io import inputs, native
from fewbit.io.native import QUANT_METHOD, Entry
from fewbit.nn.linear import QLinear


class FewbitConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a native checkpoint, held as it stands in config.json."""

    def __init__(self, version: int, formats: list, modules: dict, **others: Any):
        self.quant_method = QUANT_METHOD
        self.version, self.formats, self.modules = version, formats, modules


class FewbitQuantizer(HfQuantizer):
    """Swaps shells in before loading and ``QLinear`` after it."""

    requires_calibration = True  # quantizing is ``fewbit.quantize``'s; this one only loads

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self.entries = _resolve(model, native.entries_from_config(self.quantization_config.to_dict()))
        self.quantization_config = FewbitConfig(
            **native.quantization_config(self.entries)
        )  # names as resolved
        for name, entry in self.entries.items():
            model.set_submodule(name, _Packed(entry, model.get_submodule(name).bias))
        tied = getattr(model, "all_tied_weights_keys", {})
        for target, source in list(tied.items()):
            if {target.removesuffix(".weight"), source.removesuffix(".weight")} & set(self.entries):
                del tied[target]  # a quantized weight is nobody else's
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name in self.entries:
            model.set_submodule(name, model.get_submodule(name).open())
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict]:
        """The state as the file holds it: quantized weights packed again."""
        state = model.state_dict()
        for name, module in model.named_modules():
            if isinstance(module, QLinear):
                for buffer in module._buffers:
                    state.pop(f"{name}.{buffer}", None)
                state |= native.to_dict(name, module.qweight) | inputs.to_dict(name, module.params)
        return state, {}

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


class _Packed(nn.Module):
    """Stands in for a quantized module while transformers loads: buffers as in the file, on meta."""

    def __init__(self, entry: Entry, bias: nn.Parameter | None):
        super().__init__()
        self.entry = entry
        for name, (shape, dtype) in self._layout().items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        self.register_parameter("bias", bias)
        # Some models' ``_init_weights`` reach into children; a tensor marked as initialized is left alone.
        self.weight = torch.empty(0)
        self.weight._is_hf_initialized = True

    def _layout(self) -> dict:
        entry = self.entry
        weight = native.layout(entry.format, entry.shape, apart=entry.apart)
        return weight | inputs.layout(entry.activation, entry.shape[1])

    def open(self) -> QLinear:
        """The module that runs."""
        entry, wanted = self.entry, self._layout()
        # A loader that keeps parts of a model in float32 may have widened scales: exact, undone here.
        stored = {f".{name}": b.to(wanted[name][1]) for name, b in self._buffers.items()}
        return QLinear(
            native.from_dict("", stored, *entry.stored),
            self.bias,
            activation=entry.activation,
            params=inputs.from_dict("", stored, entry.activation, entry.shape[1]),
            online=entry.online,
            output=entry.output,
        )


def attach(model: nn.Module, entries: Mapping[str, Entry]) -> None:
    """Give a model that transformers did not load what ``save_pretrained`` needs to write it natively.

    entries: of every ``QLinear`` in the model, by its name there.
    """
    quantizer = FewbitQuantizer(FewbitConfig(**native.quantization_config(entries)))
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, QUANT_METHOD
    model.config.quantization_config = quantizer.quantization_config


def _resolve(model: nn.Module, entries: dict[str, Entry]) -> dict[str, Entry]:
    """Entries under the model's own names: the file may lack the base model's prefix, or alone have it."""
    prefix, modules, out = f"{model.base_model_prefix}.", dict(model.named_modules()), {}
    for name, entry in entries.items():
        found = next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in modules), None)
        if found is None:
            raise InputError(
                f"the checkpoint quantizes {name}, which {type(model).__name__} does not have; load it as "
                "the class that config.json names"
            )
        out[found] = entry
    return out
