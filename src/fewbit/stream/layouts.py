"""Which layout holds which weight: the plan of an export, its refusals, what readers of it do otherwise.

A layout is a codec of ``fewbit.io.checkpoint``. A layer is held as it is, or refused with the reason, or,
where that is allowed, rounded to the nearest format of the layout. GPTQ, AWQ and bitsandbytes files have one
format for all modules; their codecs refuse several.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from fewbit.errors import InputError
from fewbit.format.block import Block2d
from fewbit.format.format import Format
from fewbit.io import (
    awq,
    bitsandbytes,
    compressed_kv,
    compressed_maps,
    compressed_tensors,
    fp8,
    gptq,
    kv,
    native,
)
from fewbit.io.compressed_config import refusal
from fewbit.io.native import Entry
from fewbit.io.source import Source
from fewbit.nn.kvcache import KVFormat

LAYOUTS = {
    "native": native,
    "compressed-tensors": compressed_tensors,
    "gptq": gptq.V1,
    "gptq_v2": gptq.V2,
    "awq": awq,
    "bitsandbytes": bitsandbytes,
    "fp8": fp8,
}
GGUF = "gguf"
TARGETS = (*LAYOUTS, GGUF)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A quantized module on its way. entry: as the source has it; to: as the target will; why: for what
    reason it is rounded again, or ""; error: |W' - W|^2 / |W|^2 of that; change: |W' - W| / |W| by its steps'
    dtype; zeros: steps of 0.
    """

    name: str
    entry: Entry
    to: Entry
    why: str = ""
    error: float = 0.0
    change: float = 0.0
    zeros: int = 0


def plan_layers(source: Source, codec, kinds: Mapping[str, str], requantize: bool) -> dict[str, Layer]:
    """Every quantized linear with the Entry it will have. kinds: class of each linear, by stored name.

    A table (an embedding) is kept in float by other layouts, since they hold linears only.
    """
    layers, refused = {}, None
    for name, entry in source.entries.items():
        if codec is native:
            layers[name] = Layer(name=name, entry=entry, to=entry)
            continue
        if name not in kinds:
            continue
        why = _refusal(codec, entry)
        fixed = bool(entry.transposed or entry.online or entry.output)
        if why and (fixed or not requantize):
            refused = refused or (name, why, fixed)
            continue
        to = replace(entry, format=codec.stored_format(entry.format)) if not why else _nearest(codec, entry)
        layers[name] = Layer(name=name, entry=entry, to=to, why=why or "")
    if getattr(source, "sites", ()) and codec is not native:
        refused = refused or ("the model", "quantizers of sums and outputs have no place there", True)
    if refused:
        name, why, fixed = refused
        allow = "" if fixed else ", or allow a second rounding with --requantize"
        raise InputError(f"{name} cannot be exported as it is: {why}; choose another layout{allow}")
    return _alike(codec, layers) if requantize and codec is not native else layers


def _refusal(codec, entry: Entry) -> str | None:
    if entry.transposed:
        return "its weight is stored [in, out] (Conv1D), which the layout does not describe"
    if entry.apart is not None:
        return "columns of it are kept in float"
    if codec is compressed_tensors:
        maps = compressed_maps.refusal(entry.online, entry.output)
        return maps or refusal(entry.format, activation=entry.activation, ordered=entry.ordered)
    if entry.online is not None or entry.output is not None:
        return "it takes a map of its input or output at every call"
    if entry.ordered and not isinstance(codec, gptq.Gptq):
        return "its columns are grouped in another order (act-order)"
    return codec.holds(entry.format, entry.shape, entry.activation)


def _nearest(codec, entry: Entry) -> Entry:
    """The entry of a weight that will be rounded again; its input stays as it was if the layout has that."""
    fmt = codec.nearest(entry.format, entry.shape)
    keep = entry.activation is None or codec.holds(fmt, entry.shape, entry.activation) is None
    why = codec.holds(fmt, entry.shape)
    if why:
        raise InputError(f"a weight of shape {list(entry.shape)} fits no format of this layout: {why}")
    return Entry(format=fmt, shape=entry.shape, activation=entry.activation if keep else None)


def _alike(codec, layers: dict[str, Layer]) -> dict[str, Layer]:
    """Where a layout has one format for all modules: the rest is rounded to that of most weights."""
    if codec is compressed_tensors or codec is fp8:
        return layers
    count: dict[Format, int] = {}
    for layer in layers.values():
        count[layer.to.format] = count.get(layer.to.format, 0) + layer.to.shape[0] * layer.to.shape[1]
    most = max(count, key=count.get)
    out = {}
    for name, layer in layers.items():
        if layer.to.format != most:
            most.check(layer.to.shape, name)
            to = Entry(format=most, shape=layer.to.shape, activation=layer.to.activation)
            layer = replace(layer, to=to, why=layer.why or "one format serves all modules there")
        out[name] = layer
    return out


def kv_held(target: str, source: Source) -> KVFormat | None:
    """How keys and values are stored, where the source says so and the layout holds it.

    Raises ``InputError`` for a kind that compressed-tensors has no words for.
    """
    held = getattr(source, "kv", None)
    why = None if held is None else compressed_kv.refusal(held)
    if why is not None and target == "compressed-tensors":
        raise InputError(f"the KV cache of {source.name} cannot be exported: {why}; choose another layout")
    return held if target in ("native", "compressed-tensors") else None


def configuration(target: str, layers: Mapping[str, Layer], left: Iterable[str], source: Source) -> dict:
    """The ``quantization_config`` of config.json."""
    entries, left = {name: layer.to for name, layer in layers.items()}, list(left)
    if not entries:
        raise InputError(f"{source.name} holds no quantized linear layer; there is nothing to export")
    if target == "native":
        return native.quantization_config(entries, getattr(source, "sites", ()), kv_held(target, source))
    if target == "compressed-tensors":
        formats, given, maps = (
            {name: getattr(e, key) for name, e in entries.items()}
            for key in ("format", "activation", "online")
        )
        ordered = [name for name, e in entries.items() if e.ordered]
        return compressed_tensors.quantization_config(
            formats, left, given, ordered=ordered, maps=maps, kv=kv_held(target, source)
        )
    return LAYOUTS[target].quantization_config(entries, left)


def besides(target: str, layers: Mapping[str, Layer], source: Source) -> dict[str, torch.Tensor]:
    """Tensors of maps that run at every call, and steps of keys and values, where the layout stores them."""
    steps = {} if kv_held(target, source) is None else kv.to_dict(source.read_kv())
    maps = {name: layer.to.online for name, layer in layers.items()}
    return steps | (compressed_maps.to_dict(maps, source.dtype) if target == "compressed-tensors" else {})


def beyond(layers: Mapping[str, Layer]) -> list[str]:
    """What the transformers and vLLM of today do not do of a compressed-tensors file."""
    out = []
    if any(layer.to.ordered for layer in layers.values()):
        out.append("compressed-tensors 0.19 gave up columns in another order (actorder), and vLLM 0.32 too")
    if any(layer.to.online is not None for layer in layers.values()):
        out.append("transformers 5.23 ignores transform_config and computes another model; vLLM runs it")
    return out


def caveats(target: str, layers: Mapping[str, Layer], source: Source) -> list[str]:
    """What readers of the file do that the source did not."""
    kept = {name: layer.to.activation for name, layer in layers.items()}
    lost = [n for n, x in layers.items() if x.entry.activation is not None and kept[n] is None]
    out = [f"{len(lost)} layers no longer round their inputs"] if lost else []
    zeros = {n: x.zeros for n, x in layers.items() if x.zeros}
    if zeros:
        out.append(f"{sum(zeros.values())} steps are 0, their blocks too, first in {next(iter(zeros))}")
    if getattr(source, "kv", None) is not None and kv_held(target, source) is None:
        out.append(kv.LEFT_BEHIND)
    new = any(a is None for a in kept.values())
    if target == "compressed-tensors":
        given = {n: a for n, a in kept.items() if a is not None}
        out += compressed_tensors.caveats({n: x.to.format for n, x in layers.items()}, source.dtype, given)
        asymmetric = any(x.to.format.zero == "integer" and n not in given for n, x in layers.items())
        out += beyond(layers) + compressed_kv.caveats(getattr(source, "kv", None), asymmetric)
    elif target == "fp8" and new:
        out.append("engines round the inputs of FP8 files to e4m3 per group of 128; the source did not")
    elif target == "bitsandbytes" and new and any(x.to.format.grid.name == "int8" for x in layers.values()):
        out.append("bitsandbytes rounds the inputs of int8 weights to int8; the source did not")
    elif target == "gptq" and any(x.to.format.zero == "integer" for x in layers.values()):
        out.append(
            "vLLM reads GPTQ files of symmetric weights only; compressed-tensors holds asymmetric ones"
        )
    tiled = {n: x.to for n, x in layers.items() if isinstance(x.to.format.block, Block2d)}
    ragged = (n for n, to in tiled.items() if any(side % 128 for side in to.shape))
    if target == "fp8" and (name := next(ragged, None)):
        out.append(f"tiles of 128 x 128 do not divide {name}, and transformers decodes such only on a GPU")
    return out
