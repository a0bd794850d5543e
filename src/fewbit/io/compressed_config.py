"""compressed-tensors in config.json: which Formats it holds, how they are written there, how they are read.

Weights, and inputs that are quantized per token, group or tensor. What is not held is refused, not dropped:

- ``transform_config``: no reader runs it on every device (a rotation that could be folded needs no entry; one
  at every call is written natively);
- ``kv_cache_scheme``: it stores static steps k_scale and v_scale, and a cache here belongs to a run, not to a
  checkpoint: where its steps are fixed, ``fewbit.nn.kvlayer.calibrate`` finds them when the model is run;
- activation order by ``weight_g_idx``, which the library itself gave up in 0.19. Orders "weight" and "static"
  leave plain groups and are read.

The words of one format are those of ``fewbit.io.compressed_args``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence

import torch

from fewbit.errors import InputError
from fewbit.format.activation import Activation
from fewbit.format.block import Block2d, Channel, Group, PerTensor
from fewbit.format.format import Format, Zero
from fewbit.grid.integer import Int
from fewbit.io.compressed_args import (
    E4M3,
    activation_of,
    args_of,
    format_of,
    layout_of,
    refuse_input,
)
from fewbit.io.parts import plain_steps

QUANT_METHOD = "compressed-tensors"
VERSION = "0.20.0"  # of the layout that is written
MIXED = "mixed-precision"
# Projections that vLLM fuses into one matrix, which has one scheme.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def refusal(format: Format, kind: str = "Linear", activation: Activation | None = None) -> str | None:
    """Why ``format`` cannot be held for the weight of a module of class ``kind``; None when it can.

    ``activation`` is how the module's input is quantized.
    """
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


def caveats(
    formats: Mapping[str, Format], dtype: torch.dtype, inputs: Mapping[str, Activation] | None = None
) -> list[str]:
    """What a reader would do differently with a checkpoint of these modules, whose model is of ``dtype``.

    One sentence each; none of them concerns fewbit's own reading. inputs: module -> how its input is
    quantized.
    """
    inputs = inputs or {}
    distinct, out = {f for f in formats.values() if plain_steps(f) is not None}, []
    model, exact = str(dtype).removeprefix("torch."), (dtype, torch.float16, torch.bfloat16)
    rounded = {f for f in distinct if plain_steps(f) not in (exact if dtype == torch.float32 else (dtype,))}
    if rounded:
        others = ", ".join(sorted({str(plain_steps(f)).removeprefix("torch.") for f in rounded}))
        readers = (
            "transformers and vLLM round" if any(f.grid != E4M3 for f in rounded) else "transformers rounds"
        )
        out.append(f"{readers} the {others} scales to the model's {model}; use {model} scales")
    if any(f.zero is not Zero.NONE for f in distinct):
        if len({json.dumps(_scheme(f)) for f in formats.values()}) > 1:
            out.append("transformers 5.23 cannot load several formats when one of them is asymmetric")
        elif any(plain_steps(f) != dtype for f in distinct - rounded):
            out.append("transformers 5.23 rounds the decoded asymmetric weights to the dtype of their scales")
    if dtype != torch.bfloat16 and any(plain_steps(f) is None for f in formats.values()):
        out.append(f"transformers decodes MX and NVFP4 weights to bfloat16 and fails in a model of {model}")
    if any(f.grid.bits == 1 for f in distinct):
        out.append("vLLM reads 2 to 8 bits, not 1")
    blocks = {f.block for f in distinct if type(f.block) is Block2d}
    if blocks - {Block2d(128, 128)}:
        out.append("vLLM has kernels for FP8 blocks of 128 x 128 only")
    if any(type(a.format.block) is PerTensor and not a.static for a in inputs.values()):
        out.append("vLLM finds steps of inputs per token, not one per call")
    whole = [f for m, f in formats.items() if isinstance(f.grid, Int) and m in inputs]
    if any(f.grid.bits < 8 for f in whole):
        out.append("weights of less than 8 bits take a byte each there when inputs are quantized")
    if any(f.grid.bits not in (4, 8) or f.zero is not Zero.NONE for f in whole):
        out.append("vLLM reads symmetric weights of 4 or 8 bits with int8 inputs")
    schemes = {m: json.dumps(_scheme(f, inputs.get(m))) for m, f in formats.items()}
    for parts in _FUSED:
        for parent in {m.rpartition(".")[0] for m in formats if m.rpartition(".")[2] in parts}:
            if len({schemes.get(m) for m in _under(parent, parts)}) > 1:
                out.append(f"vLLM fuses {', '.join(parts)} of {parent} and needs one format for them")
                break
    return out


def _under(parent: str, parts: Collection[str]) -> list[str]:
    return [f"{parent}.{part}" if parent else part for part in parts]


def quantization_config(
    formats: Mapping[str, Format],
    ignore: Collection[str],
    inputs: Mapping[str, Activation | None] | None = None,
) -> dict:
    """The ``quantization_config`` of config.json.

    formats: module -> Format of every quantized module; ignore: every other torch.nn.Linear, the output head
    included; inputs: module -> how its input is quantized. One scheme for all becomes the target "Linear";
    several name their modules one by one.
    """
    inputs = inputs or {}
    schemes: dict[str, list[str]] = {}
    for module, format in formats.items():
        schemes.setdefault(json.dumps(_scheme(format, inputs.get(module))), []).append(module)
    groups = {}
    for i, (scheme, modules) in enumerate(schemes.items()):
        targets = ["Linear"] if len(schemes) == 1 else modules
        groups[f"group_{i}"] = {"targets": targets, **json.loads(scheme), "output_activations": None}
    layouts = {group["format"] for group in groups.values()}
    asymmetric = any(f.zero is not Zero.NONE and inputs.get(m) is None for m, f in formats.items())
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


def _scheme(format: Format, activation: Activation | None = None) -> dict:
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
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        if config.get(key):
            raise InputError(
                f"this compressed-tensors checkpoint has a {key}, which is not read; use another one"
            )
    groups = list((config.get("config_groups") or {}).values())
    for group in groups:
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise InputError(
                "a config group of this compressed-tensors checkpoint describes no weights; it is not read"
            )
        if group.get("output_activations"):
            raise InputError("this compressed-tensors checkpoint quantizes outputs, which is not read")
    named, patterns = _targets(groups)
    out = {}
    for module, dtype in modules.items():
        group = named.get(module) or next((g for p, g in patterns if p.match(module)), named.get("Linear"))
        if group is None:
            raise InputError(f"{module} is quantized in this checkpoint but no config group names it")
        fmt = _format(group, dtype, config)
        out[module] = fmt, _activation(group, module, fmt, (steps or {}).get(module))
    return out


def _targets(groups: Sequence[Mapping]) -> tuple[dict[str, Mapping], list[tuple[re.Pattern, Mapping]]]:
    """Groups by the modules and classes that they name, and by their patterns.

    A pattern comes from a file, and Python's can take a time exponential in the length of a name: repeated
    groups and more than four open repeats, with which that happens, are refused.
    """
    named, patterns = {}, []
    for group in groups:
        targets = group.get("targets", [])
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise InputError(f"the targets of a config group are {targets!r:.60}, no names; they are broken")
        for target in targets:
            if not target.startswith("re:"):
                named.setdefault(target, group)
                continue
            if re.search(r"[)][*+{]", target) or len(re.findall(r"[*+{]", target)) > 4 or len(target) > 2000:
                raise InputError(
                    f"the pattern {target!r:.60} of this compressed-tensors checkpoint repeats groups, or "
                    "more than four times, which can take forever; name the modules instead"
                )
            patterns.append((re.compile(target[3:]), group))
    if len(patterns) > 256:
        raise InputError(f"this compressed-tensors checkpoint has {len(patterns)} patterns; 256 are read")
    return named, patterns


def _format(group: Mapping, dtype: torch.dtype, config: Mapping) -> Format:
    weights, layout = group["weights"], group.get("format")
    layout = layout or config.get("format")
    found = None if weights.get("actorder") == "group" else format_of(weights, layout, dtype)
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
