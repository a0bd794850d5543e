"""One tiny checkpoint for each layout, and the mutations that go with it."""

from __future__ import annotations

from pathlib import Path

import torch
from hostile import layouts
from hostile import mutations as m
from hostile.gguf_headers import gguf, links
from hostile.shards import shards
from quantized import int_format, save_quantized
from safetensors.torch import load_file, save_file
from tiny import save_tiny

from fewbit.format import (
    BF16,
    DOUBLE_QUANT,
    E4M3_OVER_FP32,
    FP16,
    FP32,
    Channel,
    Flat,
    Format,
    Group,
    PerTensor,
)
from fewbit.grid import Int, by_name
from fewbit.io.gguf_write import write
from fewbit.io.source import open_source
from fewbit.stream.export import export

E4M3 = by_name("e4m3fn")


def _exported(target: str, fmt: Format, **options):
    def make(folder: Path) -> Path:
        save_quantized("llama", folder / "native", fmt)
        export(folder / "native", target, folder / "q", verify=False, **options)
        return folder / "q"

    return make


def _static(folder: Path) -> Path:
    """FP8 with a step for every input, as engines' own tools write it."""
    made = _exported("compressed-tensors", Format(grid=E4M3, block=Channel(), scale=BF16))(folder)
    weights = load_file(made / m.WEIGHTS)
    steps = {f"{n}.input_scale": torch.ones(1) for n in (k.removesuffix(".weight_scale") for k in weights)}
    weights |= {n: step for n, step in steps.items() if n.replace("input", "weight") in weights}
    save_file(weights, made / m.WEIGHTS, {"format": "pt"})
    args = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    for key, value in (("input_activations", args), ("format", "float-quantized")):
        m.said(layouts.Q, "config_groups", "group_0", key, value=value)(made)
    m.said(layouts.Q, "format", value="float-quantized")(made)
    return made


def _native(folder: Path) -> Path:
    save_quantized("llama", folder, int_format(4, asymmetric=True, scale=FP16))
    return folder


def _plain(folder: Path) -> Path:
    save_tiny("llama", folder)
    return folder


def _sharded(folder: Path) -> Path:
    save_tiny("llama", folder, max_shard_size="250KB")
    return folder


def _gguf(folder: Path) -> Path:
    from fewbit.format import FORMATS as NAMED

    save_quantized("llama", folder / "q", NAMED["q4_1"])
    write(open_source(folder / "q"), folder / "m.gguf")
    return folder / "m.gguf"


def _of(*kinds):
    return lambda: [mutation for kind in kinds for mutation in kind()]


FORMATS = {
    "plain": (_plain, _of(m.safetensors, m.configuration, m.companions)),
    "sharded": (_sharded, _of(shards)),
    "native": (_native, _of(m.safetensors, layouts.native)),
    "compressed-tensors-int": (
        _exported("compressed-tensors", int_format(4, asymmetric=True, scale=FP16)),
        _of(m.safetensors, layouts.compressed_integers),
    ),
    "compressed-tensors-fp8": (
        _static,
        _of(layouts.compressed_floats),
    ),
    "compressed-tensors-nvfp4": (
        _exported("compressed-tensors", Format(grid=by_name("e2m1"), block=Group(16), scale=E4M3_OVER_FP32)),
        _of(layouts.compressed_nvfp4),
    ),
    "gptq": (_exported("gptq", int_format(4, scale=FP16)), _of(m.safetensors, layouts.gptq)),
    "awq": (_exported("awq", int_format(4, asymmetric=True, scale=FP16)), _of(m.safetensors, layouts.awq)),
    "bitsandbytes": (
        _exported("bitsandbytes", Format(grid=by_name("nf4"), block=Flat(64), scale=DOUBLE_QUANT)),
        _of(m.safetensors, layouts.bitsandbytes),
    ),
    "bitsandbytes-int8": (
        _exported("bitsandbytes", Format(grid=Int(8), block=Channel(), scale=FP16)),
        _of(m.safetensors, layouts.bitsandbytes8),
    ),
    "fp8": (
        _exported("fp8", Format(grid=E4M3, block=PerTensor(), scale=FP32), requantize=True),
        _of(m.safetensors, layouts.fp8),
    ),
    "gguf": (_gguf, _of(gguf, links)),
}
