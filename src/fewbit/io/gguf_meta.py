"""What a GGUF says of a model's shape: metadata of a transformers configuration.

The keys are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, which ``GgufSource`` reads
back. llama.cpp computes one function per architecture, so a configuration that asks for anything else
(another activation, a partly rotated head, a scaling of positions that has no key) is refused: the file would
load and talk noise.
"""

import math
from pathlib import Path

import numpy as np

from fewbit.errors import InputError
from fewbit.io.gguf import ROPE_FACTORS

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
}


def model_metadata(config, name: str) -> dict[str, str | int | float]:
    """Metadata keys and values of a transformers configuration; ``name`` is the model's.

    Raises ``InputError`` for a model that llama.cpp's architectures do not compute.
    """
    arch = ARCHITECTURES.get(config.model_type)
    if arch is None:
        raise InputError(
            f"{name} is of architecture {config.model_type}, and GGUF files are written for "
            f"{', '.join(ARCHITECTURES)}; export it to another format"
        )
    rope = config.rope_parameters or {}
    heads, hidden = config.num_attention_heads, config.hidden_size
    wide = getattr(config, "head_dim", None) or hidden // heads
    kinds = set(getattr(config, "layer_types", None) or ())
    for wrong, what in (
        (config.hidden_act != "silu", f"the activation {config.hidden_act}"),
        (rope.get("rope_type", "default") not in ("default", "linear", "llama3"), f"positions by {rope}"),
        (rope.get("partial_rotary_factor", 1.0) != 1, "heads that are rotated in part"),
        (len(kinds) > 1, "layers of several kinds of attention"),
        *_strange_mixture(config),
    ):
        if wrong:
            raise InputError(
                f"{name} has {what}, which llama.cpp's {arch} does not; export it to another format"
            )
    # llama.cpp attends to everything there, which is the same as far as a window reaches
    window = None if kinds == {"full_attention"} else getattr(config, "sliding_window", None)
    own = {
        "vocab_size": config.vocab_size,
        "context_length": min(config.max_position_embeddings, window or config.max_position_embeddings),
        "embedding_length": hidden,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": wide,
        "attention.value_length": wide,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": wide,
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
    }
    if experts := getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        own |= {"expert_count": experts, "expert_used_count": config.num_experts_per_tok}
    if arch == "qwen3moe":
        own["expert_feed_forward_length"] = config.moe_intermediate_size
    if rope.get("rope_type") == "linear":
        own |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    title = Path(getattr(config, "_name_or_path", "") or name).name
    ours = {"general.architecture": arch, "general.type": "model", "general.name": title}
    return ours | {f"{arch}.{key}": value for key, value in own.items()}


def _strange_mixture(config) -> tuple[tuple[bool, str], ...]:
    """What a mixture could ask for and llama.cpp does not compute: (whether it does, the words)."""
    if config.model_type != "qwen3_moe":
        return ()
    dense = bool(config.mlp_only_layers) or config.decoder_sparse_step != 1
    return (
        (not config.norm_topk_prob, "experts whose weights do not sum to 1 (norm_topk_prob is false)"),
        (dense, "blocks without experts among those with them"),
    )


def rope_factors(config) -> dict[str, np.ndarray]:
    """Llama 3.1's table: what each rotary frequency is divided by, [head_dim / 2] float32; empty without.

    1 for waves shorter than the original context / high_freq_factor, ``factor`` for those longer than it /
    low_freq_factor, and a ramp between.
    """
    rope = config.rope_parameters or {}
    if rope.get("rope_type") != "llama3":
        return {}
    n = (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) // 2
    turns = (
        rope["original_max_position_embeddings"] * rope["rope_theta"] ** (-np.arange(n) / n) / (2 * math.pi)
    )
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    ramp = np.clip((turns - low) / (high - low), 0, 1)
    return {ROPE_FACTORS: (1 / ((1 - ramp) / rope["factor"] + ramp)).astype(np.float32)}
