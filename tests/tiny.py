"""Tiny random language models, and a byte-level tokenizer they share: plain ones, mixtures of experts, and
models that see images as well.

Every dimension of a linear is a multiple of 32, so that the usual groups and blocks divide; the weights are
seeded, so two processes build the same model. The models come out in evaluation mode and float32.
"""

from pathlib import Path

import torch

VOCAB = 288
HIDDEN = 64
FFN = 128
LAYERS = 2
HEADS = 4
KV_HEADS = 2
CONTEXT = 128

ARCHITECTURES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma3",
    "phi3",
    "gpt2",
    "opt",
    "gpt_neox",
    "falcon",
    "bert",
)

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss")
VISION = ("llava", "qwen2_vl", "gemma3_vl")
EXPERTS = 4

SPECIAL = ("<|endoftext|>", "<|pad|>", "<|mask|>", "<|unk|>")
_MERGED = """
Ġ t|h e|Ġt he|i n|e r|Ġ a|r e|o n|e s|o r|Ġ o|Ġ w|a n|a t|e n|e d|i s|i t|Ġ b|Ġ f|Ġ c|in g|o u|a l|Ġ m
"""
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def _config(arch: str):
    """The transformers config of the tiny model of ``arch``, and the model class."""
    import transformers as hf

    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    modern = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": CONTEXT,
        **ids,
    }
    untied = {**modern, "tie_word_embeddings": False}
    match arch:
        case "llama":
            return hf.LlamaConfig(**{**modern, "tie_word_embeddings": True}), hf.LlamaForCausalLM
        case "mistral":
            return hf.MistralConfig(**untied, sliding_window=16), hf.MistralForCausalLM
        case "qwen2":
            return hf.Qwen2Config(**{**modern, "tie_word_embeddings": True}), hf.Qwen2ForCausalLM
        case "qwen3":
            return hf.Qwen3Config(**untied, head_dim=32), hf.Qwen3ForCausalLM
        case "gemma3":
            # Three layers: a sliding, a full, a sliding one; two rotary tables.
            kinds = ["sliding_attention", "full_attention", "sliding_attention"]
            own = {"num_hidden_layers": 3, "head_dim": 32, "sliding_window": 16, "layer_types": kinds}
            return hf.Gemma3TextConfig(**{**modern, **own}), hf.Gemma3ForCausalLM
        case "phi3":
            return hf.Phi3Config(**untied), hf.Phi3ForCausalLM
        case "gpt2":
            own = {
                "n_embd": HIDDEN,
                "n_inner": FFN,
                "n_layer": LAYERS,
                "n_head": HEADS,
                "n_positions": CONTEXT,
            }
            return hf.GPT2Config(vocab_size=VOCAB, **own, **ids), hf.GPT2LMHeadModel
        case "opt":
            own = {"ffn_dim": FFN, "word_embed_proj_dim": HIDDEN}
            drop = ("intermediate_size", "num_key_value_heads")
            return hf.OPTConfig(
                **{k: v for k, v in modern.items() if k not in drop}, **own
            ), hf.OPTForCausalLM
        case "gpt_neox":
            drop = ("num_key_value_heads",)
            return hf.GPTNeoXConfig(
                **{k: v for k, v in untied.items() if k not in drop}
            ), hf.GPTNeoXForCausalLM
        case "falcon":
            own = {
                "ffn_hidden_size": FFN,
                "new_decoder_architecture": True,
                "num_kv_heads": KV_HEADS,
                "alibi": False,
            }
            drop = ("intermediate_size", "num_key_value_heads")
            return hf.FalconConfig(
                **{k: v for k, v in modern.items() if k not in drop}, **own
            ), hf.FalconForCausalLM
        case "bert":
            drop = ("num_key_value_heads",)
            return hf.BertConfig(**{k: v for k, v in modern.items() if k not in drop}), hf.BertForMaskedLM
    mixture = {**untied, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    match arch:
        case "mixtral":
            return hf.MixtralConfig(**mixture, num_local_experts=EXPERTS), hf.MixtralForCausalLM
        case "qwen2_moe":
            own = {"num_experts": EXPERTS, "shared_expert_intermediate_size": 64}
            return hf.Qwen2MoeConfig(**mixture, **own), hf.Qwen2MoeForCausalLM
        case "qwen3_moe":
            return hf.Qwen3MoeConfig(**mixture, num_experts=EXPERTS, head_dim=32), hf.Qwen3MoeForCausalLM
        case "deepseek_v3":  # a dense block, then one with experts
            own = {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "n_group": 2, "topk_group": 1}
            own |= {"first_k_dense_replace": 1, "kv_lora_rank": 32, "q_lora_rank": 32, "v_head_dim": 32}
            own |= {"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "num_key_value_heads": HEADS}
            return hf.DeepseekV3Config(**{**mixture, **own}), hf.DeepseekV3ForCausalLM
        case "gpt_oss":  # stores its experts fused, transposed, gate and up interleaved, with biases
            own = {"num_local_experts": EXPERTS, "head_dim": 32, "sliding_window": 16}
            return hf.GptOssConfig(**mixture, **own), hf.GptOssForCausalLM
    sight = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,  # more blocks than the text has
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    match arch:
        case "llava":
            own = {"vision_config": hf.CLIPVisionConfig(**sight), "text_config": hf.LlamaConfig(**untied)}
            return hf.LlavaConfig(**own, image_token_index=5), hf.LlavaForConditionalGeneration
        case "qwen2_vl":
            rope = {"rope_type": "default", "mrope_section": [2, 3, 3]}
            text = {**untied, "rope_scaling": rope, "rope_parameters": {**rope, "rope_theta": 1e4}}
            look = {"depth": 3, "embed_dim": 32, "hidden_size": HIDDEN, "num_heads": 2, "patch_size": 8}
            ids = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7}
            own = {"text_config": text, "vision_config": look, "tie_word_embeddings": False}
            return hf.Qwen2VLConfig(**own, **ids), hf.Qwen2VLForConditionalGeneration
        case "gemma3_vl":
            text = {**modern, "head_dim": 32, "sliding_window": 16}
            own = {"vision_config": sight, "text_config": text, "mm_tokens_per_image": 4}
            return hf.Gemma3Config(**own, image_token_index=5), hf.Gemma3ForConditionalGeneration
    known = ", ".join((*ARCHITECTURES, *MIXTURES, *VISION))
    raise ValueError(f"no tiny model of architecture {arch!r}; there are: {known}")


def tiny(arch: str) -> torch.nn.Module:
    """The tiny random model of ``arch`` (one of ``ARCHITECTURES``): float32, eval mode, seeded weights.

    Weights are wider than the usual 0.02 so that logits differ from token to token; norms and biases are
    moved off one and zero so that a lost or swapped one shows. The global random state is left as it was.
    """
    config, cls = _config(arch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20)
        model = cls(config).float().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(3) if p.ndim > 1 else p.add_(0.1 * torch.randn_like(p))
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.copy_(0.1 * torch.randn_like(buffer))
        embedding = model.get_input_embeddings()
        if embedding.padding_idx is not None:
            with torch.no_grad():
                embedding.weight[embedding.padding_idx] = 0
    return model


def tiny_tokenizer():
    """A byte-level BPE of ``VOCAB`` entries (bytes, 25 merges, special, fillers): any text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [tuple(pair.split(" ")) for pair in _MERGED.strip().split("|")]
    pieces += [a + b for a, b in merges]
    pieces += [f"<|extra_{i}|>" for i in range(VOCAB - len(pieces))]
    core = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[1],
        mask_token=SPECIAL[2],
        unk_token=SPECIAL[3],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_ids(batch: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    """Random token ids ``[batch, length]`` (int64) without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL), VOCAB, (batch, length), generator=generator)


def save_tiny(arch: str, folder: str | Path, max_shard_size: str = "5GB") -> torch.nn.Module:
    """Save the tiny model of ``arch`` with its tokenizer as a checkpoint folder; return the model.

    ``max_shard_size="50KB"`` makes several shards with an index.
    """
    model = tiny(arch)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return model


class Folders:
    """Tiny models in folders under ``root``, each saved when it is first asked for: ``folders / "llama"``."""

    def __init__(self, root: Path):
        self.root = root

    def __truediv__(self, arch: str) -> Path:
        folder = self.root / arch
        if not folder.exists():
            save_tiny(arch, folder)
        return folder
