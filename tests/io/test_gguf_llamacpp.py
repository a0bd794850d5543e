"""Claim: llama.cpp's own reader loads our files and goes on as our dequantized model does, token by token.

llama.cpp unpacks the weights to float32 here, because with quantized weights it rounds the inputs of linears
to 8 bits, which is its arithmetic and not the file's (benchmarks/results/gguf_llamacpp.md has both).
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fewbit
from fewbit.io.gguf_write import write
from fewbit.io.source import open_source
from fewbit.recipe import named

CLIENT = Path(__file__).parents[2] / "benchmarks" / "llamacpp_client.py"
TEXTS = ("The capital of France is", "Once upon a time, there was")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="needs llama.cpp: pip install llama-cpp-python"
)
@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_1"])
def test_twenty_greedy_tokens(name, tmp_path):
    fewbit.quantize("smollm2", named("rtn", {"format": name}), output=tmp_path / "q")
    write(open_source(tmp_path / "q"), tmp_path / "m.gguf")
    question = json.dumps({"texts": TEXTS, "tokens": 20})
    command = [sys.executable, CLIENT, tmp_path / "m.gguf", "--unpack"]
    done = subprocess.run(command, input=question, capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout)
    model, tokenizer = fewbit.load(tmp_path / "q"), open_source(tmp_path / "q").tokenizer()
    assert theirs["ids"] == [tokenizer(text).input_ids for text in TEXTS]
    for prompt, tokens in zip(theirs["ids"], theirs["tokens"], strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(20):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        assert ids[0, len(prompt) :].tolist() == tokens
