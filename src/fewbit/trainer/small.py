"""A Llama small enough to train from nothing in minutes on two cores, and its tokenizer of bytes.

1.84 million parameters: 2 blocks of width 256 (4 heads, FFN 768), 256 tokens, one for each byte of UTF-8. No
vocabulary file, no download, and every width is a multiple of 128, so that all block formats divide it.

Road not taken: a trained vocabulary. It halves the windows and doubles the parameters, most of them in
tables that no quantized product reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

NAME = "tiny-llama"
CONTEXT = 512


def small_llama(seed: int = 0, blocks: int = 2) -> nn.Module:
    """The untrained model, float32, in training mode. The global generator stays as it is."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {
        "vocab_size": 256,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**config)).float().train()


def byte_tokenizer() -> Any:
    """A transformers tokenizer with a token for every byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=CONTEXT, clean_up_tokenization_spaces=False
    )
