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
from quantized import save_quantized
from tiny import tiny_ids

import fewbit
from fewbit.format import FORMATS
from fewbit.io.gguf_write import write
from fewbit.io.source import open_source
from fewbit.recipe import named

CLIENT = Path(__file__).parents[2] / "benchmarks" / "llamacpp_client.py"
TEXTS = ("The capital of France is", "Once upon a time, there was")


needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="needs llama.cpp: pip install llama-cpp-python"
)


def llama_cpp(path, **question):
    command = [sys.executable, CLIENT, path, "--unpack"]
    done = subprocess.run(command, input=json.dumps(question), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def greedy(model, prompt, count):
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()


@needs_llama_cpp
@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_architecture_computes_the_same(arch, tmp_path):
    """Order of rows, biases, norms of heads, untied heads: random weights show each at the first token."""
    save_quantized(arch, tmp_path / "q", FORMATS["q4_1"])
    write(open_source(tmp_path / "q"), tmp_path / "m.gguf")
    prompts = tiny_ids(batch=4, length=5).tolist()
    theirs = llama_cpp(tmp_path / "m.gguf", ids=prompts, tokens=10)
    model = fewbit.load(tmp_path / "q")
    assert theirs["tokens"] == [greedy(model, prompt, 10) for prompt in prompts]


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_1"])
def test_twenty_greedy_tokens(name, tmp_path):
    fewbit.quantize("smollm2", named("rtn", {"format": name}), output=tmp_path / "q")
    write(open_source(tmp_path / "q"), tmp_path / "m.gguf")
    theirs = llama_cpp(tmp_path / "m.gguf", texts=TEXTS, tokens=20)
    model, tokenizer = fewbit.load(tmp_path / "q"), open_source(tmp_path / "q").tokenizer()
    assert theirs["ids"] == [tokenizer(text).input_ids for text in TEXTS]
    assert theirs["tokens"] == [greedy(model, prompt, 20) for prompt in theirs["ids"]]
