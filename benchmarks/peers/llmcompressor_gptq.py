"""llm-compressor's GPTQ, W4A16 group 64 symmetric, in its own environment: python ... MODEL TOKENS.json OUT.

Its defaults otherwise (damping 0.01, static act-order). MODEL is a folder in Hugging Face layout; TOKENS.json
holds the calibration windows as lists of token ids.
"""

import json
import sys

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

if __name__ == "__main__":
    model_path, tokens_path, out = sys.argv[1:4]
    torch.set_num_threads(int(sys.argv[4]) if len(sys.argv) > 4 else 1)
    with open(tokens_path) as f:
        tokens = json.load(f)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    data = Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * len(t) for t in tokens]})
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=64)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=data,
        recipe=recipe,
        max_seq_length=len(tokens[0]),
        num_calibration_samples=len(tokens),
        output_dir=out,
    )
