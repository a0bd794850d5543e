"""transformers' side of a native checkpoint: its configuration class and its quantizer.

Loading goes through transformers' own loader: before it, every quantized module is replaced by a shell whose
buffers have the names, shapes and dtypes of the file (``native.layout``); after it, the shells become
``QLinear`` or ``QEmbedding``, and quantizers take hold at their sites. Saving goes the other way through
``get_state_dict_and_metadata``. Written against transformers 5.17 and 5.23.

This module imports transformers; ``fewbit.io.hf`` imports it when transformers is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fewbit.errors import InputError
from fewbit.format.block import PerTensor
from fewbit.format.format import Params
from fewbit.io import inputs, native
from fewbit.io.native import QUANT_METHOD, Entry
from fewbit.io.renaming import expert_names, merges_experts, module_names
from fewbit.io.shell import linear_of, stored_of
from fewbit.io.sites import SiteEntry
from fewbit.nn.embedding import QEmbedding
from fewbit.nn.experts import split_experts
from fewbit.nn.kvcache import KVFormat
from fewbit.nn.linear import QLinear
from fewbit.nn.sites import Quantizer, place


class FewbitConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a native checkpoint, held as it stands in config.json."""

    def __init__(self, version: int, formats: list, modules: dict, **others: Any):
        self.quant_method = QUANT_METHOD
        self.version, self.formats, self.modules = version, formats, modules
        if others.get("sites"):
            self.activations, self.sites = others["activations"], others["sites"]
        if others.get("kv"):
            self.kv = others["kv"]


class FewbitQuantizer(HfQuantizer):
    """Swaps shells in before loading and ``QLinear`` after it."""

    requires_calibration = True  # quantizing is ``fewbit.quantize``'s; this one only loads

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        split_experts(model, expert_names(model))
        config, find = self.quantization_config.to_dict(), _finder(model)
        self.entries = {find(name): entry for name, entry in native.entries_from_config(config).items()}
        sites = native.sites_from_config(config)
        self.sites = tuple(replace(s, site=replace(s.site, module=find(s.site.module))) for s in sites)
        self.kv = native.kv_format(config)
        self.quantization_config = FewbitConfig(
            **native.quantization_config(self.entries, self.sites, self.kv)
        )  # names as resolved
        if self.kv is not None:
            unread_kv(model, self.kv)
        for name, entry in self.entries.items():
            model.set_submodule(name, _Packed(entry, model.get_submodule(name)))
        for s in self.sites:
            model.get_submodule(s.site.module).add_module(s.site.child, _unread(s))
        tied = getattr(model, "all_tied_weights_keys", {})
        for target, source in list(tied.items()):
            if {target.removesuffix(".weight"), source.removesuffix(".weight")} & set(self.entries):
                del tied[target]  # a quantized weight is nobody else's
        return model

    def update_weight_conversions(self, weight_conversions: list, *args: Any) -> list:
        """Experts are loaded one by one: what would stack them has nothing to do."""
        return [rule for rule in weight_conversions if not merges_experts(rule)]

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        quantizers = {s.site: _read(s, model.get_submodule(s.name)) for s in self.sites}
        for name in self.entries:
            model.set_submodule(name, model.get_submodule(name).open(model.dtype))
        place(model, quantizers)
        if self.kv is not None:
            model.kv_format = self.kv
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict]:
        """The state as the file holds it: quantized weights packed again."""
        state = model.state_dict()
        for name, module in model.named_modules():
            if isinstance(module, QLinear | QEmbedding):
                for buffer in module._buffers:
                    state.pop(f"{name}.{buffer}", None)
                state |= native.to_dict(name, stored_of(module))
            if isinstance(module, QLinear):
                state |= inputs.to_dict(name, module.params)
        return state, {}

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


class _Packed(nn.Module):
    """Stands in for a quantized module while transformers loads: buffers as in the file, on meta."""

    def __init__(self, entry: Entry, original: nn.Module):
        super().__init__()
        self.entry, self.is_table = entry, isinstance(original, nn.Embedding)
        for name, (shape, dtype) in self._layout().items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        self.register_parameter("bias", getattr(original, "bias", None))
        # Some models' ``_init_weights`` reach into children; a tensor marked as initialized is left alone.
        self.weight = torch.empty(0)
        self.weight._is_hf_initialized = True

    def _layout(self) -> dict:
        entry = self.entry
        weight = native.layout(entry.format, entry.shape, apart=entry.apart, ordered=entry.ordered)
        return weight | inputs.layout(entry.activation, entry.shape[1])

    def open(self, dtype: torch.dtype) -> QLinear | QEmbedding:
        """The module that runs; ``dtype``: of the rows of a table."""
        entry, wanted = self.entry, self._layout()
        # A loader that keeps parts of a model in float32 may have widened scales: exact, undone here.
        stored = {f".{name}": b.to(wanted[name][1]) for name, b in self._buffers.items()}
        weight = native.from_dict("", stored, *entry.stored)
        if self.is_table:
            return QEmbedding(weight, dtype)
        params = inputs.from_dict("", stored, entry.activation, entry.shape[1])
        return linear_of(weight, self.bias, entry, params)


def _unread(entry: SiteEntry) -> Quantizer:
    """The quantizer of a site before its steps are loaded: buffers on meta."""
    parts = {n: torch.empty(shape, dtype=d, device="meta") for n, (shape, d) in entry.layout().items()}
    return Quantizer(entry.activation, Params(**{"zero": None, **parts}) if parts else None)


def _read(entry: SiteEntry, loaded: Quantizer) -> Quantizer:
    """The quantizer with its steps in their own dtypes again (see ``_Packed.open``)."""
    for name, (_, dtype) in entry.layout().items():
        loaded._buffers[name] = loaded._buffers[name].to(dtype)
    return loaded


def unread_kv(model: nn.Module, kv: KVFormat) -> None:
    """Buffers on meta for the steps of keys and values."""
    from fewbit.nn.kvsteps import attentions, keep

    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    shapes = ((1,) if part.format.block == PerTensor() else (heads, 1, 1) for part in kv.parts())
    pair = tuple(torch.empty(shape, dtype=torch.float32, device="meta") for shape in shapes)
    keep(model, kv, dict.fromkeys(attentions(model, kv).values(), pair))


def attach(model: nn.Module, entries: Mapping[str, Entry], sites: Sequence[SiteEntry] = ()) -> None:
    """Give a model that transformers did not load what ``save_pretrained`` needs to write it natively.

    entries: of every ``QLinear`` and ``QEmbedding`` in the model, by its name there; sites: as placed in it.
    """
    kv = getattr(model, "kv_format", None)
    quantizer = FewbitQuantizer(FewbitConfig(**native.quantization_config(entries, sites, kv)))
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, QUANT_METHOD
    model.config.quantization_config = quantizer.quantization_config


def _finder(model: nn.Module) -> Callable[[str], str]:
    """A module's name in the file -> in the model: the file may lack the base model's prefix, or alone have
    it, or use a name that transformers has given up.
    """
    prefix, modules = f"{model.base_model_prefix}.", dict(model.named_modules())
    rename = module_names(model)

    def find(name: str) -> str:
        found = next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in modules), None)
        found = found or (new if (new := rename(name)) in modules else None)
        if found is None:
            raise InputError(
                f"the checkpoint quantizes {name}, which {type(model).__name__} does not have; load it as "
                "the class that config.json names"
            )
        return found

    return find
