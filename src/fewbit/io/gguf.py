"""GGUF files as a source: dequantized to float32, under the names that Hugging Face checkpoints use.

Each ``read`` takes the bytes of the wanted tensors from the file and decodes them with ``gguf.quants``. Files
of architecture llama hold the rows of the q and k projections interleaved, for llama.cpp's rotary kernel;
``unpermute`` puts them back. The configuration and the tokenizer come from the metadata.

Road not taken: transformers' own GGUF loader, over 30 s for a model of 135 million weights (here 3 s), all of
which are in memory together.
"""

import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from fewbit.errors import InputError
from fewbit.io.base import Source, TensorInfo, content_hash
from fewbit.io.gguf_file import Stored, read_container

ARCHITECTURES = ("llama", "qwen2", "qwen3")
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
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3.1's long-context table, not a parameter of the model


def unpermute(w: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order of a q or k projection.

    ``w`` is ``[heads * head_dim, ...]``. The file holds each head's rows as (0, d/2, 1, d/2 + 1, ...), which
    pairs the two members of a rotation; Hugging Face keeps the two halves apart.
    """
    half = w.shape[0] // heads // 2
    return w.reshape(heads, half, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


class GgufSource(Source):
    """A GGUF file. Tensors carry Hugging Face names and come back dequantized, float32."""

    def __init__(self, path: Path, name: str):
        """Read the header. Raises ``InputError`` for an architecture or tensor that is not supported."""
        self.name = name
        self.path = path
        self.container = read_container(path)
        self.architecture = self.container.metadata.get("general.architecture", "none")
        if self.architecture not in ARCHITECTURES:
            raise InputError(
                f"{name} is a GGUF of architecture {self.architecture!r}; supported are "
                f"{', '.join(ARCHITECTURES)}; give the safetensors checkpoint of this model instead."
            )
        self._stored: dict[str, Stored] = {}
        for gguf_name, stored in self.container.tensors.items():
            if gguf_name != ROPE_FACTORS:
                self._stored[self._hf_name(gguf_name)] = stored

    def _hf_name(self, name: str) -> str:
        if name in OUTER_NAMES:
            return OUTER_NAMES[name]
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        if not match or match[2] not in BLOCK_NAMES:
            raise InputError(
                f"{self.name} holds the tensor {name}, which has no place in a dense {self.architecture} "
                "model; give the safetensors checkpoint instead."
            )
        return f"model.layers.{match[1]}.{BLOCK_NAMES[match[2]]}.{match[3]}"

    def config(self):
        """See :class:`Source`."""
        return self._config

    @cached_property
    def _config(self):
        import transformers

        kind = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[self.architecture]
        heads = self._key("attention.head_count")
        hidden = self._key("embedding_length")
        ids = {
            f"{role}_token_id": self.container.metadata.get(f"tokenizer.ggml.{key}_token_id")
            for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        }
        fields = {
            "vocab_size": self._embedding().shape[0],
            "hidden_size": hidden,
            "intermediate_size": self._key("feed_forward_length"),
            "num_hidden_layers": self._key("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._key("attention.head_count_kv", heads),
            "max_position_embeddings": self._key("context_length"),
            "rms_norm_eps": _shortest(self._key("attention.layer_norm_rms_epsilon")),
            "rope_parameters": self._rope(),
            "tie_word_embeddings": "lm_head.weight" not in self._stored,
            "architectures": [f"{kind}ForCausalLM"],
            "dtype": torch.bfloat16,
            **ids,
        }
        if self.architecture != "qwen2":  # Qwen2's heads always divide the hidden size
            rotary = self._key("rope.dimension_count", hidden // heads)
            fields["head_dim"] = self._key("attention.key_length", rotary)
        if self.architecture == "llama":
            fields["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in self._stored
            fields["mlp_bias"] = "model.layers.0.mlp.up_proj.bias" in self._stored
        return getattr(transformers, f"{kind}Config")(**fields)

    def _embedding(self) -> Stored:
        name = OUTER_NAMES["token_embd.weight"]
        if name not in self._stored:
            raise InputError(
                f"{self.name} has no tensor token_embd.weight; it is no complete language model."
            )
        return self._stored[name]

    def _key(self, suffix: str, default=None):
        value = self.container.metadata.get(f"{self.architecture}.{suffix}", default)
        if value is None:
            raise InputError(
                f"{self.name} lacks the metadata {self.architecture}.{suffix}; convert the model again."
            )
        return value

    def _rope(self) -> dict:
        """The rotary parameters: plain, linear, or Llama 3.1's, recognised by its table of factors."""
        theta = float(self._key("rope.freq_base", 10000.0))
        kind = self._key("rope.scaling.type", "none")
        if ROPE_FACTORS in self.container.tensors:
            return self._llama3_rope(theta)
        if kind == "none":
            return {"rope_type": "default", "rope_theta": theta}
        if kind == "linear":
            return {
                "rope_type": "linear",
                "rope_theta": theta,
                "factor": float(self._key("rope.scaling.factor")),
            }
        raise InputError(f"{self.name} uses rope scaling {kind!r}; none, linear and llama3 are supported.")

    def _llama3_rope(self, theta: float) -> dict:
        """Llama 3.1's rule, from a table of what each frequency is divided by.

        The divisor is 1 for short waves, ``factor`` for long ones, with a ramp between. The parameters of the
        rule are not in the file: the published ones are tried and must reproduce the table.
        """
        factors = self._decode(self.container.tensors[ROPE_FACTORS]).astype(np.float64)
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

    def tokenizer(self):
        """See :class:`Source`. Built from the file's own tokens and merges."""
        from fewbit.io.gguf_tokenizer import build_tokenizer

        return build_tokenizer(self.container.metadata, self.name)

    def tensors(self) -> dict[str, TensorInfo]:
        """See :class:`Source`. Sizes are those of the float32 tensors that ``read`` returns."""
        return {
            name: TensorInfo(shape=s.shape, dtype=torch.float32, nbytes=4 * torch.Size(s.shape).numel())
            for name, s in self._stored.items()
        }

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """See :class:`Source`. Everything is dequantized to float32."""
        result = {}
        for name in names:
            w = self._decode(self._stored[name])
            if self.architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
                heads = self.config().num_attention_heads
                w = unpermute(w, heads if ".q_proj." in name else self.config().num_key_value_heads)
            result[name] = torch.from_numpy(np.ascontiguousarray(w))
        return result

    def _decode(self, stored: Stored) -> np.ndarray:
        """The tensor's float32 values, ``[*stored.shape]``, as owned memory."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        raw = np.fromfile(self.path, dtype=np.uint8, count=stored.nbytes, offset=stored.offset)
        if stored.kind == GGMLQuantizationType.F32:
            return raw.view(np.float32).reshape(stored.shape)
        if stored.kind == GGMLQuantizationType.F16:
            return raw.view(np.float16).astype(np.float32).reshape(stored.shape)
        rows = raw.reshape(*stored.shape[:-1], -1)
        return dequantize(rows, GGMLQuantizationType(stored.kind)).reshape(stored.shape)

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16: the file's own float tensors are few, and what they came from was bfloat16 or wider."""
        return torch.bfloat16

    def companions(self, folder: Path) -> list[str]:
        """See :class:`Source`. All files are made from the metadata."""
        from transformers import GenerationConfig

        config = self.config()
        (folder / "config.json").write_text(config.to_json_string(use_diff=True), encoding="utf-8")
        ids = {role: getattr(config, role) for role in ("bos_token_id", "eos_token_id", "pad_token_id")}
        GenerationConfig(**ids).save_pretrained(folder)
        saved = self.tokenizer().save_pretrained(folder)
        names = {Path(file).name for file in saved if file and Path(file).is_file()}
        return ["config.json", "generation_config.json", *sorted(names)]

    def fingerprint(self) -> str:
        """See :class:`Source`."""
        return content_hash([(self.path.name, self.path, self.container.header)])


def _shortest(number: float) -> float:
    """The decimal that was meant by a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(number)))
