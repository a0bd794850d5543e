"""compressed-tensors in config.json: which Formats it holds, how they are written there, how they are read.

Weights, and inputs that are quantized per token, group or tensor; ``transform_config``, maps that run at
every call (``fewbit.io.compressed_maps``); ``kv_cache_scheme``, fixed steps of keys and values
(``fewbit.io.compressed_kv``). Activation order is ``actorder: group`` with a ``weight_g_idx`` per module,
which the library itself gave up in 0.19; its orders "weight" and "static" leave plain groups. What is not
held is refused, not dropped.

The words of one format are those of ``fewbit.io.compressed_args``.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

import torch

from fewbit.errors import InputError
from fewbit.format.activation import Activation
from fewbit.format.block import Block2d, Channel, Group, PerTensor
from fewbit.format.format import Format, Zero
from fewbit.grid.integer import Int
from fewbit.io import compressed_kv, compressed_maps
from fewbit.io.compressed_args import (
    E4M3,
    PACKED,
    activation_of,
    args_of,
    format_of,
    layout_of,
    refuse_input,
)
from fewbit.io.compressed_targets import targets
from fewbit.io.parts import plain_steps
from fewbit.nn.kvcache import KVFormat
from fewbit.transform import Map

QUANT_METHOD = "compressed-tensors"
VERSION = "0.20.0"  # of the layout that is written
MIXED = "mixed-precision"


def refusal(
    format: Format, kind: str = "Linear", activation: Activation | None = None, *, ordered: bool = False
) -> str | None:
    """Why ``format`` cannot be held for the weight of a module of class ``kind``; None when it can.

    ``activation`` is how the module's input is quantized; ordered: whether its columns are grouped in another
    order.
    """
    if ordered and (layout_of(format, activation) != PACKED or type(format.block) is not Group):
        return "columns in another order (act-order) go with packed integers in groups and float inputs there"
    if kind != "Linear":
        return f"compressed-tensors describes torch.nn.Linear modules only, and this is a {kind}"
    if format.scale is None:
        return f"compressed-tensors holds no weights without scales, such as plain {format.grid.name}"
    why = _refuse_weight(format, activation)
    return why or (None if activation is None else refuse_input(format, activation))


def _refuse_weight(format: Format, activation: Activation | None) -> str | None:
    layout = layout_of(format)
    if layout is not None and plain_steps(format) is None:
        return None if format.zero is Zero.NONE else "MX and NVFP4 weights have no zero point there"
    if isinstance(format.grid, Int) or format.grid == E4M3:
        if layout is None:
            return f"its scales are float32, float16 or bfloat16 there, not {format.scale}"
        return _refuse_integer(format, activation) if isinstance(format.grid, Int) else _refuse_fp8(format)
    held = "integers of 1 to 8 bits, FP8 E4M3, NVFP4, MXFP4, MXFP6 (E2M3) and MXFP8 (E4M3)"
    return f"it holds {held}, not {format}"


def _refuse_fp8(format: Format) -> str | None:
    if format.zero is not Zero.NONE:
        return "FP8 weights have no zero point there"
    if type(format.block) not in (PerTensor, Channel, Block2d):
        return f"FP8 weights have one scale per tensor, channel or 2-D block there, not per {format.block}"
    return None


def _refuse_integer(format: Format, activation: Activation | None) -> str | None:
    whole = activation is not None and type(format.block) is PerTensor
    if type(format.block) not in (Group, Channel) and not whole:
        return f"integer weights have one scale per group or channel there, not per {format.block}"
    if format.zero not in (Zero.NONE, Zero.INTEGER):
        return f"zero points are integers there, not a {format.zero} zero"
    if format.zero is Zero.NONE and not format.grid.signed:
        return f"unsigned codes without a zero point ({format.grid.name}) have no counterpart there"
    return None


def quantization_config(
    formats: Mapping[str, Format],
    ignore: Collection[str],
    inputs: Mapping[str, Activation | None] | None = None,
    *,
    ordered: Collection[str] = (),
    maps: Mapping[str, Map | None] | None = None,
    kv: KVFormat | None = None,
) -> dict:
    """The ``quantization_config`` of config.json.

    formats: module -> Format of every quantized module; ignore: every other torch.nn.Linear, the output head
    included; inputs: module -> how its input is quantized; ordered: modules whose columns are grouped in
    another order; maps: module -> what its input goes through at every call; kv: of keys and values. One
    scheme for all becomes the target "Linear"; several name their modules one by one.
    """
    inputs = inputs or {}
    schemes: dict[str, list[str]] = {}
    for module, format in formats.items():
        own = scheme(format, inputs.get(module))
        if module in ordered:
            own["weights"] |= {"actorder": "group"}
        schemes.setdefault(json.dumps(own), []).append(module)
    groups = {}
    for i, (text, modules) in enumerate(schemes.items()):
        named = ["Linear"] if len(schemes) == 1 else modules
        groups[f"group_{i}"] = {"targets": named, **json.loads(text), "output_activations": None}
    layouts = {group["format"] for group in groups.values()}
    asymmetric = any(f.zero is not Zero.NONE and inputs.get(m) is None for m, f in formats.items())
    return {
        "quant_method": QUANT_METHOD,
        "format": layouts.pop() if len(layouts) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignore),
        "kv_cache_scheme": None if kv is None else compressed_kv.to_config(kv),
        "global_compression_ratio": None,
        "version": VERSION,
        # transformers 5.23 loads packed zero points only when it decodes while loading; others ignore this.
        **({"dequantize": True} if asymmetric else {}),
        **compressed_maps.to_config(maps or {}),
    }


def scheme(format: Format, activation: Activation | None = None) -> dict:
    """Layout and ``QuantizationArgs`` of a Format; two Formats with the same scheme share a group."""
    given = None if activation is None else args_of(activation.format, dynamic=not activation.static)
    if activation is not None and activation.local:
        given |= {"dynamic": "local"}
    return {
        "weights": args_of(format),
        "input_activations": given,
        "format": layout_of(format, activation),
    }


def formats_from_config(config: Mapping, modules: Mapping[str, torch.dtype]) -> dict[str, Format]:
    """Format of each quantized module, see ``schemes_from_config``."""
    return {m: fmt for m, (fmt, _) in schemes_from_config(config, modules).items()}


def schemes_from_config(
    config: Mapping, modules: Mapping[str, torch.dtype], steps: Mapping[str, torch.dtype] | None = None
) -> dict[str, tuple[Format, Activation | None]]:
    """Format and Activation of each quantized module.

    modules: name -> dtype of its ``weight_scale`` in the file; steps: name -> dtype of its ``input_scale``.
    Raises ``InputError`` for what is not read.
    """
    if config.get("sparsity_config"):
        raise InputError(
            "this compressed-tensors checkpoint has a sparsity_config, which is not read; use another one"
        )
    groups = list((config.get("config_groups") or {}).values())
    for group in groups:
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise InputError(
                "a config group of this compressed-tensors checkpoint describes no weights; it is not read"
            )
        if group.get("output_activations"):
            raise InputError("this compressed-tensors checkpoint quantizes outputs, which is not read")
    find = targets(groups)
    out = {}
    for module, dtype in modules.items():
        group = find(module)
        if group is None:
            raise InputError(f"{module} is quantized in this checkpoint but no config group names it")
        fmt = _format(group, dtype, config)
        out[module] = fmt, _activation(group, module, fmt, (steps or {}).get(module))
    return out


def _format(group: Mapping, dtype: torch.dtype, config: Mapping) -> Format:
    weights, layout = group["weights"], group.get("format")
    layout = layout or config.get("format")
    found = format_of(weights, layout, dtype)
    if weights.get("actorder") == "group" and (layout != PACKED or group.get("input_activations")):
        found = None
    if found is None:
        size = weights.get("group_size")
        strategy = weights.get("strategy") or ("tensor" if size is None else "channel")
        raise InputError(
            f"this compressed-tensors checkpoint holds {weights.get('num_bits', 8)!r:.20}-bit "
            f"{weights.get('type', 'int')!s:.20} weights per {strategy!s:.20} as {layout!s:.40} (actorder "
            f"{weights.get('actorder')!s:.20}), which is not read; docs/checkpoints.md lists what is"
        )
    return found


def _activation(group: Mapping, module: str, format: Format, steps: torch.dtype | None) -> Activation | None:
    args = group.get("input_activations")
    if not args:
        return None
    found = activation_of(args, steps)
    why = "their words are not known here" if found is None else refuse_input(format, found)
    if why:
        raise InputError(
            f"this compressed-tensors checkpoint quantizes the input of {module} to "
            f"{args.get('num_bits', 8)!r:.20}-bit {args.get('type', 'int')!s:.20} per "
            f"{args.get('strategy')!s:.20} (dynamic {args.get('dynamic', False)!s:.20}), "
            f"which is not read: {why}"
        )
    return found
