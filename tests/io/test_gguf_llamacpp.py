"""Claim: llama.cpp's own reader loads our files and goes on as our dequantized model does, token by token.

llama.cpp unpacks the weights to float32 here, because with quantized weights it rounds the inputs of linears
to 8 bits, which is its arithmetic and not the file's (benchmarks/results/gguf_llamacpp.md has both).
"""

import pytest
from llamacpp import greedy, llama_cpp, needs_llama_cpp
from quantized import save_quantized
from tiny import tiny_ids

import fewbit
from fewbit.format import FORMATS
from fewbit.io.gguf_write import write
from fewbit.io.source import open_source
from fewbit.recipe import named

TEXTS = ("The capital of France is", "Once upon a time, there was")


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
