"""The configuration of the model in a GGUF file, from its metadata and the shapes of its tensors.

``fewbit.io.gguf_meta`` is the way back. Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from collections.abc import Mapping

import numpy as np
import torch

from fewbit.errors import InputError

EMBEDDING = "model.embed_tokens.weight"


def read_config(metadata: Mapping, shapes: Mapping[str, tuple], factors: np.ndarray | None, name: str):
    """The transformers configuration. ``shapes``: of the tensors by Hugging Face name; ``factors`` [d / 2]:
    what rotary frequencies are divided by, where the file has such a table; ``name``: the model's.

    Raises ``InputError`` for missing metadata, for metadata that the tensors contradict (a model of them
    could be of any size), and for rope scalings that are not supported.
    """
    import transformers

    return _Reader(metadata, shapes, factors, name).config(transformers)


def experts_of(metadata: Mapping) -> int:
    """How many experts a block of the file has; 0 in dense models, and where the number is none."""
    count = metadata.get(f"{metadata.get('general.architecture')}.expert_count", 0)
    return count if isinstance(count, int) and count > 0 else 0


class _Reader:
    def __init__(self, metadata: Mapping, shapes: Mapping, factors: np.ndarray | None, name: str):
        self.metadata, self.shapes, self.factors, self.name = metadata, shapes, factors, name
        self.architecture = metadata["general.architecture"]

    def config(self, transformers):
        experts = experts_of(self.metadata)
        kinds = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3moe": "Qwen3Moe"}
        kind = "Mixtral" if self.architecture == "llama" and experts else kinds[self.architecture]
        heads = self._key("attention.head_count")
        hidden = self._key("embedding_length")
        ids = {
            f"{role}_token_id": self.metadata.get(f"tokenizer.ggml.{key}_token_id")
            for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        }
        fields = {
            "vocab_size": self._rows(),
            "hidden_size": hidden,
            "intermediate_size": self._key("feed_forward_length"),
            "num_hidden_layers": self._key("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._key("attention.head_count_kv", heads),
            "max_position_embeddings": self._key("context_length"),
            "rms_norm_eps": _shortest(self._key("attention.layer_norm_rms_epsilon")),
            "rope_parameters": self._rope(),
            "tie_word_embeddings": "lm_head.weight" not in self.shapes,
            "architectures": [f"{kind}ForCausalLM"],
            "dtype": torch.bfloat16,
            **ids,
        }
        if self.architecture != "qwen2":  # Qwen2's heads always divide the hidden size
            rotary = self._key("rope.dimension_count", hidden // heads)
            fields["head_dim"] = self._key("attention.key_length", rotary)
        if experts or self.architecture == "qwen3moe":
            fields |= self._mixture(experts)
        elif self.architecture == "llama":
            fields["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in self.shapes
            fields["mlp_bias"] = "model.layers.0.mlp.up_proj.bias" in self.shapes
        self._check(fields)
        return getattr(transformers, f"{kind}Config")(**fields)

    def _mixture(self, experts: int) -> dict:
        """Fields of a mixture of experts, as llama.cpp computes it: weights of the chosen sum to 1."""
        used = self._key("expert_used_count")
        if not isinstance(used, int) or not 1 <= used <= experts:
            raise InputError(
                f"{self.name} sends a token to {used!r:.20} of {experts} experts; the file is damaged, get "
                "it again."
            )
        if self.architecture == "llama":
            return {"num_local_experts": experts, "num_experts_per_tok": used, "sliding_window": None}
        return {
            "num_experts": experts,
            "num_experts_per_tok": used,
            "moe_intermediate_size": self._key("expert_feed_forward_length"),
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }

    def _check(self, fields: dict) -> None:
        """Sizes against the tensors."""
        layers = {name.split(".")[2] for name in self.shapes if name.startswith("model.layers.")}
        heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
        wide = fields.get("head_dim", hidden // heads)
        for what, said, found in (
            ("blocks", fields["num_hidden_layers"], len(layers)),
            ("columns", hidden, self.shapes[EMBEDDING][-1]),
            (
                "query rows",
                heads * wide,
                self.shapes.get("model.layers.0.self_attn.q_proj.weight", (None,))[0],
            ),
        ):
            if found is not None and said != found:
                raise InputError(
                    f"{self.name} says it has {said} {what} and holds tensors for {found}; the file is "
                    "damaged, get it again."
                )

    def _rows(self) -> int:
        if EMBEDDING not in self.shapes:
            raise InputError(
                f"{self.name} has no tensor token_embd.weight; it is no complete language model."
            )
        return self.shapes[EMBEDDING][0]

    def _key(self, suffix: str, default=None):
        value = self.metadata.get(f"{self.architecture}.{suffix}", default)
        if value is None:
            raise InputError(
                f"{self.name} lacks the metadata {self.architecture}.{suffix}; convert the model again."
            )
        return value

    def _rope(self) -> dict:
        """The rotary parameters: plain, linear, or Llama 3.1's, recognised by its table of factors."""
        theta = float(self._key("rope.freq_base", 10000.0))
        kind = self._key("rope.scaling.type", "none")
        if self.factors is not None:
            return self._llama3_rope(theta)
        if kind == "none":
            return {"rope_type": "default", "rope_theta": theta}
        if kind == "linear":
            return {
                "rope_type": "linear",
                "rope_theta": theta,
                "factor": float(self._key("rope.scaling.factor")),
            }
        raise InputError(
            f"{self.name} uses rope scaling {kind!r:.60}; none, linear and llama3 are supported."
        )

    def _llama3_rope(self, theta: float) -> dict:
        """Llama 3.1's rule, from a table of what each frequency is divided by.

        The divisor is 1 for short waves, ``factor`` for long ones, with a ramp between. The parameters of the
        rule are not in the file: the published ones are tried and must reproduce the table.
        """
        factors = self.factors.astype(np.float64)
        low, high, original, factor = 1.0, 4.0, 8192, float(factors.max())
        turns = original * theta ** (-np.arange(len(factors)) / len(factors)) / (2 * np.pi)
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        if not np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-3):
            raise InputError(
                f"{self.name} has a table of rope factors that is not Llama 3.1's; it is not supported."
            )
        return {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }


def _shortest(number: float) -> float:
    """The decimal that was meant by a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(number)))
