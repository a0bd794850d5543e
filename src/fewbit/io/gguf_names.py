"""Names of tensors in GGUF files and in Hugging Face checkpoints, both ways.

    blk.3.attn_q.weight          model.layers.3.self_attn.q_proj.weight
    blk.3.ffn_gate_inp.weight    model.layers.3.mlp.gate.weight                      the router of experts
    blk.3.ffn_up_exps.weight     model.layers.3.mlp.experts.7.up_proj.weight  ...    [E, out, in], all of them

A GGUF holds the experts of a block as one tensor for each of their three matrices, one expert after another,
so an expert is a stretch of its bytes. Mixtral is architecture llama there and has names of its own in
checkpoints (block_sparse_moe, w1, w3, w2).

Road not taken: to present fused tensors and have them cut when they are read, as for safetensors. Codes would
be read as a whole for each expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from fewbit.errors import InputError
from fewbit.io.gguf_file import Stored

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe")
OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROUTER = "ffn_gate_inp"
# architecture of a file with experts: their module in checkpoints, and what an expert's matrices are called
MIXTURES = {
    "llama": ("block_sparse_moe", {"ffn_gate_exps": "w1", "ffn_up_exps": "w3", "ffn_down_exps": "w2"}),
    "qwen3moe": (
        "mlp",
        {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"},
    ),
}
_TO_GGUF = {theirs: ours for ours, theirs in OUTER_NAMES.items()}
_IN_BLOCK = {theirs: ours for ours, theirs in BLOCK_NAMES.items()} | {"mlp.gate": ROUTER}
_FUSED = {theirs: ours for _, names in MIXTURES.values() for ours, theirs in names.items()}


def checkpoint_names(
    name: str, stored: Stored, architecture: str, experts: int, file: str
) -> Iterator[tuple[str, Stored]]:
    """(name in a checkpoint, where it lies) of what the tensor ``name`` of ``file`` holds: one, or each of
    ``experts``, 0 in dense models. Raises ``InputError`` for a tensor that has no place there.
    """
    if name in OUTER_NAMES:
        yield OUTER_NAMES[name], stored
        return
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    here = f"model.layers.{match[1]}" if match else ""
    if match and match[2] in BLOCK_NAMES:
        yield f"{here}.{BLOCK_NAMES[match[2]]}.{match[3]}", stored
        return
    module, matrices = MIXTURES[architecture] if experts and architecture in MIXTURES else ("", {})
    if match and module and match[2] == ROUTER:
        yield f"{here}.{module}.gate.{match[3]}", stored
        return
    if not match or match[2] not in matrices or match[3] != "weight":
        kind = f"{architecture} with {experts} experts" if experts else f"dense {architecture}"
        raise InputError(
            f"{file} holds the tensor {name}, which has no place in a {kind} model; give the safetensors "
            "checkpoint instead."
        )
    if len(stored.shape) != 3 or stored.shape[0] != experts:
        raise InputError(
            f"{file} says that it has {experts} experts, and its tensor {name} is of shape "
            f"{list(stored.shape)}; the file is damaged, get it again."
        )
    each = stored.nbytes // experts
    for e in range(experts):
        part = replace(stored, shape=stored.shape[1:], offset=stored.offset + e * each, nbytes=each)
        yield f"{here}.{module}.experts.{e}.{matrices[match[2]]}.weight", part


def gguf_name(parameter: str) -> tuple[str, int | None]:
    """The tensor of a GGUF that holds ``parameter`` of a model, and as which expert's part of it.

    Raises ``InputError`` where a GGUF has no place for it.
    """
    if parameter in _TO_GGUF:
        return _TO_GGUF[parameter], None
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", parameter)
    expert = re.fullmatch(r"mlp\.experts\.(\d+)\.(\w+)", match[2]) if match else None
    if expert and expert[2] in _FUSED and match[3] == "weight":
        return f"blk.{match[1]}.{_FUSED[expert[2]]}.weight", int(expert[1])
    if not match or match[2] not in _IN_BLOCK:
        raise InputError(
            f"a GGUF has no place for the tensor {parameter}; export the model to another format"
        )
    return f"blk.{match[1]}.{_IN_BLOCK[match[2]]}.{match[3]}", None


def is_router(parameter: str) -> bool:
    """Whether a parameter of a model is a router's, which llama.cpp wants in float32."""
    return parameter.endswith(".mlp.gate.weight")
