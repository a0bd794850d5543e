"""What readers of a compressed-tensors file do otherwise than its maker meant, in sentences.

Observed with transformers 5.23 and vLLM 0.32; none of it concerns fewbit's own reading.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

import torch

from fewbit.format.activation import Activation
from fewbit.format.block import Block2d, PerTensor
from fewbit.format.format import Format, Zero
from fewbit.grid.integer import Int
from fewbit.io.compressed_args import E4M3
from fewbit.io.compressed_config import scheme
from fewbit.io.parts import plain_steps

# Projections that vLLM fuses into one matrix, which has one scheme.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


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
        if len({json.dumps(scheme(f)) for f in formats.values()}) > 1:
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
    schemes = {m: json.dumps(scheme(f, inputs.get(m))) for m, f in formats.items()}
    for parts in _FUSED:
        for parent in {m.rpartition(".")[0] for m in formats if m.rpartition(".")[2] in parts}:
            if len({schemes.get(m) for m in _under(parent, parts)}) > 1:
                out.append(f"vLLM fuses {', '.join(parts)} of {parent} and needs one format for them")
                break
    return out


def _under(parent: str, parts: Collection[str]) -> list[str]:
    return [f"{parent}.{part}" if parent else part for part in parts]
