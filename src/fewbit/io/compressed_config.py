"""compressed-tensors in config.json: which Formats it holds, how they are written there, how they are read.

Only the grid, the blocks, the zero point and the dtype of the steps go over: how a range was chosen, and
which symmetric divisor, is not recorded there and does not matter for reading. Weights alone: quantized
activations, caches and transforms are refused, not dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping

import torch

from fewbit.errors import InputError
from fewbit.format.activation import Activation
from fewbit.format.block import Block, Block2d, Channel, Group, PerTensor
from fewbit.format.fit import AbsMax, MinMax
from fewbit.format.format import Format, Zero
from fewbit.grid import by_name
from fewbit.grid.floating import Float
from fewbit.grid.integer import Int

QUANT_METHOD = "compressed-tensors"
VERSION = "0.20.0"  # of the layout that is written
PACKED, NAIVE, MIXED = "pack-quantized", "naive-quantized", "mixed-precision"
E4M3 = by_name("e4m3fn")
_STEPS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# Projections that vLLM fuses into one matrix, which has one scheme.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def refusal(format: Format, kind: str = "Linear", activation: Activation | None = None) -> str | None:
    """Why ``format`` cannot be held for the weight of a module of class ``kind``; None when it can.

    ``activation`` is how the module's input is quantized.
    """
    if activation is not None:
        return "quantized inputs are not written there yet"
    if kind != "Linear":
        return f"compressed-tensors describes torch.nn.Linear modules only, and this is a {kind}"
    if format.scale is None:
        return f"compressed-tensors holds no weights without scales, such as plain {format.grid.name}"
    if format.scale.scale is not None or format.scale.grid.name not in _STEPS.values():
        return f"its scales are float32, float16 or bfloat16 there, not {format.scale}"
    if isinstance(format.grid, Int):
        return _refuse_integer(format)
    if format.grid == E4M3:
        if format.zero is not Zero.NONE:
            return "FP8 weights have no zero point there"
        if type(format.block) not in (PerTensor, Channel, Block2d):
            return (
                f"FP8 weights have one scale per tensor, channel or 2-D block there, not per {format.block}"
            )
        return None
    return f"it holds integers of 1 to 8 bits and FP8 E4M3, not {format.grid.name}"


def _refuse_integer(format: Format) -> str | None:
    if type(format.block) not in (Group, Channel):
        return f"integer weights have one scale per group or channel there, not per {format.block}"
    if format.zero not in (Zero.NONE, Zero.INTEGER):
        return f"zero points are integers there, not a {format.zero} zero"
    if format.zero is Zero.NONE and not format.grid.signed:
        return f"unsigned codes without a zero point ({format.grid.name}) have no counterpart there"
    return None


def caveats(formats: Mapping[str, Format], dtype: torch.dtype) -> list[str]:
    """What a reader would do differently with a checkpoint of these modules, whose model is of ``dtype``.

    One sentence each; none of them concerns fewbit's own reading.
    """
    distinct, out = set(formats.values()), []
    model, exact = str(dtype).removeprefix("torch."), (dtype, torch.float16, torch.bfloat16)
    rounded = {f for f in distinct if _steps_dtype(f) not in (exact if dtype == torch.float32 else (dtype,))}
    if rounded:
        others = ", ".join(sorted({str(_steps_dtype(f)).removeprefix("torch.") for f in rounded}))
        readers = (
            "transformers and vLLM round" if any(f.grid != E4M3 for f in rounded) else "transformers rounds"
        )
        out.append(f"{readers} the {others} scales to the model's {model}; use {model} scales")
    if any(f.zero is not Zero.NONE for f in distinct):
        if len({json.dumps(_scheme(f)) for f in distinct}) > 1:
            out.append("transformers 5.23 cannot load several formats when one of them is asymmetric")
        elif any(_steps_dtype(f) != dtype for f in distinct - rounded):
            out.append("transformers 5.23 rounds the decoded asymmetric weights to the dtype of their scales")
    if any(f.grid.bits == 1 for f in distinct):
        out.append("vLLM reads 2 to 8 bits, not 1")
    blocks = {f.block for f in distinct if type(f.block) is Block2d}
    if blocks - {Block2d(128, 128)}:
        out.append("vLLM has kernels for FP8 blocks of 128 x 128 only")
    for parts in _FUSED:
        for parent in {m.rpartition(".")[0] for m in formats if m.rpartition(".")[2] in parts}:
            schemes = {
                json.dumps(_scheme(formats[m]) if m in formats else None) for m in _under(parent, parts)
            }
            if len(schemes) > 1:
                out.append(f"vLLM fuses {', '.join(parts)} of {parent} and needs one format for them")
                break
    return out


def _under(parent: str, parts: Collection[str]) -> list[str]:
    return [f"{parent}.{part}" if parent else part for part in parts]


def _steps_dtype(format: Format) -> torch.dtype:
    return next(dtype for dtype, name in _STEPS.items() if name == format.scale.grid.name)


def quantization_config(formats: Mapping[str, Format], ignore: Collection[str]) -> dict:
    """The ``quantization_config`` of config.json.

    formats: module -> Format of every quantized module; ignore: every other torch.nn.Linear, the output head
    included. One scheme for all becomes the target "Linear"; several name their modules one by one.
    """
    schemes: dict[str, list[str]] = {}
    for module, format in formats.items():
        schemes.setdefault(json.dumps(_scheme(format)), []).append(module)
    groups = {}
    for i, (scheme, modules) in enumerate(schemes.items()):
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(schemes) == 1 else modules,
            **json.loads(scheme),
            "input_activations": None,
            "output_activations": None,
        }
    layouts = {group["format"] for group in groups.values()}
    asymmetric = any(format.zero is not Zero.NONE for format in formats.values())
    return {
        "quant_method": QUANT_METHOD,
        "format": layouts.pop() if len(layouts) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": VERSION,
        # transformers 5.23 loads packed zero points only when it decodes while loading; others ignore this.
        **({"dequantize": True} if asymmetric else {}),
    }


def _scheme(format: Format) -> dict:
    """Layout and ``QuantizationArgs`` of a Format; two Formats with the same scheme share a group."""
    whole = isinstance(format.grid, Int)
    weights = {
        "num_bits": format.grid.bits,
        "type": "int" if whole else "float",
        "symmetric": format.zero is Zero.NONE,
        "dynamic": False,
    }
    match format.block:
        case Group(size):
            weights |= {"strategy": "group", "group_size": size}
        case Block2d(rows, cols):
            weights |= {"strategy": "block", "block_structure": [rows, cols]}
        case Channel():
            weights |= {"strategy": "channel"}
        case _:
            weights |= {"strategy": "tensor"}
    return {"weights": weights, "format": PACKED if whole else NAIVE}


def formats_from_config(config: Mapping, modules: Mapping[str, torch.dtype]) -> dict[str, Format]:
    """Format of each quantized module. modules: name -> dtype of its ``weight_scale`` in the file.

    Raises ``InputError`` for what is not read: quantized activations or caches, and other schemes.
    """
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        if config.get(key):
            raise InputError(
                f"this compressed-tensors checkpoint has a {key}, which is not read; use another one"
            )
    groups = list((config.get("config_groups") or {}).values())
    for group in groups:
        if not isinstance(group, Mapping) or group.get("weights") is None:
            raise InputError(
                "a config group of this compressed-tensors checkpoint describes no weights; it is not read"
            )
        if group.get("input_activations") or group.get("output_activations"):
            raise InputError(
                "this compressed-tensors checkpoint quantizes activations, which are not read; use one with "
                "quantized weights only"
            )
    out = {}
    for module, dtype in modules.items():
        group = next((g for g in groups if any(_matches(module, t) for t in g.get("targets", ()))), None)
        group = group or next((g for g in groups if "Linear" in g.get("targets", ())), None)
        if group is None:
            raise InputError(f"{module} is quantized in this checkpoint but no config group names it")
        out[module] = _format(group, dtype, config)
    return out


def _matches(module: str, target: str) -> bool:
    return bool(re.match(target[3:], module)) if target.startswith("re:") else module == target


def _format(group: Mapping, dtype: torch.dtype, config: Mapping) -> Format:
    weights = group["weights"]
    bits, kind, group_size = weights.get("num_bits", 8), weights.get("type", "int"), weights.get("group_size")
    symmetric = weights.get("symmetric", True)
    strategy = weights.get("strategy") or ("tensor" if group_size is None else "channel")
    block: Block | None = {"channel": Channel(), "tensor": PerTensor()}.get(strategy)
    if group_size and group_size > 0:
        block = Group(group_size)
    if strategy == "block":
        block = Block2d(*weights["block_structure"])
    grid: Int | Float | None = Int(bits) if kind == "int" else E4M3 if bits == 8 else None
    layout = group.get("format") or config.get("format")
    fits = layout == PACKED if kind == "int" else layout in (NAIVE, "float-quantized")
    if grid is None or block is None or dtype not in _STEPS or not fits or weights.get("actorder") == "group":
        raise InputError(
            f"this compressed-tensors checkpoint holds {bits}-bit {kind} weights per {strategy} as {layout}, "
            f"which is not read; read are {PACKED} integers and FP8 weights"
        )
    return Format(
        grid=grid,
        block=block,
        range=AbsMax() if symmetric else MinMax(),
        zero=Zero.NONE if symmetric else Zero.INTEGER,
        scale=Format(grid=by_name(_STEPS[dtype])),
    )
